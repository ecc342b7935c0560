"""Checkpoints with Orbax: saving in the background, retention, and what happens to damaged checkpoints.

`workdir/checkpoints/<step>` holds params, opt_state, average (the running average of params, if the run keeps one) and
progress: the run's counters at that step, and for each saved step its number of samples and its score, the value of
`checkpoint.best_metric`.

On disk, Orbax writes a checkpoint to a temporary folder and commits it by a rename. In a bucket, which has no renames,
it commits a checkpoint by writing a marker object into it. It removes what interrupted saves left. A committed
checkpoint then gets a manifest with the sizes and checksums of its files (storage/manifest.py).

A run that resumes checks its checkpoints from the newest to the first that is intact; it does not read older ones. A
checkpoint that differs from its manifest, or that cannot be read, is damaged. It is moved to `checkpoints/damaged/` and
never deleted. In a bucket, a checkpoint that agrees with its manifest but cannot be read stays where it is, and the
command ends with a StoreError, since the reason may be an outage.
"""

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from mice_jax import config
from mice_jax.errors import AgreedError, StoreError, UserError, one_line
from mice_jax.models.checkpoint_layout import dotted_path
from mice_jax.models.transformer import VOCAB_MULTIPLE, Params, vocab_multiple
from mice_jax.runtime import distributed
from mice_jax.step import TrainState
from mice_jax.storage.checkpoint_steps import AVERAGE, check_has_average, choose_step
from mice_jax.storage.manifest import MANIFEST, verify, write_manifest
from mice_jax.storage.paths import RunPath, is_remote, list_objects, move, write_atomically
from mice_jax.storage.retention import checkpoints_to_keep, rank_by_score

# The parameters whose first dim is the vocabulary, which is padded for the size of the mesh's tensor axis.
VOCABULARY_PARAMS = ("embed.table", "head.weight", "own_embeddings.table")
MAX_TENSOR = 128  # the largest tensor axis for which `differ_in_padding` knows the padding
# The marker object. In a bucket, Orbax takes every folder without it for an interrupted save and removes the folder.
COMMITTED = "commit_success.txt"
# Errors of a full disk, a quota or a limit on file sizes contain one of these; 28 is ENOSPC, 27 is EFBIG.
NO_SPACE_ERRORS = ("no space", "quota", "file too large", "os_error_code='28'", "os_error_code='27'")
MAX_ERROR_CHARS = 300


