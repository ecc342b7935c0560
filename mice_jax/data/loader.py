"""From a step's number to the arrays of its microbatches; Grain runs it ahead of the training loop.

Element i of the source is step i, made from nothing but i: so a loader's state is one integer, and the number of
hosts, workers or rows a device changes nothing in what a step holds.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from mice_jax.data.mixture import Corpus, Mixture
from mice_jax.data.packing import Microbatch, Shape, pack_steps

PREFETCH_STEPS = 2
PLANNED_TOGETHER = 2**14  # samples, about: the plans of so many are made at once

# One microbatch of this host: tokens, targets, segment_ids, positions (int32) and loss_weights (float32), each
# [local rows, slots].
Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class StepSource:
    """Random access to the steps of a mixture, as the rows of this host's shards.

    `shards` are this host's numbers among the `num_shards` that split a microbatch's rows between them.
    """

    corpus: Corpus
    mixture: Mixture
    shapes: tuple[Shape, ...]
    num_shards: int
    shards: tuple[int, ...]
    loss_reduction: str
    seed: int
    split_every: int = 0  # of so many steps one that is a single microbatch is made two; 0 = none
    # The number of the first step and the plans of the block of steps that was planned last.
    _latest: list[tuple[int, Sequence[list[Microbatch]]]] = dataclasses.field(
        default_factory=lambda: [(0, [])], init=False, repr=False, compare=False
    )

    def __len__(self) -> int:
        return len(self.mixture)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Step number `index`: where it stands, its counts over all hosts, and this host's microbatches."""
        step = self.mixture.step(int(index))
        plan = self.plan(int(index))
        halves = self._halves(int(index), len(step.samples)) if len(plan) == 1 else [None]
        lengths = self.corpus.lengths[step.samples].astype(np.int64)
        return {
            "phase": step.phase,
            "epoch": step.epoch,
            "samples": len(step.samples),
            "tokens": int(lengths.sum()),
            "lengths": lengths,  # of the samples: attention's cost follows them
            "loss_tokens": int(self.corpus.num_trained[step.samples].sum()),
            "slots": len(halves) * sum(len(m.rows) * m.shape.slots for m in plan),
            "microbatches": [self._fill(m, step.samples, half) for m in plan for half in halves],
        }

    def _halves(self, i: int, count: int) -> list[set[int] | None]:
        """Which samples of a step train in each pass over its one microbatch; None = all.

        The gradient's noise is told from microbatches that differ: of one, half of the samples, drawn at random, have a
        loss in the first pass and the others in the second. Their sum is the same step.
        """
        if not self.split_every or i % self.split_every or count < 2:
            return [None]
        order = np.random.default_rng([self.seed, 1, i]).permutation(count).tolist()
        return [set(order[: count // 2]), set(order[count // 2 :])]

    def plan(self, i: int) -> list[Microbatch]:
        """How step i is packed. It is planned with its block, which is kept, since its steps come together."""
        first, plans = self._latest[0]
        if not first <= i < first + len(plans):
            block = self.mixture.block(i, PLANNED_TOGETHER)
            rng = np.random.default_rng([self.seed, 0, block.phase, block.epoch, block.first])
            first = block.first
            plans = pack_steps(self.corpus.lengths[block.samples], self.shapes, self.num_shards, rng)
            self._latest[0] = first, plans
        return plans[i - first]

    def _fill(self, microbatch: Microbatch, samples: np.ndarray, half: set[int] | None = None) -> Arrays:
        count = microbatch.shape.rows
        rows = [r for s in self.shards for r in microbatch.rows[s * count : (s + 1) * count]]
        arrays = empty_rows(len(rows), microbatch.shape.slots)
        for r, row in enumerate(rows):
            at = 0
            for segment, sample in enumerate(row, 1):
                tokens, trained = self.corpus.sample(samples[sample])
                put_sample(arrays, r, at, segment, tokens, trained, self.loss_reduction)
                if half is not None and sample not in half:
                    arrays["loss_weights"][r, at : at + len(tokens)] = 0
                at += len(tokens)
        return arrays


def empty_rows(rows: int, slots: int) -> Arrays:
    """Rows of padding: segment 0, weight 0."""
    names = ("tokens", "targets", "segment_ids", "positions")
    arrays = {name: np.zeros((rows, slots), np.int32) for name in names}
    return arrays | {"loss_weights": np.zeros((rows, slots), np.float32)}


def put_sample(
    arrays: Arrays,
    row: int,
    at: int,
    segment: int,
    tokens: np.ndarray,
    trained: np.ndarray,
    loss_reduction: str,
) -> None:
    """Writes one sample into a row from slot `at`. Slot t predicts token t+1 of its own sample; the last, nothing."""
    n = len(tokens)
    span = slice(at, at + n)
    arrays["tokens"][row, span] = tokens
    arrays["segment_ids"][row, span] = segment
    arrays["positions"][row, span] = np.arange(n)
    arrays["targets"][row, at : at + n - 1] = tokens[1:]
    share = max(1, int(trained[1:].sum())) if loss_reduction == "sample" else 1
    arrays["loss_weights"][row, at : at + n - 1] = trained[1:].astype(np.float32) / np.float32(share)


def load_steps(source: StepSource, start: int, num_workers: int) -> Iterator[dict[str, Any]]:
    """Steps from number `start` on, made ahead by a thread, or by `num_workers` processes."""
    steps = grain.MapDataset.source(source)[start:].to_iter_dataset(
        grain.ReadOptions(num_threads=1, prefetch_buffer_size=PREFETCH_STEPS)
    )
    if num_workers:
        flags.FLAGS.mark_as_parsed()  # grain reads a flag of its own; ours are parsed elsewhere
        steps = steps.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers))
    return iter(steps)
