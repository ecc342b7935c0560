"""Make what the demo trains on: chats of three phases, a tokenizer and the config of a small model.

    python demo/make_data.py OUT

Each phase becomes `OUT/<phase>.jsonl` and, for what is asked afterwards, `OUT/<phase>.heldout.jsonl`. The same Python
and seed give the same files.

- formats: lists of words to write in another form. Asked: lists that are not in the training data.
- facts: what the documentation of this Python, read when this file runs, says about some functions and classes. Each
  fact is trained in five wordings. Asked: each fact in a sixth wording, which is trained for other facts only.
- skills: small tasks whose answers are computed. Asked: tasks that are not in the training data.
"""

import importlib
import inspect
import json
import random
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


class Pair(NamedTuple):
    """A question and its answer."""

    prompt: str
    answer: str


class Split(NamedTuple):
    """The pairs of a phase to train on, and those to ask afterwards."""

    trained: list[Pair]
    held_out: list[Pair]


# ---------------------------------------------------------------------------------------- formats
WORDS = ["apple", "bird", "cake", "dog", "egg", "fish", "gold", "hat", "ink", "jam", "king", "lamp"]
WORDS += ["moon", "nut", "oak", "pen", "queen", "red", "sun", "tree", "van", "wind", "yard", "zoo"]

# How a list is asked for, and its answer. All lists have three words: with lists of two to five words, the model had
# not learned to copy them after 600 steps; with three it does within 400.
FORMATS: dict[str, Callable[[list[str]], str]] = {
    "Make a bullet list: {}": lambda w: "\n".join(f"- {x}" for x in w),
    "Number this list: {}": lambda w: "\n".join(f"{i}. {x}" for i, x in enumerate(w, 1)),
    "Write one item per line: {}": lambda w: "\n".join(w),
    "Write as a JSON list: {}": json.dumps,
    "Join with hyphens: {}": lambda w: "-".join(w),
    "Write in upper case: {}": lambda w: ", ".join(w).upper(),
}


def format_pair(rng: random.Random) -> Pair:
    """A random list of three words, to be written in a random form."""
    wording, answer = rng.choice(list(FORMATS.items()))
    words = rng.sample(WORDS, 3)
    return Pair(wording.format(", ".join(words)), answer(words))


# ---------------------------------------------------------------------------------------- facts
MODULES = (
    "json", "os", "os.path", "math", "random", "shutil", "statistics", "textwrap", "functools", "collections", "glob",
    "bisect", "heapq", "copy", "tempfile", "datetime", "pathlib", "inspect", "csv", "time", "operator", "calendar",
    "contextlib", "string", "zipfile", "base64", "html", "keyword", "linecache", "getpass", "socket", "threading",
)  # fmt: skip
PER_MODULE = 5
NUM_ENTRIES = 80

# What is asked of a function or class: its summary, its module and its first argument, each in six wordings.
SUMMARY = (
    "What does `{path}` do?",
    "What is `{path}` for?",
    "Describe `{path}`.",
    "Explain `{path}` in one sentence.",
    "Give the summary of `{path}`.",
    "Tell me what `{path}` does.",
)
MODULE = (
    "Which module has `{name}`?",
    "In which module is `{name}`?",
    "From which module do I import `{name}`?",
    "Name the module of `{name}`.",
    "Where does Python define `{name}`?",
    "Which module do I need for `{name}`?",
)
ARGUMENT = (
    "What is the first argument of `{path}`?",
    "Which argument does `{path}` take first?",
    "Name the first argument of `{path}`.",
    "What do I pass to `{path}` first?",
    "How is the first argument of `{path}` called?",
    "`{path}` begins with which argument?",
)


class Entry(NamedTuple):
    """A function or class of the standard library."""

    module: str
    name: str
    summary: str  # the first sentence of its docstring
    first_argument: str  # "" where Python cannot tell


def read_documentation() -> list[Entry]:
    """Reads a few entries of each module, without names and summaries that are, or begin as, those of others."""
    entries: list[Entry] = []
    for module in MODULES:
        contents = importlib.import_module(module)
        names = sorted(getattr(contents, "__all__", None) or [n for n in vars(contents) if not n.startswith("_")])
        found: dict[str, Entry] = {}
        for name in names:
            entry = read_entry(module, name, getattr(contents, name, None))
            if entry and not any(entry.name == e.name or entry.summary == e.summary for e in entries):
                found.setdefault(" ".join(entry.summary.split()[:3]), entry)
        entries += list(found.values())[:PER_MODULE]
    return entries[:NUM_ENTRIES]


def read_entry(module: str, name: str, value: object) -> Entry | None:
    """Reads one entry; None for anything but a function or class with a short first sentence."""
    if not (inspect.isclass(value) or inspect.isroutine(value)) or getattr(value, "__name__", "") != name:
        return None
    own_docstring = value.__doc__ if isinstance(value.__doc__, str) else ""  # not that of a base class
    paragraph = inspect.cleandoc(own_docstring).partition("\n\n")[0]
    summary = re.split(r"(?<=\.)\s", " ".join(paragraph.split()))[0]
    # Some docstrings begin with a signature, which says nothing of what the function does.
    if not re.fullmatch(r"[A-Z][a-z]+ [\w ,'`-]{15,60}\.", summary):
        return None
    try:
        first_argument = next(iter(inspect.signature(value).parameters), "")  # type: ignore[arg-type]
    except (ValueError, TypeError):
        first_argument = ""
    return Entry(module, name, summary, first_argument)


