"""Makes chats from the documentation of Python, a tokenizer and the config of a small model, for bench/train_cpu.py.

    python bench/documentation_chats.py OUT

The text is the documentation of the Python that runs this file, read from the standard library
at run time; no text is kept in the repository. As in the paper there are three phases:
instructions (reformat and list), knowledge (what the documentation says) and skills (answers that
can be computed). Each becomes `OUT/<phase>.jsonl` and `OUT/<phase>.heldout.jsonl`; the tokenizer
and config.json go to `OUT/init`. The same Python, packages and seed give the same files.
"""

import importlib
import inspect
import json
import random
import re
import string
import sys
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, product, zip_longest
from pathlib import Path
from pydoc_data.topics import topics
from types import ModuleType

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

Pair = tuple[str, str]  # a prompt and its answer

# The phases' sizes in the paper, in thousands of samples; these keep their proportion.
PHASES = {"instructions": 308, "knowledge": 231, "skills": 286}
SAMPLES_PER_THOUSAND = 8
# How often a conversation has one, two and three turns. Skills have many because they are short.
TURNS = {"instructions": (86, 10, 4), "knowledge": (86, 10, 4), "skills": (30, 30, 40)}
HELDOUT = 0.05
MAX_CHARS = 1900  # of a conversation's answers: about 850 tokens of its tokenizer
MAX_POSITIONS = 1024

SYSTEM_PROMPTS = {
    "instructions": ("Follow the instruction exactly.", "You are a careful editor of lists."),
    "knowledge": ("You are an expert on Python.", "Answer from Python's documentation."),
    "skills": ("Answer with the result only.", "You are a calculator."),
}

# Left out by how their names begin: they print, open windows, touch the terminal, or are other
# modules' insides under a second name.
SKIPPED = ("_", "antigravity", "distutils", "genericpath", "idlelib", "lib2to3", "nt", "posix")
SKIPPED += ("pydoc_data", "readline", "rlcompleter", "sre_", "test", "this", "tkinter", "turtle")

# Worth asking about too, though only their packages are in Python's own list.
SUBMODULES = ("collections.abc", "concurrent.futures", "email.message", "http.client")
SUBMODULES += ("importlib.metadata", "json.decoder", "logging.handlers", "multiprocessing.pool")
SUBMODULES += ("os.path", "unittest.mock", "urllib.parse", "urllib.request", "xml.dom.minidom")


# ---------------------------------------------------------------- reading the documentation


@dataclass(frozen=True)
class Entry:
    """One documented thing of the standard library, or a topic of the language reference."""

    name: str  # dotted, from the module on
    kind: str  # module | class | function | method | topic
    module: str  # that defines it; "" for a topic
    doc: str
    signature: str = ""  # "(a, b=1)"; "" where Python cannot tell


def read_documentation() -> list[Entry]:
    """All entries of this Python, in an order that depends on nothing but their names."""
    # A topic's first paragraph is its underlined heading.
    texts = {key.replace("-", " "): text.partition("\n\n")[2] for key, text in topics.items()}
    entries = [Entry(key, "topic", "", text.strip()) for key, text in sorted(texts.items())]
    names = sorted(n for n in sys.stdlib_module_names if not n.startswith(SKIPPED))
    seen: set[object] = set()  # many modules export what another one defines: the first has it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated modules and names are documented too
        # builtins first, so that its names are not taken for those of a module that re-exports them
        for name in dict.fromkeys(["builtins", *names, *SUBMODULES]):
            try:
                module = importlib.import_module(name)
            except Exception:  # another system's module, or one this build of Python lacks
                continue
            entries += module_entries(name, module, seen)
    return [entry for entry in entries if len(entry.doc) >= 30]


def module_entries(module: str, value: ModuleType, seen: set[object]) -> Iterator[Entry]:
    """The module itself, its public functions and classes, and the classes' own methods."""
    yield entry(module, "module", module, value)
    exported = getattr(value, "__all__", None)
    for name in sorted(n for n in exported or vars(value) if not n.startswith("_")):
        item = getattr(value, name, None)
        if not (inspect.isclass(item) or inspect.isroutine(item)) or item in seen:
            continue
        if not exported and item.__module__ != value.__name__:
            continue
        seen.add(item)
        if not inspect.isclass(item):
            yield entry(f"{module}.{name}", "function", module, item)
            continue
        yield entry(f"{module}.{name}", "class", module, item)
        for method in sorted(vars(item)):
            if not method.startswith("_") and inspect.isroutine(getattr(item, method, None)):
                yield entry(f"{module}.{name}.{method}", "method", module, getattr(item, method))


