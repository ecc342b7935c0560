"""Checkpoints: orbax behind one small door.

`workdir/checkpoints/<step>` holds params, opt_state and progress (the counters that metrics.jsonl carries on
from). A step's folder has its name only once it is whole; what a killed save left is another name and is removed.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from mice_jax.errors import UserError
from mice_jax.models.transformer import Params
from mice_jax.step import TrainState

PADDED = ("embed", "head")  # what has a vocabulary's dim


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, workdir: Path, keep_last: int = 0, read_only: bool = False):
        self.folder = workdir.resolve() / "checkpoints"
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep_last or None,
            create=not read_only,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,
            enable_async_checkpointing=not read_only,
        )
        handlers = {
            "params": ocp.StandardCheckpointHandler(),
            "opt_state": ocp.StandardCheckpointHandler(),
            "progress": ocp.JsonCheckpointHandler(),
        }
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    def save(self, state: TrainState, progress: dict[str, Any]) -> None:
        """Starts to save; the arrays are copied before it returns, the files written behind."""
        items = {
            "params": ocp.args.StandardSave(state.params),
            "opt_state": ocp.args.StandardSave(state.opt_state),
            "progress": ocp.args.JsonSave(progress),
        }
        self._manager.save(int(state.step), args=ocp.args.Composite(**items))

    def latest(self) -> int | None:
        """The newest whole checkpoint's step."""
        return self._manager.latest_step()

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

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def wait(self) -> None:
        """Until every save is whole."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


def pick_step(checkpoints: Checkpoints, step: int | None) -> int:
    """A step that is there: the asked one, or the newest."""
    steps = checkpoints.steps()
    if not steps:
        raise UserError(f"{checkpoints.folder} holds no whole checkpoint.")
    if step is not None and step not in steps:
        raise UserError(f"{checkpoints.folder} has no step {step}; it has {', '.join(map(str, steps))}.")
    return steps[-1] if step is None else step
