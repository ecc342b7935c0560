"""The table of bench/memory.py: bytes by the compiler beside those of the memory model."""

import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from mice_jax.hardware import cpu_chip

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import memory

TINY = memory.MODEL | {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip


@pytest.mark.slow
def test_measured_bytes_are_those_of_the_state_and_of_the_compiled_step() -> None:
    fields = {"model.param_dtype": "bfloat16", "optim.moments_dtype": "int8"}
    devices = SimpleNamespace(devices=jax.devices()[:4], chip=cpu_chip(4, 1e11, 2**30))
    found = memory.measure(fields, devices, model=TINY, slots=32)
    # Of each layer q, k, v, o with 32 x 32 entries and three of 32 x 64; both tables with 128 x 32; five norms of 32.
    matrices, norms = 2 * (4 * 32 * 32 + 3 * 32 * 64) + 2 * 128 * 32, 5 * 32
    assert found.params == (2 * matrices + 4 * norms) // 4  # of one of four devices
    # Blocks have 32 entries along the last dim but for `o`, with 16 of a head, and `down`, with 64. They are whole on
    # devices; scales of a dim of one block are replicated where four devices split it.
    codes = 2 * matrices + 2 * 4 * norms
    assert codes // 4 < found.optimizer < codes // 4 + 2 * 4 * matrices // 16
    state, sums = found.params + found.optimizer, matrices + norms
    assert found.apply > state + sums and found.accumulate > state + sums
    assert found.compiled == max(found.accumulate, found.apply)
    # Next to so small a model, constants of the compiler count; tests/test_aot.py bounds the error for large ones.
    assert 0.3 < found.estimated / found.compiled < 3
