"""The arrays of a step, slot by slot by hand; the same samples however many shards, hosts or workers there are."""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from helpers.runs import make_tokenizer
from mice_jax.config import Data, Phase, Source
from mice_jax.data import loader, store
from mice_jax.data.bad_records import BadRecords
from mice_jax.data.chat import ChatEncoder
from mice_jax.data.dataset import build_dataset
from mice_jax.data.loader import StepSource, load_steps
from mice_jax.data.mixture import Corpus, Mixture, PhasePools, Pool, SampleSources
from mice_jax.data.packing import Shape, microbatch_shapes
from mice_jax.data.tokenise import SCHEMA, TokenisedBlock

pytestmark = pytest.mark.smoke

Sample = tuple[list[int], list[int]]  # tokens, trained


class ListStore:
    """What a corpus reads, from lists."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._samples = samples
        self.lengths = np.array([len(t) for t, _ in samples], np.int32)
        self.num_trained = np.array([sum(m[1:]) for _, m in samples], np.int32)

    def __len__(self) -> int:
        return len(self._samples)

    def num_trained_within(self, most: int) -> np.ndarray:
        return np.array([sum(m[1:most]) for _, m in self._samples], np.int32)

    def sample(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        tokens, trained = self._samples[i]
        return np.array(tokens, np.int32), np.array(trained, np.uint8)


def make_source(
    samples: Sequence[Sample],
    *,
    batch_size: int = 100,
    shapes: tuple[Shape, ...] = (Shape(1, 8),),
    num_shards: int = 1,
    shards: tuple[int, ...] | None = None,
    loss_reduction: str = "token",
    num_epochs: float = 1.0,
    sources: SampleSources | None = None,
) -> StepSource:
    corpus: Any = Corpus([ListStore(samples)], max_length=shapes[0].slots)  # type: ignore[list-item]
    mixture = Mixture([PhasePools("a", num_epochs, (Pool(corpus.ids(0)),))], batch_size=batch_size, seed=0)
    here = tuple(range(num_shards)) if shards is None else shards
    return StepSource(corpus, mixture, shapes, num_shards, here, loss_reduction, 0, sources=sources)


def random_samples(count: int, longest: int = 200) -> list[Sample]:
    rng = np.random.default_rng(0)
    samples = []
    for _ in range(count):
        n = int(rng.integers(2, longest))
        trained = rng.integers(0, 2, n)
        trained[-1] = 1
        samples.append((rng.integers(1, 1000, n).tolist(), trained.tolist()))
    return samples


def found(step: dict[str, Any]) -> list[tuple]:
    """Every sample of a step as its slots hold it, wherever in the step; sorted."""
    names = ("tokens", "targets", "positions", "loss_weights")
    samples = []
    for m in step["microbatches"]:
        for row in range(len(m["tokens"])):
            segments = m["segment_ids"][row]
            for segment in range(1, segments.max(initial=0) + 1):
                at = segments == segment
                samples.append(tuple(tuple(m[name][row][at].tolist()) for name in names))
    return sorted(samples)


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two steps are equal, bit for bit."""
    arrays = ("microbatches", "lengths")
    counts = {k: v for k, v in a.items() if k not in arrays} == {k: v for k, v in b.items() if k not in arrays}
    counts &= a["lengths"].tolist() == b["lengths"].tolist()
    pairs = zip(a["microbatches"], b["microbatches"], strict=True)
    return counts and all(np.array_equal(x[k], y[k]) for x, y in pairs for k in x.keys() | y.keys())


# ---------------------------------------------------------------------------------------- by hand
# The longer sample is packed first. Of the shorter, the first token is trained, which nothing can predict.
LONG: Sample = ([11, 12, 13, 14], [0, 0, 1, 1])
SHORT: Sample = ([21, 22, 23], [1, 0, 1])
TWO_SOURCES = SampleSources(("none", "long", "short"), np.array([2, 1], np.int32))


def test_two_samples_in_a_row_slot_by_slot() -> None:
    step = make_source([SHORT, LONG], sources=TWO_SOURCES)[0]
    (arrays,) = step["microbatches"]
    assert {k: v.tolist() for k, v in arrays.items()} == {
        "tokens": [[11, 12, 13, 14, 21, 22, 23, 0]],
        "targets": [[12, 13, 14, 0, 22, 23, 0, 0]],
        "segment_ids": [[1, 1, 1, 1, 2, 2, 2, 0]],
        "positions": [[0, 1, 2, 3, 0, 1, 2, 0]],
        "sources": [[1, 1, 1, 1, 2, 2, 2, 0]],
        "loss_weights": [[0, 1, 1, 0, 0, 1, 0, 0]],
    }
    kinds = {k: v.dtype for k, v in arrays.items()}
    assert kinds.pop("loss_weights") == np.float32 and set(kinds.values()) == {np.dtype(np.int32)}