# ---------------------------------------------------------------------------------------- reading
class CheckpointReader:
    """Read-only access to a run's checkpoints; safe while the run is still writing.

    Only the subclass `Checkpoints` opens them with `read_only=False`.
    """

    def __init__(self, workdir: RunPath, *, read_only: bool = True):
        self.folder = workdir / "checkpoints"
        self._manager = self._open(read_only)

    def _open(self, read_only: bool) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            create=not read_only,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,
            enable_async_checkpointing=not read_only,
        )
        handlers = {
            "params": ocp.StandardCheckpointHandler(),
            "opt_state": ocp.StandardCheckpointHandler(),
            "average": ocp.StandardCheckpointHandler(),
            "progress": ocp.JsonCheckpointHandler(),
        }
        with _explain_store_errors(self.folder):
            folder = self.folder.resolve() if isinstance(self.folder, Path) else self.folder  # Orbax needs it so
            return ocp.CheckpointManager(folder, options=options, item_handlers=handlers)

    def steps(self) -> list[int]:
        """Returns the steps of all committed checkpoints, in order."""
        return sorted(self._manager.all_steps())

    def resolve_step(self, step: int | None) -> int:
        """Returns `step`, or the newest step if it is None; raises UserError if there is no such checkpoint."""
        return choose_step(self.folder, self.steps(), step)

    def samples(self, step: int) -> int:
        """Returns the number of samples that the run had seen at a step; raises UserError if it cannot be read."""
        items = ocp.args.Composite(progress=ocp.args.JsonRestore())
        with self._explain_damage(step):
            return self._manager.restore(step, args=items)["progress"]["samples"]

    def restore_params(self, step: int, abstract: Params, item: str = "params") -> Params:
        """Restores the parameters of a step.

        Args:
          step: a step that has a checkpoint.
          abstract: the shapes, dtypes and shardings of the parameters.
          item: "params", or "average" for the running average of the parameters.

        Raises:
          UserError: if the checkpoint is damaged, or has other parameters, or no average.
        """
        self._raise_if_damaged(step, item)
        with self._explain_damage(step):
            return self._restore_params(step, abstract, item)

    def _verify(self, step: int, item: str = "") -> str | None:
        """Compares a checkpoint with its manifest; returns a description of the damage, or None in every process.

        Only the main process reads the files, so it alone knows the details.

        Args:
          step: the step of the checkpoint.
          item: the part that is compared, such as "params"; the whole checkpoint by default.
        """
        with distributed.raise_on_all_processes(), _explain_store_errors(self.folder):
            damage = verify(self.folder / str(step), item) if distributed.is_main_process() else None
        if not distributed.is_true_on_any_process(damage is not None):
            return None
        return damage or "the main process found that it differs from its manifest"

    def _raise_if_damaged(self, step: int, item: str = "") -> None:
        """Raises UserError if a checkpoint differs from its manifest. Orbax reads changed bytes without an error."""
        if damage := self._verify(step, item):
            raise UserError(self._unreadable(step, damage))

    def _unreadable(self, step: int, reason: str) -> str:
        others = ", ".join(str(s) for s in self.steps() if s != step) or "none"
        return (
            f"{self.folder / str(step)} cannot be read ({reason}). If it is damaged, use another step "
            f"(there are {others}) with --step or as model.init_from={self.folder}/STEP. To resume the run, "
            "move this checkpoint out of that folder; if it is the newest, the run does so itself."
        )

    @contextlib.contextmanager
    def _explain_damage(self, step: int) -> Iterator[None]:
        """Turns the errors of a checkpoint that cannot be read into an error for the user."""
        try:
            yield
        except UserError:
            raise
        except Exception as e:  # Orbax may raise any exception on damaged files
            if distributed.is_lost_peer_error(e):
                raise  # It says nothing about the files.
            found = None
            with contextlib.suppress(OSError):
                found = verify(self.folder / str(step))
            reason = found or one_line(e).partition(" See full TensorStore details")[0][:MAX_ERROR_CHARS].rstrip(".")
            raise UserError(self._unreadable(step, reason)) from e

    def _restore_params(self, step: int, abstract: Params, item: str) -> Params:
        if item == AVERAGE:
            check_has_average(self.folder / str(step))
        self._check_params(step, abstract, item)
        items = ocp.args.Composite(**{item: ocp.args.StandardRestore(abstract, strict=False)})
        return self._manager.restore(step, args=items)[item]

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Restores the state of a step, with the shapes, dtypes and shardings of `abstract`, and the run's progress.

        Raises:
          UserError: if the checkpoint is damaged, or has other parameters.
        """
        self._raise_if_damaged(step)
        with self._explain_damage(step):
            return self._restore(step, abstract)

    def _restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        self._check_params(step, abstract.params)
        items = {
            # strict=False pads or cuts the vocabulary as this mesh needs it. _check_params rejects other differences of
            # the params. The shapes of opt_state and average are not checked: they follow from those of the params and
            # from config fields that may not change on resume.
            "params": ocp.args.StandardRestore(abstract.params, strict=False),
            "opt_state": ocp.args.StandardRestore(abstract.opt_state, strict=False),
            "progress": ocp.args.JsonRestore(),
        }
        if abstract.average is not None:
            items["average"] = ocp.args.StandardRestore(abstract.average, strict=False)
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        # The step is not stored: it is the checkpoint's name.
        count = jax.device_put(jnp.asarray(step, jnp.int32), abstract.step.sharding)
        average = restored["average"] if abstract.average is not None else None
        return TrainState(count, restored["params"], restored["opt_state"], average), restored["progress"]

    def _check_params(self, step: int, abstract: Params, item: str = "params") -> None:
        """Raises UserError if stored and requested parameters differ in more than the padding of the vocabulary.

        With `strict=False`, Orbax silently pads and cuts arrays to the requested shapes. That is right only for the
        padding of the vocabulary, which is zero.
        """
        # The metadata of a damaged item may be None. The callers treat the AttributeError that follows as damage.
        metadata = self._manager.item_metadata(step)[item]
        stored, wanted = _shapes(metadata.tree), _shapes(abstract)
        for name in [*wanted, *(stored.keys() - wanted.keys())]:
            found, asked = stored.get(name), wanted.get(name)
            if found == asked or (found and asked and differ_in_padding(name, found, asked)):
                continue
            raise UserError(
                f"{self.folder / str(step)} holds {_described(name, found)}, but the model that is asked for has "
                f"{_described(name, asked)}. The model's config.json has probably changed since the run started: that "
                "of model.init_from for mice train, WORKDIR/model/config.json for other commands. Undo the change."
            )

    def close(self) -> None:
        """Closes Orbax's manager; if a pending save has failed, its error is only printed."""
        try:
            self._manager.close()
        except Exception as e:
            print(f"warning: {self.folder}: {one_line(e)[:MAX_ERROR_CHARS]}", file=sys.stderr)


