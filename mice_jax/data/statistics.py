"""What a run's data is like: the numbers of data_report.json, what users regret later, and how both are shown.

All of it follows from the stores' columns (lengths, trained counts, hashes, flags), so a million samples take no
longer than a look at them.
"""

import operator
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from mice_jax.data.packing import slot_efficiency

if TYPE_CHECKING:  # it brings grain, which takes a while
    from mice_jax.data.loader import StepSource
    from mice_jax.data.mixture import Epoch

PERCENTILES = (0, 5, 25, 50, 75, 95, 100)
BARS = "▁▂▃▄▅▆▇█"
FEW_TRAINED = 0.01  # of the tokens
MANY_DROPPED = 0.01  # of the samples: from here on the share is said too
LONGEST = 3  # samples named in the report
STEPS_PACKED = 16  # of which the slot efficiency is taken

Entry = dict[str, Any]  # of one source


# ---------------------------------------------------------------------------------------- numbers
def length_numbers(lengths: np.ndarray) -> Entry:
    """Percentiles, and a histogram of about a dozen classes whose bounds are of round ratios."""
    if not len(lengths):
        return {"length_percentiles": {}, "length_histogram": {}}
    values = np.percentile(lengths, PERCENTILES)
    bounds = _bounds(int(lengths.min()), int(lengths.max()))
    counts = np.bincount(np.searchsorted(bounds, lengths), minlength=len(bounds))
    return {
        "length_percentiles": {str(p): int(v) for p, v in zip(PERCENTILES, values, strict=True)},
        "length_histogram": {str(b): int(n) for b, n in zip(bounds, counts, strict=True)},  # up to b tokens
    }


def _bounds(shortest: int, longest: int) -> np.ndarray:
    """Powers of two, each halved once or twice where they are few; the last is no less than the longest."""
    low, high = int(np.log2(shortest)), int(np.ceil(np.log2(longest)))
    steps = 4 if high - low <= 3 else 2 if high - low <= 6 else 1
    exponents = np.arange(low * steps, high * steps + 1) / steps
    bounds = np.unique(np.round(2.0**exponents).astype(np.int64))
    return bounds[max(0, np.searchsorted(bounds, shortest) - 1) :]


def longest(lengths: np.ndarray, ids: np.ndarray, where: Callable[[int], str]) -> list[Entry]:
    """The longest of the samples `ids`, which have these lengths, and where they stand."""
    count = min(LONGEST, len(ids))
    top = np.argpartition(-lengths, count - 1)[:count] if count else np.zeros(0, int)
    top = top[np.lexsort((ids[top], -lengths[top]))]
    return [{"tokens": int(lengths[i]), "where": where(int(ids[i]))} for i in top]


def flag_numbers(flags: np.ndarray, ids: np.ndarray, where: Callable[[int], str], names: dict[str, int]) -> Entry:
    """How many of the samples show each sign of trouble, and the first that does; `names` gives each one's bit."""
    shown = {name: np.flatnonzero(flags & bit) for name, bit in names.items()}
    return {name: {"samples": len(at), "first": where(int(ids[at[0]]))} for name, at in shown.items() if len(at)}


def mean_length(report: Entry) -> float:
    """Tokens a sample, of all that are kept."""
    sources = report["sources"].values()
    return sum(s["tokens"] for s in sources) / sum(s["kept"] for s in sources)


def with_steps(report: Entry, source: "StepSource", total_steps: int) -> Entry:
    """The whole of data_report.json: with what each epoch of the run's `total_steps` draws of each source, exactly."""
    mixture = source.mixture
    phases: list[Entry] = [{"name": p.name, "samples_per_epoch": p.per_epoch, "epochs": []} for p in mixture.phases]
    epochs = mixture.epochs(total_steps)
    for e in epochs:
        names = [pool.name for pool in mixture.phases[e.phase].pools]
        drawn = dict(zip(names, e.by_pool, strict=True))
        phases[e.phase]["epochs"].append({"steps": e.steps, "samples": e.samples, "by_source": drawn})
    first = range(min(total_steps, STEPS_PACKED))
    tokens = sum(int(source.corpus.lengths[mixture.step(i).samples].sum()) for i in first)
    packed = [microbatch for i in first for microbatch in source.plan(i)]
    return report | {
        "phases": phases,
        "steps": total_steps,
        "samples_left_out_by_drop_remainder": mixture.samples_left_out,
        "packing_efficiency_of_first_steps": slot_efficiency(tokens, packed),
        "packing_efficiency_by_source": packing_by_source(source, epochs),  # of the first steps of each phase
        "packed_for": {"shards": source.num_shards, "rows_per_shard": source.shapes[0].rows},
    }


def packing_by_source(source: "StepSource", epochs: Sequence["Epoch"]) -> dict[str, float]:
    """Each source's tokens over the slots they take, in the first steps of each phase; `epochs` are all of the run.

    The padding of a row is shared by its samples as their tokens are; rows of padding alone are nobody's.
    """
    tokens: dict[str, int] = defaultdict(int)
    slots: dict[str, float] = defaultdict(float)
    corpus, mixture = source.corpus, source.mixture
    for number, phase in enumerate(mixture.phases):
        pool_of = np.zeros(len(corpus.lengths), np.int16)
        for i, pool in enumerate(phase.pools):
            pool_of[pool.ids] = i
        for step in _first_steps(epochs, number):
            samples = mixture.step(step).samples
            lengths, names = corpus.lengths[samples], [phase.pools[i].name for i in pool_of[samples]]
            for microbatch in source.plan(step):
                for row in filter(None, microbatch.rows):
                    whole = lengths[row].sum()
                    for i in row:
                        tokens[names[i]] += int(lengths[i])
                        slots[names[i]] += float(lengths[i] / whole * microbatch.shape.slots)
    return {name: tokens[name] / slots[name] for name in tokens}


