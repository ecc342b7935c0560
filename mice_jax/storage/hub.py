"""Fetches models from the Hugging Face Hub into its own cache, and uploads exports.

A model is named as `owner/name` or `owner/name@revision`. Only files that are read are fetched: config, tokenizer, chat
template, safetensors and the README.md with the licence, never code and never a pickle. HF_HUB_OFFLINE is respected.
The only token that is used is that of $HF_TOKEN.
"""

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name

from mice_jax.errors import UserError, nearest_path, one_line

HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[^@\s]+))?")
SMALL_FILES = (
    "config.json", "adapter_config.json", "generation_config.json", "README.md",
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model*", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece*.model", "*.tiktoken", "tekken.json",
    "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja",
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
)  # fmt: skip
WEIGHTS = ("*.safetensors", "model.safetensors.index.json")
# Weights of other layouts in the same repository: those of Mistral's own code, and folders of other libraries.
NOT_READ = ("consolidated*.safetensors", "*/*.safetensors", "*/tokenizer*", "*/*.tiktoken")


class HubModel(NamedTuple):
    """A model of the Hub that is in the cache.

    Attributes:
      repo: Its name, `owner/name`.
      commit: The hash of the commit that its revision stood for when it was fetched.
      folder: The folder of its files.
    """

    repo: str
    commit: str
    folder: Path

    def record(self) -> dict[str, str]:
        """Returns what config.json records of the model."""
        return {"repo": self.repo, "commit": self.commit}


def is_hub_id(name: str) -> bool:
    """Returns whether a name is `owner/name` or `owner/name@revision`, and no path that exists here."""
    return HUB_ID.fullmatch(name) is not None and not os.path.lexists(name)


def check_cached(name: str) -> None:
    """Raises UserError where HF_HUB_OFFLINE is set and the cache has nothing of a model of the Hub."""
    found = HUB_ID.fullmatch(name)
    assert found is not None, name
    repo = found["repo"]
    if (
        constants.HF_HUB_OFFLINE
        and not (Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")).exists()
    ):
        raise UserError(_offline(name, repo, found["revision"]))


def fetch(name: str, commit: str = "", *, weights: bool = True) -> HubModel:
    """Fetches the files of a model that the cache lacks. Of several processes on a host, one fetches at a time.

    Args:
      name: A name for which `is_hub_id` is true.
      commit: The commit to fetch instead of the revision in `name`; "" takes that revision, or else the newest.
      weights: Whether the safetensors are needed.

    Returns:
      The model's commit and folder.

    Raises:
      UserError: The model cannot be fetched and is not in the cache, or it has no safetensors.
    """
    found = HUB_ID.fullmatch(name)
    assert found is not None, name
    repo, revision = found["repo"], commit or found["revision"]
    try:
        with _one_process_of_this_host(repo):
            folder = snapshot_download(
                repo,
                revision=revision,
                allow_patterns=[*SMALL_FILES, *(WEIGHTS if weights else ())],
                ignore_patterns=list(NOT_READ),
                token=os.environ.get("HF_TOKEN") or False,  # False: never a token that is stored on this machine
            )
    except Exception as e:  # besides the Hub's own errors, those of its HTTP library and of the disk
        raise UserError(_reason(name, repo, revision, e)) from e
    fetched = HubModel(repo, Path(folder).name, Path(folder))
    if weights and not any(fetched.folder.glob("*.safetensors")):
        if constants.HF_HUB_OFFLINE:
            raise UserError(_offline(name, repo, revision))
        raise UserError(
            f"{name} has no *.safetensors at commit {fetched.commit}. Only safetensors is read: look for a revision "
            f"or a copy of the model that has them, or convert it with `save_pretrained` and give the folder."
        )
    return fetched


def check_upload(name: str) -> None:
    """Checks what can be known before an upload to the repository `name`; asks nothing of the Hub.

    Raises:
      UserError: The name is not `owner/name`, HF_TOKEN is not set, or HF_HUB_OFFLINE is.
    """
    found = HUB_ID.fullmatch(name)
    if found is None or found["revision"]:
        raise UserError(f"--push_to={name} must be owner/name, the repository on the Hub to upload to.")
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"--push_to={name} uploads to the Hub, and HF_HUB_OFFLINE is set. Unset one of the two.")
    if not os.environ.get("HF_TOKEN"):
        raise UserError(f"--push_to={name} needs a token that may write to it, in the environment variable HF_TOKEN.")


