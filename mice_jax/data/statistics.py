"""Describes a run's data: the numbers of data_report.json, warnings of likely mistakes, and tables of both.

Everything is computed from the columns of the stores (lengths, trained counts, hashes, flags), which is fast even for
a million samples.
"""

import operator
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from mice_jax.data import sample_notes
from mice_jax.data.packing import slot_efficiency
from mice_jax.errors import format_count

if TYPE_CHECKING:  # importing the loader imports grain, which takes a while
    from mice_jax.data.loader import StepSource
    from mice_jax.data.mixture import Epoch

PERCENTILES = (0, 5, 25, 50, 75, 95, 100)
BARS = "▁▂▃▄▅▆▇█"
MIN_TRAINED_FRACTION = 0.01  # a smaller fraction of trained tokens gives a warning
MIN_DROPPED_FRACTION = 0.01  # above this fraction of dropped samples, the warning includes the percentage
NUM_LONGEST = 3  # longest samples that the report lists for each source
NUM_PACKED_STEPS = 16  # steps whose slot efficiency is measured

Entry = dict[str, Any]  # the numbers of one source


# ---------------------------------------------------------------------------------------- numbers
def length_numbers(lengths: np.ndarray) -> Entry:
    """Computes percentiles and a histogram of about a dozen bins.

    Args:
      lengths: int [n], tokens of each sample.

    Returns:
      `length_percentiles`, tokens by percentile, and `length_histogram`, samples by the upper bound of their bin.
    """
    if not len(lengths):
        return {"length_percentiles": {}, "length_histogram": {}}
    values = np.percentile(lengths, PERCENTILES)
    bounds = _bounds(int(lengths.min()), int(lengths.max()))
    counts = np.bincount(np.searchsorted(bounds, lengths), minlength=len(bounds))
    return {
        "length_percentiles": {str(p): int(v) for p, v in zip(PERCENTILES, values, strict=True)},
        "length_histogram": {str(b): int(n) for b, n in zip(bounds, counts, strict=True)},
    }


def _bounds(shortest: int, longest: int) -> np.ndarray:
    """Returns powers of two, with one or three bounds between them if they are few; the last is >= `longest`."""
    low, high = int(np.log2(shortest)), int(np.ceil(np.log2(longest)))
    steps = 4 if high - low <= 3 else 2 if high - low <= 6 else 1
    exponents = np.arange(low * steps, high * steps + 1) / steps
    bounds = np.unique(np.round(2.0**exponents).astype(np.int64))
    return bounds[max(0, np.searchsorted(bounds, shortest) - 1) :]


def longest(lengths: np.ndarray, ids: np.ndarray, where: Callable[[int], str]) -> list[Entry]:
    """Finds the longest samples.

    Args:
      lengths: int [n], in tokens.
      ids: int [n], the numbers of the samples.
      where: gives the file and line of a sample.

    Returns:
      For each, its tokens and its place.
    """
    count = min(NUM_LONGEST, len(ids))
    top = np.argpartition(-lengths, count - 1)[:count] if count else np.zeros(0, int)
    top = top[np.lexsort((ids[top], -lengths[top]))]
    return [{"tokens": int(lengths[i]), "where": where(int(ids[i]))} for i in top]


def flag_numbers(flags: np.ndarray, ids: np.ndarray, where: Callable[[int], str], names: dict[str, int]) -> Entry:
    """Counts flagged samples.

    Args:
      flags: uint8 [n], combinations of bits.
      ids: int [n], the numbers of the samples.
      where: gives the file and line of a sample.
      names: the bit of each flag's name.

    Returns:
      For each flag that occurs, the number of samples and the place of the first.
    """
    shown = {name: np.flatnonzero(flags & bit) for name, bit in names.items()}
    return {name: {"samples": len(at), "first": where(int(ids[at[0]]))} for name, at in shown.items() if len(at)}


def mean_length(report: Entry) -> float:
    """Returns the mean number of tokens of the samples that are kept."""
    sources = report["sources"].values()
    return sum(s["tokens"] for s in sources) / sum(s["kept"] for s in sources)


def with_steps(report: Entry, source: "StepSource", total_steps: int, warnings: Sequence[str] = ()) -> Entry:
    """Completes data_report.json with the samples that the steps draw from each source.

    Args:
      report: the part that does not depend on steps.
      source: the steps.
      total_steps: number of steps of the run.
      warnings: what the user was warned of.

    Returns:
      The complete report.
    """
    mixture = source.mixture
    phases: list[Entry] = [{"name": p.name, "samples_per_epoch": p.per_epoch, "epochs": []} for p in mixture.phases]
    epochs = mixture.epochs(total_steps)
    for e in epochs:
        names = [pool.name for pool in mixture.phases[e.phase].pools]
        drawn = dict(zip(names, e.by_pool, strict=True))
        phases[e.phase]["epochs"].append({"steps": e.steps, "samples": e.samples, "by_source": drawn})
    first = range(min(total_steps, NUM_PACKED_STEPS))
    tokens = sum(int(source.corpus.lengths[mixture.step(i).samples].sum()) for i in first)
    packed = [microbatch for i in first for microbatch in source.plan(i)]
    return report | {
        "phases": phases,
        "steps": total_steps,
        "samples_left_out_by_drop_remainder": mixture.samples_left_out,
        "packing_efficiency_of_first_steps": slot_efficiency(tokens, packed),
        "packing_efficiency_by_source": packing_by_source(source, epochs),
        "packed_for": {"shards": source.num_shards, "rows_per_shard": source.shapes[0].rows},
        "warnings": list(warnings),
    }