def fact_pairs(entries: list[Entry], rng: random.Random) -> Split:
    """Every fact in five wordings to train on, and in a sixth to ask, which is random but for the first fact."""
    split = Split([], [])
    for e in entries:
        facts = {SUMMARY: e.summary, MODULE: e.module, ARGUMENT: e.first_argument}
        for wordings, answer in facts.items():
            if not answer:
                continue
            pairs = [Pair(w.format(path=f"{e.module}.{e.name}", name=e.name), answer) for w in wordings]
            split.held_out.append(pairs.pop(rng.randrange(len(pairs)) if split.held_out else 0))
            split.trained.extend(pairs)
    return split


# ---------------------------------------------------------------------------------------- skills
def skill_pair(rng: random.Random) -> Pair:
    """A random task."""
    digits, words = rng.sample(range(10), rng.randint(3, 5)), rng.sample(WORDS, 3)
    numbers, items = ", ".join(map(str, digits)), ", ".join(words)
    return rng.choice(
        (
            Pair(f"What is the smallest of {numbers}?", str(min(digits))),
            Pair(f"What is the largest of {numbers}?", str(max(digits))),
            Pair(f"How many digits are these: {numbers}?", str(len(digits))),
            Pair(f"Reverse this list: {items}", ", ".join(words[::-1])),
            Pair(f"Which word is first: {items}?", words[0]),
            Pair(f"Which word is last: {items}?", words[-1]),
        )
    )


# ---------------------------------------------------------------------------------------- files
PHASES = ("formats", "facts", "skills")
# The demo shows the answer to the first question of each phase. These two are never trained on.
FORMAT_SHOWN = Pair("Write as a JSON list: red, sun, moon", '["red", "sun", "moon"]')
SKILL_SHOWN = Pair("What is the smallest of 7, 2, 9?", "2")


def make_pairs(seed: int = 0) -> dict[str, Split]:
    """Makes the questions and answers of each phase."""
    rngs = {phase: random.Random(f"{seed}/{phase}") for phase in PHASES}
    return {
        "formats": computed_pairs(FORMAT_SHOWN, format_pair, 5000, 150, rngs["formats"]),
        "facts": fact_pairs(read_documentation(), rngs["facts"]),
        "skills": computed_pairs(SKILL_SHOWN, skill_pair, 7500, 300, rngs["skills"]),
    }


def computed_pairs(
    shown: Pair, make: Callable[[random.Random], Pair], num_trained: int, num_held_out: int, rng: random.Random
) -> Split:
    """Draws pairs with `make` until there are enough, all different; the held-out ones begin with `shown`."""
    drawn = {shown.prompt: shown}
    while len(drawn) < num_trained + num_held_out:
        pair = make(rng)
        drawn[pair.prompt] = pair
    pairs = list(drawn.values())
    return Split(pairs[num_held_out:], pairs[:num_held_out])


def chat(pair: Pair) -> dict:
    """A sample of the training data, in the format that `mice train` reads."""
    user, assistant = {"role": "user", "content": pair.prompt}, {"role": "assistant", "content": pair.answer}
    return {"messages": [user, assistant]}


def write_chats(file: Path, pairs: list[Pair]) -> None:
    file.write_text("".join(json.dumps(chat(p)) + "\n" for p in pairs), encoding="utf-8")


def make_data(out_dir: Path, seed: int = 0) -> dict[str, Split]:
    """Writes the files of each phase, the tokenizer and config.json to `out_dir`; returns the pairs by phase."""
    (out_dir / "init").mkdir(parents=True, exist_ok=True)
    phases = make_pairs(seed)
    for phase, split in phases.items():
        write_chats(out_dir / f"{phase}.jsonl", split.trained)
        write_chats(out_dir / f"{phase}.heldout.jsonl", split.held_out)
    tokenizer = train_tokenizer(text for split in phases.values() for pair in split.trained for text in pair)
    tokenizer.save_pretrained(out_dir / "init")
    (out_dir / "init" / "config.json").write_text(json.dumps(model_config(tokenizer), indent=2) + "\n")
    return phases


# ---------------------------------------------------------------------------------------- tokenizer and model
VOCAB_SIZE = 1536
MAX_POSITIONS = 256
USER, ASSISTANT, END, PAD = "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message.role + '|>' + message.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# A digit is a token of its own, a comma belongs to the space after it, and a word is the same token at the start of a
# line as in a list: so the model sees what the tasks are about.
TOKENS = r"\d|[^\w\s]+ ?| ?[^\W\d_]+|_|\s"


def train_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE, which can spell any text, with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(TOKENS), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, USER, ASSISTANT, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, model_max_length=MAX_POSITIONS
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def model_config(tokenizer: PreTrainedTokenizerFast) -> dict[str, object]:
    """The config.json of a Llama of about a million weights."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(tokenizer),
        "max_position_embeddings": MAX_POSITIONS,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "initializer_range": 0.06,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "torch_dtype": "float32",
    }


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python demo/make_data.py OUT")
    for phase, split in make_data(Path(sys.argv[1])).items():
        print(f"{phase:<10}{len(split.trained):>8,} to train on {len(split.held_out):>6,} to ask")


if __name__ == "__main__":
    main()
