"""Reads and writes Hugging Face folders: config.json to a spec, safetensors to sharded parameters and back.

What differs between families is in models/families; this module uses their tables in both directions. It reads only
safetensors, never a pickle, and executes nothing from a checkpoint. It reads headers first and reports all problems at
once. Then it reads the slice of each device separately, so that a process needs memory for its own share only.
"""

import fnmatch
import functools
import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mice_jax.errors import UserError, did_you_mean
from mice_jax.models import untrained
from mice_jax.models.checkpoint_files import open_tensors, tensor_files
from mice_jax.models.checkpoint_files import read_config as read_config
from mice_jax.models.checkpoint_layout import HFTensor, checkpoint_tensors, dotted_path
from mice_jax.models.families import FAMILIES
from mice_jax.models.families.config_reader import DROPOUTS, ConfigReader
from mice_jax.models.families.rope_config import with_both_rope_spellings
from mice_jax.models.spec import ModelSpec
from mice_jax.models.tensors import READ, map_tensors, tensor_shapes, write_tensors
from mice_jax.models.transformer import Decoder, Params

SHARD_BYTES = 2**30  # limit of the size of one exported file
WRITERS = 4  # number of files written at a time
PIECE_BYTES = 4 * 2**20  # bytes read or written at a time; larger pieces leave the CPU's caches and are slower
# Suffixes of buffers in old checkpoints; they are ignored because the config determines them.
BUFFERS = (".rotary_emb.inv_freq", ".masked_bias", ".attn.bias")


def spec_from_config(config: dict[str, Any], file: Path) -> ModelSpec:
    """Makes the spec of a config.json.

    Args:
      config: the content.
      file: its path, for error messages.

    Returns:
      The spec.

    Raises:
      UserError: a key is missing, unknown, or has an unsupported value.
    """
    family, reader = _family(config, file), ConfigReader(config)
    try:
        spec = family.spec_from_hf(reader)
    except KeyError as e:
        raise UserError(f"{file} lacks {e}, which {family.ARCHITECTURE} needs.") from None
    except ValueError as e:
        raise UserError(f"{file} has {e}.") from None
    if keys := reader.unread():
        raise UserError(
            f"{file} sets keys that are not supported for {family.ARCHITECTURE}: {keys}. If the keys do not affect "
            "what the model computes, remove them from the file."
        )
    if spec.num_heads % spec.num_kv_heads:
        raise UserError(
            f"{file}: num_attention_heads={spec.num_heads} is not a multiple of "
            f"num_key_value_heads={spec.num_kv_heads}."
        )
    return spec


def dropouts(config: dict[str, Any]) -> dict[str, float]:
    """Returns the dropout probabilities of a config.json that are not 0; training does not use dropout."""
    text = config.get("text_config") or config
    return {key: text[key] for key in DROPOUTS if text.get(key)}


def with_sizes(config: dict[str, Any], vocab_size: int, dtype: str) -> dict[str, Any]:
    """Returns a config.json with the vocabulary and the dtype of a model's weights."""
    text = config.get("text_config", config)
    sized = dict.fromkeys(("vocab_size", "vocab_size_per_layer_input") & text.keys() | {"vocab_size"}, vocab_size)
    config = config | ({"text_config": text | sized} if "text_config" in config else sized)
    return config | {"dtype": dtype, "torch_dtype": dtype}


def check_weights(folder: Path, decoder: Decoder, architecture: str) -> dict[str, Path]:
    """Compares the headers of a folder's safetensors with the parameters of its config; reads no weights.

    Args:
      folder: the Hugging Face folder.
      decoder: the decoder of the folder's config.json.
      architecture: a key of `FAMILIES`.

    Returns:
      The file of each tensor that is trained.

    Raises:
      UserError: lists all tensors that are missing or unexpected or have another shape or an unsupported dtype.
    """
    family = FAMILIES[architecture]
    kept = untrained.prefixes(family, read_config(folder / "config.json"))
    files = {n: f for n, f in tensor_files(folder).items() if not n.startswith(kept)}
    _check_headers(folder, files, checkpoint_tensors(decoder, family), decoder.spec.tie_embeddings)
    return files


