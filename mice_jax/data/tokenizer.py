"""Loads a folder's tokenizer, says of a text's tokens where in the text they lie, and makes text of tokens.

Fast tokenizers (`tokenizer.json`, and most `tokenizer.model`, which transformers converts) know that by themselves.
The slow ones, which run in Python or in sentencepiece, give ids alone. Of those a text is cut at its added tokens as
transformers cuts it, and each piece is laid beside its tokens by sentencepiece's own account or, where the tokens
spell it byte by byte, by their lengths. Nothing is guessed: the tokens of all pieces must be those that the
tokenizer gives for the whole text, else it is refused.
"""

import copy
import hashlib
import itertools
import json
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
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
from mice_jax.errors import UserError, one_line

Span = tuple[int, int]  # characters, the end excluded
Located = tuple[np.ndarray, np.ndarray]  # ids, int32 [n], and their spans, int64 [n, 2]

MODEL = "tokenizer.model"
PROBE = "How to compete with elephants, in 3 steps"
# Of what a tokenizer is made with: where it lies, and what chats are rendered by, which has its own place.
_NOT_IDS = ("name_or_path", "vocab_file", "tokenizer_file", "chat_template", "tokenizer_class", "backend")


# ---------------------------------------------------------------------------------------- loading
def load_tokenizer(path: str, chat_template: str = "", said: list[str] | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder, with another chat template where one is given.

    Args:
      chat_template: the name of one of `templates.TOKENS`, or a .jinja file; "" leaves the tokenizer's own.
      said: gets a sentence about whatever that changes besides the template, for the user to read.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"the tokenizer {path!r} is not a folder; nothing is downloaded, give a local one.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as e:  # it raises of all kinds, as the files' own content decides
        raise _unloadable(folder, _bad_model(folder, one_line(e))) from e
    # Without a file, some classes make a vocabulary of their special tokens and say nothing.
    if tokenizer.get_vocab().keys() <= {*tokenizer.added_tokens_encoder, *tokenizer.all_special_tokens}:
        raise _unloadable(folder, f"{type(tokenizer).__name__} finds no vocabulary there but special tokens")
    _compare_conversion(folder, tokenizer)
    if chat_template in templates.TOKENS:
        lacking = templates.give_template(tokenizer, chat_template)
        if lacking and said is not None:
            said.append(f"chat template {chat_template}: the tokenizer gets the special tokens {', '.join(lacking)}")
    elif chat_template:
        tokenizer.chat_template = _read_template(chat_template)
    return tokenizer


def _unloadable(folder: Path, reason: str) -> UserError:
    have = ", ".join(sorted(p.name for p in folder.iterdir())) or "nothing"
    return UserError(
        f"no tokenizer can be loaded from {folder}, which holds {have}: {reason}. It needs a tokenizer.json, as "
        f"`save_pretrained` writes it, or a sentencepiece {MODEL}, besides its tokenizer_config.json; set "
        "data.tokenizer to a folder that has one."
    )


def _bad_model(folder: Path, reason: str) -> str:
    """Why transformers raises, better than it says: a tokenizer.model that it fails with it takes for a tiktoken's."""
    file = folder / MODEL
    if not file.is_file() or (folder / "tokenizer.json").exists():
        return reason
    import sentencepiece  # here alone, as it takes a while

    content = file.read_bytes()
    if not content:
        return f"its {MODEL} is empty"
    try:
        sentencepiece.SentencePieceProcessor(model_proto=content)
    except (RuntimeError, ValueError):
        start = content[:24].decode("utf-8", "replace")
        pointer = ", a Git LFS pointer: fetch the file itself" if start.startswith("version https://git-lfs") else ""
        return f"its {MODEL} is no sentencepiece model: {len(content)} bytes that start with {start!r}{pointer}"
    if "tiktoken" not in reason:
        return reason
    return (
        f"its {MODEL} is a sentencepiece model, but transformers {transformers.__version__} cannot convert it for the "
        "tokenizer_class of tokenizer_config.json; name the class that the model was published with there, or "
        "SentencePieceBackend, with which sentencepiece itself does the work"
    )


def _compare_conversion(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Says so where transformers converts a tokenizer.model to what gives other tokens than it does itself.

    It takes each for the kind that its class stands for, BPE or unigram, and not every class puts a space before a
    text. Its ids are used all the same: they are what others get who load the folder.
    """
    file = folder / MODEL
    if not tokenizer.is_fast or not file.is_file() or (folder / "tokenizer.json").exists():
        return
    import sentencepiece

    try:
        own = sentencepiece.SentencePieceProcessor(model_proto=file.read_bytes()).encode(PROBE, out_type=str)
    except (RuntimeError, ValueError):  # of another kind, which transformers could read
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
    if not Path(path).exists():
        raise UserError(
            f"data.chat_template={path!r} is neither the name of a built-in template ({templates.NAMES}) nor a file "
            "that is there."
        )
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as e:
        raise UserError(f"data.chat_template={path!r} cannot be read: {one_line(e)}.") from e
    try:
        render_jinja_template(conversations=[], chat_template=text)  # compiles, renders nothing
    except jinja2.TemplateSyntaxError as e:
        raise UserError(f"the chat template {path} line {e.lineno} does not parse: {e.message}.") from e
    return text


# ---------------------------------------------------------------------------------------- text
def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
    """The text of ids, as transformers has it or, where it would write out bytes as `<0xC3>`, as sentencepiece has it.

    The second leaves out one space at the start, as fast tokenizers do.
    """
    slow: Any = tokenizer
    sp = getattr(slow, "sp_model", None)
    if sp is None or slow.is_fast or slow.convert_tokens_to_string(["<0x41>"]) == "A":
        text = slow.decode(list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
        return str(text)
    added, special = slow.added_tokens_decoder, set(slow.all_special_ids)
    runs: list[str] = []
    for whole, run in itertools.groupby(ids, lambda i: i in added or i in special):
        if whole:  # marked as special in either of two places
            shown = [i for i in run if not skip_special_tokens or not (i in special or added[i].special)]
            runs += slow.convert_ids_to_tokens(shown)
        else:  # what a model has beyond the tokenizer's ids spells nothing
            runs.append(sp.decode(slow.convert_ids_to_tokens([i for i in run if i < slow.vocab_size])))
    text = "".join(runs)
    return text if sp.decode(["▁"]) == "" else text.removeprefix(" ")


# ---------------------------------------------------------------------------------------- ids
class Locator(Protocol):
    """Texts to ids, and where each id's token lies in the text; picklable, for worker processes."""

    def documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of whole documents, with the special tokens that the tokenizer puts around one."""
        ...

    def ids(self, text: str) -> list[int]:
        """Ids of a rendered chat: no special token is added to it."""
        ...

    def located(self, texts: Sequence[str]) -> list[Located]:
        """Ids of rendered chats, and the characters of each token.

        A token that has no character of its own (a space put before a text, all but the last byte of a character)
        is an empty span where it belongs: it goes with the character that follows.
        """
        ...

    def state(self) -> str:
        """Changes when ids may."""
        ...


def locator(tokenizer: PreTrainedTokenizerBase) -> Locator:
    if tokenizer.is_fast:
        return _Fast(tokenizer)
    if isinstance(tokenizer, PreTrainedTokenizer):
        return _Slow(tokenizer)
    raise UserError(
        f"the tokenizer {tokenizer.name_or_path!r} is a {type(tokenizer).__name__}, which neither has a tokenizer.json "
        "nor runs in Python or sentencepiece; set data.tokenizer to a folder with a tokenizer.json."
    )


class _Fast:
    """A tokenizer of the tokenizers library, which tells offsets."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._documents = _backend(tokenizer)
        # A post-processor may trim offsets: a token of spaces would then lie nowhere.
        self._chats = _backend(tokenizer)
        self._chats.post_processor = None  # type: ignore[assignment]
        probe = " a  b\n\n c "
        ids = [t.encode(probe, add_special_tokens=False).ids for t in (self._documents, self._chats)]
        assert ids[0] == ids[1]
        state = json.loads(self._chats.to_str())
        self._num_bytes = bytes_of_tokens(state)
        self._words = word_table(self._chats, state) if self._num_bytes is not None else None

    def documents(self, texts: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in self._documents.encode_batch(texts)]

    def ids(self, text: str) -> list[int]:
        return self._chats.encode(text, add_special_tokens=False).ids

    def located(self, texts: Sequence[str]) -> list[Located]:
        num_bytes = self._num_bytes
        # The one normalizer of byte-level tokenizers, which leaves most texts as they are.
        if num_bytes is None or not all(unicodedata.is_normalized("NFC", t) for t in texts):
            return [_arrays(e.ids, e.offsets) for e in self._chats.encode_batch(texts, add_special_tokens=False)]
        # To add up bytes is faster than to have the library keep offsets, and a table of words than to ask it.
        ids = [self._words.ids(t) if self._words else None for t in texts]
        rest = [t for t, found in zip(texts, ids, strict=True) if found is None]
        encoded = iter(self._chats.encode_batch_fast(rest, add_special_tokens=False))
        ids = [np.array(next(encoded).ids, np.int32) if found is None else found for found in ids]
        return [(found, spans_by_bytes(t, num_bytes[found])) for t, found in zip(texts, ids, strict=True)]

    def state(self) -> str:
        return self._documents.to_str()


def _arrays(ids: Sequence[int], spans: Sequence[Span]) -> Located:
    flat = np.fromiter(itertools.chain.from_iterable(spans), np.int64, 2 * len(spans))
    return np.array(ids, np.int32), flat.reshape(-1, 2)


def _backend(tokenizer: Any) -> Tokenizer:
    """A copy of our own: calls of `tokenizer` switch truncation and padding of theirs."""
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    return backend


# ---------------------------------------------------------------------------------------- slow ones
class _Unaligned(Exception):
    """Why the tokens of a text could not be laid beside it."""


class _Slow:
    """A tokenizer that runs in Python or in sentencepiece, and gives ids alone."""

    def __init__(self, tokenizer: PreTrainedTokenizer) -> None:
        self._tokenizer: Any = tokenizer  # much of what is asked here, only some classes have

    def documents(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._tokenizer.encode(t, verbose=False) for t in texts]

    def ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False, verbose=False)

    def located(self, texts: Sequence[str]) -> list[Located]:
        return [_arrays(*self._located(t)) for t in texts]

    def state(self) -> str:
        made_with = {k: str(v) for k, v in self._tokenizer.init_kwargs.items() if k not in _NOT_IDS}
        added = {i: repr(t) for i, t in self._tokenizer.added_tokens_decoder.items()}
        # How such a tokenizer works is written in its class, hence the version.
        parts = [type(self._tokenizer).__name__, transformers.__version__, made_with, added]
        if sp := self._sp_model:
            parts.append(hashlib.sha256(sp.serialized_model_proto()).hexdigest())
        return json.dumps([*parts, self._tokenizer.get_vocab()], sort_keys=True)

    @property
    def _sp_model(self) -> Any:
        return getattr(self._tokenizer, "sp_model", None)

    def _located(self, text: str) -> tuple[list[int], list[Span]]:
        ids = self.ids(text)
        tokens: list[str] = []
        offsets: list[Span] = []
        try:
            for (start, end), is_added in self._parts(text):
                part = text[start:end]
                found, spans = ([part], [(0, len(part))]) if is_added else self._aligned(part)
                tokens += found
                offsets += [(start + s, start + e) for s, e in spans]
            if self._tokenizer.convert_tokens_to_ids(tokens) != ids:
                raise _Unaligned("its parts, each for itself, give other ids than the whole")
        except _Unaligned as e:
            raise UserError(
                f"the tokenizer {self._tokenizer.name_or_path!r} ({type(self._tokenizer).__name__}) is a slow one, and "
                f"where its tokens lie in a chat, so which of them to train, cannot be told: {e}. Convert it to a fast "
                f"one with a tokenizer.json, and set data.tokenizer to that folder. The chat starts {text[:80]!r}."
            ) from None
        return ids, offsets

    def _parts(self, text: str) -> Iterator[tuple[Span, bool]]:
        """The text cut at added tokens, as `PreTrainedTokenizer.tokenize` does it; whether each is such a token."""
        if self._tokenizer.split_special_tokens:
            yield (0, len(text)), False
            return
        parts = self._tokenizer.tokens_trie.split(text)
        edges = [0, *itertools.accumulate(map(len, parts))]
        starts, ends = edges[:-1], edges[1:]
        added = {t.content: t for t in self._tokenizer.added_tokens_decoder.values()}
        for i, part in enumerate(parts):  # some take the spaces beside them
            if part in added and added[part].rstrip and i + 1 < len(parts):
                starts[i + 1] += len(parts[i + 1]) - len(parts[i + 1].lstrip())
            if part in added and added[part].lstrip and i:
                ends[i - 1] -= len(parts[i - 1]) - len(parts[i - 1].rstrip())
        whole = {*added, *self._tokenizer.all_special_tokens}
        for start, end, part in zip(starts, ends, parts, strict=True):
            if start < end:
                yield (start, end), part in whole

    def _aligned(self, part: str) -> tuple[list[str], list[Span]]:
        """Tokens of a text without added tokens, and their spans in it."""
        tokens = self._tokenizer._tokenize(part)
        spans = (self._by_sentencepiece if self._sp_model else _by_spelling)(part, tokens)
        if spans is None:
            raise _Unaligned(f"it reads {part[:40]!r} as {tokens[:12]}, which do not spell it")
        return tokens, spans

    def _by_sentencepiece(self, part: str, tokens: list[str]) -> list[Span] | None:
        """Spans by sentencepiece's own account, which holds where it gives these very tokens.

        A class may prepare the text first, and may put the unknown token before it, to keep sentencepiece from
        changing spaces at its start.
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
    """The text as prepared, and where each of its characters comes from; None where that cannot be told.

    What the prepared text is made of are clusters, the shortest parts that it treats each for itself: a letter with
    the accents that it joins to it, and else single characters.
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
    """Spans of tokens that are characters of the text, or one for each of its bytes; None where they are neither."""
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