def packing_by_source(source: "StepSource", epochs: Sequence["Epoch"]) -> dict[str, float]:
    """Computes the slot efficiency of each source in the first steps of each phase.

    The padding of a row is divided among its samples in proportion to their tokens. Padding rows are not counted.

    Args:
      source: the steps.
      epochs: the epochs of the whole run.

    Returns:
      The ratio of tokens to slots by source.
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
    """Returns the first steps of a phase, whose epochs are consecutive."""
    before, own = (sum(e.steps for e in epochs if belongs(e.phase, phase)) for belongs in (operator.lt, operator.eq))
    return range(before, before + min(own, NUM_PACKED_STEPS))


# ---------------------------------------------------------------------------------------- likely mistakes in the data
FLAG_MESSAGES = {
    "special_in_content": "hold a special token's text in a message, a tool or a document, which is read as that token "
    "and can end or fake a turn; take it out, or mask it",
    "double_bos": "begin with the bos token twice; take it out of the text, or out of the chat template",
    "starts_with_assistant": "start with the assistant, which the model never sees when it is asked; put the user's "
    "message before it",
}


def data_warnings(report: Entry) -> list[str]:
    """Returns one sentence for each likely mistake in the data, with the source, the numbers and the fix."""
    found: list[str] = []
    for kind in ("sources", "validation"):
        for name, entry in report[kind].items():
            name = name if kind == "sources" else f"{name}, held out"
            found += [f"{name}: {sentence}" for sentence in _warnings_of(entry)]
    if copies := report["duplicates_across_sources"]:
        found.append(
            f"{copies:,} exact {'copy' if copies == 1 else 'copies'} of samples in another source, which weigh that "
            "much more: remove them from one of the two"
        )
    overlap = report["validation_overlap"]
    if overlap:
        found.append(
            f"{overlap:,} of the samples that are trained on are held out too (in data.validation, or in a phase's "
            "own), which then measures memorisation: remove them from one of the two"
        )
    return found


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _warnings_of(entry: Entry) -> list[str]:
    found = []
    if entry["tokens"] and entry["loss_tokens"] < MIN_TRAINED_FRACTION * entry["tokens"]:
        share = entry["loss_tokens"] / entry["tokens"]
        found.append(
            f"only {share:.2%} of its {entry['tokens']:,} tokens are trained on; look at it with --inspect, and at the "
            "roles, data.train_on and the chat template"
        )
    overlong = entry.get("overlong")
    longest = f"; the longest has {overlong['tokens']:,} tokens ({overlong['where']})" if overlong else ""
    dropped = sum(entry["dropped"].values())
    if dropped:
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in entry["dropped"].items())
        share = f" ({dropped / entry['read']:.1%})" if dropped > MIN_DROPPED_FRACTION * entry["read"] else ""
        found.append(
            f"{dropped:,} of its {format_count(entry['read'], 'sample')} {_are(dropped)} dropped{share}: {reasons}"
            + (f"{longest}. data.max_length is the limit" if longest and not entry["truncated"] else "")
        )
    if entry["truncated"]:
        found.append(
            f"{format_count(entry['truncated'], 'sample')} {_are(entry['truncated'])} truncated at data.max_length; "
            f"what is cut off is not trained on{longest}"
        )
    if entry["duplicates"]:
        found.append(
            f"exact copies of other samples in it: {entry['duplicates']:,}, by which those weigh more; remove them, or "
            "use Source.weight for what should weigh more"
        )
    for flag, numbers in entry["signs"].items():
        found.append(
            f"{format_count(numbers['samples'], 'sample')} (the first is {numbers['first']}) {FLAG_MESSAGES[flag]}"
        )
    return [*found, *sample_notes.sentences(entry.get("notes", {}))]


# ---------------------------------------------------------------------------------------- tables
def spark(histogram: dict[str, int]) -> str:
    """Draws a histogram in one line: `23 ▂▅█▇▃▁ 4,096`."""
    if not histogram:
        return "-"
    most = max(histogram.values())
    bars = "".join(BARS[min(len(BARS) - 1, n * len(BARS) // most)] if n else " " for n in histogram.values())
    return f"{int(next(iter(histogram))):,} {bars} {int(next(reversed(histogram))):,}"


def summary_table(report: Entry) -> Table:
    """Returns a table with one row for each source: samples read, kept and left out (and why), and tokens trained."""
    table = _table(["source"], ["read", "kept", "left out", "truncated", "tokens", "trained", "median", "longest"])
    for name, s in _entries(report):
        dropped = ", ".join(f"{n:,} {reason}" for reason, n in (s["dropped"] | s["set_aside"]).items()) or "0"
        trained = f"{s['loss_tokens']:,} ({s['loss_tokens'] / max(1, s['tokens']):.0%})"
        lengths = [f"{s['length_percentiles'][p]:,}" if s["length_percentiles"] else "-" for p in ("50", "100")]
        counts = [f"{s[k]:,}" for k in ("truncated", "tokens")]
        table.add_row(name, f"{s['read']:,}", f"{s['kept']:,}", dropped, *counts, trained, *lengths)
    return table


def length_table(report: Entry) -> Table:
    """Returns a table with one row for each source: its samples' lengths, duplicates and packing efficiency."""
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
    """Returns one line for each of the longest samples of each source."""
    return [f"{name}: {e['tokens']:,} tokens at {e['where']}" for name, s in _entries(report) for e in s["longest"]]


def _entries(report: Entry) -> list[tuple[str, Entry]]:
    return [*report["sources"].items(), *((f"{n} (held out)", s) for n, s in report["validation"].items())]


def _table(left: Sequence[str], right: Sequence[str]) -> Table:
    table = Table(*left)
    for name in right:
        table.add_column(name, justify="right")
    return table
