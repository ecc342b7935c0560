"""Maps safetensors files into memory, and writes them piece by piece.

The safetensors library copies what it reads, and needs all arrays of a file in memory to write it. So hf.py uses the
library to check headers only, and this module for the bytes. A file has eight bytes with the length of a JSON header,
the header, and the bytes of the arrays (little-endian, row-major).
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

READ = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F64": np.float64}
WRITTEN = {"float32": ("F32", 4), "bfloat16": ("BF16", 2)}


def map_tensors(file: Path) -> dict[str, np.ndarray]:
    """Maps the tensors of an intact safetensors file whose dtypes are in `READ`; only pages that are used are read."""
    mapped = np.memmap(file, np.uint8, "r")
    start = 8 + int.from_bytes(mapped[:8].tobytes(), "little")
    header = json.loads(mapped[8:start].tobytes())
    return {
        name: mapped[start + t["data_offsets"][0] : start + t["data_offsets"][1]]
        .view(READ[t["dtype"]])
        .reshape(t["shape"])
        .view(np.ndarray)
        for name, t in header.items()
        if name != "__metadata__" and t["dtype"] in READ
    }


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
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for piece in pieces:
            assert piece.dtype == dtype
            f.write(np.ascontiguousarray(piece).view(np.uint8).data)
        assert f.tell() == 8 + len(text) + end, "the pieces do not have the shapes in the header"
