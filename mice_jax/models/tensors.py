"""Tensors on their way between a checkpoint's files and ours: turned fast, and written one at a time.

The safetensors library writes a file from arrays that are all in memory; here they come one after another. The
format: eight bytes with the length of a JSON header, the header, the arrays' bytes (little-endian, row-major).
"""

import json
import math
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

NAMES = {"float32": ("F32", 4), "bfloat16": ("BF16", 2)}
STRIP = 16  # rows turned at once: as many as fill a cache line of the target


def write_tensors(file: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str, pieces: Iterable[np.ndarray]) -> None:
    """Writes a safetensors file in `dtype`, float32 or bfloat16.

    `pieces` are its tensors in the order of `shapes`, each in one array of `dtype` or in several of its rows. A piece
    is written while the next one is made.
    """
    code, itemsize = NAMES[dtype]
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as f, ThreadPoolExecutor(1) as writer:
        f.write(len(text).to_bytes(8, "little") + text)
        written: Future | None = None
        for piece in pieces:
            assert piece.dtype == dtype
            data = np.ascontiguousarray(piece).view(np.uint8).data
            if written is not None:
                written.result()
            written = writer.submit(f.write, data)
        if written is not None:
            written.result()
        assert f.tell() == 8 + len(text) + end, "the pieces are not the tensors that the header names"


def turn(source: np.ndarray, target: np.ndarray) -> None:
    """target[:] = source.T, [R C] to [C R], strip by strip; of another dtype if need be."""
    for r in range(0, source.shape[0], STRIP):
        target[:, r : r + STRIP] = source[r : r + STRIP].astype(target.dtype, copy=False).T
