"""Tokenises blocks of raw records in several processes, in the order of the source.

One process parses, checks, renders and tokenises a block, so that only bytes travel between processes. A few blocks
for each process are in memory, for a source of any size.
"""

import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

import numpy as np
import pyarrow as pa

from mice_jax.data.bad_records import BadRecord, BadRecords
from mice_jax.data.chat import ChatEncoder, Encoded
from mice_jax.data.readers import Block, Reader
from mice_jax.data.sample_notes import NoteCounter
from mice_jax.data.sources import Sample, parse_block
from mice_jax.errors import UserError

MIN_BLOCKS_FOR_WORKERS = 4  # starting processes takes longer than tokenising fewer blocks than these
MAX_BLOCKS_PER_WORKER = 3  # in memory: being read, tokenised, or waiting for their turn
COMPARED_CHATS = 4  # conversations of each block whose turns are compared with the prompts for them

SCHEMA = pa.schema(
    [
        ("tokens", pa.list_(pa.int32())),
        ("trained", pa.list_(pa.uint8())),  # 1 = this token is trained on
        ("num_trained", pa.int32()),  # trained tokens that can be predicted: all but a trained first one
        ("content_hash", pa.uint64()),  # of the sample as read; decides whether the sample is held out
        ("signs", pa.uint8()),  # a combination of chat.SampleFlag
        ("place", pa.uint32()),  # index in the reader's places
        ("number", pa.uint64()),  # of the record in that place
    ]
)


@dataclass(frozen=True)
class TokenisationJob:
    """What is tokenised, and how."""

    path: str  # of the source, as in `Source.path`
    reader: Reader
    encoder: ChatEncoder
    format: str
    skip_bad: bool  # whether bad records are counted instead of being an error
    workers: int  # number of processes


@dataclass(frozen=True)
class TokenisedBlock:
    """A block of the store."""

    batch: bytes  # a record batch in the form that it has in an Arrow stream; empty where records were only checked
    samples: int
    tokens: int
    bad: BadRecords
    notes: dict[str, dict[str, Any]]  # as `NoteCounter.found`


@dataclass(frozen=True)
class _Task:
    """What a worker process needs besides the blocks."""

    encoder: ChatEncoder
    places: Sequence[str]
    format: str
    skip_bad: bool

    def __call__(self, block: Block, only_check: bool = False) -> TokenisedBlock:
        """Tokenises a block; with `only_check`, only its bad records are found."""
        parsed = list(parse_block(block, self.places, self.format))
        samples = list(self.encoder.split_by_turn(s for s in parsed if isinstance(s, Sample)))
        found = self.encoder.bad_records(samples) if only_check else self.encoder.encode_each(samples, COMPARED_CHATS)
        refused = {r.where: r for r in found if isinstance(r, BadRecord)}
        bad = BadRecords()
        bad.add(_in_order(parsed, refused))
        if only_check or (bad and not self.skip_bad):
            return TokenisedBlock(b"", 0, 0, bad, {})
        # A conversation of which one turn cannot be encoded is left out whole.
        encoded = [(s, e) for s, e in zip(samples, found, strict=True) if isinstance(e, Encoded)]
        return self._tokenised([(s, e) for s, e in encoded if s.where not in refused], bad)

    def _tokenised(self, pairs: Sequence[tuple[Sample, Encoded]], bad: BadRecords) -> TokenisedBlock:
        samples, encoded = [s for s, _ in pairs], [e for _, e in pairs]
        notes = NoteCounter()
        for sample, one in pairs:
            notes.add(one.notes, sample.place, sample.number)
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
        return TokenisedBlock(batch, len(samples), sum(map(len, ids)), bad, notes.found)


def _in_order(parsed: Sequence[Sample | BadRecord], refused: dict[str, BadRecord]) -> Iterator[BadRecord]:
    """The bad records of a block in their order: those that could not be parsed, and those that were refused later."""
    for one in parsed:
        if isinstance(one, BadRecord):
            yield one
        elif one.where in refused:
            yield refused[one.where]


