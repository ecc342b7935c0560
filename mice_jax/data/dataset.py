"""Builds what a run draws from: the corpus, the pools of each phase, the held-out samples, and the counts.

This is the only module that leaves samples out. It counts them by source and reason, in this order: held out, too long
or without a trained token, in the half that is not selected (`Source.half`), and beyond `Source.max_samples`.
"""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mice_jax import config
from mice_jax.data import statistics
from mice_jax.data.bad_records import BadRecordsError, merged
from mice_jax.data.chat import ChatEncoder, SampleFlag
from mice_jax.data.mixture import Corpus, PhasePools, Pool, SampleSources
from mice_jax.data.source_names import source_name
from mice_jax.data.store import ProgressCallback, TokenStore, build_store
from mice_jax.errors import UserError, format_count
from mice_jax.storage.cache import cache_folder

MAX_DEFAULT_WORKERS = 32  # each takes a few hundred MB; data.prepare_workers may be larger

Key = tuple[str, str]  # path and format: sources that share them share a store


@dataclasses.dataclass(frozen=True)
class Dataset:
    """The data of a run."""

    corpus: Corpus
    phases: list[PhasePools]
    sources: SampleSources  # those that are trained on
    validation: list["HeldOut"]
    report: dict[str, Any]  # the part of data_report.json that does not depend on steps
    fingerprint: str  # of all stores


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Samples of one source that are measured and never trained on."""

    name: str  # of the source
    ids: np.ndarray  # sample numbers
    phases: tuple[str, ...]  # the phases that it is held out for; () means the whole run


def build_dataset(
    data: config.Data,
    encoder: ChatEncoder,
    log: Callable[[str], None] = lambda text: None,
    watch: Callable[[str], ProgressCallback] = lambda what: lambda done, samples: None,
) -> Dataset:
    """Opens or builds the store of every source, and selects the samples to train on.

    Args:
      data: the data part of the config.
      encoder: turns samples into ids and masks.
      log: called with each sentence that the user should read.
      watch: gives the progress callback for the path of a source.

    Returns:
      The data set.

    Raises:
      UserError: a source cannot be read, or a phase has no samples.
    """
    for warning in encoder.warnings():
        log(warning)
    stores = _stores(data, encoder, log, watch)
    corpus = Corpus(list(stores.values()), data.max_length)
    pools = _Pools(data, corpus, stores)
    phases: list[PhasePools] = []
    named: list[tuple[str, Pool]] = []  # by the names of their sources
    for phase in data.phases:
        own = [pools.make(s, held_out=False) for s in phase.sources]
        named += [(source_name(s), pool) for s, pool in zip(phase.sources, own, strict=True)]
        phases.append(
            PhasePools(
                phase.name, phase.num_epochs, (*own, *_replayed(phase, phases)), phase.num_steps, phase.batch_size
            )
        )
    for phase in phases:
        _check_phase(phase, data, pools.entries["sources"])
    validation = _validation(data, pools)
    sources = _sample_sources(named, len(corpus.lengths))
    report = pools.entries | _overlaps(corpus, phases, validation)
    fingerprint = hashlib.sha256(" ".join(s.fingerprint for s in stores.values()).encode()).hexdigest()
    return Dataset(corpus, phases, sources, validation, report | {"fingerprint": fingerprint}, fingerprint)


def _stores(
    data: config.Data, encoder: ChatEncoder, log: Callable[[str], None], watch: Callable[[str], ProgressCallback]
) -> dict[Key, TokenStore]:
    """The store of every source, whether it is trained on or held out."""
    cache_dir = cache_folder(data.cache_dir)
    stores: dict[Key, TokenStore] = {}
    errors: list[BadRecordsError] = []  # of all sources, so that their bad records are listed together
    for source in [s for p in data.phases for s in (*p.sources, *p.validation)] + data.validation:
        if (source.path, source.format) not in stores:
            log(f"tokenising {source.path}")
            try:
                stores[source.path, source.format] = build_store(
                    source.path,
                    format=source.format,
                    encoder=encoder,
                    skip_bad=data.skip_bad,
                    cache_dir=cache_dir,
                    workers=data.prepare_workers or min(MAX_DEFAULT_WORKERS, os.cpu_count() or 1),
                    log=log,
                    watch=watch(source.path),
                )
            except BadRecordsError as e:
                errors.append(e)
    if errors:
        raise merged(errors)
    return stores


# ---------------------------------------------------------------------------------------- pools
class _Pools:
    """Makes a source's pool of samples, and its entry in the report, once for each phase that names it."""

    def __init__(self, data: config.Data, corpus: Corpus, stores: dict[Key, TokenStore]):
        self._data, self._corpus, self._stores = data, corpus, stores
        self._ids = {key: corpus.ids(i) for i, key in enumerate(stores)}
        self._hashes, self._flags = corpus.content_hashes, corpus.flags
        self.entries: dict[str, Any] = {"max_length": data.max_length, "sources": {}, "validation": {}}

    def make(self, source: config.Source, held_out: bool) -> Pool:
        """The samples of a source that are trained on or, with `held_out`, measured."""
        key, fraction = (source.path, source.format), self._data.validation_fraction
        ids, meta = self._ids[key], self._stores[key].meta
        if fraction:
            is_held = self._hashes[ids] < np.uint64(int(fraction * 2**64))
            ids = ids[is_held == held_out]
        # Where a part of a source is held out, its bad lines are counted once, with the part that is trained on.
        bad = {} if held_out and fraction else {f"bad line: {k}": n for k, n in meta["bad_lines"].items()}
        kept, dropped = self._kept(ids, source)
        chosen, set_aside = self._chosen(kept, source)
        entries = self.entries["validation" if held_out else "sources"]
        name = source_name(source)
        while name in entries:  # the same source in two phases
            name += "'"
        entries[name] = {
            "path": source.path,
            "format": meta["format"],
            "weight": source.weight,
            "read": len(ids) + sum(bad.values()),
            "kept": len(chosen),
            "dropped": dropped | bad,
            "set_aside": set_aside,
            "overlong": self._overlong(ids),
            # What is counted for a whole source is reported once, like its bad lines.
            "notes": {} if held_out and fraction else self._stores[key].notes(),
            **self._numbers(chosen),
        }
        return Pool(chosen, source.weight, name)

    def _kept(self, ids: np.ndarray, source: config.Source) -> tuple[np.ndarray, dict[str, int]]:
        """The samples that can be trained on, and how many cannot."""
        data, lengths = self._data, self._corpus.full_lengths[ids]
        overlong = lengths > data.max_length
        if data.overlong == "error" and overlong.any():
            longest = self._overlong(ids)
            raise UserError(
                f"{source.path} has {format_count(int(overlong.sum()), 'sample')} above "
                f"data.max_length={data.max_length}, the longest of {longest['tokens']} tokens ({longest['where']}), "
                "and data.overlong is 'error'. Increase the length, or set data.overlong to 'drop' or 'truncate'."
            )
        too_long = overlong & (data.overlong == "drop")
        untrained = ~too_long & (self._corpus.num_trained[ids] == 0)
        dropped = {"longer than max_length": int(too_long.sum()), "no trained token": int(untrained.sum())}
        return ids[~too_long & ~untrained], {reason: n for reason, n in dropped.items() if n}

    def _overlong(self, ids: np.ndarray) -> dict[str, Any]:
        """The longest sample where it is longer than max_length, whether such samples are dropped or truncated."""
        lengths = self._corpus.full_lengths[ids]
        if not len(ids) or lengths.max() <= self._data.max_length:
            return {}
        return {"tokens": int(lengths.max()), "where": self._corpus.where(int(ids[lengths.argmax()]))}

    def _chosen(self, ids: np.ndarray, source: config.Source) -> tuple[np.ndarray, dict[str, int]]:
        """The samples that `Source.half` and `max_samples` select, in order, and how many they leave out."""
        set_aside = {}
        if source.half:
            by_answer = ids[np.lexsort((ids, self._corpus.num_trained[ids]))]
            middle = -(-len(ids) // 2)
            chosen = by_answer[:middle] if source.half == "short" else by_answer[middle:]
            set_aside[f"not of the {source.half} half"] = len(ids) - len(chosen)
            ids = np.sort(chosen)
        if source.max_samples and len(ids) > source.max_samples:
            # Samples are chosen by content, as for validation_fraction, so the order of files has no influence.
            by_hash = ids[np.lexsort((ids, self._hashes[ids]))]
            set_aside["beyond max_samples"] = len(ids) - source.max_samples
            ids = np.sort(by_hash[: source.max_samples])
        return ids, set_aside

    def _numbers(self, ids: np.ndarray) -> dict[str, Any]:
        corpus = self._corpus
        lengths = corpus.lengths[ids]
        return {
            "truncated": int((corpus.full_lengths[ids] > lengths).sum()),
            "tokens": int(lengths.sum()),
            "loss_tokens": int(corpus.num_trained[ids].sum()),
            "duplicates": len(ids) - len(np.unique(self._hashes[ids])),
            "signs": statistics.flag_numbers(
                self._flags[ids], ids, corpus.where, {str(s.name).lower(): s.value for s in SampleFlag}
            ),
            **statistics.length_numbers(lengths),
            "longest": statistics.longest(lengths, ids, corpus.where),
        }


def _replayed(phase: config.Phase, earlier: Sequence[PhasePools]) -> list[Pool]:
    """The pool of earlier phases' samples that a phase replays; a sample of several pools is in it once."""
    if not phase.replay:
        return []
    replayed = [p for p in earlier if phase.replay_from in ("", p.name)]
    ids = np.unique(np.concatenate([pool.ids for p in replayed for pool in p.pools]))
    pool = Pool(ids, phase.replay, f"replay of {', '.join(p.name for p in replayed)}")
    if not pool.per_epoch:
        raise UserError(
            f"the phase {phase.name!r} replays nothing: replay={phase.replay} of the {len(ids)} samples of "
            f"{', '.join(p.name for p in replayed)} is less than one. Give it more, or leave it out."
        )
    return [pool]


def _sample_sources(named: Sequence[tuple[str, Pool]], num_samples: int) -> SampleSources:
    """Which source each sample comes from; where several name it, the first one.

    Args:
      named: the pool of each source of each phase, in order, with the name of the source.
      num_samples: the number of samples of the corpus.
    """
    names = tuple(dict.fromkeys(name for name, _ in named))
    numbers = np.zeros(num_samples, np.int32)
    for name, pool in reversed(named):
        numbers[pool.ids] = names.index(name)
    return SampleSources(names, numbers)


def _check_phase(phase: PhasePools, data: config.Data, sources: dict[str, Any]) -> None:
    if not phase.per_epoch:
        counts = {name: (s["dropped"] | s["set_aside"]).items() for name, s in sources.items()}
        dropped = "; ".join(f"{name}: {', '.join(f'{n:,} {why}' for why, n in c)}" for name, c in counts.items() if c)
        raise UserError(
            f"the phase {phase.name!r} has no sample to train on. Dropped, by source and reason: {dropped or 'none'}. "
            f"A sample is kept when its tokens are at most data.max_length={data.max_length} and at least one "
            "of them is trained on."
        )
    if not (phase.num_steps or round(phase.num_epochs * phase.per_epoch)):
        raise UserError(
            f"the phase {phase.name!r} has no sample to train on: num_epochs={phase.num_epochs} of "
            f"{phase.per_epoch} samples an epoch is less than one. Give it more."
        )


# ---------------------------------------------------------------------------------------- held out
def _validation(data: config.Data, pools: _Pools) -> list[HeldOut]:
    """The held-out sources; a source that is held out for several phases is listed once."""
    if data.validation_fraction:
        listed = [(s, p.name) for p in data.phases for s in p.sources]
        # The whole held-out part is measured, since a selection from it would only be noisier.
        listed = [(dataclasses.replace(s, half="", max_samples=0), phase) for s, phase in listed]
    else:
        listed = [(s, "") for s in data.validation] + [(s, p.name) for p in data.phases for s in p.validation]
    phases_of: dict[tuple, list[str]] = {}
    sources: dict[tuple, config.Source] = {}
    for source, phase in listed:
        key = (source.path, source.format, source.half, source.max_samples)
        sources.setdefault(key, source)
        phases_of.setdefault(key, []).extend([phase] if phase else [])
    held = [(s, pools.make(s, held_out=True), tuple(dict.fromkeys(phases_of[key]))) for key, s in sources.items()]
    empty = [s.path for s, pool, _ in held if not len(pool.ids)]
    if empty and not data.validation_fraction:
        raise UserError(
            f"validation has no sample to measure in {', '.join(empty)}: every one is longer than "
            f"data.max_length={data.max_length} or has no trained token."
        )
    return [HeldOut(source_name(s), pool.ids, phases) for s, pool, phases in held if len(pool.ids)]


def _overlaps(corpus: Corpus, phases: Sequence[PhasePools], validation: Sequence[HeldOut]) -> dict[str, int]:
    """Counts samples of equal content that two sources share, or that are both trained on and held out."""
    trained = np.unique(np.concatenate([pool.ids for p in phases for pool in p.pools]))
    all_hashes = corpus.content_hashes
    hashes = all_hashes[trained]
    held = np.concatenate([hashes[:0], *(all_hashes[h.ids] for h in validation)])
    contents = len(np.unique(hashes))
    by_store = np.split(hashes, np.flatnonzero(np.diff(corpus.stores_of(trained))) + 1)
    return {
        "samples": len(trained),
        "duplicates": len(trained) - contents,
        "duplicates_across_sources": sum(len(np.unique(h)) for h in by_store) - contents,
        "validation_overlap": int(np.isin(hashes, held).sum()),
    }
