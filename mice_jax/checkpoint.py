"""Checkpoints: orbax behind one small door; which are kept, and what is done about a damaged one.

`workdir/checkpoints/<step>` holds params, opt_state and progress (what metrics.jsonl goes on from, and each saved
step's samples and score). A step's folder has its name only once it is whole; what a killed save left is another name
and is removed. Once whole it gets a `manifest.json`: the size and the CRC-32 of each of its files. A checkpoint that
does not agree with it, or that cannot be read, is set aside in `checkpoints/damaged/` and never deleted.
"""

import contextlib
import functools
import json
import math
import os
import re
import sys
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from mice_jax.config import Checkpoint
from mice_jax.errors import StoreError, UserError, one_line
from mice_jax.models.transformer import Params
from mice_jax.step import TrainState
from mice_jax.storage.paths import RunPath, is_remote, list_objects, move, write_atomically

PADDED = ("embed", "head")  # what has a vocabulary's dim
# Of what it finds in a bucket orbax removes, as saves that were cut short, all folders but those that hold this.
COMMITTED = "commit_success.txt"
MANIFEST = "manifest.json"
READ_BYTES = 1 << 24
NO_ROOM = ("no space", "quota", "file too large", "os_error_code='28'", "os_error_code='27'")


def to_keep(
    saved: Mapping[int, Mapping[str, float]],
    *,
    keep_last: int,
    keep_best: int,
    keep_every: int,
    mode: str,
    also: Collection[int] = (),
) -> set[int]:
    """Which of the `saved` steps (with their samples and, where it was measured, their score) are kept.

    All of them where nothing is asked for; else the newest one always, the newest `keep_last`, the best `keep_best`,
    each that is the first at or past a multiple of `keep_every` samples, and `also`.
    """
    steps = sorted(saved)
    if not (keep_last or keep_best or keep_every):
        return set(steps)
    kept = set(steps[-max(1, keep_last) :]) | set(ranked(saved, mode)[:keep_best]) | (set(also) & set(steps))
    before = 0
    for step in steps:
        samples = int(saved[step]["samples"])
        if keep_every and samples // keep_every > before // keep_every:
            kept.add(step)
        before = samples
    return kept


def ranked(saved: Mapping[int, Mapping[str, float]], mode: str) -> list[int]:
    """The steps that have a score, the best first; of equal ones the earlier."""
    scores = {step: s["score"] for step, s in saved.items() if math.isfinite(s.get("score", math.nan))}
    sign = 1 if mode == "min" else -1
    return sorted(scores, key=lambda step: (sign * scores[step], step))