def entry(name: str, kind: str, module: str, value: object) -> Entry:
    doc = value.__doc__ if isinstance(value.__doc__, str) else ""
    try:
        signature = str(inspect.signature(value))  # type: ignore[arg-type]
    except (ValueError, TypeError, NameError):
        signature = ""
    # "<" and "{" come from addresses and sets, which differ from one run to the next.
    signature = "" if "<" in signature or "{" in signature else signature
    return Entry(name, kind, module, inspect.cleandoc(doc).strip(), signature)


# ------------------------------------------------------------------------------- knowledge

WHAT = {
    "module": "What is the `{}` module for?",
    "class": "What is `{}`?",
    "function": "What does `{}` do?",
    "method": "What does `{}` do?",
}


def knowledge_pairs(entries: list[Entry], count: int, rng: random.Random) -> list[Pair]:
    """Questions about every module and topic, which are long, and a random choice of the rest.

    Those about one thing stay neighbours, so that a conversation of several turns stays with it.
    """
    last_names = Counter(last_name(e) for e in entries)
    pairs: dict[str, str] = {}
    shuffled = rng.sample(entries, len(entries))
    for e in sorted(shuffled, key=lambda e: e.kind not in ("module", "topic")):
        inside = (x for x in entries if x.module == e.name and x.kind in ("class", "function"))
        if e.kind == "module" and (names := comma(sorted(map(last_name, inside)))):
            pairs[f"List the functions and classes of the `{e.name}` module."] = clip(names)
        pairs.update(questions(e, unique=last_names[last_name(e)] == 1))
        if len(pairs) >= count:
            break
    return list(pairs.items())[:count]


def questions(entry: Entry, unique: bool) -> Iterator[Pair]:
    if entry.kind == "topic":
        yield f"What does Python's reference say about {entry.name}?", clip(entry.doc)
        return
    paragraphs = entry.doc.split("\n\n")
    # Many docstrings begin with "name(args) -> result", which says nothing of what it does.
    if told := [p for p in paragraphs if not re.match(r"[\w.]+\(", p)]:
        yield WHAT[entry.kind].format(entry.name), clip(" ".join(told[0].split()))
    if len(paragraphs) > 1:
        yield f"Show the documentation of `{entry.name}`.", clip(entry.doc)
    if entry.signature:
        yield f"What is the signature of `{entry.name}`?", clip(entry.name + entry.signature)
    if unique and entry.kind != "module":
        yield f"Which module defines `{last_name(entry)}`?", entry.module


def last_name(entry: Entry) -> str:
    return entry.name.rpartition(".")[2]


def clip(text: str) -> str:
    """What fits in MAX_CHARS, cut between paragraphs, else lines, else words."""
    if len(text) <= MAX_CHARS:
        return text
    head = text[:MAX_CHARS]
    return next(cut for mark in ("\n\n", "\n", " ") if (cut := head.rpartition(mark)[0].strip()))


# ---------------------------------------------------------------------------- instructions


def comma(words: Iterable[str]) -> str:
    return ", ".join(words)


def lines(words: Iterable[str], mark: str = "") -> str:
    return "\n".join(mark + word for word in words)


# How a task is asked for, its wordings, and its answer as a function of the list.
INSTRUCTIONS: list[tuple[tuple[str, ...], Callable[[list[str]], str]]] = [
    (("Write in upper case: {}", "Turn into capitals: {}"), lambda w: comma(w).upper()),
    (("Capitalise each item: {}",), lambda w: comma(x.capitalize() for x in w)),
    (("Sort alphabetically: {}", "Put in alphabetical order: {}"), lambda w: comma(sorted(w))),
    (("Reverse this list: {}", "Write this list backwards: {}"), lambda w: comma(w[::-1])),
    (("Number this list: {}",), lambda w: lines(f"{i}. {x}" for i, x in enumerate(w, 1))),
    (("Make a bullet list: {}", "Write as bullets: {}"), lambda w: lines(w, "- ")),
    (("Write one item per line: {}",), lambda w: lines(w)),
    (("Join with hyphens: {}",), lambda w: "-".join(w)),
    (("Join with spaces: {}", "Remove the commas: {}"), lambda w: " ".join(w)),
    (("Write as a JSON list: {}",), lambda w: json.dumps(w)),
    (("Count the items: {}", "How many items are in this list? {}"), lambda w: str(len(w))),
    (("Give the first item: {}",), lambda w: w[0]),
    (("Give the last item: {}",), lambda w: w[-1]),
    (("Give every second item: {}",), lambda w: comma(w[1::2])),
    (("Copy this list: {}", "Repeat after me: {}"), comma),
    (("Join with commas:\n{lines}",), comma),
    (("Count the lines:\n{lines}",), lambda w: str(len(w))),
]