def _first_steps(epochs: Sequence["Epoch"], phase: int) -> range:
    """A phase's first steps; its epochs follow each other."""
    before, own = (sum(e.steps for e in epochs if belongs(e.phase, phase)) for belongs in (operator.lt, operator.eq))
    return range(before, before + min(own, STEPS_PACKED))


# ---------------------------------------------------------------------------------------- likely mistakes in the data
FLAG_MESSAGES = {
    "special_in_content": "hold a special token's text inside a message, which is read as that token and can end or "
    "fake a turn; take it out, or mask it",
    "double_bos": "begin with the bos token twice; take it out of the text, or out of the chat template",
    "starts_with_assistant": "start with the assistant, which the model never sees when it is asked; put the user's "
    "message before it",
}


def data_warnings(report: Entry) -> list[str]:
    """One sentence for each likely mistake in the data, with the source, the numbers and the fix."""
    found: list[str] = []
    for kind in ("sources", "validation"):
        for name, entry in report[kind].items():
            name = name if kind == "sources" else f"{name}, held out"
            found += [f"{name}: {sentence}" for sentence in _warnings_of(entry)]
    if copies := report["duplicates_across_sources"]:
        found.append(
            f"{copies:,} samples are exact copies of some in another source, and weigh that much more: take them out "
            "of either"
        )
    overlap = report["validation_overlap"]
    if overlap:
        found.append(
            f"{overlap:,} of the samples that are trained on are held out too (in data.validation, or in a phase's "
            "own), which then measures memory: take them out of either"
        )
    return found


def _warnings_of(entry: Entry) -> list[str]:
    found = []
    if entry["tokens"] and entry["loss_tokens"] < FEW_TRAINED * entry["tokens"]:
        share = entry["loss_tokens"] / entry["tokens"]
        found.append(
            f"only {share:.2%} of its {entry['tokens']:,} tokens are trained on; look at it with --inspect, and at the "
            "roles, data.train_on and the chat template"
        )
    dropped = sum(entry["dropped"].values())
    if dropped:
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in entry["dropped"].items())
        share = f" ({dropped / entry['read']:.1%})" if dropped > MANY_DROPPED * entry["read"] else ""
        found.append(f"{dropped:,} of its {entry['read']:,} samples are dropped{share}: {reasons}")
    if entry["truncated"]:
        found.append(f"{entry['truncated']:,} samples are truncated at data.max_length, their ends not trained on")
    if entry["duplicates"]:
        found.append(
            f"{entry['duplicates']:,} samples are exact copies of others in it, and weigh that much more; remove them, "
            "or use Source.weight for what should weigh more"
        )
    for flag, numbers in entry["signs"].items():
        found.append(f"{numbers['samples']:,} samples (the first is {numbers['first']}) {FLAG_MESSAGES[flag]}")
    return found


# ---------------------------------------------------------------------------------------- to look at
def spark(histogram: dict[str, int]) -> str:
    """A histogram in one line: `23 ▂▅█▇▃▁ 4,096`."""
    if not histogram:
        return "-"
    most = max(histogram.values())
    bars = "".join(BARS[min(len(BARS) - 1, n * len(BARS) // most)] if n else " " for n in histogram.values())
    return f"{int(next(iter(histogram))):,} {bars} {int(next(reversed(histogram))):,}"


def summary_table(report: Entry) -> Table:
    """A row a source: what is read, kept, left out and why, and trained on."""
    table = _table(["source"], ["read", "kept", "left out", "truncated", "tokens", "trained", "median", "longest"])
    for name, s in _entries(report):
        dropped = ", ".join(f"{n:,} {reason}" for reason, n in (s["dropped"] | s["set_aside"]).items()) or "0"
        trained = f"{s['loss_tokens']:,} ({s['loss_tokens'] / max(1, s['tokens']):.0%})"
        lengths = [f"{s['length_percentiles'][p]:,}" if s["length_percentiles"] else "-" for p in ("50", "100")]
        counts = [f"{s[k]:,}" for k in ("truncated", "tokens")]
        table.add_row(name, f"{s['read']:,}", f"{s['kept']:,}", dropped, *counts, trained, *lengths)
    return table


def length_table(report: Entry) -> Table:
    """A row a source: how long its samples are, how many are copies, and how full the rows are that they lie in."""
    middle = [str(p) for p in PERCENTILES if 0 < p < 100]
    columns = ["shortest", *(f"{p} %" for p in middle), "longest", "duplicates", "packed"]
    table = _table(["source", "format", "tokens a sample"], columns)
    for name, s in _entries(report):
        lengths = [f"{v:,}" for v in s["length_percentiles"].values()] or ["-"] * (len(middle) + 2)
        packed = report["packing_efficiency_by_source"].get(name)
        counts = [f"{s['duplicates']:,}", f"{packed:.1%}" if packed else "-"]
        table.add_row(name, s["format"], spark(s["length_histogram"]), *lengths, *counts)
    return table


def longest_lines(report: Entry) -> list[str]:
    return [f"{name}: {e['tokens']:,} tokens at {e['where']}" for name, s in _entries(report) for e in s["longest"]]


def _entries(report: Entry) -> list[tuple[str, Entry]]:
    return [*report["sources"].items(), *((f"{n} (held out)", s) for n, s in report["validation"].items())]


def _table(left: Sequence[str], right: Sequence[str]) -> Table:
    table = Table(*left)
    for name in right:
        table.add_column(name, justify="right")
    return table