def test_counts_of_a_step_by_hand() -> None:
    step = make_source([SHORT, LONG], num_shards=2, sources=TWO_SOURCES)[0]
    counts = {k: v for k, v in step.items() if k not in ("microbatches", "lengths")}
    assert step["lengths"].tolist() == [4, 3]
    assert counts == {
        "phase": 0,
        "epoch": 0,
        "samples": 2,
        "tokens": 7,
        "loss_tokens": 3,  # 13, 14 and 23; 21 is the first of its sample
        "loss_tokens_by_source": {"none": 0, "long": 2, "short": 1},
        "slots": 16,
    }


def test_by_sample_each_sample_weighs_one() -> None:
    arrays = make_source([SHORT, LONG], loss_reduction="sample")[0]["microbatches"][0]
    assert arrays["loss_weights"].tolist() == [[0, 0.5, 0.5, 0, 0, 1, 0, 0]]
    samples = random_samples(50)
    for step in (make_source(samples, shapes=microbatch_shapes(256, 2), loss_reduction="sample")[0],):
        total = sum(float(m["loss_weights"].sum()) for m in step["microbatches"])
        assert total == pytest.approx(50, rel=1e-6)  # float32 shares
        assert step["loss_tokens"] > 1000  # by token it would be this


def test_sample_is_cut_at_the_rows_length() -> None:
    source = make_source([([1, 2, 3, 4, 5], [0, 1, 1, 1, 1])], shapes=(Shape(1, 3),))
    step = source[0]
    assert step["microbatches"][0]["targets"].tolist() == [[2, 3, 0]]
    assert (step["tokens"], step["loss_tokens"], step["microbatches"][0]["loss_weights"].sum()) == (3, 2, 2)


def test_what_a_step_counts_is_what_its_slots_hold() -> None:
    source = make_source(random_samples(60), batch_size=16, shapes=microbatch_shapes(256, 2), num_shards=2)
    for i in range(len(source)):
        step = source[i]
        held = [m for m in step["microbatches"]]
        assert step["tokens"] == sum(int((m["segment_ids"] > 0).sum()) for m in held)
        assert step["loss_tokens"] == sum(int((m["loss_weights"] > 0).sum()) for m in held)
        assert step["slots"] == sum(m["tokens"].size for m in held)
        assert step["samples"] == len(found(step))
        for m in held:
            padding = m["segment_ids"] == 0
            assert not any(m[name][padding].any() for name in m)


# ---------------------------------------------------------------------------------------- shards and hosts
@pytest.mark.parametrize("num_shards", [2, 8])
def test_step_holds_the_same_samples_on_any_number_of_shards(num_shards: int) -> None:
    samples, shapes = random_samples(70), microbatch_shapes(256, 2)
    one = make_source(samples, batch_size=20, shapes=shapes, num_epochs=2)
    many = make_source(samples, batch_size=20, shapes=shapes, num_shards=num_shards, num_epochs=2)
    assert len(one) == len(many) == 8
    for i in range(len(one)):
        assert found(one[i]) == found(many[i])
        counts = ("phase", "epoch", "samples", "tokens", "loss_tokens")
        assert [one[i][k] for k in counts] == [many[i][k] for k in counts]
        assert one[i]["lengths"].tolist() == many[i]["lengths"].tolist()
    assert found(one[0]) != found(one[1])


def test_hosts_together_hold_what_one_host_would() -> None:
    samples, shapes = random_samples(70), microbatch_shapes(256, 2)
    alone = make_source(samples, batch_size=30, shapes=shapes, num_shards=4)
    hosts = [make_source(samples, batch_size=30, shapes=shapes, num_shards=4, shards=s) for s in ((0, 1), (2,), (3,))]
    for i in range(len(alone)):
        parts = [host[i] for host in hosts]
        assert [p["slots"] for p in parts] == [alone[i]["slots"]] * 3  # counts are of all hosts
        for number, m in enumerate(alone[i]["microbatches"]):
            for name, whole in m.items():
                joined = np.concatenate([p["microbatches"][number][name] for p in parts])
                assert np.array_equal(joined, whole)