def upload(folder: Path, name: str) -> str:
    """Uploads a folder as one commit; a repository that does not exist is created, and is private.

    Args:
      folder: The folder; all of its files are uploaded.
      name: The repository, `owner/name`.

    Returns:
      The address of the commit.

    Raises:
      UserError: The Hub refuses the upload or cannot be reached. The folder is left as it is.
    """
    api = HfApi(token=os.environ["HF_TOKEN"])
    try:
        api.create_repo(name, private=True, exist_ok=True)
        commit = api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload a model of mice_jax")
        return commit.commit_url
    except Exception as e:  # besides the Hub's own errors, those of its HTTP library and of its check of README.md
        raise UserError(
            f"{folder} is written, and could not be uploaded to {name}: {one_line(e)}. Check that the token in "
            f"HF_TOKEN may write to it, and upload it with `hf upload {name} {folder}`."
        ) from e


@contextlib.contextmanager
def _one_process_of_this_host(repo: str) -> Iterator[None]:
    """Holds a lock of the cache, which the system releases when the process ends."""
    folder = Path(constants.HF_HUB_CACHE).expanduser() / ".locks" / "mice_jax"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / f"{repo.replace('/', '--')}.lock").open("a")
    except OSError:  # A cache that cannot be written can still hold the model, and nothing is fetched into it.
        yield
        return
    with file:
        # On a file system without locks, the Hub's library has its own for each file.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _reason(name: str, repo: str, revision: str | None, error: Exception) -> str:
    """Returns the message for a model that could not be fetched."""
    at = f" at revision {revision}" if revision else ""
    token = "the token in HF_TOKEN is not allowed to read it" if os.environ.get("HF_TOKEN") else "HF_TOKEN is not set"
    if isinstance(error, GatedRepoError):
        return (
            f"{name} is gated on the Hub, and {token}. Ask for access on the model's page, and set HF_TOKEN to a token "
            "of the account that has it."
        )
    if isinstance(error, RepositoryNotFoundError | HFValidationError):
        return (
            f"{_no_path(name)} The Hub has no model of this name that can be read either. Check how it is spelt. A "
            f"private model needs a token that may read it: {token}."
        )
    if isinstance(error, RevisionNotFoundError):
        return (
            f"{repo} is on the Hub, but has no revision {revision!r}. Give a branch, a tag or a commit of it after @."
        )
    if isinstance(error, LocalEntryNotFoundError) and constants.HF_HUB_OFFLINE:
        return _offline(name, repo, revision)
    # The library's own error for a missing file says what its cause says, and gives advice.
    cause = (error.__cause__ or error) if isinstance(error, LocalEntryNotFoundError) else error
    return (
        f"{_no_path(name)} As a model of the Hub, {repo}{at} could not be fetched ({one_line(cause)}), and "
        f"{constants.HF_HUB_CACHE} does not have all of it. Check the network and the disk, and run the same command "
        "again, which keeps what was fetched. "
        f"Without a network, run {_download(repo, revision)}."
    )


def _offline(name: str, repo: str, revision: str | None) -> str:
    return (
        f"{_no_path(name)} The Hub's cache in {constants.HF_HUB_CACHE} does not have all files of a model of this "
        "name, and HF_HUB_OFFLINE is set, so nothing is downloaded. Unset HF_HUB_OFFLINE where there is a "
        f"network, or run {_download(repo, revision)}."
    )


def _no_path(name: str) -> str:
    """Returns the sentence that a name, which may be a mistyped path, is none here."""
    return f"{name} is no path on this machine{nearest_path(name, '.')}"


def _download(repo: str, revision: str | None) -> str:
    """Returns how to get a model onto this machine by hand, as the end of a sentence."""
    asked = f" --revision {revision}" if revision else ""
    folder = repo.partition("/")[2]
    return f"`hf download {repo}{asked} --local-dir models/{folder}` where there is one, and give that folder"