# ---------------------------------------------------------------------------------------- writing
class Checkpoints(CheckpointReader):
    """The checkpoints of a run that is training. Every process of the run must make the same calls."""

    def __init__(
        self,
        workdir: RunPath,
        policy: config.Checkpoint | None = None,
        *,
        warm_start_ranges: Sequence[range] = (),
        check_ownership: Callable[[], None] = lambda: None,
    ):
        """Opens or creates the folder, and removes the remains of interrupted saves.

        Args:
          workdir: the run's folder, on disk or in a bucket.
          policy: which checkpoints are kept; None keeps all.
          warm_start_ranges: for each phase from whose best checkpoint the next phase starts (`seed_from="best"`), the
            steps of that phase. The best checkpoint of each range is kept.
          check_ownership: raises, in every process, if a process outside of this run has taken the lock of the workdir.
            It is called before each save, and before a manifest is written and old checkpoints are deleted.
        """
        self._policy = policy or config.Checkpoint()
        self._warm_start_ranges = warm_start_ranges
        self._check_ownership = check_ownership
        self._saved: dict[int, dict[str, float]] = {}  # by step: its samples, and its score if it has one
        self._pending_manifest: int | None = None  # step of the save that has no manifest yet
        self._last_committed: int | None = None
        super().__init__(workdir, read_only=False)

    # ---- Saving ---------------------------------------------------------------------------------------------
    def save(self, state: TrainState, progress: dict[str, Any], score: float | None = None) -> None:
        """Waits for the previous save, then copies the arrays and writes them in the background.

        A checkpoint that the policy no longer keeps is deleted only after a newer one is complete. From the first
        completed save on, the folder therefore always has a complete checkpoint.

        Args:
          state: the state after `state.step` steps.
          progress: the run's counters, which must be serialisable to JSON and include `samples`.
          score: the step's value of the policy's `best_metric`, if it was measured.
        """
        self.wait()
        step = int(jax.device_get(state.step))
        self._saved[step] = {"samples": progress["samples"]}
        if score is not None:
            self._saved[step]["score"] = score
        trees = {"params": state.params, "opt_state": state.opt_state, "average": state.average}
        items: dict[str, Any] = {n: ocp.args.StandardSave(tree) for n, tree in trees.items() if tree is not None}
        items["progress"] = ocp.args.JsonSave(progress | {"saved": {str(s): v for s, v in self._saved.items()}})
        self._check_ownership()
        with self._raise_write_errors_on_all_processes():
            saved = self._manager.save(step, args=ocp.args.Composite(**items))
        assert saved, f"steps are saved in order, and the folder has step {step} or a later one"
        self._pending_manifest = step

    def wait(self) -> None:
        """Blocks until the pending save is committed, its manifest written, and what the policy drops deleted."""
        step = self._pending_manifest
        self._pending_manifest = None
        with self._raise_write_errors_on_all_processes():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        if step is None:
            return
        self._last_committed = step
        self._check_ownership()
        with self._raise_write_errors_on_all_processes():
            if distributed.is_main_process():
                write_manifest(self.folder / str(step))
        with self._raise_write_errors_on_all_processes():
            self._delete_expired()

    def _delete_expired(self) -> None:
        # The policy applies to the checkpoints whose samples are known. Any others are kept.
        present = {step: self._saved[step] for step in self.steps() if step in self._saved}
        warm_start_steps = [self.best_step(steps) for steps in self._warm_start_ranges]
        kept = checkpoints_to_keep(
            present,
            keep_last=self._policy.keep_last,
            keep_best=self._policy.keep_best,
            keep_every=self._policy.keep_every,
            mode=self._policy.best_mode,
            also={step for step in warm_start_steps if step is not None},
        )
        for step in sorted(present.keys() - kept):
            self._manager.delete(step)
            del self._saved[step]

    def best_step(self, steps: range) -> int | None:
        """Returns the saved step with the best score among `steps`; None if none of them has a score."""
        best = rank_by_score({s: v for s, v in self._saved.items() if s in steps}, self._policy.best_mode)
        return best[0] if best else None

    def last_committed_step(self) -> int | None:
        """Returns the newest step known to be committed, without reading the folder, which may be unavailable."""
        if self._pending_manifest is not None and not self._manager.is_saving_in_progress():
            with contextlib.suppress(Exception):  # a failed save is not committed
                self._manager.check_for_errors()
                self._last_committed = self._pending_manifest
        return self._last_committed

    @contextlib.contextmanager
    def _raise_write_errors_on_all_processes(self) -> Iterator[None]:
        """Raises an error of any process on all processes, with a message for the user if the storage failed.

        Unlike `distributed.raise_on_all_processes`, it also handles errors that are not a UserError. If a peer is
        lost, its error is raised at once.
        """
        failure = None
        try:
            with _explain_store_errors(self.folder):
                yield
        except Exception as e:
            # A lost process would not join the collective below. A JaxRuntimeError never comes from the storage.
            if isinstance(e, jax.errors.JaxRuntimeError) or distributed.is_lost_peer_error(e):
                raise
            failure = e
        failed, in_store = distributed.any_across_processes(failure is not None, isinstance(failure, StoreError))
        if failed:
            kind = StoreError if in_store else AgreedError
            if isinstance(failure, UserError):
                raise kind(str(failure)) from failure
            raise failure or kind("a checkpoint could not be written; another process prints the reason.")

    # ---- Preemption notices of the cluster, which Orbax's manager passes on from JAX ----------------------------
    def preempted_before(self, start: int) -> bool:
        """Returns whether a preemption notice came before the first step of this process.

        Call it once, before the first `reached_preemption`. JAX reports a notice at one step only: the step after the
        highest one that any process has passed to `reached_preemption`. If the notice came before any call, that is
        step 1, which a resumed run would never ask for. So this function asks for step 1. It then asks for `start`, so
        that a later notice is reported at one of the steps that follow `start`.

        Args:
          start: the number of steps that were done before this process started.
        """
        at_step_1 = self._manager.reached_preemption(1)  # Every process makes both calls, in this order.
        at_start = self._manager.reached_preemption(start)
        return at_step_1 or at_start

    def reached_preemption(self, step: int) -> bool:
        """Returns whether to stop after a step because of a preemption notice.

        Call it after every step. For each notice it is true at one step, which is the same in every process.
        """
        return self._manager.reached_preemption(step)

    # ---- Restoring ------------------------------------------------------------------------------------------
    def restore_newest(
        self, abstract: TrainState, log: Callable[[str], None]
    ) -> tuple[int, TrainState, dict[str, Any]] | None:
        """Restores the newest checkpoint that is not damaged; damaged newer ones are moved to `damaged/`.

        Args:
          abstract: shapes, dtypes and shardings of the state.
          log: called with a sentence about each damaged checkpoint.

        Returns:
          The step, the state and the progress; None if the run has no checkpoint at all, not even a damaged one.

        Raises:
          UserError: if all checkpoints are damaged (the run does not silently start from the beginning), or if the
            newest has other parameters.
          StoreError: if the bucket cannot be listed or read at the moment.
        """
        steps = self.steps()
        while steps:
            step = steps[-1]
            damage = self._verify(step)
            if damage is None:
                restored, damage = self._try_restore(step, abstract)
                if restored is not None:
                    state, progress = restored
                    saved = progress.pop("saved", {})
                    self._saved = {int(s): dict(v) for s, v in saved.items() if int(s) in steps}
                    self._last_committed = step
                    return step, state, progress
            moved_to = self._move_to_damaged(step)
            log(f"the checkpoint of step {step} is damaged ({damage}); it was moved to {moved_to}")
            steps = self.steps()
        self._raise_if_checkpoints_exist()
        return None

    def _try_restore(
        self, step: int, abstract: TrainState
    ) -> tuple[tuple[TrainState, dict[str, Any]] | None, str | None]:
        """Returns the restored state and progress, and None; or None, and a description of the damage.

        Either every process restores the checkpoint, or none does.
        """
        restored, damage = None, None
        try:
            restored = self._restore(step, abstract)
        except UserError:
            raise
        except Exception as e:  # Orbax may raise any exception on damaged files
            if distributed.is_lost_peer_error(e):
                raise  # It says nothing about the files, and the lost process would not join the collective below.
            damage = one_line(e)[:MAX_ERROR_CHARS]
        if not distributed.is_true_on_any_process(restored is None):
            return restored, None
        damage = damage or "another process could not read it"
        # A checkpoint with a manifest has passed `_verify`. In a bucket, reading may still fail for another reason.
        if is_remote(self.folder) and (self.folder / str(step) / MANIFEST).exists():
            raise StoreError(f"{self.folder / str(step)} is complete, but cannot be read at the moment: {damage}.")
        return None, damage

    def _move_to_damaged(self, step: int) -> RunPath:
        """Moves a checkpoint to `damaged/`, where Orbax does not see it; returns its new place."""
        self._manager.close()
        folder = self.folder / "damaged"
        names = [str(step), *(f"{step}-{i}" for i in range(2, 1000))]
        target = next(folder / name for name in names if not (folder / name).exists())
        distributed.wait_for_all()  # All have chosen the name before the main process uses it.
        if distributed.is_main_process():
            if is_remote(folder):
                write_atomically(folder / COMMITTED, "")  # Otherwise Orbax would remove damaged/; see COMMITTED.
            move(self.folder / str(step), target)
        distributed.wait_for_all()  # No process lists the folder before the checkpoint is moved.
        self._manager = self._open(read_only=False)
        return target

    def _raise_if_checkpoints_exist(self) -> None:
        """Raises if the folder holds checkpoints although Orbax lists none: a failed listing, or all are damaged."""
        if is_remote(self.folder) and any(
            re.fullmatch(f"[0-9]+/{COMMITTED}", name) for name in list_objects(self.folder)
        ):
            raise StoreError(
                f"{self.folder} holds checkpoints, but could not be listed at the moment. Run the command again."
            )
        folder = self.folder / "damaged"
        damaged = sorted(str(p) for p in folder.iterdir() if p.name != COMMITTED) if folder.exists() else []
        if damaged:
            raise UserError(
                f"all checkpoints in {self.folder} are damaged: {', '.join(damaged)}. Start in another --workdir, or "
                "remove these folders to start this run from the beginning."
            )


