"""Loads a tokenizer from a folder, maps each token of a text to its characters, and decodes ids.

Fast tokenizers (`tokenizer.json`, and most `tokenizer.model`, which transformers converts) return offsets. Slow ones,
which run in Python or in sentencepiece, return only ids. For these, a text is split at its added tokens as
transformers splits it, and each part is aligned with its tokens by sentencepiece's offsets or, if the tokens spell the
part byte by byte, by their lengths. It is an error if the tokens of the parts differ from those of the whole text.
"""

import copy
import hashlib
import itertools
import json
import sys
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jinja2
import numpy as np
import transformers
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizer, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from mice_jax.data import templates
from mice_jax.data.byte_level import bytes_of_tokens, spans_by_bytes, word_table
from mice_jax.data.template_names import check_template_name
from mice_jax.data.template_source import check_defaults, with_defaults
from mice_jax.errors import UserError, one_line, sentence
from mice_jax.storage import hub
from mice_jax.storage.model_names import check_tokenizer_name

Span = tuple[int, int]  # characters, the end excluded
IdsAndSpans = tuple[np.ndarray, np.ndarray]  # ids, int32 [n], and the spans of their tokens, int64 [n, 2]

MODEL = "tokenizer.model"
PROBE = "How to compete with elephants, in 3 steps"
# Arguments of a tokenizer that do not affect its ids: paths, and the chat template, which is hashed separately.
_NOT_IDS = ("name_or_path", "vocab_file", "tokenizer_file", "chat_template", "tokenizer_class", "backend")


