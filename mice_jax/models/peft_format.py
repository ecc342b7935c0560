"""Adapters under the names of Hugging Face checkpoints: the targets of a config, and folders that PEFT loads."""

import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from mice_jax.errors import UserError
from mice_jax.models import lora
from mice_jax.models.checkpoint_layout import HFTensor, Part, checkpoint_tensors
from mice_jax.models.families import FAMILIES
from mice_jax.models.spec import ModelSpec
from mice_jax.models.transformer import Params, make_decoder

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
WEIGHT = ".weight"
LORA_A, LORA_B, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"  # the ends of their names
PREFIX = "base_model.model."  # of the names of tensors


def find_targets(spec: ModelSpec, architecture: str, targets: Sequence[str]) -> tuple[str, ...]:
    """Finds the weights that adapters are added to.

    Args:
      spec: The model.
      architecture: A key of `FAMILIES`.
      targets: The ends of modules' names in a checkpoint, such as `q_proj` or `self_attn.q_proj`; none means all.

    Returns:
      The weights, of `lora.ADAPTABLE`, in its order.

    Raises:
      UserError: A target matches no matrix of the layers.
    """
    modules = adaptable_modules(spec, architecture, rows=(0,))
    for target in targets:
        if not any(_ends_in(module, target) for module in modules):
            known = dict.fromkeys(module.rsplit(".", 1)[-1] for module in modules)
            raise UserError(
                f"model.lora.targets has {target!r}, which matches no matrix in the layers of {architecture}. The "
                f"matrices that can have an adapter are {', '.join(known)}; an empty list takes all of them."
            )
    taken = [t for m, t in modules.items() if not targets or any(_ends_in(m, target) for target in targets)]
    paths = {_path(part) for tensor in taken for part in tensor.parts}
    return tuple(path for path in lora.ADAPTABLE if path in paths)


def target_names(spec: ModelSpec, architecture: str, paths: Sequence[str]) -> list[str]:
    """Returns the targets that `find_targets` finds these weights by, of `lora.ADAPTABLE`."""
    modules = adaptable_modules(spec, architecture)
    return _shortest_names([m for m, t in modules.items() if _path(t.parts[0]) in paths], spec, architecture)


def _ends_in(module: str, target: str) -> bool:
    """Whether a target is the last part of a module's name, or the last two: more would name one layer alone."""
    return target in (module.rsplit(".", 1)[-1], ".".join(module.rsplit(".", 2)[-2:]))


def write_adapter(
    folder: Path, adapters: Params, spec: ModelSpec, architecture: str, *, config: dict[str, Any], dtype: str
) -> int:
    """Writes an adapter folder that PEFT loads.

    A tensor of a checkpoint that holds several of our weights has one adapter there, of as many times the rank.

    Args:
      folder: The folder to write to, which exists.
      adapters: The adapters, stacked over layers.
      spec: The model.
      architecture: A key of `FAMILIES`.
      config: `r`, `lora_alpha`, `use_rslora`, `use_dora` and `base_model_name_or_path` of adapter_config.json.
      dtype: float32 or bfloat16.

    Returns:
      The number of parameters written.
    """
    tensors, counts = {}, {}
    for module, tensor in adaptable_modules(spec, architecture).items():
        found = [own for part in tensor.parts if (own := _adapter_of(part, adapters))]
        if not found:
            continue
        for end, array in _joined(found, tensor.parts).items():
            tensors[PREFIX + module + end] = np.ascontiguousarray(array, dtype)
        counts[module] = len(found)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    fixed = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "lora_dropout": 0.0, "fan_in_fan_out": False,
        "inference_mode": True, "target_modules": _shortest_names([*counts], spec, architecture),
    }  # fmt: skip
    several = {count: [m for m, n in counts.items() if n == count] for count in counts.values() if count > 1}
    patterns = {name: n for n, group in several.items() for name in _shortest_names(group, spec, architecture)}
    rslora = config["use_rslora"]
    fixed["rank_pattern"] = {name: n * config["r"] for name, n in patterns.items()}
    # The scale stays alpha / rank, or alpha / sqrt(rank).
    fixed["alpha_pattern"] = {n: config["lora_alpha"] * (k**0.5 if rslora else k) for n, k in patterns.items()}
    (folder / CONFIG).write_text(json.dumps(fixed | config, indent=2) + "\n")
    return sum(math.prod(t.shape) for t in tensors.values())


def _adapter_of(part: Part, adapters: Params) -> dict[str, np.ndarray] | None:
    """Returns what the adapter of one of our weights has for one layer; None if the weight has no adapter."""
    found: Any = functools.reduce(lambda tree, key: (tree or {}).get(key), part.path.split("."), adapters)
    return None if found is None else {name: np.asarray(x[part.row]) for name, x in found.items()}


def _joined(found: Sequence[dict[str, np.ndarray]], parts: Sequence[Part]) -> dict[str, np.ndarray]:
    """Joins the adapters of the weights that a checkpoint holds in one tensor, by the ends of PEFT's names.

    PEFT has one adapter for the tensor. With A the rows of all of theirs, and B a matrix with theirs as blocks and
    zeros elsewhere, B A adds to each weight what its own adapter adds.
    """
    a = [own["a"].reshape(len(own["a"]), -1) for own in found]
    b = np.zeros((sum(part.rows for part in parts), sum(map(len, a))), np.float32)
    first = 0
    for own, part in zip(found, parts, strict=True):
        rank = own["b"].shape[-1]
        b[part.start : part.start + part.rows, first : first + rank] = own["b"].reshape(part.rows, rank)
        first += rank
    joined = {LORA_A: np.concatenate(a), LORA_B: b}
    if "magnitude" in found[0]:
        joined[MAGNITUDE] = np.concatenate([own["magnitude"].reshape(-1) for own in found])
    return joined


def _shortest_names(modules: Sequence[str], spec: ModelSpec, architecture: str) -> list[str]:
    """Returns the ends of modules' names by which PEFT finds these modules and no others.

    One part is enough unless another module ends in it too, as those of LFM2's attention and convolutions do.
    """
    tensors = checkpoint_tensors(make_decoder(spec), FAMILIES[architecture])
    others = {t.name.removesuffix(WEIGHT) for t in tensors} - {*modules}
    taken = {name.rsplit(".", 1)[-1] for name in others}
    ends = (m.rsplit(".", 2)[1:] for m in modules)
    return list(dict.fromkeys(".".join(end) if end[-1] in taken else end[-1] for end in ends))


def adaptable_modules(spec: ModelSpec, architecture: str, rows: Sequence[int] | None = None) -> dict[str, HFTensor]:
    """Returns the weights of the modules that may have an adapter, by the modules' names.

    Args:
      spec: The model.
      architecture: A key of `FAMILIES`.
      rows: The rows of the stacks of layers whose modules are returned; None means all.
    """
    tensors = checkpoint_tensors(make_decoder(spec), FAMILIES[architecture])
    return {
        t.name.removesuffix(WEIGHT): t
        for t in tensors
        if t.name.endswith(WEIGHT) and _path(t.parts[0]) in lora.ADAPTABLE and (rows is None or t.parts[0].row in rows)
    }


def _path(part: Part) -> str:
    return part.path.removeprefix("layers.")