class Checkpoints:
    """The checkpoints of one run.

    Every process of the run makes the same calls. `lead` is whether this one writes what is written once, `agree` says
    whether a flag is set in any of them; `check` raises, in each of them, where the folder is another run's by now, and
    is asked before anything there is written or deleted. The best step of each of the ranges in `seeding` is kept: a
    phase starts from it.
    """

    def __init__(
        self,
        workdir: RunPath,
        policy: Checkpoint | None = None,
        *,
        seeding: Sequence[range] = (),
        read_only: bool = False,
        lead: bool = True,
        agree: Callable[[bool], bool] = lambda flag: flag,
        check: Callable[[], None] = lambda: None,
    ):
        self.folder = (workdir.resolve() if isinstance(workdir, Path) else workdir) / "checkpoints"
        self._policy, self._lead, self._agree, self._check = policy or Checkpoint(), lead, agree, check
        self._saved: dict[int, dict[str, float]] = {}
        self._seeding = seeding
        self._bare: int | None = None  # the step whose manifest is not written yet
        self._whole: int | None = None  # the newest step that is known to be
        self._read_only = read_only
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            create=not self._read_only,
            read_only=self._read_only,
            cleanup_tmp_directories=not self._read_only,
            enable_async_checkpointing=not self._read_only,
        )
        handlers = {
            "params": ocp.StandardCheckpointHandler(),
            "opt_state": ocp.StandardCheckpointHandler(),
            "progress": ocp.JsonCheckpointHandler(),
        }
        with _told_of_failures(self.folder):
            return ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    # ---- Saving -------------------------------------------------------------------------------------------------
    def save(self, state: TrainState, progress: dict[str, Any], score: float | None = None) -> None:
        """Starts to save; the arrays are copied before it returns, the files written behind.

        `progress` is anything that JSON can hold, the samples so far among it. Before it starts, the save before is
        waited for, and only then is deleted what need not be kept: so there is a whole newest one at any time.
        """
        self.wait()
        step = int(state.step)
        self._saved[step] = {"samples": progress["samples"]} | ({} if score is None else {"score": score})
        items = {
            "params": ocp.args.StandardSave(state.params),
            "opt_state": ocp.args.StandardSave(state.opt_state),
            "progress": ocp.args.JsonSave(progress | {"saved": {str(s): v for s, v in self._saved.items()}}),
        }
        self._check()
        with self._together():
            self._manager.save(step, args=ocp.args.Composite(**items))
        self._bare = step

    def preempted_before(self, start: int) -> bool:
        """Whether a machine of the run is to be taken away, as any of its processes was told; asked once, at its start.

        The coordination service names the step after the latest that any process has asked about: the first of all
        where none has, which a resumed run would never come to.
        """
        told = self._manager.reached_preemption(1)
        return self._manager.reached_preemption(start) or told

    def reached_preemption(self, step: int) -> bool:
        """Whether it is since then: true at one step, the same in every process; asked at every step."""
        return self._manager.reached_preemption(step)

    def newest_whole(self) -> int | None:
        """The newest step that is known to be whole, without a look at the folder, whose store may be down."""
        if self._bare is not None and not self._manager.is_saving_in_progress():
            with contextlib.suppress(Exception):  # what failed is not whole
                self._manager.check_for_errors()
                self._whole = self._bare
        return self._whole

    def best(self, steps: range) -> int | None:
        """The best of those saved steps that are among `steps`, by the policy's metric."""
        found = ranked({s: v for s, v in self._saved.items() if s in steps}, self._policy.best_mode)
        return found[0] if found else None

    def wait(self) -> None:
        """Until every save is whole, sealed, and what need not be kept is gone."""
        bare, self._bare = self._bare, None
        with self._together():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        if bare is None or bare not in self.steps():  # what failed is none
            return
        self._whole = bare
        self._check()
        with self._together():
            if self._lead:
                _seal(self.folder / str(bare))
        with self._together():
            self._delete_rest()

    def _delete_rest(self) -> None:
        """Deletes what need not be kept."""
        p = self._policy
        there = {s: self._saved[s] for s in self.steps() if s in self._saved}
        kept = to_keep(
            there,
            keep_last=p.keep_last,
            keep_best=p.keep_best,
            keep_every=p.keep_every,
            mode=p.best_mode,
            also={best for steps in self._seeding if (best := self.best(steps))},
        )
        for step in sorted(there.keys() - kept):
            self._manager.delete(step)
            del self._saved[step]

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """What fails in one process fails in all of them, in words."""
        failure = None
        try:
            with _told_of_failures(self.folder):
                yield
        except jax.errors.JaxRuntimeError:  # a process is gone: it would be waited for
            raise
        except Exception as e:
            failure = e
        if self._agree(failure is not None):
            raise failure or StoreError("a checkpoint could not be written; another process says why.")

    def close(self) -> None:
        """Lets go of the folder; a save that is still under way is waited for, and a failure of it only said."""
        try:
            self._manager.close()
        except Exception as e:
            print(f"warning: {self.folder}: {one_line(e)[:300]}", file=sys.stderr)

    # ---- Restoring ----------------------------------------------------------------------------------------------
    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def restore_newest(
        self, abstract: TrainState, say: Callable[[str], None]
    ) -> tuple[int, TrainState, dict[str, Any]] | None:
        """The newest checkpoint that is whole: step, state and progress; None where there is none at all.

        One that is damaged is set aside, with a word. Raises UserError where only damaged ones are there: a run is not
        silently started from nothing.
        """
        while steps := self.steps():
            step = steps[-1]
            damage = damage_of(self.folder / str(step)) if self._lead else None  # every byte is read: once will do
            state, progress = None, {}
            if not (differs := self._agree(damage is not None)):
                try:
                    state, progress = self.restore(step, abstract)
                except UserError:
                    raise
                except Exception as e:  # whatever a damaged file makes of its readers
                    damage = one_line(e)[:300]
            if not self._agree(state is None):
                assert state is not None
                self._take_saved(progress.pop("saved", {}), steps)
                self._whole = step
                return step, state, progress
            damage = damage or "another process could not read it"
            if is_remote(self.folder) and not differs and (self.folder / str(step) / MANIFEST).exists():
                raise StoreError(f"{self.folder / str(step)} is whole, but cannot be read just now: {damage}.")
            place = self._set_aside(step)
            say(f"the checkpoint of step {step} is damaged ({damage}); it is set aside as {place}")
        if is_remote(self.folder) and any(
            re.fullmatch(f"[0-9]+/{COMMITTED}", name) for name in list_objects(self.folder)
        ):
            raise StoreError(
                f"{self.folder} holds checkpoints, but could not be listed just now. Run the command again."
            )
        if damaged := self._damaged_ones():
            raise UserError(
                f"{self.folder} holds no checkpoint that is whole; damaged are {', '.join(damaged)}. Start in "
                "another --workdir, or remove them to start this one anew."
            )
        return None

    def _take_saved(self, saved: Mapping[str, Any], steps: Collection[int]) -> None:
        self._saved = {int(s): dict(v) for s, v in saved.items() if int(s) in steps}

    def _damaged_ones(self) -> list[str]:
        folder = self.folder / "damaged"
        return sorted(str(p) for p in folder.iterdir() if p.name != COMMITTED) if folder.exists() else []

    def _set_aside(self, step: int) -> RunPath:
        """Moves a checkpoint to where orbax does not see it."""
        self._manager.close()
        folder = self.folder / "damaged"
        names = [str(step), *(f"{step}-{i}" for i in range(2, 1000))]
        place = next(folder / n for n in names if not (folder / n).exists())
        self._agree(False)  # every process has seen the names before one of them is taken
        if self._lead:
            if is_remote(folder):
                write_atomically(folder / COMMITTED, "")
            move(self.folder / str(step), place)
        self._agree(False)  # and nobody looks before it is
        self._manager = self._open()
        return place

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The state at a step, laid out as `abstract` says, and its progress."""
        self._check_shapes(step, abstract.params)
        items = {
            "params": ocp.args.StandardRestore(abstract.params, strict=False),
            "opt_state": ocp.args.StandardRestore(abstract.opt_state, strict=False),
            "progress": ocp.args.JsonRestore(),
        }
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        count = jax.device_put(jnp.asarray(step, jnp.int32), abstract.step.sharding)
        return TrainState(count, restored["params"], restored["opt_state"]), restored["progress"]

    def samples(self, step: int) -> int:
        """How many samples the run had seen at a step."""
        items = ocp.args.Composite(progress=ocp.args.JsonRestore())
        return self._manager.restore(step, args=items)["progress"]["samples"]

    def restore_params(self, step: int, abstract: Params) -> Params:
        """The parameters alone, laid out as `abstract` says."""
        self._check_shapes(step, abstract)
        items = ocp.args.Composite(params=ocp.args.StandardRestore(abstract, strict=False))
        return self._manager.restore(step, args=items)["params"]

    def _check_shapes(self, step: int, abstract: Params) -> None:
        """Restoring pads and cuts arrays to the shapes that are asked for: that may happen to a vocabulary alone.

        It is padded to what the tensor axis divides, with zeros here as there.
        """
        stored = self._manager.item_metadata(step)["params"]
        for path, leaf in jax.tree_util.tree_leaves_with_path(abstract):
            found = functools.reduce(lambda tree, key: tree[key.key], path, stored).shape
            differing = sum(a != b for a, b in zip(found, leaf.shape, strict=True))
            if differing > (path[0].key in PADDED):
                name = jax.tree_util.keystr(path, simple=True, separator=".")
                raise UserError(
                    f"{self.folder / str(step)} holds {name} of shape {list(found)}, but the model's config.json makes "
                    f"it {list(leaf.shape)}. Put back the config.json that the run was made with."
                )


def pick_step(checkpoints: Checkpoints, step: int | None) -> int:
    """A step that is there: the asked one, or the newest."""
    steps = checkpoints.steps()
    if not steps:
        raise UserError(f"{checkpoints.folder} holds no whole checkpoint.")
    if step is not None and step not in steps:
        raise UserError(f"{checkpoints.folder} has no step {step}; it has {', '.join(map(str, steps))}.")
    return steps[-1] if step is None else step


# ---------------------------------------------------------------------------------------- damage
def contents(folder: RunPath) -> dict[str, list[Any]]:
    """What tells a checkpoint from any other: what its manifest says of its files, or they themselves."""
    file = folder / MANIFEST
    return json.loads(file.read_text())["files"] if file.exists() else _digests(folder)


def damage_of(folder: RunPath) -> str | None:
    """How a checkpoint's files differ from its manifest; None where they do not, or where it has none.

    A process that is killed between a save's end and its manifest leaves none; then reading alone tells.
    """
    file = folder / MANIFEST
    if not file.exists():
        return None
    try:
        wanted = json.loads(file.read_text())["files"]
    except (ValueError, KeyError, TypeError):
        return f"its {MANIFEST} cannot be read"
    found = _digests(folder)
    missing = sorted(wanted.keys() - found)
    if missing:
        return f"{missing[0]} is missing"
    for name, (size, crc) in wanted.items():
        if found[name][0] != size:
            return f"{name} has {found[name][0]:,} bytes, not {size:,}"
        if found[name][1] != crc:
            return f"{name} has other bytes than were written"
    return None


def _seal(folder: RunPath) -> None:
    """Writes the manifest of a whole checkpoint."""
    write_atomically(folder / MANIFEST, json.dumps({"files": _digests(folder)}))


def _digests(folder: RunPath) -> dict[str, list[Any]]:
    """Size and CRC-32 of each of a checkpoint's files; in a bucket, what the store knows of its objects."""
    if not isinstance(folder, Path):
        return {name: list(known) for name, known in list_objects(folder).items() if name != MANIFEST}

    def digest(file: Path) -> list[Any]:
        size = crc = 0
        with file.open("rb") as opened:
            while block := opened.read(READ_BYTES):
                size, crc = size + len(block), zlib.crc32(block, crc)
        return [size, crc]

    ours = (MANIFEST, f".{MANIFEST}.partial")
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in ours]
    with ThreadPoolExecutor(os.cpu_count()) as threads:  # crc32 lets go of the interpreter's lock
        return {str(p.relative_to(folder)): d for p, d in zip(files, threads.map(digest, files), strict=True)}


@contextlib.contextmanager
def _told_of_failures(folder: RunPath) -> Iterator[None]:
    """Turns what a save fails with, where there is no room or a store is down, into a word for the user."""
    try:
        yield
    except (AssertionError, AttributeError, LookupError, TypeError, jax.errors.JaxRuntimeError):  # no store's
        raise
    except Exception as e:
        said = one_line(e)
        if is_remote(folder):
            raise StoreError(f"{folder} could not be written: {said[:300]}.") from e
        if not any(word in said.lower() for word in NO_ROOM):
            raise
        stats = os.statvfs(folder.parent)  # it may be the folder that could not be made
        raise UserError(
            f"the checkpoint could not be written to {folder}: there is no room ({said[:200]}); "
            f"{stats.f_bavail * stats.f_frsize:,} bytes are free. The earlier checkpoints are whole. Make room (or set "
            "checkpoint.keep_last) and run the same command to go on."
        ) from e
