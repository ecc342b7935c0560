"""Maps safetensors files into memory, and writes them piece by piece.

The safetensors library copies what it reads, and needs all arrays of a file in memory to write it. So hf.py uses the
library to check headers only, and this module for the bytes. A file has eight bytes with the length of a JSON header,
the header, and the bytes of the arrays (little-endian, row-major).
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

READ = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F64": np.float64}
WRITTEN = {"float32": ("F32", 4), "bfloat16": ("BF16", 2)}


def map_tensors(file: Path) -> dict[str, np.ndarray]:
    """Maps the tensors of an intact safetensors file whose dtypes are in `READ`; only pages that are used are read."""
    start, header = _header(file)
    mapped = np.memmap(file, np.uint8, "r")
    return {
        name: mapped[start + t["data_offsets"][0] : start + t["data_offsets"][1]]
        .view(READ[t["dtype"]])
        .reshape(t["shape"])
        .view(np.ndarray)
        for name, t in header.items()
        if name != "__metadata__" and t["dtype"] in READ
    }


def copy_tensors(file: Path, sources: Mapping[str, Path]) -> None:
    """Writes a safetensors file with tensors of intact others, byte for byte in whatever dtype they have.

    Args:
      file: the file to write.
      sources: the file of each tensor by name.
    """
    headers = {source: _header(source) for source in set(sources.values())}
    merged: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, source in sources.items():
        entry = headers[source][1][name]
        start, end = end, end + entry["data_offsets"][1] - entry["data_offsets"][0]
        merged[name] = entry | {"data_offsets": [start, end]}
    with file.open("wb") as f:
        f.write(_encoded(merged))
        for name, source in sources.items():
            data, header = headers[source]
            first, last = header[name]["data_offsets"]
            with source.open("rb") as s:
                s.seek(data + first)
                f.write(s.read(last - first))


def tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each tensor of an intact safetensors file."""
    return {name: tuple(t["shape"]) for name, t in _header(file)[1].items() if name != "__metadata__"}


def _header(file: Path) -> tuple[int, dict[str, Any]]:
    """Returns the position of the first tensor's bytes, and the header."""
    with file.open("rb") as f:
        size = int.from_bytes(f.read(8), "little")
        return 8 + size, json.loads(f.read(size))


def _encoded(header: Mapping[str, object]) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_tensors(file: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str, pieces: Iterable[np.ndarray]) -> None:
    """Writes a safetensors file.

    Args:
      file: the file to write.
      shapes: the shape of each tensor by name.
      dtype: float32 or bfloat16.
      pieces: the tensors in the order of `shapes`, each as one array of `dtype` or as several with some of its rows.
    """
    code, itemsize = WRITTEN[dtype]
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
    head = _encoded(header)
    with file.open("wb") as f:
        f.write(head)
        for piece in pieces:
            assert piece.dtype == dtype
            f.write(np.ascontiguousarray(piece).view(np.uint8).data)
        assert f.tell() == len(head) + end, "the pieces do not have the shapes in the header"
