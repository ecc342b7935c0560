"""What is said of the data: every number by hand, every warning with a case that calls for it and one that does not."""

import io
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from mice_jax.data import statistics as r
from mice_jax.data.mixture import Mixture, PhasePools, Pool
from mice_jax.data.packing import Microbatch, Shape


def where(i: int) -> str:
    return f"a.jsonl line {i + 1}"


def entry(**keys: Any) -> dict[str, Any]:
    """A source that gives no cause for regret."""
    good = {
        "path": "a.jsonl",
        "format": "messages",
        "read": 200,
        "kept": 200,
        "dropped": {},
        "set_aside": {},
        "truncated": 0,
        "tokens": 1000,
        "loss_tokens": 500,
        "duplicates": 0,
        "signs": {},
        "longest": [{"tokens": 9, "where": "a.jsonl line 7"}],
    }
    return good | r.length_numbers(np.array([3, 5, 9])) | keys


def report(source: dict[str, Any], **keys: Any) -> dict[str, Any]:
    nothing: dict[str, Any] = {"validation": {}, "duplicates_across_sources": 0, "validation_overlap": 0}
    return {"sources": {"a": source}, "packing_efficiency_by_source": {"a": 0.876}} | nothing | keys


# ---------------------------------------------------------------------------------------- numbers
def test_percentiles_and_histogram_by_hand() -> None:
    numbers = r.length_numbers(np.array([1, 2, 3, 4, 5, 8, 9, 700]))
    assert numbers["length_percentiles"] == {"0": 1, "5": 1, "25": 2, "50": 4, "75": 8, "95": 458, "100": 700}
    assert numbers["length_histogram"] == {
        "1": 1, "2": 1, "4": 2, "8": 2, "16": 1, "32": 0, "64": 0, "128": 0, "256": 0, "512": 0, "1024": 1,
    }  # fmt: skip


@pytest.mark.parametrize("lengths", [[7], [16, 4096], [1, 1, 1], [5, 6], [100, 101, 799], list(range(1, 5000, 7))])
def test_every_sample_is_in_one_class_of_the_histogram(lengths: list[int]) -> None:
    histogram = r.length_numbers(np.array(lengths))["length_histogram"]
    bounds = [int(b) for b in histogram]
    assert bounds == sorted(set(bounds)) and bounds[-1] >= max(lengths) and len(bounds) <= 16
    below = 0
    for bound, count in histogram.items():
        assert count == sum(below < n <= int(bound) for n in lengths)
        below = int(bound)
    assert sum(histogram.values()) == len(lengths)


def test_nothing_has_no_numbers() -> None:
    assert r.length_numbers(np.zeros(0, int)) == {"length_percentiles": {}, "length_histogram": {}}
    assert r.longest(np.zeros(0, int), np.zeros(0, int), where) == [] and r.spark({}) == "-"


def test_the_longest_samples_are_named_longest_first() -> None:
    lengths = np.array([5, 9, 2, 9, 7])
    found = r.longest(lengths, np.array([10, 11, 12, 13, 14]), where)
    assert [(e["tokens"], e["where"]) for e in found] == [
        (9, "a.jsonl line 12"), (9, "a.jsonl line 14"), (7, "a.jsonl line 15"),
    ]  # fmt: skip


def test_flags_are_counted_with_the_first_sample_that_shows_them() -> None:
    names = {"double_bos": 2, "special_in_content": 1, "starts_with_assistant": 4}
    found = r.flag_numbers(np.array([0, 1, 3, 0], np.uint8), np.array([4, 5, 6, 7]), where, names)
    assert found == {
        "double_bos": {"samples": 1, "first": "a.jsonl line 7"},
        "special_in_content": {"samples": 2, "first": "a.jsonl line 6"},
    }