def instruction_pairs(entries: list[Entry], count: int, rng: random.Random) -> list[Pair]:
    """Small jobs on lists of words and identifiers that the documentation uses."""
    words = common_words(entries, 900)
    functions = sorted({last_name(e) for e in entries if e.kind == "function"})
    names = [name for name in functions if re.fullmatch(r"[a-z_]{3,14}", name)]
    pairs: dict[str, str] = {}
    while len(pairs) < count:
        wordings, answer = rng.choice(INSTRUCTIONS)
        items = rng.sample(words if rng.random() < 0.75 else names, rng.choice((2, 3, 4, 5, 7, 12)))
        pairs[rng.choice(wordings).format(comma(items), lines=lines(items))] = answer(items)
    return list(pairs.items())


WORD = re.compile(r"(?<![\w'])[a-z]{3,9}(?![\w'])")


def common_words(entries: list[Entry], count: int) -> list[str]:
    found = Counter(chain.from_iterable(WORD.findall(e.doc) for e in entries))
    return sorted(word for word, _ in found.most_common(count))


# ---------------------------------------------------------------------------------- skills


def skill_pairs(entries: list[Entry], count: int, rng: random.Random) -> list[Pair]:
    """An even draw from each skill's whole space, until the small ones are used up."""
    spaces = [rng.sample(space, len(space)) for space in skill_spaces(entries)]
    in_turn = [pair for row in zip_longest(*spaces) for pair in row if pair is not None]
    return rng.sample(in_turn[:count], count)


def skill_spaces(entries: list[Entry]) -> list[list[Pair]]:
    """Every fact of each skill once, so that no held-out fact is trained under other words."""
    digits = range(10)
    sums = list(product(range(50), digits))
    triples = [t for t in product(digits, repeat=3) if len(set(t)) == 3]
    steps = [(start, step) for start in range(40) for step in range(1, 6)]
    repeats = list(product(string.ascii_lowercase, range(1, 10)))
    unequal = [(a, b) for a, b in product(range(30), repeat=2) if a != b]
    # Letters stand apart because a tokenizer hides those of a whole word.
    spelled = ["-".join(word) for word in common_words(entries, 500)]
    return [
        [(f"What is {a} + {b}?", f"{a + b}") for a, b in sums],
        [(f"What is {a} - {b}?", f"{a - b}") for a, b in sums if a >= b],
        [(f"What is {a} * {b}?", f"{a * b}") for a, b in product(digits, digits)],
        [(f"Is {a} greater than {b}?", "yes" if a > b else "no") for a, b in unequal],
        [(f"Is {a} odd or even?", "odd" if a % 2 else "even") for a in range(400)],
        [(f"What is the largest of {comma(map(str, t))}?", f"{max(t)}") for t in triples],
        [(f"What is the smallest of {comma(map(str, t))}?", f"{min(t)}") for t in triples],
        [(f"What comes next: {a}, {a + s}, {a + 2 * s}?", f"{a + 3 * s}") for a, s in steps],
        [(f"What is the last digit of {a}?", f"{a % 10}") for a in range(10, 1000)],
        [(f"Write the letter {x} {n} times.", " ".join(x * n)) for x, n in repeats],
        [(f"How many letters are in {w}?", f"{len(w) // 2 + 1}") for w in spelled],
        [(f"What is the first letter of {w}?", w[0]) for w in spelled],
        [(f"What is the last letter of {w}?", w[-1]) for w in spelled],
    ]


# ------------------------------------------------------------------------ writing the files


