"""Which samples make up each step: a pure function of the seed, the phase and the epoch.

A corpus numbers the samples of all stores consecutively, and phases draw from pools of those numbers. A step is
exactly `batch_size` samples and never crosses an epoch or a phase; only an epoch's last step may hold fewer.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np

from mice_jax.data.store import TokenStore
from mice_jax.errors import UserError


class Corpus:
    """All samples of a run under one numbering, truncated at `max_length`."""

    def __init__(self, stores: Sequence[TokenStore], max_length: int):
        """Joins the stores, whose samples are numbered in this order; `max_length` is in tokens."""
        self._stores = list(stores)
        self._first = np.cumsum([0] + [len(s) for s in stores])
        self.full_lengths = np.concatenate([s.lengths for s in stores])
        self.lengths = np.minimum(self.full_lengths, max_length)
        self.num_trained = np.concatenate([s.num_trained_within(max_length) for s in stores])

    # These arrays are not attributes, since the loader's processes, to which a corpus is sent, do not need them.
    @property
    def content_hashes(self) -> np.ndarray:
        """A hash of each sample as read; uint64 [samples]."""
        return np.concatenate([s.content_hashes for s in self._stores])

    @property
    def flags(self) -> np.ndarray:
        """Combinations of `chat.SampleFlag`; uint8 [samples]."""
        return np.concatenate([s.flags for s in self._stores])

    def ids(self, store: int) -> np.ndarray:
        """The numbers of a store's samples."""
        return np.arange(self._first[store], self._first[store + 1])

    def stores_of(self, ids: np.ndarray) -> np.ndarray:
        """The number of the store that holds each sample."""
        return np.searchsorted(self._first, ids, side="right") - 1

    def sample(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids (int32 [n]) and mask of trained tokens (uint8 [n]) of sample i, truncated at `max_length`."""
        store, number = self._of(i)
        tokens, trained = store.sample(number)
        return tokens[: self.lengths[i]], trained[: self.lengths[i]]

    def where(self, i: int) -> str:
        """Where sample number i came from: `a.jsonl line 12`."""
        store, number = self._of(i)
        return store.where(number)

    def _of(self, i: int) -> tuple[TokenStore, int]:
        store = int(self.stores_of(np.array(i)))
        return self._stores[store], int(i - self._first[store])


@dataclasses.dataclass(frozen=True)
class SampleSources:
    """Which source each sample of a corpus comes from."""

    names: tuple[str, ...]
    numbers: np.ndarray  # int32 [samples], indices into names; 0 for a sample that is not trained on

    def loss_tokens(self, ids: np.ndarray, num_trained: np.ndarray) -> dict[str, int]:
        """Counts the trained tokens of samples by source.

        Args:
          ids: the numbers of the samples.
          num_trained: the trained tokens of each of them.
        """
        counts = np.bincount(self.numbers[ids], weights=num_trained, minlength=len(self.names))
        return {name: int(count) for name, count in zip(self.names, counts, strict=True)}


@dataclasses.dataclass(frozen=True)
class Pool:
    """Sample numbers that a phase draws from; each is drawn `weight` times an epoch on average."""

    ids: np.ndarray
    weight: float = 1.0
    name: str = ""  # in reports

    @property
    def per_epoch(self) -> int:
        """Samples of this pool in an epoch, rounded to the nearest integer (halves to the even one)."""
        return round(self.weight * len(self.ids))


@dataclasses.dataclass(frozen=True)
class PhasePools:
    """A phase and the pools that it draws from."""

    name: str
    num_epochs: float
    pools: tuple[Pool, ...]
    num_steps: int = 0  # instead of num_epochs
    batch_size: int = 0  # samples per step; 0 = the mixture's

    @property
    def per_epoch(self) -> int:
        """Samples of all pools in an epoch."""
        return sum(p.per_epoch for p in self.pools)

    def epoch_sizes(self, batch_size: int, drop_remainder: bool) -> list[int]:
        """Samples of each epoch; the last epoch may be partial."""
        size = self.per_epoch
        if not self.num_steps:
            whole = math.floor(self.num_epochs)
            rest = round((self.num_epochs - whole) * size)
            sizes = [size] * whole
            return [*sizes, rest] if rest else sizes
        steps = num_steps(size, batch_size, drop_remainder)
        if not steps:
            return []
        whole, rest = divmod(self.num_steps, steps)
        sizes = [size] * whole
        return [*sizes, min(size, rest * batch_size)] if rest else sizes


def num_steps(samples: int, batch_size: int, drop_remainder: bool) -> int:
    """The number of steps in an epoch."""
    return samples // batch_size if drop_remainder else -(-samples // batch_size)


@dataclasses.dataclass(frozen=True)
class Epoch:
    """The part of one epoch of a phase that the run trains on."""

    phase: int
    epoch: int
    steps: int
    samples: int
    by_pool: tuple[int, ...]  # samples drawn from each of the phase's pools


@dataclasses.dataclass(frozen=True)
class Step:
    """One optimizer update's samples, in the order drawn."""

    phase: int
    epoch: int
    samples: np.ndarray


@dataclasses.dataclass(frozen=True)
class StepBlock:
    """Consecutive steps of one epoch that hold equally many samples."""

    phase: int
    epoch: int
    first: int  # number of the first step
    samples: np.ndarray  # [steps, samples]


@dataclasses.dataclass(frozen=True)
class Trunk:
    """The beginning of another run, from which a run goes on with another batch size or another order.

    Attributes:
        steps: the steps of that run before the branch.
        batch_size: samples per step of that run.
        seed: the seed of that run's order.
    """

    steps: int
    batch_size: int
    seed: int


@dataclasses.dataclass(frozen=True)
class _Part:
    """Consecutive samples of one epoch that are trained on with one batch size."""

    phase: int
    epoch: int
    offset: int  # of its first sample in the order of the epoch
    samples: int
    batch_size: int

    def num_steps(self, drop_remainder: bool) -> int:
        return num_steps(self.samples, self.batch_size, drop_remainder)


class Mixture:
    """The steps of a run, by number; they are the same on every host and do not depend on earlier calls.

    After a trunk, a run trains on the samples that the trunk did not reach: the rest of the epoch, in the trunk's order
    or, with another seed, in an order of its own, and then the later epochs. Each epoch has the samples that it would
    have had without the branch, so runs that branch off with other batch sizes or seeds train on equally many.
    """

    def __init__(
        self,
        phases: Sequence[PhasePools],
        *,
        batch_size: int,
        seed: int,
        drop_remainder: bool = False,
        trunk: Trunk | None = None,
    ):
        self.phases = tuple(phases)
        self._batch_sizes, self._seed = [p.batch_size or batch_size for p in phases], seed
        # Without a change, the steps are those of the trunk to the end, and their blocks of planning too.
        self._trunk = trunk if trunk and (trunk.batch_size, trunk.seed) != (batch_size, seed) else None
        self._parts: list[_Part] = []
        steps = [0]
        self.samples_left_out = 0
        for part in self._divided(drop_remainder):
            self.samples_left_out += part.samples % part.batch_size * drop_remainder
            self._parts.append(part)
            steps.append(steps[-1] + part.num_steps(drop_remainder))
        self._first_step = np.array(steps)
        if not len(self):
            sizes = "; ".join(
                f"phase {p.name!r}: {p.per_epoch} samples an epoch, {p.num_epochs} epochs, "
                f"{'its batch_size' if p.batch_size else 'optim.batch_size'}={b}"
                for p, b in zip(self.phases, self._batch_sizes, strict=True)
            )
            fix = "take a smaller batch, or data.drop_remainder=False" if drop_remainder else "take more of the data"
            raise UserError(f"there is no step to take ({sizes}): {fix}.")
        self._latest: tuple[tuple[int, int], np.ndarray] = ((-1, -1), np.zeros(0, int))

    def _divided(self, drop_remainder: bool) -> Iterator[_Part]:
        """Yields the parts of the run: whole epochs, of which that of the branch is in two parts."""
        trunk, done, steps = self._trunk, 0, 0
        for p, phase in enumerate(self.phases):
            before = (phase.batch_size or trunk.batch_size) if trunk else 0
            for e, size in enumerate(phase.epoch_sizes(before or self._batch_sizes[p], drop_remainder)):
                if not trunk:
                    yield _Part(p, e, 0, size, self._batch_sizes[p])
                    continue
                steps, done = done, done + num_steps(size, before, drop_remainder)
                at = min(max(trunk.steps - steps, 0) * before, size) if trunk.steps < done else size
                if at:
                    yield _Part(p, e, 0, at, before)
                if at < size:
                    yield _Part(p, e, at, size - at, self._batch_sizes[p])

    def __len__(self) -> int:
        return int(self._first_step[-1])

    def samples_before(self) -> np.ndarray:
        """The samples that the run has trained on before each of its steps, and after the last; int64 [steps + 1]."""
        counts = np.diff(self._first_step)
        sizes = np.repeat([part.batch_size for part in self._parts], counts)
        # The last step of a part holds what is left of it; where that is left out, all of its steps are whole.
        last = self._first_step[1:][counts > 0] - 1
        left = [p.samples - (n - 1) * p.batch_size for p, n in zip(self._parts, counts, strict=True) if n]
        sizes[last] = np.minimum(sizes[last], left)
        return np.concatenate([[0], np.cumsum(sizes)])

    def step(self, i: int) -> Step:
        """Step i, counted from 0 over the whole run."""
        part, number = self._find(i)
        start = number * part.batch_size
        return Step(part.phase, part.epoch, self._order(part)[start : start + part.batch_size])

    def block(self, i: int, about: int) -> StepBlock:
        """The block of about `about` samples that step i is planned in; every step of a block gives the same one."""
        part, number = self._find(i)
        count = part.batch_size
        whole = part.samples // count  # steps; one of fewer samples may follow
        steps = max(1, about // count)
        first, end = number // steps * steps, whole
        if number >= whole:
            first, end = whole, whole + 1
        end = min(first + steps, end)
        samples = self._order(part)[first * count : end * count]
        return StepBlock(part.phase, part.epoch, i - number + first, samples.reshape(end - first, -1))

    def _find(self, i: int) -> tuple[_Part, int]:
        """The part that step i belongs to, and the step's number in it."""
        assert 0 <= i < len(self)
        at = int(np.searchsorted(self._first_step, i, side="right")) - 1
        return self._parts[at], int(i - self._first_step[at])

    def phase_ends(self) -> list[int]:
        """For each phase, the number of the first step after it."""
        ends = np.zeros(len(self.phases), int)
        for part, end in zip(self._parts, self._first_step[1:], strict=True):
            ends[part.phase] = end
        return np.maximum.accumulate(ends).tolist()  # a phase without steps ends where it begins

    def epochs(self, max_steps: int) -> list[Epoch]:
        """The epochs of the first `max_steps` steps, with exact counts; that of a branch is in two parts."""
        found = []
        for part, first, end in zip(self._parts, self._first_step, self._first_step[1:], strict=False):
            steps = int(min(end, max_steps) - first)
            if steps <= 0:
                continue
            samples = min(part.samples, steps * part.batch_size)
            counts = [p.per_epoch for p in self.phases[part.phase].pools]
            if samples < sum(counts):
                pool_of = self._permuted(part.phase, part.epoch, np.repeat(np.arange(len(counts)), counts))
                drawn = pool_of[part.offset : part.offset + samples]
                counts = np.bincount(drawn, minlength=len(counts)).tolist()
            found.append(Epoch(part.phase, part.epoch, steps, samples, tuple(counts)))
        return found

    def _epoch_sizes(self) -> list[list[int]]:
        """The samples of each epoch of each phase."""
        return [[part.samples for part in self._parts if part.phase == p] for p in range(len(self.phases))]

    def largest_epochs(self) -> list[int]:
        """The samples of each phase's largest epoch; 0 for a phase without epochs."""
        return [max(sizes, default=0) for sizes in self._epoch_sizes()]

    def crowded_phases(self) -> list[str]:
        """`'name' (8 samples per step, 5 per epoch)` for each phase whose epoch is smaller than a step."""
        shortest = [min(sizes, default=p.per_epoch) for sizes, p in zip(self._epoch_sizes(), self.phases, strict=True)]
        return [
            f"{phase.name!r} ({batch_size:,} samples per step, {size:,} per epoch)"
            for phase, batch_size, size in zip(self.phases, self._batch_sizes, shortest, strict=True)
            if size < batch_size
        ]

    def _order(self, part: _Part) -> np.ndarray:
        """The samples of a part in the order drawn; the latest epoch is cached, since its steps come together."""
        key, order = self._latest
        if key != (part.phase, part.epoch):
            key = part.phase, part.epoch
            order = self._epoch_order(*key)
            self._latest = (key, order)
        return order[part.offset : part.offset + part.samples]

    def _epoch_order(self, phase: int, epoch: int) -> np.ndarray:
        drawn = [self._draw(phase, i, epoch) for i in range(len(self.phases[phase].pools))]
        return self._permuted(phase, epoch, np.concatenate(drawn))

    def _permuted(self, phase: int, epoch: int, drawn: np.ndarray) -> np.ndarray:
        """What an epoch draws, in the order of the run: that of the trunk's seed up to the branch, then of its own."""
        trunk = self._trunk
        if not trunk or trunk.seed == self._seed:
            return self._rng(phase, epoch).permutation(drawn)
        own = [p.offset for p in self._parts if (p.phase, p.epoch) == (phase, epoch) and not self._is_of_trunk(p)]
        order = _rng(trunk.seed, phase, epoch).permutation(drawn)
        at = own[0] if own else len(order)
        return np.concatenate([order[:at], self._rng(phase, epoch).permutation(order[at:])])

    def _is_of_trunk(self, part: _Part) -> bool:
        assert self._trunk
        return self._first_step[self._parts.index(part)] < self._trunk.steps

    def _draw(self, phase: int, pool: int, epoch: int) -> np.ndarray:
        """A pool's samples of one epoch: the next `per_epoch` of an endless sequence of shuffled passes over it.

        A weight of 0.5 therefore draws every sample once in two epochs, and a weight of 1 once an epoch.
        """
        ids, count = self.phases[phase].pools[pool].ids, self.phases[phase].pools[pool].per_epoch
        if not count:
            return ids[:0]  # all samples of the source may have been left out
        first, last = epoch * count, (epoch + 1) * count
        passes = range(first // len(ids), -(-last // len(ids)))
        # With a trunk, each epoch draws the samples that it would have drawn there, so that none is drawn again.
        seed = self._trunk.seed if self._trunk else self._seed
        shuffled = [_rng(seed, phase, p, pool).permutation(ids) for p in passes]
        skip = first % len(ids)
        return np.concatenate([ids[:0], *shuffled])[skip : skip + count]

    def _rng(self, *key: int) -> np.random.Generator:
        return _rng(self._seed, *key)


def _rng(seed: int, *key: int) -> np.random.Generator:
    return np.random.default_rng([seed, len(key), *key])
