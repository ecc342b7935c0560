"""Makes the arrays of a step's microbatches from the step's number; Grain runs it ahead of the training loop.

Element i of the source is step i and depends on i alone. The state of a loader is therefore one integer, and the number
of hosts, workers or rows per device has no influence on the samples of a step.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from mice_jax.data.mixture import Corpus, Mixture, SampleSources
from mice_jax.data.packing import Microbatch, Shape, pack_steps

PREFETCH_STEPS = 2
PLANNED_SAMPLES = 2**14  # about as many are planned at once

# One microbatch of this host: tokens, targets, segment_ids, positions, sources (int32) and loss_weights (float32), each
# [local rows, slots].
Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class StepSource:
    """Random access to the steps of a mixture, as the rows of this host's shards."""

    corpus: Corpus
    mixture: Mixture
    shapes: tuple[Shape, ...]  # those that a microbatch may have
    num_shards: int  # that share the rows of a microbatch
    shards: tuple[int, ...]  # indices of this host's shards
    loss_reduction: str  # "token" or "sample"
    seed: int
    split_every: int = 0  # every such step that has a single microbatch is split into two; 0 = never
    sources: SampleSources | None = None  # None takes all samples as those of one source without a name
    # The first step of the block that was planned last, and the plans of its steps.
    _latest: list[tuple[int, Sequence[list[Microbatch]]]] = dataclasses.field(
        default_factory=lambda: [(0, [])], init=False, repr=False, compare=False
    )

    def __len__(self) -> int:
        return len(self.mixture)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Step `index`: its phase and epoch, its counts over all hosts, and this host's microbatches."""
        step = self.mixture.step(int(index))
        plan = self.plan(int(index))
        halves = self._halves(int(index), len(step.samples)) if len(plan) == 1 else [None]
        lengths = self.corpus.lengths[step.samples].astype(np.int64)
        num_trained = self.corpus.num_trained[step.samples]
        return {
            "phase": step.phase,
            "epoch": step.epoch,
            "samples": len(step.samples),
            "tokens": int(lengths.sum()),
            "lengths": lengths,  # of the samples; the cost of attention depends on them
            "loss_tokens": int(num_trained.sum()),
            "loss_tokens_by_source": self.sources.loss_tokens(step.samples, num_trained) if self.sources else {},
            "slots": len(halves) * sum(len(m.rows) * m.shape.slots for m in plan),
            "microbatches": [self._fill(m, step.samples, half) for m in plan for half in halves],
        }

    def _halves(self, i: int, count: int) -> list[set[int] | None]:
        """The samples that have a loss in each pass over the single microbatch of a step; None = all.

        The gradient noise is estimated from the differences between microbatches. Where there is only one, a random
        half of its samples has a loss in a first pass and the other half in a second. Their sum is the same step.
        """
        if not self.split_every or i % self.split_every or count < 2:
            return [None]
        order = np.random.default_rng([self.seed, 1, i]).permutation(count).tolist()
        return [set(order[: count // 2]), set(order[count // 2 :])]

    def plan(self, i: int) -> list[Microbatch]:
        """The packing of step i; the block that it is planned in is cached, since its steps come together."""
        first, plans = self._latest[0]
        if not first <= i < first + len(plans):
            block = self.mixture.block(i, PLANNED_SAMPLES)
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
                source = int(self.sources.numbers[samples[sample]]) if self.sources else 0
                put_sample(arrays, r, at, segment, tokens, trained, self.loss_reduction, source)
                if half is not None and sample not in half:
                    arrays["loss_weights"][r, at : at + len(tokens)] = 0
                at += len(tokens)
        order = microbatch.shape.order
        return arrays if order is None else {name: x[:, order] for name, x in arrays.items()}


def empty_rows(rows: int, slots: int) -> Arrays:
    """Rows of padding, whose segment ids and loss weights are 0."""
    names = ("tokens", "targets", "segment_ids", "positions", "sources")
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
    source: int = 0,
) -> None:
    """Writes one sample of n tokens into a row; slot t predicts token t + 1, and the last slot has no loss.

    Args:
      arrays: those of a microbatch, [rows, slots] each; they are changed.
      row: index of the row.
      at: the first slot of the sample.
      segment: id of the sample in the row, from 1 on.
      tokens: int32 [n].
      trained: uint8 [n]; 1 = the model learns to predict this token.
      loss_reduction: "token", or "sample" to give each sample a total weight of 1.
      source: the number of the source that the sample comes from.
    """
    n = len(tokens)
    span = slice(at, at + n)
    arrays["tokens"][row, span] = tokens
    arrays["segment_ids"][row, span] = segment
    arrays["positions"][row, span] = np.arange(n)
    arrays["sources"][row, span] = source
    arrays["targets"][row, at : at + n - 1] = tokens[1:]
    share = max(1, int(trained[1:].sum())) if loss_reduction == "sample" else 1
    arrays["loss_weights"][row, at : at + n - 1] = trained[1:].astype(np.float32) / np.float32(share)


def load_steps(source: StepSource, start: int, num_workers: int) -> Iterator[dict[str, Any]]:
    """Loads steps ahead of their use.

    Args:
      source: the steps.
      start: number of the first one.
      num_workers: number of processes that load; 0 = a thread of this process.

    Returns:
      An iterator over the elements of `source`.
    """
    steps = grain.MapDataset.source(source)[start:].to_iter_dataset(
        grain.ReadOptions(num_threads=1, prefetch_buffer_size=PREFETCH_STEPS)
    )
    if num_workers:
        flags.FLAGS.mark_as_parsed()  # grain reads one of its flags; the project's flags are parsed elsewhere
        steps = steps.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers))
    return iter(steps)