# ---------------------------------------------------------------------------------------- shared
def differ_in_padding(name: str, a: Sequence[int], b: Sequence[int]) -> bool:
    """Returns whether two shapes may be those of one parameter whose vocabulary is padded for two different meshes.

    A vocabulary is padded to a multiple of `vocab_multiple(tensor)`, where `tensor` is the size of the tensor axis.

    Args:
      name: the dotted name of the parameter.
      a: a shape.
      b: another shape.
    """
    if name not in VOCABULARY_PARAMS or len(a) != len(b) or a[1:] != b[1:]:
        return False
    small, large = sorted((a[0], b[0]))
    multiples = {vocab_multiple(tensor) for tensor in range(1, MAX_TENSOR + 1)}
    return small % VOCAB_MULTIPLE == 0 and any(large % m == 0 and large - m < small for m in multiples)


def _shapes(params: Any) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each parameter by its dotted name."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {dotted_path(path): tuple(leaf.shape) for path, leaf in leaves}


def _described(name: str, shape: tuple[int, ...] | None) -> str:
    return f"no {name}" if shape is None else f"{name} with the shape {list(shape)}"


@contextlib.contextmanager
def _explain_store_errors(folder: RunPath) -> Iterator[None]:
    """Turns the errors of a full disk or an unavailable bucket into errors for the user."""
    try:
        yield
    except (AssertionError, AttributeError, LookupError, TypeError, jax.errors.JaxRuntimeError):  # bugs and lost peers
        raise
    except Exception as e:
        if distributed.is_lost_peer_error(e):
            raise
        text = one_line(e)
        if is_remote(folder):
            raise StoreError(f"{folder} could not be opened or written: {text[:MAX_ERROR_CHARS]}.") from e
        if not any(error in text.lower() for error in NO_SPACE_ERRORS):
            raise
        stats = os.statvfs(folder.parent)  # the folder itself may not exist yet
        raise UserError(
            f"the checkpoint could not be written to {folder}, since there is no space for it ({text[:200]}; the disk "
            f"has {stats.f_bavail * stats.f_frsize:,} bytes free). The earlier checkpoints are complete. Delete old "
            "ones or other files, and run the same command to resume. checkpoint.keep_last makes a run keep fewer."
        ) from e
