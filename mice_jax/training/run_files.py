"""Writes the files of a run that exist before its first step, and reads them when the run is resumed."""

import datetime
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from mice_jax.config import Config, to_dict
from mice_jax.data.tokenizer import save_tokenizer
from mice_jax.inference import generation_config
from mice_jax.model_source import ModelSource
from mice_jax.models import hf, untrained
from mice_jax.models.families import FAMILIES
from mice_jax.models.spec import ModelSpec
from mice_jax.models.transformer import Compute
from mice_jax.runtime import cpu_devices
from mice_jax.sharding import LENGTH_AXIS
from mice_jax.storage.checkpoint_steps import saved_steps
from mice_jax.storage.paths import is_remote
from mice_jax.storage.recorded_config import CONFIG
from mice_jax.storage.workdir import Workdir
from mice_jax.training.model_card import README


def start_date(workdir: Workdir) -> datetime.date | None:
    """Returns the date on which a run began, for chat templates that write the date; None for a new run."""
    day = _resolved(workdir).get("today")
    return datetime.date.fromisoformat(day) if day else None


def recorded_choices(workdir: Workdir, mesh: Mesh) -> dict[str, Any]:
    """Returns what "auto" stood for when the run was last started, if that was on such a mesh; else nothing."""
    resolved = _resolved(workdir)
    return resolved if mesh_and_device(mesh).items() <= resolved.items() else {}


def recorded_cpu_devices(workdir: Workdir) -> int | None:
    """Returns the number of devices that a run last had on a CPU; None for a new run, or one on other devices."""
    return cpu_devices.recorded_count({"resolved": _resolved(workdir)})


def hub_models(workdir: Workdir) -> dict[str, dict[str, str]]:
    """Returns the models of the Hub that a run began with, as `build.Inputs.hosted`; empty for a new run."""
    return _resolved(workdir).get("hub", {})


def has_checkpoint(workdir: Workdir) -> bool:
    """Returns whether the workdir holds a run that has saved a checkpoint, which may be damaged.

    In a bucket, which is not asked, a run that has begun counts as one that has.
    """
    if is_remote(workdir.path):
        return bool(_resolved(workdir))
    return bool(saved_steps(workdir.path))


def mesh_and_device(mesh: Mesh) -> dict[str, Any]:
    """Returns the mesh and the kind of its devices, as config.json records them.

    An axis of size 1 that older runs did not have is left out, so that their records still name the same mesh.
    """
    sizes = {axis: size for axis, size in mesh.shape.items() if axis != LENGTH_AXIS or size > 1}
    return {"mesh": sizes, "device": mesh.devices.flat[0].device_kind}


def choices(
    mesh: Mesh, compute: Compute, rows: int, today: datetime.date, hosted: dict[str, dict[str, str]]
) -> dict[str, Any]:
    """Returns what "auto", 0 and the names of models of the Hub stand for in this run, as config.json records it.

    Args:
      mesh: The run's mesh.
      compute: The dtype, attention backend and remat policy.
      rows: The number of rows of a microbatch on one device.
      today: The date that chat templates write.
      hosted: The models of the Hub, with the commits that are used.
    """
    return mesh_and_device(mesh) | {
        "compute_dtype": jnp.dtype(compute.dtype).name,
        "rows_per_device": rows,
        "remat": compute.remat,
        "attention": compute.attention,
        "today": str(today),
        **({"hub": hosted} if hosted else {}),
    }


def write_config(workdir: Workdir, config: Config, resolved: dict[str, Any], provenance: dict[str, Any]) -> None:
    """Writes config.json.

    Args:
      workdir: The run's workdir.
      config: The run's config.
      resolved: The values that "auto" and 0 stand for, from `choices`.
      provenance: The config's file and the overrides of the command line.
    """
    workdir.write_json(CONFIG, to_dict(config) | {"resolved": resolved, "provenance": provenance})


def write_model_folder(folder: Path, source: ModelSource, spec: ModelSpec, tokenizer: PreTrainedTokenizerBase) -> None:
    """Writes what an export needs: config.json, tokenizer, chat template and more; does nothing if they exist.

    Args:
      folder: The run's `model` folder.
      source: The model that the run starts from.
      spec: The run's model, with the vocabulary of the tokenizer.
      tokenizer: The run's tokenizer, with its chat template.
    """
    if (folder / CONFIG).exists():
        return
    folder.mkdir(exist_ok=True)
    save_tokenizer(tokenizer, folder)
    if source.kind != "random":
        untrained.keep(FAMILIES[source.architecture], source.folder, folder)
        # An export has the licence of the first in its model card, and keeps the fields of the second.
        for name in (README, generation_config.FILE):
            if (source.folder / name).is_file():
                shutil.copyfile(source.folder / name, folder / name)
    stored = hf.with_sizes(source.config, spec.vocab_size, source.stored_dtype())
    Workdir(folder).write_json(CONFIG, stored)  # This is written last: its presence means that the folder is complete.


def _resolved(workdir: Workdir) -> dict[str, Any]:
    return (workdir.read_json(CONFIG) or {}).get("resolved", {})