# ---------------------------------------------------------------------------------------- onward
def test_loading_from_a_step_on_is_loading_all_and_skipping() -> None:
    source = make_source(random_samples(60), batch_size=8, shapes=microbatch_shapes(256, 1), num_epochs=2)
    every = list(load_steps(source, 0, 0))
    assert len(every) == len(source) == 16
    assert all(same(step, source[i]) for i, step in enumerate(every))
    for start in (1, 7, 15):
        rest = list(load_steps(source, start, 0))
        assert len(rest) == 16 - start
        assert all(same(a, b) for a, b in zip(rest, every[start:], strict=True))
    assert not same(every[0], every[1])  # the comparison can fail
    assert list(load_steps(source, 16, 0)) == []


@pytest.mark.slow
def test_worker_processes_change_nothing() -> None:
    source = make_source(random_samples(40), batch_size=8, shapes=microbatch_shapes(256, 1), num_epochs=4)
    # A run plans its steps to know their shapes; then these plans go to the workers too, and the others make theirs.
    source.plan(3)
    here = list(load_steps(dataclasses.replace(source), 1, 0))
    there = list(load_steps(source, 1, 2))
    assert len(here) == len(there) == 19
    assert all(same(a, b) for a, b in zip(here, there, strict=True))


# ---------------------------------------------------------------------------------------- halves of a step
def test_single_microbatch_is_split_into_halves_slot_by_slot() -> None:
    """Every other step of three: each half is the whole microbatch, with a loss on its own samples alone."""
    source = dataclasses.replace(make_source([SHORT, LONG] * 3, batch_size=2, shapes=(Shape(1, 8),)), split_every=2)
    whole = make_source([SHORT, LONG] * 3, batch_size=2, shapes=(Shape(1, 8),))
    for i in (0, 2):
        (only,) = whole[i]["microbatches"]
        halves = source[i]["microbatches"]
        assert len(halves) == 2
        for name in ("tokens", "targets", "segment_ids", "positions"):
            assert all(half[name].tolist() == only[name].tolist() for half in halves)
        first = only["segment_ids"] == 1  # one of the two samples has the slots of segment 1, the other those of 2
        parts = [(only["loss_weights"] * mask).tolist() for mask in (first, ~first)]
        assert sorted(half["loss_weights"].tolist() for half in halves) == sorted(parts)
        counts = {"slots": 16, "samples": 2, "loss_tokens": whole[i]["loss_tokens"], "tokens": whole[i]["tokens"]}
        assert {name: source[i][name] for name in counts} == counts and whole[i]["slots"] == 8
    assert same(source[1], whole[1])


def test_halves_of_a_step_are_equal_random_and_the_same_on_every_host() -> None:
    samples, shapes = random_samples(9, longest=28), (Shape(2, 256),)
    source = dataclasses.replace(make_source(samples, batch_size=9, shapes=shapes, num_shards=2), split_every=1)
    halves = [source._halves(i, 9) for i in range(200)]
    assert all((len(a), len(b)) == (4, 5) and a | b == set(range(9)) for a, b in halves)
    in_first = np.array([[sample in a for sample in range(9)] for a, _ in halves]).mean(axis=0)
    assert np.abs(in_first - 4 / 9).max() < 0.14  # four deviations of one share over 200 steps
    whole = source[0]["microbatches"]
    for shard in (0, 1):
        here = dataclasses.replace(source, shards=(shard,))[0]["microbatches"]
        for all_rows, own in zip(whole, here, strict=True):
            assert all(np.array_equal(own[name], all_rows[name][2 * shard : 2 * shard + 2]) for name in own)


def test_step_of_several_microbatches_or_of_one_sample_is_not_split() -> None:
    several = dataclasses.replace(make_source([LONG] * 3, batch_size=3, shapes=(Shape(1, 4),)), split_every=1)
    assert len(several[0]["microbatches"]) == 3 and several[0]["slots"] == 12
    one = dataclasses.replace(make_source([LONG], batch_size=1), split_every=1)
    assert len(one[0]["microbatches"]) == 1 and one[0]["slots"] == 8


# ---------------------------------------------------------------------------------------- fast enough
def waited(source: StepSource, tokens_per_s: float) -> float:
    """The share of a step's time for which a consumer of so many tokens a second waits for it: the median."""
    shares = []
    steps = load_steps(source, 0, 0)
    next(steps)
    began = time.perf_counter()
    for step in steps:
        wait = time.perf_counter() - began
        span = step["tokens"] / tokens_per_s
        time.sleep(span)
        shares.append(wait / (wait + span))
        began = time.perf_counter()
    return float(np.median(shares))


