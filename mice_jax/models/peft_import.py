"""Reads adapters in PEFT's format: adapter_config.json and adapter_model.safetensors, never a pickle.

Every key of adapter_config.json that changes what the model computes is honoured or refused by its name. Which weights
have an adapter, and in which layers, is read from the tensors.
"""

import dataclasses
import functools
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from mice_jax.errors import UserError
from mice_jax.models import lora
from mice_jax.models.checkpoint_files import open_tensors, read_config
from mice_jax.models.checkpoint_layout import HFTensor
from mice_jax.models.lora import LoRA, scale_of
from mice_jax.models.peft_format import (
    CONFIG,
    LORA_A,
    LORA_B,
    MAGNITUDE,
    PREFIX,
    WEIGHTS,
    adaptable_modules,
)
from mice_jax.models.spec import ModelSpec
from mice_jax.models.tensors import READ, map_tensors
from mice_jax.models.transformer import Params, make_decoder

PICKLE = "adapter_model.bin"
# Keys of adapter_config.json that do not change what the stored tensors compute: records, and how training began. The
# tensors themselves say which modules have an adapter.
WITHOUT_EFFECT = frozenset(
    {"task_type", "auto_mapping", "peft_version", "inference_mode"}
    | {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_core"}
    | {"qalora_group_size", "eva_config", "lora_dropout", "ensure_weight_tying", "parent_library", "base_model_class"}
)
READ_KEYS = frozenset(
    {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "init_lora_weights"}
    | {"base_model_name_or_path", "revision", "use_dora"}
)
# Ways to draw adapters that leave the base as it is. With others, such as PiSSA, the adapter belongs to a changed base.
PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclasses.dataclass(frozen=True)
class PeftAdapter:
    """An adapter folder, of which adapter_config.json has been read.

    Attributes:
      folder: The folder.
      base: The base model, as `base_model_name_or_path` has it.
      revision: The revision of a base on the Hub; "" for the newest.
      rank: The rank of the adapters that `ranks` does not name.
      alpha: Their alpha.
      rslora: Whether the factor on what an adapter adds is alpha / sqrt(rank).
      dora: Whether the adapters have magnitudes.
      ranks: Ranks by patterns of modules' names.
      alphas: Alphas by such patterns.
      dropout: The probability of dropout that the adapter was trained with.
    """

    folder: Path
    base: str
    revision: str
    rank: int
    alpha: float
    rslora: bool
    dora: bool
    ranks: tuple[tuple[str, int], ...]
    alphas: tuple[tuple[str, float], ...]
    dropout: float

    def find_base(self) -> str:
        """Returns what names the base: a folder, from here or from the adapter's folder, or else a model of the Hub."""
        for path in (Path(self.base), self.folder / self.base):
            if path.is_dir():
                return str(path)
        return f"{self.base}@{self.revision}" if self.revision else self.base

    def rank_of(self, module: str) -> int:
        """Returns the rank of the adapter of a module, by its full name."""
        return _by_pattern(self.ranks, module, self.rank)

    def scale_of(self, module: str) -> float:
        """Returns the factor on what the adapter of a module adds, by its full name."""
        return scale_of(self.rank_of(module), _by_pattern(self.alphas, module, self.alpha), self.rslora)


class Adapters(NamedTuple):
    """Adapters that have been read.

    Attributes:
      lora: Their rank and scale, and the weights that have one.
      arrays: The adapters, stacked over layers: float32, without effect where a layer has none or a smaller rank.
      obstacle: Why they are not what a run with `model.lora` could train; "" if they are.
    """

    lora: LoRA
    arrays: Params
    obstacle: str


def is_adapter(folder: Path) -> bool:
    """Returns whether a folder holds an adapter; raises UserError if it holds a whole model too."""
    if not (folder / CONFIG).is_file():
        return False
    whole = sorted(file.name for file in folder.glob("model*.safetensors"))
    if whole:
        raise UserError(
            f"{folder} holds an adapter ({CONFIG}) and a whole model ({whole[0]}), and which of them is meant cannot "
            "be told. Move one of the two to another folder."
        )
    return True


def read_adapter(folder: Path) -> PeftAdapter:
    """Reads the adapter_config.json of an adapter folder.

    Raises:
      UserError: It is not that of LoRA, or has a value that is not supported; or the weights are not in safetensors.
    """
    file = folder / CONFIG
    config = read_config(file)
    if not (folder / WEIGHTS).is_file():
        stored = f"; {PICKLE} is a pickle, which could run code" if (folder / PICKLE).exists() else ""
        raise UserError(f"{folder} has no {WEIGHTS}{stored}. Save the adapter with safetensors.")
    problems = _problems(config)
    if problems:
        raise UserError(f"{file} cannot be used: {'; '.join(problems)}.")
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(
            f"{file} has base_model_name_or_path={base!r}, which names no model. Set it to the folder of the base "
            "model or to its name on the Hub (owner/name)."
        )
    return PeftAdapter(
        folder,
        base,
        config.get("revision") or "",
        rank=config["r"],
        alpha=float(config["lora_alpha"]),
        rslora=bool(config.get("use_rslora")),
        dora=bool(config.get("use_dora")),
        ranks=tuple((config.get("rank_pattern") or {}).items()),
        alphas=tuple((config.get("alpha_pattern") or {}).items()),
        dropout=config.get("lora_dropout") or 0.0,
    )


def _problems(config: dict[str, Any]) -> list[str]:
    """Returns what an adapter_config.json has that is not supported."""
    if config.get("peft_type") != "LORA":
        return [f"peft_type={config.get('peft_type')!r} is not supported, only 'LORA' is"]
    problems = []
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        problems.append(f"r={rank!r} must be a positive integer")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        problems.append(f"lora_alpha={alpha!r} must be a number")
    for key in ("rank_pattern", "alpha_pattern"):
        found = config.get(key) or {}
        if not isinstance(found, dict) or not all(isinstance(v, int | float) for v in found.values()):
            problems.append(f"{key}={found!r} must map patterns to numbers")
    if config.get("bias") not in (None, "none"):
        problems.append(f"bias={config['bias']!r} trains biases, which is not supported")
    init = config.get("init_lora_weights", True)
    if init not in PLAIN_INITS:
        problems.append(f"init_lora_weights={init!r} belongs to a changed base: save the adapter for the original one")
    for key, value in config.items():
        if key not in WITHOUT_EFFECT | READ_KEYS and value not in (None, False, {}, []):
            problems.append(f"{key}={value!r} is not supported")
    return problems


def check_tensors(adapter: PeftAdapter, spec: ModelSpec, architecture: str) -> list[str]:
    """Compares the tensors of an adapter with the matrices of a model; reads no weights.

    Args:
      adapter: The adapter.
      spec: The model.
      architecture: A key of `FAMILIES`.

    Returns:
      The names of the modules that have an adapter, in the order of the model's layers.

    Raises:
      UserError: A tensor matches no matrix, has another shape or dtype, or is missing beside another one.
    """
    file, modules = adapter.folder / WEIGHTS, adaptable_modules(spec, architecture)
    expected: dict[str, tuple[int, ...]] = {}
    for module, tensor in modules.items():
        rank = adapter.rank_of(module)
        expected[PREFIX + module + LORA_A] = (rank, math.prod(tensor.shape[1:]))
        expected[PREFIX + module + LORA_B] = (tensor.shape[0], rank)
        if adapter.dora:
            expected[PREFIX + module + MAGNITUDE] = (tensor.shape[0],)
    with open_tensors(file) as f:
        slices = {name: f.get_slice(name) for name in f.keys()}  # noqa: SIM118  (safe_open is not a mapping)
        found = {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    with_adapter = [m for m in modules if PREFIX + m + LORA_A in found or PREFIX + m + LORA_B in found]
    problems = [f"{name} matches no matrix that can have an adapter" for name in found if name not in expected]
    ends = (LORA_A, LORA_B, MAGNITUDE) if adapter.dora else (LORA_A, LORA_B)
    needed = [PREFIX + m + end for m in with_adapter for end in ends]
    problems += [f"{name} is missing" for name in needed if name not in found]
    for name, (shape, dtype) in found.items():
        if shape != expected.get(name, shape):
            problems.append(f"{name} has shape {list(shape)} where {list(expected[name])} is expected")
        if dtype not in READ:
            problems.append(f"{name} is stored as {dtype}; it must be one of {', '.join(READ)}")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(f"{file} does not fit {architecture}: {'; '.join(problems[:5])}{more}.")
    if not with_adapter:
        raise UserError(f"{file} holds no adapter.")
    return with_adapter


def load_adapters(adapter: PeftAdapter, spec: ModelSpec, architecture: str) -> Adapters:
    """Reads an adapter into the structure of a decoder's adapters.

    Args:
      adapter: The adapter.
      spec: The model.
      architecture: A key of `FAMILIES`.

    Returns:
      The adapters on the host.

    Raises:
      UserError: As `check_tensors`.
    """
    with_adapter = check_tensors(adapter, spec, architecture)
    modules, stored = adaptable_modules(spec, architecture), map_tensors(adapter.folder / WEIGHTS)
    pieces = [p for m in with_adapter for p in _pieces(m, modules[m], stored)]
    scales = {p.module: adapter.scale_of(p.module) for p in pieces}
    paths = {p.path for p in pieces}
    plain = scale_of(adapter.rank, adapter.alpha, adapter.rslora)
    made = LoRA(
        max(len(p.a) for p in pieces), plain, tuple(path for path in lora.ADAPTABLE if path in paths), adapter.dora
    )
    decoder = make_decoder(spec, 1, made)
    arrays = jax.tree_util.tree_map_with_path(_without_effect, decoder.split(decoder.abstract)[0])
    for p in pieces:
        pair = functools.reduce(lambda tree, key: tree[key], p.path.split("."), arrays["layers"])
        a, b = pair["a"][p.row], pair["b"][p.row]
        a[: len(p.a)] = p.a.reshape(-1, *a.shape[1:])
        scaled = p.b if _equal(scales[p.module], plain) else p.b * np.float32(scales[p.module] / plain)
        b[..., : len(p.a)] = scaled.reshape(*b.shape[:-1], -1)
        if p.magnitude is not None:
            pair["magnitude"][p.row] = p.magnitude.reshape(b.shape[:-1])
    return Adapters(made, arrays, _obstacle(adapter, pieces, modules, scales, plain))


def _without_effect(path: tuple, x: jax.ShapeDtypeStruct) -> np.ndarray:
    """Makes an array of adapters that change nothing: for `lora.merge`, a magnitude that is NaN stands for the norm."""
    return np.full(x.shape, np.nan if path[-1].key == "magnitude" else 0, np.float32)


class _Piece(NamedTuple):
    """The adapter of one of our weights in one layer."""

    module: str
    path: str
    row: int
    a: np.ndarray  # [R I]
    b: np.ndarray  # [O R]
    magnitude: np.ndarray | None  # [O]
    shares_a: bool  # whether the adapter of a module that holds several of our weights cannot be divided


def _pieces(module: str, tensor: HFTensor, stored: dict[str, np.ndarray]) -> list[_Piece]:
    """Divides the adapter of a module among our weights in it.

    One of several weights is a block in the way that `peft_format.write_adapter` has them. Otherwise each weight takes
    the whole of A.
    """
    a, b = (stored[PREFIX + module + end].astype(np.float32) for end in (LORA_A, LORA_B))
    parts = tensor.parts
    rank = len(a) // len(parts)
    rows = [slice(part.start, part.start + part.rows) for part in parts]
    blocks = [slice(i * rank, (i + 1) * rank) for i in range(len(parts))]
    outside = b.copy()
    for own, block in zip(rows, blocks, strict=True):
        outside[own, block] = 0
    divided = rank * len(parts) == len(a) and not outside.any()
    magnitudes = stored.get(PREFIX + module + MAGNITUDE)

    def own_magnitude(own: slice) -> np.ndarray | None:
        return None if magnitudes is None else magnitudes[own].astype(np.float32)

    pieces = []
    for part, own, block in zip(parts, rows, blocks, strict=True):
        taken = block if divided else slice(None)
        path, magnitude = part.path.removeprefix("layers."), own_magnitude(own)
        pieces.append(_Piece(module, path, part.row or 0, a[taken], b[own, taken], magnitude, not divided))
    return pieces


def _obstacle(
    adapter: PeftAdapter,
    pieces: list[_Piece],
    modules: dict[str, HFTensor],
    scales: dict[str, float],
    plain: float,
) -> str:
    """Returns why adapters are not what a run with `model.lora` could train; "" if they are."""
    for p in pieces:
        if p.shares_a:
            return f"{p.module} holds several matrices here, of which each would need an adapter of its own"
        if len(p.a) != adapter.rank or not _equal(scales[p.module], plain):
            return f"{p.module} has another rank or alpha than the rest, and model.lora has one of each"
    held = {(p.path, p.row) for p in pieces}
    paths = {p.path for p in pieces}
    for module, tensor in modules.items():
        for part in tensor.parts:
            path = part.path.removeprefix("layers.")
            if path in paths and (path, part.row) not in held:
                return f"{module} has no adapter, while the same matrix of other layers has one"
    return ""


def _by_pattern(patterns: tuple[tuple[str, Any], ...], module: str, default: Any) -> Any:
    """Returns the value of the first pattern that is the whole of a module's name, or its end after a dot."""
    return next((v for pattern, v in patterns if re.match(rf"(.*\.)?({pattern})$", module)), default)


def _equal(a: float, b: float) -> bool:
    """Whether two scales are equal but for the rounding of a square root."""
    return math.isclose(a, b, rel_tol=1e-12)
