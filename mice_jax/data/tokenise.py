"""Blocks of raw records to blocks of a token store, by several processes, in the order of the source.

A process parses, checks, renders and tokenises a block by itself, so that what travels between processes is bytes.
At most a few blocks a process are in the making, whatever the size of the source.
"""

import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np
import pyarrow as pa

from mice_jax.data.chat import ChatEncoder
from mice_jax.data.readers import Block, Reader
from mice_jax.data.sources import Sample, samples_of
from mice_jax.errors import UserError

SMALL = 4  # blocks: to start processes takes longer than to tokenise so few
AHEAD = 3  # blocks a process that are read, in the making, or waiting for their turn

SCHEMA = pa.schema(
    [
        ("tokens", pa.list_(pa.int32())),
        ("trained", pa.list_(pa.uint8())),  # 1 = this token is trained on
        ("num_trained", pa.int32()),  # trained tokens that can be predicted: all but a trained first one
        ("content_hash", pa.uint64()),  # of the sample as read: decides what is held out
        ("signs", pa.uint8()),  # a combination of chat.SampleFlag
        ("place", pa.uint32()),  # among the reader's places
        ("number", pa.uint64()),  # of the record there
    ]
)


@dataclass(frozen=True)
class Tokenised:
    """A block on its way into the store."""

    batch: bytes  # a record batch, as it stands in an Arrow stream
    samples: int
    tokens: int
    bad: dict[str, int]  # by reason


@dataclass(frozen=True)
class _Task:
    """All that a process needs besides the blocks."""

    encoder: ChatEncoder
    places: Sequence[str]
    format: str
    skip_bad: bool

    def __call__(self, block: Block) -> Tokenised:
        bad: Counter[str] | None = Counter() if self.skip_bad else None
        samples = list(samples_of(block, self.places, self.format, bad))
        encoded = self.encoder.encode(samples)
        ids, trained = [e.ids for e in encoded], [e.trained for e in encoded]
        columns = [
            _list_array(ids, pa.int32()),
            _list_array(trained, pa.uint8()),
            pa.array([int(t[1:].sum()) for t in trained], pa.int32()),
            pa.array([_content_hash(s) for s in samples], pa.uint64()),
            pa.array([e.flags for e in encoded], pa.uint8()),
            pa.array([s.place for s in samples], pa.uint32()),
            pa.array([s.number for s in samples], pa.uint64()),
        ]
        batch = pa.record_batch(columns, schema=SCHEMA).serialize().to_pybytes()
        return Tokenised(batch, len(samples), sum(map(len, ids)), dict(bad or {}))


def tokenise(
    reader: Reader, encoder: ChatEncoder, format: str, skip_bad: bool, *, skip: int, workers: int
) -> Iterator[tuple[float, Tokenised]]:
    """Every block but the first `skip`, in order, with the share of the source that has been read (0 to 1).

    Raises UserError for the first bad record, unless `skip_bad` counts them.
    """
    blocks = _until_it_fails(islice(reader.blocks(), skip, None))
    task = _Task(encoder, reader.places, format, skip_bad)
    size = max(1, reader.size)
    few = list(islice(blocks, SMALL)) if workers > 1 else []
    if workers == 1 or len(few) < SMALL:
        for block in map(_sound, chain(few, blocks)):
            yield block.done / size, task(block)
        return
    with _processes(task, workers) as (submit, first):
        waiting: deque[tuple[Block, Future[Tokenised]]] = deque()

        def next_done() -> tuple[float, Tokenised]:
            block, future = waiting.popleft()
            return block.done / size, future.result()

        for block in chain(few, blocks):
            if isinstance(block, UserError):  # what is bad before that place comes first
                break
            if not _is_up(first):  # starting takes seconds, in which this process can do the work
                yield block.done / size, task(block)
                continue
            waiting.append((block, submit(block)))
            if len(waiting) >= AHEAD * workers:
                yield next_done()
        while waiting:
            yield next_done()
        _sound(block)


def _until_it_fails(blocks: Iterator[Block]) -> Iterator[Block | UserError]:
    """The blocks, and last the error by which their reading ended, if it did."""
    try:
        yield from blocks
    except UserError as e:
        yield e


def _sound(block: Block | UserError) -> Block:
    if isinstance(block, UserError):
        raise block
    return block


# ---------------------------------------------------------------------------------------- processes
_task: _Task  # of a worker process


@contextmanager
def _processes(task: _Task, workers: int) -> Iterator[tuple[Callable[[Block], Future[Tokenised]], Future[None]]]:
    """Processes that carry out the task, and a future that is done once there is one; they end with this one."""
    # Not forked from this process, which may run threads (JAX's, Arrow's) that do not survive it, but from a fresh
    # one that has imported what they need.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mice_jax.data.tokenise"])
    pool = ProcessPoolExecutor(workers, context, _begin, (task,))
    with ThreadPoolExecutor(1) as starter:  # the first submission waits for that process
        try:
            yield lambda block: pool.submit(_work, block), starter.submit(lambda: pool.submit(_nothing).result())
        except BrokenProcessPool as e:
            raise UserError(
                "a process that tokenised was ended from outside, for want of memory most likely. What is done is "
                "kept: run it again, with fewer data.prepare_workers."
            ) from e
        finally:
            pool.shutdown(cancel_futures=True)


def _is_up(first: Future[None]) -> bool:
    return first.done()


def _nothing() -> None: ...


def _begin(task: _Task) -> None:
    global _task
    _task = task
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there are as many processes as cores
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(block: Block) -> Tokenised:
    return _task(block)


# ---------------------------------------------------------------------------------------- columns
def _content_hash(sample: Sample) -> int:
    text = json.dumps([sample.messages, sample.tools, sample.unmask], sort_keys=True)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _list_array(arrays: Sequence[np.ndarray], dtype: pa.DataType) -> pa.ListArray:
    offsets = np.cumsum([0] + [len(a) for a in arrays], dtype=np.int32)
    flat = np.concatenate(arrays) if arrays else np.zeros(0)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat, dtype))
