"""Hugging Face folders in and out: config.json to a spec, safetensors to sharded parameters and back.

A family's file holds what is particular to it; here its tables are used both ways. Only safetensors is read,
never a pickle, and nothing in a checkpoint is executed. Headers are read first and every problem is reported at
once; then each device's slice is read by itself, so a process never holds more than its share.
"""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mice_jax.errors import UserError
from mice_jax.models.families import llama
from mice_jax.models.spec import ModelSpec
from mice_jax.models.transformer import Decoder, Params

FAMILIES: dict[str, ModuleType] = {llama.ARCHITECTURE: llama}

SHARD_BYTES = 4 * 2**30  # of one exported file
# Buffers that old checkpoints carry and that follow from the config.
BUFFERS = (".rotary_emb.inv_freq", ".masked_bias", ".attn.bias")
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16, "F64": np.float64}


@dataclasses.dataclass(frozen=True)
class HFTensor:
    """One of a checkpoint's tensors, and the part of one of our parameters that it fills."""

    name: str
    path: str  # of our parameter, dotted
    layer: int | None  # its place along a stacked parameter's first axis
    in_dims: int | None  # leading dims of ours that are inputs of a matrix product; None = stored as it is
    shape: tuple[int, ...]  # in the checkpoint, without the vocabulary's padding