# ---------------------------------------------------------------------------------------- warnings
def test_good_data_is_not_warned_of() -> None:
    assert r.data_warnings(report(entry(), validation={"b": entry()})) == []
    assert r.data_warnings(report(entry(tokens=1000, loss_tokens=10))) == []  # at the bound


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"loss_tokens": 9}, "only 0.90% of its 1,000 tokens are trained on"),
        (
            {"dropped": {"longer than max_length": 2, "bad line: not JSON": 1}},
            "3 of its 200 samples are dropped (1.5%): 2 longer than max_length, 1 bad line",
        ),
        (
            {"dropped": {"longer than max_length": 1}, "overlong": {"tokens": 1300, "where": "a.jsonl line 2"}},
            "1 of its 200 samples is dropped: 1 longer than max_length; the longest has 1,300 tokens (a.jsonl line 2). "
            "data.max_length is the limit",
        ),
        (
            {"truncated": 3, "overlong": {"tokens": 900, "where": "a.jsonl line 2"}},
            "what is cut off is not trained on; the longest has 900 tokens (a.jsonl line 2)",
        ),
        ({"dropped": {"no trained token": 2}}, "2 of its 200 samples are dropped: 2 no trained token"),
        ({"truncated": 3}, "3 samples are truncated"),
        ({"duplicates": 1}, "exact copies of other samples in it: 1,"),
        *(({"signs": {s: {"samples": 7, "first": "a.jsonl line 2"}}}, "7 samples (the first is a.jsonl line 2)")
          for s in r.FLAG_MESSAGES),
    ],
)  # fmt: skip
def test_what_users_regret_is_said_of_the_source(keys: dict[str, Any], words: str) -> None:
    (said,) = r.data_warnings(report(entry(**keys)))
    assert said.startswith("a: ") and words in said
    (said,) = r.data_warnings(report(entry(), validation={"b": entry(**keys)}))
    assert said.startswith("b, held out: ") and words in said


def test_held_out_samples_that_are_trained_on_are_said() -> None:
    (said,) = r.data_warnings(report(entry(), validation_overlap=12))
    assert said.startswith("12 of the samples that are trained on are held out too (in data.validation, or in a phase")


def test_copies_of_what_another_source_has_are_said() -> None:
    (said,) = r.data_warnings(report(entry(), duplicates_across_sources=1200))
    assert said.startswith("1,200 exact copies of samples in another source")


# ---------------------------------------------------------------------------------------- tables
def text(table: Any) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_histogram_fits_in_a_line() -> None:
    assert r.spark({"16": 1, "32": 0, "64": 80, "128": 40}) == "16 ▁ █▅ 128"


def test_tables_have_a_row_for_each_source() -> None:
    told = report(
        entry(dropped={"no trained token": 3}, set_aside={"beyond max_samples": 5}),
        validation={"b": entry(duplicates=4)},
    )
    shown = text(r.summary_table(told))
    assert "3 no trained token, 5 beyond max_samples" in shown and "b (held out)" in shown and "500 (50%)" in shown
    shown = text(r.length_table(told))
    assert "messages" in shown and "█" in shown and "87.6%" in shown
    assert r.longest_lines(told) == ["a: 9 tokens at a.jsonl line 7", "b (held out): 9 tokens at a.jsonl line 7"]


def test_a_source_of_which_nothing_is_left_has_a_row_too() -> None:
    nothing = entry(kept=0, tokens=0, loss_tokens=0, longest=[]) | r.length_numbers(np.zeros(0, int))
    assert "│ a " in text(r.summary_table(report(nothing))) and "│ a " in text(r.length_table(report(nothing)))


def test_the_slots_of_a_row_are_shared_by_its_samples_as_their_tokens_are() -> None:
    lengths = np.array([30, 30, 50, 10, 80])
    phases = [
        PhasePools("first", 1.0, (Pool(np.array([0, 2]), name="a"), Pool(np.array([1]), name="b"))),
        PhasePools("second", 1.0, (Pool(np.array([3, 4]), name="c"),)),
    ]
    wide, narrow = Shape(2, 100), Shape(1, 100)
    plans = {  # by step, of the step's samples in the order they are drawn in
        (0, 1, 2): [Microbatch(wide, [[0, 1], [2], []])],  # 60 of 100 slots, 50 of 100, and a row of padding
        (3, 4): [Microbatch(narrow, [[1]]), Microbatch(narrow, [[0]])],
    }
    mixture = Mixture(phases, batch_size=3, seed=0)
    steps = {tuple(sorted(mixture.step(i).samples.tolist())): i for i in range(len(mixture))}

    def plan(i: int) -> list[Microbatch]:
        drawn = mixture.step(i).samples.tolist()
        place = {s: drawn.index(s) for s in drawn}
        named = sorted(drawn)
        return [Microbatch(m.shape, [[place[named[j]] for j in row] for row in m.rows]) for m in plans[tuple(named)]]

    source: Any = SimpleNamespace(corpus=SimpleNamespace(lengths=lengths), mixture=mixture, plan=plan)
    assert sorted(steps) == [(0, 1, 2), (3, 4)]
    found = r.packing_by_source(source, mixture.epochs(len(mixture)))
    # a: 30 of 60 tokens of a row of 100 slots, and all 50 of another; b: the other 30; c: 80 and 10, of 100 slots each.
    assert found == pytest.approx({"a": 80 / 150, "b": 0.6, "c": 90 / 200})
    assert r.packing_by_source(source, mixture.epochs(1)) == pytest.approx({"a": 80 / 150, "b": 0.6}), (
        "only of steps that are taken"
    )