class Slow(StepSource):
    """As long in the making as a consumer of 200,000 tokens/s takes for a step, and a half more."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        step = super().__getitem__(index)
        time.sleep(1.5 * step["tokens"] / 200_000)
        return step


@pytest.mark.slow
def test_loader_keeps_up_with_200_000_tokens_per_second() -> None:
    """A median, since others on the machine may take the loader's thread its core now and then; a loader that is too
    slow is so at each step. `bench/data.py` has the sum, on a machine that is calm."""
    source = make_source(random_samples(2000, longest=1000), batch_size=128, shapes=microbatch_shapes(1024, 4))
    assert waited(source, 200_000) < 0.01
    fields = {f.name: getattr(source, f.name) for f in dataclasses.fields(source) if f.init}
    assert waited(Slow(**fields), 200_000) > 0.2  # the negative control


@pytest.mark.slow
def test_warm_store_of_a_million_samples_starts_within_ten_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of short ones: their lengths, hashes and places are read, and of the tokens those of the steps alone."""
    count, tokens = 1_000_000, 6
    path = tmp_path / "documents.jsonl"
    path.write_text('{"text": "mice"}\n' * count)
    encoder = ChatEncoder(make_tokenizer())

    def blocks(*_: Any, **__: Any) -> Iterator[tuple[float, TokenisedBlock]]:
        many = 500
        offsets = pa.array(np.arange(0, tokens * many + 1, tokens), pa.int32())
        kinds = (pa.int32(), pa.uint8())
        lists = [pa.ListArray.from_arrays(offsets, pa.array(np.ones(tokens * many), kind)) for kind in kinds]
        for start in range(0, count, many):
            numbers = np.arange(start + 1, start + 1 + many)
            rest = {"num_trained": np.full(many, tokens - 1), "content_hash": numbers, "number": numbers}
            columns = [pa.array(rest.get(f.name, np.zeros(many, int)), f.type) for f in list(SCHEMA)[2:]]
            batch = pa.record_batch(lists + columns, schema=SCHEMA).serialize().to_pybytes()
            yield start / count, TokenisedBlock(batch, many, tokens * many, BadRecords(), {})

    def first_step() -> dict[str, Any]:
        data = Data(phases=[Phase(sources=[Source(path=str(path), format="text")])], cache_dir=str(tmp_path / "stores"))
        made = build_dataset(data, encoder)
        mixture = Mixture(made.phases, batch_size=3840, seed=0)
        source = StepSource(made.corpus, mixture, microbatch_shapes(4096, 4), 8, tuple(range(8)), "token", 0)
        assert sum(len(source.plan(i)) for i in range(len(source))) >= 261  # all of them, as a run does
        return next(load_steps(source, 0, 0))

    monkeypatch.setattr(store, "tokenise", blocks)
    first_step()
    monkeypatch.setattr(store, "tokenise", None)  # from here on it is there, or fails
    began = time.process_time()  # all is in the page cache, so that a calm machine takes no longer than this
    step = first_step()
    assert time.process_time() - began < 10  # with the report and the digest of the source
    assert (step["samples"], step["tokens"]) == (3840, 3840 * tokens)


# ---------------------------------------------------------------------------------------- blocks of steps
@pytest.mark.parametrize("planned_together", [1, 30, 70, 10_000])
def test_steps_plan_is_the_same_from_wherever_a_run_begins(
    planned_together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "PLANNED_SAMPLES", planned_together)
    samples = random_samples(95)

    def fresh(num_epochs: float = 2.0) -> StepSource:
        return make_source(
            samples, batch_size=10, shapes=microbatch_shapes(256, 2), num_shards=2, num_epochs=num_epochs
        )

    inorder = fresh()
    plans = [inorder.plan(i) for i in range(len(inorder))]
    assert len(plans) == 20
    assert [sum(len(row) for m in plan for row in m.rows) for plan in plans] == ([10] * 9 + [5]) * 2
    assert all(fresh().plan(i) == plan for i, plan in enumerate(plans))
    backwards = fresh()
    assert [backwards.plan(i) for i in reversed(range(20))] == plans[::-1]
    assert len({tuple(tuple(row) for m in plan for row in m.rows) for plan in plans}) == 20
    # A run that ends in the midst of the second epoch packs what it has of it the same.
    shorter = fresh(1.5)
    assert [len(shorter), len(shorter.mixture.step(14).samples)] == [15, 8]
    assert [shorter.plan(i) for i in range(14)] == plans[:14]
