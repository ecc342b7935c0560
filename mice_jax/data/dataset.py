"""From the data config to what a run draws from: the corpus, each phase's pools, the held-out samples, the report.

Here samples are dropped, and nowhere else: each with its reason, counted by source.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mice_jax import config
from mice_jax.data.chat import ChatEncoder
from mice_jax.data.mixture import Corpus, PhasePools, Pool
from mice_jax.data.store import TokenStore, build_store, default_cache_dir
from mice_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Dataset:
    corpus: Corpus
    phases: list[PhasePools]
    validation: dict[str, np.ndarray]  # sample numbers by source
    report: dict[str, Any]  # data_report.json


def build_dataset(data: config.Data, encoder: ChatEncoder, say: Callable[[str], None]) -> Dataset:
    """Opens or builds the stores of every source, and sorts out which samples are trained on.

    Raises UserError where a phase is left without a sample.
    """
    cache_dir = Path(data.cache_dir) if data.cache_dir else default_cache_dir()
    sources = {(s.path, s.format): s for s in _all_sources(data)}
    stores: dict[tuple[str, str], TokenStore] = {}
    for key, source in sources.items():
        say(f"tokens of {source.path}")
        stores[key] = build_store(
            source.path, format=source.format, encoder=encoder, skip_bad=data.skip_bad, cache_dir=cache_dir
        )
    corpus = Corpus(list(stores.values()), data.max_length)
    numbers = {key: corpus.ids(i) for i, key in enumerate(stores)}
    report: dict[str, Any] = {"max_length": data.max_length, "sources": {}, "validation": {}}

    def pool(source: config.Source, held_out: bool) -> np.ndarray:
        key = (source.path, source.format)
        ids, hashes = numbers[key], stores[key].content_hashes
        if data.validation_fraction:
            is_held = hashes < np.uint64(int(data.validation_fraction * 2**64))
            ids = ids[is_held == held_out]
        kept, counts = _kept(corpus, ids, source, data)
        # A source of which a part is held out is read once: its bad lines are counted with the part that is trained on.
        bad = {} if held_out and data.validation_fraction else stores[key].meta["bad_lines"]
        counts["dropped"] |= {f"bad line: {k}": v for k, v in bad.items()}
        entries = report["validation" if held_out else "sources"]
        name = source_name(source)
        while name in entries:  # the same source in two phases
            name += "'"
        entries[name] = {"path": source.path, "read": len(ids) + sum(bad.values())} | counts
        return kept

    phases = [
        PhasePools(p.name, p.num_epochs, tuple(Pool(pool(s, False), s.weight) for s in p.sources)) for p in data.phases
    ]
    for phase in phases:
        if not phase.per_epoch:
            dropped = {n: s["dropped"] for n, s in report["sources"].items()}
            raise UserError(
                f"the phase {phase.name!r} has no sample to train on. Dropped, by source and reason: {dropped}. "
                f"A sample is kept when its tokens are at most data.max_length={data.max_length} and at least one "
                "of them is trained on."
            )
        if not phase.epoch_sizes():
            raise UserError(
                f"the phase {phase.name!r} has no sample to train on: num_epochs={phase.num_epochs} of "
                f"{phase.per_epoch} samples an epoch is less than one. Give it more."
            )
    return Dataset(corpus, phases, _validation(data, pool), report)


def source_name(source: config.Source) -> str:
    """As reports and metrics call it."""
    return source.name or Path(source.path).name.split(".")[0]


def _validation(data: config.Data, pool: Callable[..., np.ndarray]) -> dict[str, np.ndarray]:
    if data.validation:
        held = [(source_name(s), pool(s, True)) for s in data.validation]
        empty = [s.path for s, (_, ids) in zip(data.validation, held, strict=True) if not len(ids)]
        if empty:
            raise UserError(
                f"data.validation has no sample to measure in {', '.join(empty)}: every one is longer than "
                f"data.max_length={data.max_length} or has no trained token."
            )
    elif data.validation_fraction:
        unique = {(s.path, s.format): s for p in data.phases for s in p.sources}
        held = [(source_name(s), pool(s, True)) for s in unique.values()]
    else:
        return {}
    by_name: dict[str, np.ndarray] = {}
    for name, ids in held:
        if len(ids):
            by_name[name] = np.concatenate([by_name[name], ids]) if name in by_name else ids
    return by_name


def _kept(
    corpus: Corpus, ids: np.ndarray, source: config.Source, data: config.Data
) -> tuple[np.ndarray, dict[str, Any]]:
    """The samples that are trained on, and the counts of the report."""
    overlong = corpus.full_lengths[ids] > data.max_length
    if data.overlong == "error" and overlong.any():
        longest = int(corpus.full_lengths[ids].max())
        raise UserError(
            f"{source.path} has {int(overlong.sum())} samples above data.max_length={data.max_length}, the longest "
            f"of {longest} tokens, and data.overlong is 'error'. Raise the length, or say 'drop' or 'truncate'."
        )
    too_long = overlong & (data.overlong == "drop")
    untrained = ~too_long & (corpus.num_trained[ids] == 0)
    kept = ids[~too_long & ~untrained]
    dropped = {"longer than max_length": int(too_long.sum()), "no trained token": int(untrained.sum())}
    counts = {
        "kept": len(kept),
        "dropped": {reason: n for reason, n in dropped.items() if n},
        "truncated": int(np.isin(kept, ids[overlong]).sum()),
        "weight": source.weight,
        "tokens": int(corpus.lengths[kept].sum()),
        "loss_tokens": int(corpus.num_trained[kept].sum()),
        "length_percentiles": _percentiles(corpus.lengths[kept]),
    }
    return kept, counts


def _percentiles(lengths: np.ndarray) -> dict[str, int]:
    if not len(lengths):
        return {}
    points = (0, 5, 25, 50, 75, 95, 100)
    return {str(p): int(v) for p, v in zip(points, np.percentile(lengths, points), strict=True)}


def _all_sources(data: config.Data) -> Sequence[config.Source]:
    return [s for p in data.phases for s in p.sources] + data.validation