def read_config(file: Path) -> dict[str, Any]:
    """A config.json as a dict."""
    try:
        config = json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(f"{file} does not exist; a model needs its config.json.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"{file} is not JSON: {e}.") from None
    if not isinstance(config, dict):
        raise UserError(f"{file} holds a {type(config).__name__}; it must hold an object.")
    return config


def spec_from_config(config: dict[str, Any], file: Path) -> ModelSpec:
    """The spec of a config.json's content; raises UserError for what cannot be honoured, by key."""
    family = _family(config, file)
    try:
        spec, read = family.spec_from_hf(config)
    except KeyError as e:
        raise UserError(f"{file} lacks {e}, which {family.ARCHITECTURE} needs.") from None
    except ValueError as e:
        raise UserError(f"{file} has {e}.") from None
    unknown = [k for k in config if k not in read and k not in family.IGNORED and config[k] is not None]
    if unknown:
        keys = ", ".join(f"{k}={config[k]!r}" for k in sorted(unknown))
        raise UserError(
            f"{file} sets what this {family.ARCHITECTURE} does not know how to honour: {keys}. If the keys change "
            "nothing that is computed, take them out of the file."
        )
    if spec.num_heads % spec.num_kv_heads:
        raise UserError(
            f"{file}: num_attention_heads={spec.num_heads} is no multiple of num_key_value_heads={spec.num_kv_heads}."
        )
    return spec


def load_params(folder: Path, decoder: Decoder, architecture: str, shardings: Params) -> Params:
    """The folder's safetensors as float32 parameters, each device's slice read by itself.

    Raises UserError that lists every tensor that is missing, unexpected or of another shape.
    """
    files = _tensor_files(folder)
    wanted = list(_tensors(decoder, FAMILIES[architecture]))
    _check_headers(folder, files, wanted, decoder.spec.tie_embeddings)
    by_path: dict[str, list[HFTensor]] = {}
    for tensor in wanted:
        by_path.setdefault(tensor.path, []).append(tensor)

    def load(path: tuple, leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.Array:
        tensors = by_path[_dotted(path)]

        def part(index: Any) -> np.ndarray:
            return _read_part(files, tensors, leaf.shape, index)

        return jax.make_array_from_callback(leaf.shape, sharding, part)

    return jax.tree_util.tree_map_with_path(load, decoder.abstract, shardings)


def save_params(folder: Path, params: Params, decoder: Decoder, config: dict[str, Any], dtype: str) -> None:
    """Writes model*.safetensors, their index, and config.json, in `dtype` (float32 or bfloat16)."""
    family = _family(config, folder)
    leaves = {_dotted(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    itemsize = jnp.dtype(dtype).itemsize
    tensors = list(_tensors(decoder, family))
    shards = list(_in_shards(tensors, itemsize))
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        one = len(shards) == 1
        name = "model.safetensors" if one else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        arrays = {t.name: _to_hf(leaves[t.path], t).astype(dtype) for t in shard}
        save_file(arrays, folder / name, metadata={"format": "pt"})
        weight_map |= {t.name: name for t in shard}
    if len(shards) > 1:
        total = sum(math.prod(t.shape) for t in tensors) * itemsize
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    config = config | {"architectures": [family.ARCHITECTURE], "dtype": dtype, "torch_dtype": dtype}
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def stored_dtype(folder: Path) -> str:
    """`bfloat16` or `float32`: the dtype of most of a folder's tensors, float16 counted as float32."""
    files = set(_tensor_files(folder).values())
    counts = {"bfloat16": 0, "float32": 0}
    for file in files:
        with _open(file) as f:
            for name in f.keys():  # noqa: SIM118  (safe_open is no mapping)
                counts["bfloat16" if f.get_slice(name).get_dtype() == "BF16" else "float32"] += 1
    return max(counts, key=lambda d: counts[d])


def _family(config: dict[str, Any], file: Path) -> ModuleType:
    names = config.get("architectures") or [""]
    if names[0] not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UserError(f"{file} says architectures={names}; the families that can be trained are: {known}.")
    return FAMILIES[names[0]]


def _tensors(decoder: Decoder, family: ModuleType) -> Iterator[HFTensor]:
    """Every tensor that a checkpoint of this decoder holds."""
    real = decoder.spec.vocab_size
    leaves = {_dotted(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(decoder.abstract)}
    axes = {
        _dotted(path): a
        for path, a in jax.tree_util.tree_leaves_with_path(decoder.axes, is_leaf=lambda a: isinstance(a, tuple))
    }
    assert leaves.keys() <= {path for _, path, _ in family.NAMES}, "a parameter has no name in the checkpoint"
    for template, path, in_dims in family.NAMES:
        if path not in leaves:
            continue
        stacked = axes[path][0] == "layers"
        dims = [real if a == "vocab" else n for n, a in zip(leaves[path].shape, axes[path], strict=True)]
        inner = dims[1:] if stacked else dims
        shape = _flat_shape(tuple(inner), in_dims)
        for layer in range(dims[0]) if stacked else [None]:
            yield HFTensor(template.format(layer), path, layer, in_dims, shape)


def _flat_shape(inner: tuple[int, ...], in_dims: int | None) -> tuple[int, ...]:
    """How a checkpoint holds a parameter of one layer: [outputs, inputs], a flat vector, or as it is."""
    if in_dims is None:
        return inner
    outputs = math.prod(inner[in_dims:])
    return (outputs, math.prod(inner[:in_dims])) if in_dims else (outputs,)


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Which file holds each tensor, from the index or from the only file's header."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        weight_map: dict[str, str] = read_config(index).get("weight_map", {})
        missing = sorted({f for f in weight_map.values() if not (folder / f).exists()})
        if missing:
            raise UserError(f"{index} names files that are not there: {', '.join(missing)}. Fetch them again.")
        return {name: folder / file for name, file in weight_map.items()}
    if not single.exists():
        raise UserError(
            f"{folder} holds neither model.safetensors nor model.safetensors.index.json. Only safetensors is read: "
            "a checkpoint of another kind has to be saved as safetensors first."
        )
    with _open(single) as f:
        return {name: single for name in f.keys()}  # noqa: SIM118


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="numpy")
    except SafetensorError as e:
        size = file.stat().st_size
        raise UserError(f"{file} ({size} bytes) is damaged or cut short: {e}. Fetch it again.") from None


def _check_headers(folder: Path, files: dict[str, Path], wanted: list[HFTensor], tied: bool) -> None:
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    for file in sorted(set(files.values())):
        with _open(file) as f:
            for name in f.keys():  # noqa: SIM118
                if files.get(name) == file:  # where the index says it is; elsewhere nobody will look
                    s = f.get_slice(name)
                    found[name] = tuple(s.get_shape()), s.get_dtype()
    by_name = {t.name: t for t in wanted}
    ignorable = BUFFERS + (("lm_head.weight",) if tied else ())  # transformers ties over a stored copy too
    problems = [f"{n} is missing from {files.get(n, folder).name}" for n in by_name if n not in found]
    problems += [f"{n} is unexpected" for n in found if n not in by_name and not n.endswith(ignorable)]
    for name, (shape, dtype) in found.items():
        if name in by_name and shape != by_name[name].shape:
            problems.append(f"{name} has shape {list(shape)}, config.json makes it {list(by_name[name].shape)}")
        if name in by_name and dtype not in DTYPES:
            problems.append(f"{name} is stored as {dtype}; it must be one of {', '.join(DTYPES)}")
    if problems:
        more = f" and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise UserError(f"the tensors in {folder} do not fit its config.json: {'; '.join(problems[:10])}{more}.")


def _read_part(
    files: dict[str, Path], tensors: list[HFTensor], shape: tuple[int, ...], index: tuple[slice, ...]
) -> np.ndarray:
    """The slice `index` of one of our parameters, read from the tensors that fill it."""
    bounds = [s.indices(n)[:2] for s, n in zip(index, shape, strict=True)]
    part = np.zeros([stop - start for start, stop in bounds], np.float32)
    if tensors[0].layer is None:
        _read_tensor(files, tensors[0], shape, bounds, part)
        return part
    first, last = bounds[0]
    for tensor in tensors[first:last]:
        assert tensor.layer is not None
        _read_tensor(files, tensor, shape[1:], bounds[1:], part[tensor.layer - first])
    return part


def _read_tensor(
    files: dict[str, Path],
    tensor: HFTensor,
    shape: tuple[int, ...],
    bounds: list[tuple[int, int]],
    out: np.ndarray,
) -> None:
    """Fills `out` with ours[bounds]; the vocabulary's padding, which no checkpoint has, is left zero."""
    with _open(files[tensor.name]) as f:
        stored, k = f.get_slice(tensor.name), tensor.in_dims
        if k is None:
            inside = (slice(a, min(b, n)) for (a, b), n in zip(bounds, tensor.shape, strict=True))
            block = stored[tuple(inside)]
            out[: block.shape[0]] = block
            return
        outputs = _flat_range(shape[k:], bounds[k:])
        outputs = slice(outputs.start, min(outputs.stop, tensor.shape[0]))
        if k == 0:
            out.reshape(-1)[:] = stored[outputs]
            return
        inputs = _flat_range(shape[:k], bounds[:k])
        flat = out.reshape(inputs.stop - inputs.start, -1)
        flat[:, : outputs.stop - outputs.start] = stored[outputs, inputs].T


def _flat_range(shape: tuple[int, ...], bounds: list[tuple[int, int]]) -> slice:
    """The range of a flattened group of dims; only its first dim is ever split over devices."""
    inner = math.prod(shape[1:])
    assert all(b == (0, n) for b, n in zip(bounds[1:], shape[1:], strict=True))
    return slice(bounds[0][0] * inner, bounds[0][1] * inner)


def _to_hf(leaf: jax.Array, tensor: HFTensor) -> np.ndarray:
    """A checkpoint's tensor from one of our parameters, the vocabulary's padding cut off."""
    ours = np.asarray(leaf if tensor.layer is None else leaf[tensor.layer])
    if tensor.in_dims:
        ours = ours.reshape(math.prod(ours.shape[: tensor.in_dims]), -1).T
    elif tensor.in_dims == 0:
        ours = ours.reshape(-1)
    return np.ascontiguousarray(ours[: tensor.shape[0]])


def _in_shards(tensors: list[HFTensor], itemsize: int) -> Iterator[list[HFTensor]]:
    shard: list[HFTensor] = []
    size = 0
    for tensor in tensors:
        bytes_ = math.prod(tensor.shape) * itemsize
        if shard and size + bytes_ > SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += bytes_
    yield shard


def _dotted(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