def load_params(folder: Path, decoder: Decoder, architecture: str, shardings: Params) -> Params:
    """Reads a folder's safetensors as float32 parameters, the slice of each device separately.

    Args:
      folder: the Hugging Face folder.
      decoder: the decoder of the folder's config.json.
      architecture: a key of `FAMILIES`.
      shardings: a tree like the parameters', of shardings.

    Returns:
      The parameters.

    Raises:
      UserError: as `check_weights`; or the config ties the head to the embedding, and a head that differs is stored.
    """
    wanted = checkpoint_tensors(decoder, FAMILIES[architecture])
    files = check_weights(folder, decoder, architecture)
    stored = {file: map_tensors(file) for file in set(files.values())}
    if decoder.spec.tie_embeddings:
        _check_tied_head(folder, files, stored)
    ours: dict[str, list[np.ndarray]] = {}  # parameter -> its layers, as views of the files
    for tensor in wanted:
        for part in tensor.parts:
            rows = stored[files[tensor.name]][tensor.name][part.start : part.start + part.rows]
            ours.setdefault(part.path, []).append(rows.reshape(part.shape))

    with ThreadPoolExecutor(os.cpu_count()) as threads:

        def load(path: tuple, leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.Array:
            layers = ours[dotted_path(path)]
            stacked = leaf.ndim > layers[0].ndim

            def read(index: Any) -> np.ndarray:
                if stacked:
                    return _read_slice(layers[index[0]], leaf.shape[1:], index[1:], threads)
                return _read_slice(layers, leaf.shape, index, threads)[0]

            return jax.make_array_from_callback(leaf.shape, sharding, read)

        return jax.tree_util.tree_map_with_path(load, decoder.abstract, shardings)


def save_params(
    folder: Path, params: Params, decoder: Decoder, config: dict[str, Any], dtype: str, model: Path | None = None
) -> int:
    """Writes model*.safetensors, their index, and config.json.

    Each file is written by one thread, which brings one piece of a tensor to the host at a time, so that no device and
    no process needs memory for the whole model.

    Args:
      folder: the folder to write to, which exists.
      params: the parameters.
      decoder: their decoder.
      config: the content of a config.json, which is written with the vocabulary and dtype of the parameters.
      dtype: float32 or bfloat16.
      model: the run's `model` folder, for families with tensors that are not trained.

    Returns:
      The number of parameters written.
    """
    family = _family(config, folder)
    itemsize = jnp.dtype(dtype).itemsize
    shards = list(_in_shards(checkpoint_tensors(decoder, family), itemsize))
    kept = untrained.find(family, model or folder)
    files = len(shards) + (kept is not None)
    names = ["model.safetensors"]
    if files > 1:
        names = [f"model-{i:05d}-of-{files:05d}.safetensors" for i in range(1, files + 1)]

    def write(name: str, shard: list[HFTensor]) -> None:
        pieces = (piece.astype(dtype, copy=False) for t in shard for piece in _to_hf(params, t))
        write_tensors(folder / name, {t.name: t.shape for t in shard}, dtype, pieces)

    with ThreadPoolExecutor(WRITERS) as threads:
        list(threads.map(write, names, shards))
    weight_map = {t.name: name for name, shard in zip(names, shards, strict=False) for t in shard}
    count = sum(math.prod(t.shape) for shard in shards for t in shard)
    size = count * itemsize
    if kept is not None:
        shutil.copyfile(kept, folder / names[-1])
        shapes = tensor_shapes(kept)
        weight_map |= dict.fromkeys(shapes, names[-1])
        count += sum(math.prod(shape) for shape in shapes.values())
        size += kept.stat().st_size
    if files > 1:
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    config = with_sizes(with_both_rope_spellings(config), decoder.spec.vocab_size, dtype)
    config |= {"architectures": [family.ARCHITECTURE]}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return count


def trained_mask(decoder: Decoder, architecture: str, frozen: Sequence[str]) -> Params:
    """Makes the mask of the parameters that are trained.

    Args:
      decoder: the model.
      architecture: a key of `FAMILIES`.
      frozen: patterns of names of a checkpoint's tensors that are not trained, with `*`, `?` and `[0-3]`.

    Returns:
      A tree like the parameters', of bool arrays: of no dims, or [L 1 ...] for a stacked parameter.

    Raises:
      UserError: a pattern matches no tensor, or all tensors are matched.
    """
    family = FAMILIES[architecture]
    tensors = checkpoint_tensors(decoder, family)
    names = [t.name for t in tensors]
    for pattern in frozen:
        if not fnmatch.filter(names, pattern):
            raise UserError(
                f"optim.frozen has {pattern!r}, which matches no tensor of the model. Use the names in a checkpoint, "
                f"such as {names[0]!r} or {names[len(names) // 2]!r}."
            )
    patterns = (*always_frozen(architecture), *frozen)
    frozen_names = {t.name for t in tensors if any(fnmatch.fnmatchcase(t.name, p) for p in patterns)}
    if len(frozen_names) == len(names):
        raise UserError(f"optim.frozen={list(frozen)} matches every tensor of the model, so nothing would be trained.")

    def trained(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        parts = {(p.row, t.name) for t in tensors for p in t.parts if p.path == dotted_path(path)}
        rows = sorted(parts, key=lambda part: part[0] or 0)
        free = np.array([name not in frozen_names for _, name in rows])
        stacked = rows[0][0] is not None
        return free.reshape([-1] + [1] * (leaf.ndim - 1)) if stacked else free[0]

    return jax.tree_util.tree_map_with_path(trained, decoder.abstract)


def always_frozen(architecture: str) -> tuple[str, ...]:
    """Returns patterns of names of a family's tensors that are never trained; most families have none."""
    return getattr(FAMILIES[architecture], "FROZEN", ())


def stored_dtype(folder: Path) -> str:
    """Returns the dtype of most tensors of a folder, `bfloat16` or `float32`; float16 counts as float32."""
    files = set(tensor_files(folder).values())
    counts = {"bfloat16": 0, "float32": 0}
    for file in files:
        with open_tensors(file) as f:
            for name in f.keys():  # noqa: SIM118  (safe_open is not a mapping)
                counts["bfloat16" if f.get_slice(name).get_dtype() == "BF16" else "float32"] += 1
    return max(counts, key=lambda d: counts[d])


def _family(config: dict[str, Any], file: Path) -> ModuleType:
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or names[0] not in list(FAMILIES):
        near = did_you_mean(str(names[0]) if isinstance(names, list) and names else "", FAMILIES, ".")
        raise UserError(
            f"{file} has architectures={names!r}{near} The families that can be trained are: {', '.join(FAMILIES)}."
        )
    return FAMILIES[names[0]]


def _check_tied_head(folder: Path, files: dict[str, Path], stored: dict[Path, dict[str, np.ndarray]]) -> None:
    """Raises UserError if a head is stored that is not the embedding, though config.json says that it is."""
    head = next((n for n in files if n.endswith("lm_head.weight")), None)
    embedding = next((n for n in files if n.endswith("embed_tokens.weight")), None)
    if embedding is None or head is None:
        return
    if not np.array_equal(stored[files[head]][head], stored[files[embedding]][embedding]):
        raise UserError(
            f"{folder / 'config.json'} has tie_word_embeddings=true, which makes {embedding} the head too, but {head} "
            f"in {files[head].name} differs from it and would be lost. Set tie_word_embeddings to false to train and "
            f"export both, as transformers 5 reads them, or remove {head}."
        )


def _check_headers(folder: Path, files: dict[str, Path], wanted: list[HFTensor], tied: bool) -> None:
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    for file in sorted(set(files.values())):
        with open_tensors(file) as f:
            for name in f.keys():  # noqa: SIM118
                if files.get(name) == file:  # a copy in a file that the index does not name is not read
                    s = f.get_slice(name)
                    found[name] = tuple(s.get_shape()), s.get_dtype()
    by_name = {t.name: t for t in wanted}
    ignorable = BUFFERS + (("lm_head.weight",) if tied else ())  # transformers ignores a stored copy of a tied head too
    problems = [f"{n} is missing from {files.get(n, folder).name}" for n in by_name if n not in found]
    problems += [f"{n} is unexpected" for n in found if n not in by_name and not n.endswith(ignorable)]
    for name, (shape, dtype) in found.items():
        if name in by_name and shape != by_name[name].shape:
            problems.append(f"{name} has shape {list(shape)}, config.json makes it {list(by_name[name].shape)}")
        if name in by_name and dtype not in READ:
            problems.append(f"{name} is stored as {dtype}; it must be one of {', '.join(READ)}")
    if problems:
        more = f" and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise UserError(f"the tensors in {folder} do not fit its config.json: {'; '.join(problems[:10])}{more}.")


def _read_slice(
    layers: list[np.ndarray], shape: tuple[int, ...], index: tuple[slice, ...], threads: ThreadPoolExecutor
) -> np.ndarray:
    """Reads layers[:][index] as one float32 array, with zeros in the padding; `shape` is that of a padded layer."""
    sizes = [len(range(n)[s]) for n, s in zip(shape, index, strict=True)]
    out = _aligned([len(layers), *sizes])
    copies = []
    for layer, target in zip(layers, out, strict=True):
        source = layer[index]  # shorter than the target if the target has padding
        target[len(source) :] = 0
        for start, stop in _pieces(len(source), target.nbytes // len(target)):
            copies.append(threads.submit(np.copyto, target[start:stop], source[start:stop], "same_kind"))
    for done in copies:
        done.result()
    return out


def _aligned(shape: list[int]) -> np.ndarray:
    """Makes an empty float32 array aligned to 64 bytes, which a CPU device uses without a copy."""
    size = math.prod(shape) * 4
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(np.float32).reshape(shape)


def _to_hf(params: Params, tensor: HFTensor) -> Iterator[np.ndarray]:
    """Yields a checkpoint's tensor in pieces of its rows, without the padding of the vocabulary."""
    for part in tensor.parts:
        leaf: Any = functools.reduce(lambda tree, key: tree[key], part.path.split("."), params)
        whole = [(0, n) for n in leaf.shape]
        if part.row is not None:
            layer = _on_host(leaf, [(part.row, part.row + 1), *whole[1:]])
            flat = layer.reshape(part.rows, *tensor.shape[1:])
            for start, stop in _pieces(part.rows, layer.nbytes // part.rows):
                yield flat[start:stop]
        else:  # an embedding is large, so it is cut before it is on the host
            for piece in _pieces(part.rows, leaf.nbytes // leaf.shape[0]):
                yield _on_host(leaf, [piece, *whole[1:]])


def _on_host(leaf: jax.Array, bounds: list[tuple[int, int]]) -> np.ndarray:
    """Assembles leaf[bounds] on the host from the shards of the devices."""
    sizes = [stop - start for start, stop in bounds]
    out: np.ndarray | None = None
    for shard in leaf.addressable_shards:
        owned = [s.indices(n)[:2] for s, n in zip(shard.index, leaf.shape, strict=True)]
        inside = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(owned, bounds, strict=True)]
        if shard.replica_id or any(start >= stop for start, stop in inside):
            continue
        starts = [start - h for (start, _), (h, _) in zip(inside, owned, strict=True)]
        block = _block(shard.data, starts, [stop - start for start, stop in inside])
        if list(block.shape) == sizes:
            return block
        out = np.empty(sizes, leaf.dtype) if out is None else out
        out[tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(inside, bounds, strict=True))] = block
    assert out is not None
    return out


def _block(x: jax.Array, starts: list[int], sizes: list[int]) -> np.ndarray:
    """Returns x[starts : starts + sizes] on the host, for an array on one device."""
    if next(iter(x.devices())).platform == "cpu":  # a CPU array is in the host's memory, so a view is enough
        return np.asarray(x)[tuple(slice(a, a + n) for a, n in zip(starts, sizes, strict=True))]
    return np.asarray(jax.lax.dynamic_slice(x, starts, sizes))


def _pieces(rows: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    size = max(1, PIECE_BYTES // row_bytes)
    return ((start, min(start + size, rows)) for start in range(0, rows, size))


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