def make_data(out_dir: Path, seed: int = 0) -> dict[str, int]:
    """Writes both files of each phase to `out_dir`; returns the number of samples by file."""
    out_dir.mkdir(parents=True, exist_ok=True)
    entries = read_documentation()
    makers = dict(instructions=instruction_pairs, knowledge=knowledge_pairs, skills=skill_pairs)
    counts = {}
    for phase, thousands in PHASES.items():
        rng = random.Random(f"{seed}/{phase}")
        turns = sum(n * weight for n, weight in enumerate(TURNS[phase], 1)) / sum(TURNS[phase])
        pairs = makers[phase](entries, round(thousands * SAMPLES_PER_THOUSAND * turns), rng)
        heldout = set(rng.sample(range(len(pairs)), round(HELDOUT * len(pairs))))
        training = [pair for i, pair in enumerate(pairs) if i not in heldout]
        # A held-out sample is one plain question, so that exact match is simple to score.
        samples = {
            f"{phase}.jsonl": conversations(training, phase, rng),
            f"{phase}.heldout.jsonl": [chat([pairs[i]]) for i in sorted(heldout)],
        }
        for name, chats in samples.items():
            text = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in chats)
            (out_dir / name).write_text(text, encoding="utf-8")
            counts[name] = len(chats)
    return counts


def conversations(pairs: list[Pair], phase: str, rng: random.Random) -> list[dict]:
    """Each pair once, alone or as a turn of a longer conversation, some after a system message."""
    left, samples = deque(pairs), []
    while left:
        turns = [left.popleft()]
        wanted = rng.choices((1, 2, 3), weights=TURNS[phase])[0]
        room = MAX_CHARS - len(turns[0][1])
        while left and len(turns) < wanted and len(left[0][1]) <= room:
            turns.append(left.popleft())
            room -= len(turns[-1][1])
        system = rng.choice(SYSTEM_PROMPTS[phase]) if rng.random() < 0.15 else ""
        samples.append(chat(turns, system))
    rng.shuffle(samples)
    return samples


def chat(turns: list[Pair], system: str = "") -> dict:
    messages = [{"role": "system", "content": system}] if system else []
    for prompt, answer in turns:
        messages.append({"role": "user", "content": prompt})
        messages.append({"role": "assistant", "content": answer})
    return {"messages": messages}


# --------------------------------------------------------------------- tokenizer and model

START, END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def train_tokenizer(out_dir: Path, files: Iterable[Path], vocab_size: int = 2048) -> Path:
    """A byte-level BPE of the files' messages, saved with its template to `out_dir/init`."""
    tokenizer = Tokenizer(models.BPE())
    # A number is a row of digits, so that sums can be learned digit by digit.
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # so that any text round-trips
        show_progress=False,
    )
    tokenizer.train_from_iterator(contents(files), trainer)
    special = {"bos_token": START, "eos_token": END, "pad_token": PAD}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=MAX_POSITIONS, **special)
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(out_dir / "init")
    return out_dir / "init"


def contents(files: Iterable[Path]) -> Iterator[str]:
    for file in files:
        with file.open(encoding="utf-8") as samples:
            for line in samples:
                yield from (message["content"] for message in json.loads(line)["messages"])


def write_model_config(out_dir: Path, vocab_size: int) -> Path:
    """The config.json of a Llama of about a million weights, beside the tokenizer."""
    tokenizer = Tokenizer.from_file(str(out_dir / "init" / "tokenizer.json"))
    config: dict[str, object] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    config |= {"vocab_size": vocab_size, "max_position_embeddings": MAX_POSITIONS}
    config |= {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    config |= {"hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0}
    config |= {"attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True}
    config |= {"initializer_range": 0.02, "torch_dtype": "float32"}
    for name, token in (("bos", START), ("eos", END), ("pad", PAD)):
        config[f"{name}_token_id"] = tokenizer.token_to_id(token)
    path = out_dir / "init" / "config.json"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return path


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python bench/documentation_chats.py OUT")
    out_dir = Path(sys.argv[1])
    counts = make_data(out_dir)
    train_tokenizer(out_dir, [out_dir / f"{phase}.jsonl" for phase in PHASES])
    write_model_config(out_dir, vocab_size=2048)
    print(f"{'phase':<14}{'training':>9}{'held out':>9}")
    for phase in PHASES:
        held_out = counts[f"{phase}.heldout.jsonl"]
        print(f"{phase:<14}{counts[f'{phase}.jsonl']:>9,}{held_out:>9,}")
    print(f"tokenizer and config.json: {out_dir / 'init'}")


if __name__ == "__main__":
    main()