# ---------------------------------------------------------------------------------------- loading
def load_tokenizer(
    path: str,
    chat_template: str = "",
    notes: list[str] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a folder or model of the Hub, and replaces its chat template if another is given.

    Args:
      path: the folder, or `owner/name` or `owner/name@revision`, of which only small files are fetched.
      chat_template: the name of one of `templates.TOKENS`, or a .jinja file; "" keeps the tokenizer's own.
      notes: a list to which a note for the user is appended if the template adds special tokens.
      template_kwargs: values of variables of the template, which become its defaults and so are saved with it.

    Returns:
      The tokenizer.

    Raises:
      UserError: if the folder or the template cannot be loaded, or the template does not read a variable.
    """
    check_tokenizer_name(path)
    folder = hub.fetch(path, weights=False).folder if hub.is_hub_id(path) else Path(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as e:  # the type of the error depends on the content of the files
        raise _unloadable(folder, _bad_model(folder, one_line(e))) from e
    # If the vocabulary file is missing, some classes silently make a vocabulary of only their special tokens.
    if tokenizer.get_vocab().keys() <= {*tokenizer.added_tokens_encoder, *tokenizer.all_special_tokens}:
        raise _unloadable(folder, f"{type(tokenizer).__name__} finds no vocabulary there except special tokens")
    _compare_conversion(folder, tokenizer)
    own: Any = tokenizer.chat_template
    if chat_template in templates.TOKENS:
        lacking = templates.give_template(tokenizer, chat_template)
        if lacking and notes is not None:
            notes.append(f"chat template {chat_template}: the tokenizer gets the special tokens {', '.join(lacking)}")
    elif chat_template:
        tokenizer.chat_template = _read_template(chat_template)
    if own and own != tokenizer.chat_template and notes is not None:
        notes.append(f"chat template {chat_template} replaces the model's own, which data.chat_template='' keeps")
    _change_template(tokenizer, lambda text: text.removeprefix("\ufeff"))  # a byte-order mark is not part of the text
    if template_kwargs:
        _give_defaults(tokenizer, template_kwargs)
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes a tokenizer so that transformers 4 can read it too.

    Version 5 names a class that version 4 does not have, and calls its additional special tokens by another name.
    It still reads the names of version 4.
    """
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _give_defaults(tokenizer: PreTrainedTokenizerBase, values: Mapping[str, Any]) -> None:
    template: Any = tokenizer.chat_template
    if not template:
        raise UserError(
            f"data.template_kwargs has {', '.join(map(repr, values))}, and the tokenizer {tokenizer.name_or_path!r} "
            f"has no chat template. Set data.chat_template to the name of a built-in one ({templates.NAMES}) or to a "
            ".jinja file."
        )
    sources = {"": template} if isinstance(template, str) else template
    try:
        check_defaults(sources, values, tokenizer.special_tokens_map)
    except jinja2.TemplateSyntaxError as e:
        raise UserError(sentence(f"the chat template of {tokenizer.name_or_path!r} does not parse: {e.message}")) from e
    _change_template(tokenizer, lambda text: with_defaults(text, values))


def _change_template(tokenizer: PreTrainedTokenizerBase, change: Callable[[str], str]) -> None:
    """Changes the text of the chat template, or of each where a tokenizer has several by name."""
    template: Any = tokenizer.chat_template
    if isinstance(template, str):
        tokenizer.chat_template = change(template)
    elif template:
        tokenizer.chat_template = {name: change(text) for name, text in template.items()}  # type: ignore[assignment]


def _unloadable(folder: Path, reason: str) -> UserError:
    files = ", ".join(sorted(p.name for p in folder.iterdir())) or "nothing"
    return UserError(
        f"no tokenizer can be loaded from {folder}, which holds {files}: {reason}. The folder needs a "
        f"tokenizer_config.json and a tokenizer.json, as `save_pretrained` writes it, or a sentencepiece {MODEL}. "
        "Restore them, or use another folder that has them; for a run, data.tokenizer can name it."
    )


def _bad_model(folder: Path, reason: str) -> str:
    """Returns why loading failed, since transformers blames tiktoken for any tokenizer.model that it cannot read."""
    file = folder / MODEL
    if not file.is_file() or (folder / "tokenizer.json").exists():
        return reason
    import sentencepiece  # imported here because it is slow and rarely needed

    content = file.read_bytes()
    if not content:
        return f"its {MODEL} is empty"
    try:
        sentencepiece.SentencePieceProcessor(model_proto=content)
    except (RuntimeError, ValueError):
        start = content[:24].decode("utf-8", "replace")
        pointer = ", a Git LFS pointer: fetch the file itself" if start.startswith("version https://git-lfs") else ""
        return f"its {MODEL} is not a sentencepiece model: {len(content)} bytes that start with {start!r}{pointer}"
    if "tiktoken" not in reason:
        return reason
    return (
        f"its {MODEL} is a sentencepiece model, but transformers {transformers.__version__} cannot convert it for the "
        "tokenizer_class in tokenizer_config.json; set that to the class that the model was published with, or to "
        "SentencePieceBackend, which runs sentencepiece itself"
    )


def _compare_conversion(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Warns if a tokenizer.model that transformers has converted gives other tokens than sentencepiece does.

    The conversion takes the kind of model, BPE or unigram, from the tokenizer's class, and not every class adds a space
    before a text. The converted ids are used anyway, because everyone who loads the folder with transformers gets them.
    """
    file = folder / MODEL
    if not tokenizer.is_fast or not file.is_file() or (folder / "tokenizer.json").exists():
        return
    import sentencepiece

    try:
        own = sentencepiece.SentencePieceProcessor(model_proto=file.read_bytes()).encode(PROBE, out_type=str)
    except (RuntimeError, ValueError):  # the file is not a sentencepiece model, but transformers could read it
        return
    converted = tokenizer.convert_ids_to_tokens(tokenizer.encode(PROBE, add_special_tokens=False))
    if converted != own:
        print(
            f"warning: transformers {transformers.__version__} converts {file} to a {type(tokenizer).__name__} that "
            f"gives other tokens than sentencepiece: {PROBE!r} becomes {converted}, not {own}. The ids of transformers "
            "are used. If the model was trained on the others, set data.tokenizer to a folder with the tokenizer.json "
            "that was published with it.",
            file=sys.stderr,
        )


def _read_template(path: str) -> str:
    check_template_name(path)
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as e:
        raise UserError(f"data.chat_template={path!r} cannot be read: {one_line(e)}.") from e
    try:
        render_jinja_template(conversations=[], chat_template=text)  # compiles the template without rendering it
    except jinja2.TemplateSyntaxError as e:
        problem = sentence(f"the chat template {path} line {e.lineno} does not parse: {e.message}")
        raise UserError(f"{problem} Correct it there, or name a built-in template.") from e
    return text


# ---------------------------------------------------------------------------------------- text
def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
    """Decodes ids with transformers or, if its tokenizer would write bytes as `<0xC3>`, with sentencepiece.

    Text that sentencepiece decodes loses one space at its start, as it does with fast tokenizers.

    Args:
      tokenizer: the tokenizer.
      ids: the ids to decode.
      skip_special_tokens: whether to leave special tokens out of the text.

    Returns:
      The text.
    """
    slow: Any = tokenizer
    sp = getattr(slow, "sp_model", None)
    if sp is None or slow.is_fast or slow.convert_tokens_to_string(["<0x41>"]) == "A":
        text = slow.decode(list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
        return str(text)
    added, special = slow.added_tokens_decoder, set(slow.all_special_ids)
    runs: list[str] = []
    for whole, run in itertools.groupby(ids, lambda i: i in added or i in special):
        if whole:  # a tokenizer marks special tokens in `all_special_ids` or in `added_tokens_decoder`
            shown = [i for i in run if not skip_special_tokens or not (i in special or added[i].special)]
            runs += slow.convert_ids_to_tokens(shown)
        else:  # the model's vocabulary may be padded with ids that the tokenizer does not have
            runs.append(sp.decode(slow.convert_ids_to_tokens([i for i in run if i < slow.vocab_size])))
    text = "".join(runs)
    return text if sp.decode(["▁"]) == "" else text.removeprefix(" ")


# ---------------------------------------------------------------------------------------- ids
class OffsetTokenizer(Protocol):
    """A tokenizer that also returns the span of each token; instances can be pickled for worker processes."""

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of documents, with the special tokens that the tokenizer puts around a document."""
        ...

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a rendered chat, to which no special tokens are added."""
        ...

    def encode_with_offsets(self, texts: Sequence[str]) -> list[IdsAndSpans]:
        """Returns the ids of rendered chats, and the span of characters of each token.

        A token to which no character belongs (a space that the tokenizer adds before a text, or any byte of a character
        but the last) has an empty span and counts with the character that follows.
        """
        ...

    def state(self) -> str:
        """Returns a string that differs if the ids may differ."""
        ...


def offset_tokenizer(tokenizer: PreTrainedTokenizerBase) -> OffsetTokenizer:
    """Wraps a tokenizer of transformers so that it returns offsets; raises UserError if its kind is not supported."""
    if tokenizer.is_fast:
        return _Fast(tokenizer)
    if isinstance(tokenizer, PreTrainedTokenizer):
        return _Slow(tokenizer)
    raise UserError(
        f"the tokenizer {tokenizer.name_or_path!r} is a {type(tokenizer).__name__}, which neither has a tokenizer.json "
        "nor runs in Python or in sentencepiece. Set data.tokenizer to a folder with a tokenizer.json."
    )


class _Fast:
    """A tokenizer of the tokenizers library, which returns offsets."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._documents = _backend(tokenizer)
        # A post-processor may trim offsets, and a token of only spaces would then have an empty span.
        self._chats = _backend(tokenizer)
        self._chats.post_processor = None  # type: ignore[assignment]
        probe = " a  b\n\n c "
        ids = [t.encode(probe, add_special_tokens=False).ids for t in (self._documents, self._chats)]
        assert ids[0] == ids[1]
        state = json.loads(self._chats.to_str())
        self._num_bytes = bytes_of_tokens(state)
        self._words = word_table(self._chats, state) if self._num_bytes is not None else None
        self._splits_special = bool(tokenizer.split_special_tokens)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Sets again what the JSON of a tokenizer, by which it is pickled, does not hold."""
        self.__dict__.update(state)
        for backend in (self._documents, self._chats):
            backend.encode_special_tokens = self._splits_special

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in self._documents.encode_batch(texts)]

    def encode(self, text: str) -> list[int]:
        return self._chats.encode(text, add_special_tokens=False).ids

    def encode_with_offsets(self, texts: Sequence[str]) -> list[IdsAndSpans]:
        num_bytes = self._num_bytes
        # Byte counts hold for NFC text only, because NFC is the one normalizer that byte-level tokenizers use.
        if num_bytes is None or not all(unicodedata.is_normalized("NFC", t) for t in texts):
            return [_arrays(e.ids, e.offsets) for e in self._chats.encode_batch(texts, add_special_tokens=False)]
        # Adding up byte counts is faster than the library's offsets, and the word table is faster than its encoding.
        ids = [self._words.ids(t) if self._words else None for t in texts]
        rest = [t for t, found in zip(texts, ids, strict=True) if found is None]
        encoded = iter(self._chats.encode_batch_fast(rest, add_special_tokens=False))
        ids = [np.array(next(encoded).ids, np.int32) if found is None else found for found in ids]
        return [(found, spans_by_bytes(t, num_bytes[found])) for t, found in zip(texts, ids, strict=True)]

    def state(self) -> str:
        return self._documents.to_str() + (" split_special_tokens" if self._splits_special else "")


def _arrays(ids: Sequence[int], spans: Sequence[Span]) -> IdsAndSpans:
    flat = np.fromiter(itertools.chain.from_iterable(spans), np.int64, 2 * len(spans))
    return np.array(ids, np.int32), flat.reshape(-1, 2)


def _backend(tokenizer: Any) -> Tokenizer:
    """Returns a copy of the backend, because calls of `tokenizer` change its truncation and padding."""
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    return backend


# ---------------------------------------------------------------------------------------- slow tokenizers
class _Unaligned(Exception):
    """The tokens of a text cannot be aligned with it; the message says why."""


class _Slow:
    """A tokenizer that runs in Python or in sentencepiece and returns only ids."""

    def __init__(self, tokenizer: PreTrainedTokenizer) -> None:
        self._tokenizer: Any = tokenizer  # only some classes have the attributes that are used below

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._tokenizer.encode(t, verbose=False) for t in texts]

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False, verbose=False)

    def encode_with_offsets(self, texts: Sequence[str]) -> list[IdsAndSpans]:
        return [_arrays(*self._encode_one(t)) for t in texts]

    def state(self) -> str:
        made_with = {k: str(v) for k, v in self._tokenizer.init_kwargs.items() if k not in _NOT_IDS}
        added = {i: repr(t) for i, t in self._tokenizer.added_tokens_decoder.items()}
        # A slow tokenizer is code of transformers, so it may behave differently in another version.
        parts = [type(self._tokenizer).__name__, transformers.__version__, made_with, added]
        if sp := self._sp_model:
            parts.append(hashlib.sha256(sp.serialized_model_proto()).hexdigest())
        return json.dumps([*parts, self._tokenizer.get_vocab()], sort_keys=True)

    @property
    def _sp_model(self) -> Any:
        return getattr(self._tokenizer, "sp_model", None)

    def _encode_one(self, text: str) -> tuple[list[int], list[Span]]:
        ids = self.encode(text)
        tokens: list[str] = []
        offsets: list[Span] = []
        try:
            for (start, end), is_added in self._parts(text):
                part = text[start:end]
                found, spans = ([part], [(0, len(part))]) if is_added else self._aligned(part)
                tokens += found
                offsets += [(start + s, start + e) for s, e in spans]
            if self._tokenizer.convert_tokens_to_ids(tokens) != ids:
                raise _Unaligned("its parts, encoded separately, give other ids than the whole text")
        except _Unaligned as e:
            raise UserError(
                f"the tokenizer {self._tokenizer.name_or_path!r} ({type(self._tokenizer).__name__}) is a slow one, and "
                f"its tokens cannot be aligned with the text of a chat, so the loss mask is unknown: {e}. Convert it "
                f"to a fast one with a tokenizer.json, and set data.tokenizer to that folder. The chat starts with "
                f"{text[:80]!r}."
            ) from None
        return ids, offsets

    def _parts(self, text: str) -> Iterator[tuple[Span, bool]]:
        """Yields spans of parts, split as by `PreTrainedTokenizer.tokenize`, and whether each is an added token."""
        if self._tokenizer.split_special_tokens:
            yield (0, len(text)), False
            return
        parts = self._tokenizer.tokens_trie.split(text)
        edges = [0, *itertools.accumulate(map(len, parts))]
        starts, ends = edges[:-1], edges[1:]
        added = {t.content: t for t in self._tokenizer.added_tokens_decoder.values()}
        for i, part in enumerate(parts):  # some added tokens absorb the spaces around them
            if part in added and added[part].rstrip and i + 1 < len(parts):
                starts[i + 1] += len(parts[i + 1]) - len(parts[i + 1].lstrip())
            if part in added and added[part].lstrip and i:
                ends[i - 1] -= len(parts[i - 1]) - len(parts[i - 1].rstrip())
        whole = {*added, *self._tokenizer.all_special_tokens}
        for start, end, part in zip(starts, ends, parts, strict=True):
            if start < end:
                yield (start, end), part in whole

    def _aligned(self, part: str) -> tuple[list[str], list[Span]]:
        """Returns the tokens of a text without added tokens, and their spans in it."""
        tokens = self._tokenizer._tokenize(part)
        spans = (self._by_sentencepiece if self._sp_model else _by_spelling)(part, tokens)
        if spans is None:
            raise _Unaligned(f"the tokens of {part[:40]!r} are {tokens[:12]}, which do not spell that text")
        return tokens, spans

    def _by_sentencepiece(self, part: str, tokens: list[str]) -> list[Span] | None:
        """Returns spans from sentencepiece's offsets, or None if sentencepiece does not give exactly these tokens.

        Some tokenizer classes preprocess the text first, and some put the unknown token before it to keep
        sentencepiece from changing spaces at its start, so each combination is tried.
        """
        prepare = getattr(self._tokenizer, "preprocess_text", None)
        readings = [_clusters(part, str), _clusters(part, prepare) if prepare else None]
        for reading, before in itertools.product(readings, ("", str(self._tokenizer.unk_token))):
            if reading is None:
                continue
            text, spans = reading
            given = self._sp_model.encode(before + text, return_type="offset_mapping")
            skipped = len(self._sp_model.encode(before)) if before else 0
            if given["pieces"][skipped:] == tokens:
                width = len(before)
                within = [(max(0, s - width), max(0, e - width)) for s, e in given["offsets"][skipped:]]
                return [(spans[s][0], spans[e - 1][1] if s < e else spans[s][0]) for s, e in within]
        return None


def _clusters(text: str, prepare: Callable[[str], str]) -> tuple[str, list[Span]] | None:
    """Returns the prepared text and the span of `text` that each of its characters comes from, or None if unknown.

    The text is split into clusters, the shortest parts that `prepare` treats independently. A cluster is mostly a
    single character; a letter and its combining accents are one cluster.
    """
    if prepare(text) == text:
        return text, [*((i, i + 1) for i in range(len(text))), (len(text), len(text))]
    clusters: list[str] = []
    for character in text:
        last = clusters[-1] if clusters else ""
        if last and prepare(last + character) != prepare(last) + prepare(character):
            clusters[-1] += character
        else:
            clusters.append(character)
    if "".join(map(prepare, clusters)) != prepare(text):
        return None
    spans: list[Span] = []
    end = 0
    for cluster in clusters:
        start, end = end, end + len(cluster)
        spans += [(start, end)] * len(prepare(cluster))
    return prepare(text), [*spans, (end, end)]


def _by_spelling(part: str, tokens: list[str]) -> list[Span] | None:
    """Returns spans if the tokens spell the text in characters, or in one character for each byte; else None."""
    content = part.encode("utf-8", "surrogatepass")
    letter = [i for i, c in enumerate(part) for _ in c.encode("utf-8", "surrogatepass")]  # the character of each byte
    for encoding in ("utf-8", "latin-1"):
        try:
            spelled = [t.encode(encoding) for t in tokens]
        except UnicodeEncodeError:
            continue
        if b"".join(spelled) == content and all(spelled):
            edges = [0, *itertools.accumulate(map(len, spelled))]
            return [(letter[s], letter[e - 1] + 1) for s, e in itertools.pairwise(edges)]
    return None
