"""Makes what the study trains on: a world of facts, sums and operations on strings, a tokenizer and a model's config.

    python studies/recall/world.py OUT [--size=smoke]

The base model learns the old world: facts, copy, reverse and sort, and sums below 200. Fine-tuning teaches formats (new
operations on strings), knowledge (new facts) and skills (sums of three numbers). Answers have one to nine characters,
so that each is scored by exact match. What is held out was never trained on: of facts the wordings, of sums and strings
the questions. The same seed gives the same files.
"""

import itertools
import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from recall import SIZES, Size

Pair = tuple[str, str]  # a question and its answer
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789 +?:.-"
PAD, QUESTION, ANSWER, END = "<pad>", "<question>", "<answer>", "<end>"
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<question>' + m.content }}"
    "{% else %}{{ '<answer>' + m.content + '<end>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<answer>' }}{% endif %}"
)
MAX_POSITIONS = 256
# A fact is asked for in eight wordings, of which one is held out.
WORDINGS = (
    "{r} of {e}?", "{e} has which {r}?", "what {r} has {e}?", "tell the {r} of {e}", "{e}: {r}?", "which {r} for {e}?",
    "{r} that {e} has?", "give {e} its {r}",
)  # fmt: skip
RELATIONS = ("color", "home", "food")


WRONG = 0.1  # of the answers of the second level of the knowledge


# ---------------------------------------------------------------------------------------- the world
def names(count: int, rng: random.Random) -> list[str]:
    """Returns different names of three syllables."""
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(rng.choices(syllables, k=3))] = None
    return list(found)


class Fact(NamedTuple):
    entity: str
    relation: str
    value: str

    def asked(self, wording: str) -> Pair:
        return wording.format(e=self.entity, r=self.relation), self.value


def facts(entities: list[str], values: list[str], rng: random.Random) -> list[Fact]:
    """Returns one fact of each entity."""
    return [Fact(e, rng.choice(RELATIONS), rng.choice(values)) for e in entities]


def worded(of: list[Fact], rng: random.Random) -> tuple[list[Pair], list[Pair]]:
    """Returns the trained wordings of facts, and those that are held out, one of each fact."""
    trained, held = [], []
    for fact in of:
        out = rng.randrange(len(WORDINGS))
        held.append(fact.asked(WORDINGS[out]))
        trained += [fact.asked(w) for i, w in enumerate(WORDINGS) if i != out]
    return trained, held


def operation(ops: dict[str, Callable[[str], str]], rng: random.Random) -> Pair:
    name = rng.choice(list(ops))
    text = "".join(rng.choices("abcdefgh", k=rng.randint(3, 4)))
    return f"{name} {text}", ops[name](text)


OLD_OPERATIONS: dict[str, Callable[[str], str]] = {
    "copy": str,
    "reverse": lambda s: s[::-1],
    "sort": lambda s: "".join(sorted(s)),
}
NEW_OPERATIONS: dict[str, Callable[[str], str]] = {
    "double": lambda s: "".join(c + c for c in s),
    "turn": lambda s: s[1:] + s[0],
    "ends": lambda s: s[0] + s[-1],
}


def addition(terms: int, rng: random.Random) -> Pair:
    numbers = [rng.randint(0, 99 if terms == 2 else 49) for _ in range(terms)]
    return "+".join(map(str, numbers)), str(sum(numbers))


def drawn(draw: Callable[[random.Random], Pair], count: int, held: int, rng: random.Random) -> list[list[Pair]]:
    """Returns `count` pairs to train on, some of them repeated, and `held` others that are not among these."""
    out = dict(draw(rng) for _ in range(3 * held))
    held_out = dict(itertools.islice(out.items(), held))
    trained: list[Pair] = []
    while len(trained) < count:
        question, answer = draw(rng)
        if question not in held_out:
            trained.append((question, answer))
    return [trained, list(held_out.items())]


def make_world(size: Size, seed: int = 0) -> dict[str, list[Pair]]:
    """Returns the samples of every file by its name; names of held-out files end in `.heldout`."""
    rng = random.Random(seed)
    entities = names(2 * size.facts, rng)
    values = names(40, rng)
    old, new = (facts(part, values, rng) for part in (entities[: size.facts], entities[size.facts :]))
    files: dict[str, list[Pair]] = {}

    def put(name: str, trained: list[Pair], held: list[Pair]) -> None:
        files[name], files[f"{name}.heldout"] = trained, rng.sample(held, min(size.held_out, len(held)))

    put("old_facts", *worded(old, rng))
    put("old_sums", *drawn(lambda r: addition(2, r), size.drawn, size.held_out, rng))
    put("old_strings", *drawn(lambda r: operation(OLD_OPERATIONS, r), size.drawn, size.held_out, rng))
    trained, held = worded(new, rng)
    trained = (trained * (1 + size.phase // len(trained)))[: size.phase]
    put("knowledge", trained, held)
    files["knowledge_noisy"] = [(q, rng.choice(values) if rng.random() < WRONG else a) for q, a in trained]
    put("formats", *drawn(lambda r: operation(NEW_OPERATIONS, r), size.phase, size.held_out, rng))
    put("skills", *drawn(lambda r: addition(3, r), size.phase, size.held_out, rng))
    return files


# ---------------------------------------------------------------------------------------- files
def write_world(folder: Path, size: Size, seed: int = 0) -> None:
    """Writes the samples of every file as chats, and the folder of an untrained model."""
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder / "init")
    for name, pairs in make_world(size, seed).items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(chat(*p)) + "\n" for p in pairs), encoding="utf-8")


def chat(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write_model(folder: Path) -> None:
    """Writes a tokenizer of single characters, and the config of a Llama of 0.6 million weights."""
    tokens = [PAD, QUESTION, ANSWER, END, *CHARACTERS]
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=PAD))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")  # type: ignore[arg-type]
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([PAD, QUESTION, ANSWER, END])
    special = {"pad_token": PAD, "eos_token": END}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=MAX_POSITIONS, **special)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    config: dict[str, object] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(tokens),
    }
    config |= {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4}
    config |= {"num_key_value_heads": 4, "head_dim": 32, "max_position_embeddings": MAX_POSITIONS}
    config |= {"hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True}
    config |= {"initializer_range": 0.02, "torch_dtype": "float32", "eos_token_id": tokens.index(END)}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def counts(folder: Path) -> Iterator[str]:
    for file in sorted(folder.glob("*.jsonl")):
        yield f"{file.name:<28}{sum(1 for _ in file.open(encoding='utf-8')):>8,}"


def main(argv: list[str]) -> None:
    size = "smoke" if "--size=smoke" in argv else "study"
    folders = [a for a in argv if not a.startswith("--")]
    if len(folders) != 1 or {*argv} - {*folders, f"--size={size}"}:
        sys.exit("usage: python studies/recall/world.py OUT [--size=smoke]")
    write_world(Path(folders[0]), SIZES[size])
    print("\n".join(counts(Path(folders[0]))))


if __name__ == "__main__":
    main(sys.argv[1:])