def tokenise(job: TokenisationJob, skip: int) -> Iterator[tuple[float, TokenisedBlock]]:
    """Tokenises every block of a source but the first `skip`; after one with bad records, blocks are only checked.

    Args:
      job: what is tokenised.
      skip: number of blocks that an earlier build has done.

    Yields:
      The blocks in order, each with the fraction of the source that has been read (0 to 1).

    Raises:
      UserError: the source cannot be read.
    """
    blocks = _with_final_error(islice(job.reader.blocks(), skip, None))
    task = _Task(job.encoder, job.reader.places, job.format, job.skip_bad)
    size = max(1, job.reader.size)
    only_check = False

    def share_of(block: Block, done: TokenisedBlock) -> tuple[float, TokenisedBlock]:
        nonlocal only_check
        only_check |= bool(done.bad) and not job.skip_bad
        return block.done / size, done

    first_blocks = list(islice(blocks, MIN_BLOCKS_FOR_WORKERS)) if job.workers > 1 else []
    if job.workers == 1 or len(first_blocks) < MIN_BLOCKS_FOR_WORKERS:
        for block in map(_raise_if_error, chain(first_blocks, blocks)):
            yield share_of(block, task(block, only_check))
        return
    with _processes(task, job.workers) as (submit, first):
        waiting: deque[tuple[Block, Future[TokenisedBlock]]] = deque()

        def next_done() -> tuple[float, TokenisedBlock]:
            block, future = waiting.popleft()
            return share_of(block, future.result())

        for block in chain(first_blocks, blocks):
            if isinstance(block, UserError):  # it is raised last, after errors in the blocks before it
                break
            if not _is_up(first):  # workers take seconds to start; this process tokenises meanwhile
                yield share_of(block, task(block, only_check))
                continue
            waiting.append((block, submit(block, only_check)))
            if len(waiting) >= MAX_BLOCKS_PER_WORKER * job.workers:
                yield next_done()
        while waiting:
            yield next_done()
        _raise_if_error(block)


def _with_final_error(blocks: Iterator[Block]) -> Iterator[Block | UserError]:
    """The blocks, followed by the error that ended their reading, if there was one."""
    try:
        yield from blocks
    except UserError as e:
        yield e


def _raise_if_error(block: Block | UserError) -> Block:
    if isinstance(block, UserError):
        raise block
    return block


# ---------------------------------------------------------------------------------------- processes
_task: _Task  # of a worker process


Submit = Callable[[Block, bool], Future[TokenisedBlock]]


@contextmanager
def _processes(task: _Task, workers: int) -> Iterator[tuple[Submit, Future[None]]]:
    """Starts worker processes, which end with this one.

    Args:
      task: what they do with each block.
      workers: their number.

    Yields:
      A function that submits a block, and a future that is done once the first worker runs.
    """
    # This process may run threads (JAX's, Arrow's) that do not survive a fork. Workers are therefore forked from a
    # fresh process that has imported what they need.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mice_jax.data.tokenise"])
    pool = ProcessPoolExecutor(workers, context, _begin, (task,))
    with ThreadPoolExecutor(1) as starter:  # the first submission waits for that process
        try:
            yield (
                lambda block, only_check: pool.submit(_work, block, only_check),
                starter.submit(lambda: pool.submit(_nothing).result()),
            )
        except BrokenProcessPool as e:
            raise UserError(
                "a process that tokenises was ended from outside, most likely because memory ran out. Finished work "
                "is saved: run the command again, with fewer data.prepare_workers."
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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(block: Block, only_check: bool) -> TokenisedBlock:
    return _task(block, only_check)


# ---------------------------------------------------------------------------------------- columns
def _content_hash(sample: Sample) -> int:
    """A hash of a sample as read; one that begins like its conversation's, so that all turns are held out or none."""
    if sample.conversation:
        turn, whole = (_content_hash(s) for s in (replace(sample, conversation=None), sample.conversation))
        return whole >> 32 << 32 | turn & 0xFFFFFFFF
    content: list[Any] = [sample.messages, sample.tools, sample.unmask]
    if sample.documents or sample.template_kwargs:
        content += [sample.documents, sample.template_kwargs]
    text = json.dumps(content, sort_keys=True)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _list_array(arrays: Sequence[np.ndarray], dtype: pa.DataType) -> pa.ListArray:
    offsets = np.cumsum([0] + [len(a) for a in arrays], dtype=np.int32)
    flat = np.concatenate(arrays) if arrays else np.zeros(0)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat, dtype))
