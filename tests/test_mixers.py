"""Recurrent mixers against their formula, slot by slot in float64, and against transformers' functions.

The references compute each sample alone, so that every comparison is also one of a packed row with its samples.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding, PartitionSpec
from transformers.models.granitemoehybrid import modeling_granitemoehybrid as granite
from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen

from helpers.models import QUICK, gap, mesh_of
from mice_jax.models.mixers.gated_delta import LENGTH_EPS, gated_delta, gated_delta_of_rows, gated_delta_step
from mice_jax.models.mixers.mamba2 import mamba2, mamba2_of_rows, mamba2_step, time_steps

# Rows as (segment, slots) pairs. Chunks are of 16 slots: borders lie inside of them and at their edges.
ROWS = [[(1, 5), (2, 1), (3, 20), (4, 13), (0, 6)], [(1, 16), (2, 16), (3, 13)]]
SEGMENTS = np.stack([np.concatenate([np.full(n, s, np.int32) for s, n in row]) for row in ROWS])
ROWS_SLOTS = SEGMENTS.shape
CHUNK = 16
# Entries are of order 1, and come of a few sums of at most 64 products each, whose roundings are 6e-8.
FORWARD = 3e-6
GRADIENT = 2e-5  # entries are of order 10, and sums over heads and slots of such sums
LIMITS = (0.05, 1.5)

Arrays = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Mixer:
    """A mixer, its float32 inputs [B T ...], and references for one sample; all return outputs and the last state."""

    packed: Callable[..., tuple[jax.Array, jax.Array]]  # inputs, segment ids, state, chunk
    step: Callable[..., tuple[jax.Array, jax.Array]]  # inputs, state, number of tokens
    of_rows: Callable[..., jax.Array]  # inputs, segment ids
    formula: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    peers: tuple[Callable[..., tuple[torch.Tensor, torch.Tensor]], ...]
    slots: Arrays  # by name
    heads: Arrays  # inputs without slots, by name
    state_shape: tuple[int, ...]  # of a row

    @property
    def inputs(self) -> Arrays:
        return self.slots | self.heads

    def zeros(self) -> jax.Array:
        return jnp.zeros((len(ROWS), *self.state_shape), jnp.float32)


def delta_formula(x: Arrays, state: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Each slot of one sample [1 T ...] in turn."""
    groups = x["v"].shape[2] // x["k"].shape[2]
    q, k = (
        (y / torch.sqrt((y * y).sum(-1, keepdim=True) + LENGTH_EPS)).repeat_interleave(groups, 2)
        for y in (x["q"], x["k"])
    )
    s, outputs = q.new_zeros(*x["v"].shape[2:3], q.shape[3], x["v"].shape[3]), []
    for t in range(q.shape[1]):
        s = s * x["log_decay"][0, t].exp()[:, None, None]
        missing = x["v"][0, t] - torch.einsum("nd,nde->ne", k[0, t], s)
        s = s + torch.einsum("nd,ne->nde", k[0, t], x["beta"][0, t][:, None] * missing)
        outputs.append(torch.einsum("nd,nde->ne", q[0, t], s) / q.shape[3] ** 0.5)
    return torch.stack(outputs)[None], s[None]


def mamba_formula(x: Arrays) -> tuple[torch.Tensor, torch.Tensor]:
    """Each slot of one sample [1 T ...] in turn."""
    groups = x["x"].shape[2] // x["b"].shape[2]
    b, c = (x[name].repeat_interleave(groups, 2) for name in "bc")
    step = torch.log1p(torch.exp(x["raw"] + x["bias"])).clamp(*LIMITS)
    rate = -x["rate_log"].exp()
    s, outputs = b.new_zeros(*x["x"].shape[2:], b.shape[3]), []
    for t in range(b.shape[1]):
        s = s * (step[0, t] * rate).exp()[:, None, None]
        s = s + torch.einsum("np,nd->npd", step[0, t][:, None] * x["x"][0, t], b[0, t])
        outputs.append(torch.einsum("npd,nd->np", s, c[0, t]) + x["skip"][:, None] * x["x"][0, t])
    return torch.stack(outputs)[None], s[None]


def delta_peer(rule: Callable[..., Any], x: Arrays) -> tuple[torch.Tensor, torch.Tensor]:
    return rule(
        x["q"], x["k"], x["v"], x["log_decay"], x["beta"], output_final_state=True, use_qk_l2norm_in_kernel=True
    )


def mamba_peer(x: Arrays) -> tuple[torch.Tensor, torch.Tensor]:
    return granite.mamba2_chunk_scan(
        x["x"], x["raw"], -x["rate_log"].exp(), x["b"], x["c"], 8, D=x["skip"], dt_bias=x["bias"], dt_softplus=True,
        dt_limit=LIMITS, return_final_states=True,
    )  # fmt: skip


def packed_mamba(
    x: Arrays, segment_ids: jax.Array, state: jax.Array | None = None, chunk: int = CHUNK
) -> tuple[jax.Array, jax.Array]:
    step, rate = time_steps(x["raw"], x["bias"], LIMITS), -jnp.exp(x["rate_log"])
    return mamba2(x["x"], step, rate, x["b"], x["c"], x["skip"], segment_ids, state, chunk=chunk)


def packed_delta(
    x: Arrays, segment_ids: jax.Array, state: jax.Array | None = None, chunk: int = CHUNK
) -> tuple[jax.Array, jax.Array]:
    return gated_delta(x["q"], x["k"], x["v"], x["log_decay"], x["beta"], segment_ids, state, chunk=chunk)


def mamba_of_rows(x: Arrays, segment_ids: jax.Array) -> jax.Array:
    step, rate = time_steps(x["raw"], x["bias"], LIMITS), -jnp.exp(x["rate_log"])
    return mamba2_of_rows(x["x"], step, rate, x["b"], x["c"], x["skip"], segment_ids)


def delta_of_rows(x: Arrays, segment_ids: jax.Array) -> jax.Array:
    return gated_delta_of_rows(x["q"], x["k"], x["v"], x["log_decay"], x["beta"], segment_ids)


def step_mamba(x: Arrays, state: jax.Array, num_tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    step, rate = time_steps(x["raw"], x["bias"], LIMITS), -jnp.exp(x["rate_log"])
    return mamba2_step(x["x"], step, rate, x["b"], x["c"], x["skip"], state, num_tokens)


def step_delta(x: Arrays, state: jax.Array, num_tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    return gated_delta_step(x["q"], x["k"], x["v"], x["log_decay"], x["beta"], state, num_tokens)


def draw(**shapes: tuple[int, ...]) -> Arrays:
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=(*ROWS_SLOTS, *shape)).astype(np.float32) for name, shape in shapes.items()}


def delta_slots() -> Arrays:
    x = draw(q=(2, 5), k=(2, 5), v=(4, 3), log_decay=(4,), beta=(4,))
    x["log_decay"] = -np.exp(x["log_decay"])
    x["log_decay"][:, 9] = -200.0  # its inverse overflows in float32
    x["beta"] = 1 / (1 + np.exp(-x["beta"]))
    # A chunk of one key that replaces what it recalls. To solve it by powers of its system would miss by 1e-4.
    x["k"][1, :16], x["log_decay"][1, :16], x["beta"][1, :16] = x["k"][1, 0], 0.0, 1.0
    return x


HEADS = np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)
MIXERS = {
    "gated delta": Mixer(
        packed_delta,
        step_delta,
        delta_of_rows,
        delta_formula,
        tuple(
            functools.partial(delta_peer, rule)
            for rule in (qwen.torch_chunk_gated_delta_rule, qwen.torch_recurrent_gated_delta_rule)
        ),
        delta_slots(),
        {},
        (4, 5, 3),
    ),
    "mamba2": Mixer(
        packed_mamba,
        step_mamba,
        mamba_of_rows,
        mamba_formula,
        (mamba_peer,),
        draw(x=(4, 3), raw=(4,), b=(2, 5), c=(2, 5)),
        dict(zip(("bias", "rate_log", "skip"), HEADS, strict=True)),
        (4, 3, 5),
    ),
}
ALL = pytest.mark.parametrize("mixer", MIXERS.values(), ids=MIXERS.keys())
pytestmark = pytest.mark.usefixtures("strict_dtypes", "one_thread")


def output_gradient(mixer: Mixer) -> np.ndarray:
    """The gradient of the outputs: zero at padding."""
    shape = (*ROWS_SLOTS, 4, 3)
    return np.where(SEGMENTS[..., None, None] > 0, np.random.default_rng(2).normal(size=shape), 0).astype(np.float32)


def samples() -> Iterable[tuple[int, slice]]:
    for row, ids in enumerate(SEGMENTS):
        for segment in range(1, ids.max() + 1):
            slots = np.flatnonzero(ids == segment)
            yield row, slice(slots[0], slots[-1] + 1)


def alone(mixer: Mixer, rule: Callable[..., Any], dtype: torch.dtype) -> tuple[np.ndarray, Arrays, dict[Any, Any]]:
    """Runs each sample alone: outputs, zero at padding, the gradients of all inputs, and last states by sample."""
    x = {name: torch.tensor(value, dtype=dtype, requires_grad=True) for name, value in mixer.inputs.items()}
    d_y = torch.tensor(output_gradient(mixer), dtype=dtype)
    outputs, states = np.zeros(d_y.shape), {}
    for row, slots in samples():
        own = {name: value if name in mixer.heads else value[row : row + 1, slots] for name, value in x.items()}
        y, state = rule(own)
        (y * d_y[row, slots]).sum().backward()
        outputs[row, slots] = y[0].detach().numpy()
        states[row, slots.stop] = state[0].detach().numpy()
    return outputs, {name: value.grad.detach().numpy() for name, value in x.items() if value.grad is not None}, states


@functools.cache
def compiled(packed: Callable[..., Any], chunk: int) -> Callable[..., Any]:
    """The outputs, the last state, and the gradients of all inputs for a gradient of the outputs, as one program."""

    def outputs_and_gradients(x: Arrays, segment_ids: jax.Array, d_y: jax.Array) -> Any:
        y, pull, state = jax.vjp(lambda x: packed(x, segment_ids, chunk=chunk), x, has_aux=True)
        return y, pull(d_y)[0], state

    return jax.jit(outputs_and_gradients, compiler_options=QUICK)


def packed_result(mixer: Mixer, segments: np.ndarray) -> tuple[np.ndarray, Arrays, np.ndarray]:
    y, gradients, state = compiled(mixer.packed, CHUNK)(mixer.inputs, segments, output_gradient(mixer))
    return np.where(SEGMENTS[..., None, None] > 0, y, 0), gradients, state


@ALL
def test_packed_rows_equal_samples_alone_slot_by_slot_in_float64(mixer: Mixer) -> None:
    y, gradients, state = packed_result(mixer, SEGMENTS)
    wanted, wanted_gradients, states = alone(mixer, mixer.formula, torch.float64)
    assert gap(y, wanted) < FORWARD and gap(gradients, wanted_gradients) < GRADIENT
    assert gap(state[1], states[1, ROWS_SLOTS[1]]) < FORWARD

    leaked, leaked_gradients, _ = packed_result(mixer, np.where(SEGMENTS > 0, 1, 0).astype(np.int32))
    assert gap(leaked, wanted) > 1e3 * FORWARD
    assert all(gap(leaked_gradients[name], wanted_gradients[name]) > 1e2 * GRADIENT for name in mixer.slots)


@ALL
def test_packed_rows_equal_transformers_functions_on_each_sample(mixer: Mixer) -> None:
    y, gradients, _ = packed_result(mixer, SEGMENTS)
    for peer in mixer.peers:  # both sides round in float32
        wanted, wanted_gradients, _ = alone(mixer, peer, torch.float32)
        assert gap(y, wanted) < 2 * FORWARD and gap(gradients, wanted_gradients) < 2 * GRADIENT


@ALL
def test_size_of_chunks_and_split_heads_change_nothing_but_rounding(mixer: Mixer) -> None:
    y, _, state = packed_result(mixer, SEGMENTS)
    mesh = mesh_of(1, 1, 2)
    for chunk, split in [(64, False), (4, True)]:
        axes = {n: "tensor" if split and (n in mixer.slots) else None for n in mixer.inputs}
        placed = {n: NamedSharding(mesh, PartitionSpec(None, None, axis)) for n, axis in axes.items()}
        placed |= {n: NamedSharding(mesh, PartitionSpec("tensor" if split else None)) for n in mixer.heads}
        whole = NamedSharding(mesh, PartitionSpec())
        function = jax.jit(functools.partial(mixer.packed, chunk=chunk), in_shardings=(placed, whole))
        program = function.lower(mixer.inputs, SEGMENTS).compile({name: str(value) for name, value in QUICK.items()})
        y_too, state_too = program(jax.device_put(mixer.inputs, placed), jax.device_put(SEGMENTS, whole))
        assert gap(np.where(SEGMENTS[..., None, None] > 0, y_too, 0), y) < 2 * FORWARD
        assert gap(state_too[1], state[1]) < 2 * FORWARD
        sent = [
            word for word in ("all-reduce", "all-gather", "all-to-all", "permute") if word in str(program.as_text())
        ]
        assert not sent, sent  # each device computes its own heads
        assert y_too.sharding.is_fully_replicated != split


@ALL
def test_parts_of_rows_on_several_devices_pass_their_state_on(mixer: Mixer) -> None:
    """Three devices of 15 slots: a sample that all of them share, borders within parts, and padding at the end."""
    rows = [[(1, 45)], [(1, 20), (2, 19), (0, 6)]]
    segments = np.stack([np.concatenate([np.full(n, s, np.int32) for s, n in row]) for row in rows])
    real = (segments > 0)[..., None, None]

    d_y = np.where(real, np.cos(np.arange(2 * 45 * 4 * 3, dtype=np.float32)).reshape(2, 45, 4, 3), 0)

    def run(inputs: Arrays, segments: jax.Array) -> tuple[jax.Array, Arrays]:
        y, pull = jax.vjp(lambda x: jnp.where(real, mixer.of_rows(x, segments), 0), inputs)
        return y, pull(d_y)[0]

    whole, wanted_gradients, _ = compiled(mixer.packed, CHUNK)(mixer.inputs, segments, d_y)
    wanted = np.where(real, whole, 0)
    with jax.set_mesh(mesh_of(1, 1, 1, sequence=3)):
        function = jax.jit(run, compiler_options=QUICK)
        y, gradients = function(mixer.inputs, segments)
        apart, _ = function(mixer.inputs, segments + 10 * (np.arange(45) // 15))  # no state goes from part to part
    assert gap(y, wanted) < 2 * FORWARD and gap(gradients, wanted_gradients) < 2 * GRADIENT
    assert gap(apart, wanted) > 1e3 * FORWARD


@ALL
def test_ragged_rows_continued_in_pieces_equal_rows_alone(mixer: Mixer) -> None:
    """Pieces of three slots go one by one, those of eleven in chunks; padding follows the tokens of a piece."""
    step, state = jax.jit(mixer.step, compiler_options=QUICK), mixer.zeros()
    lengths, parts = [0, 0], [[], []]
    for slots, tokens in [(11, (11, 4)), (3, (0, 3)), (3, (1, 2)), (11, (6, 11))]:
        piece = {name: np.zeros((2, slots, *x.shape[2:]), np.float32) for name, x in mixer.slots.items()}
        for name, x in mixer.slots.items():
            for row in range(2):
                piece[name][row] = x[row, lengths[row] : lengths[row] + slots]  # tokens that follow stand in as padding
        y, state = step(piece | mixer.heads, state, np.array(tokens, np.int32))
        for row, n in enumerate(tokens):
            parts[row].append(np.asarray(y[row, :n]))
            lengths[row] += n
    for row, length in enumerate(lengths):
        own = {name: torch.tensor(x[row : row + 1, :length], dtype=torch.float64) for name, x in mixer.slots.items()}
        heads = {name: torch.tensor(x, dtype=torch.float64) for name, x in mixer.heads.items()}
        wanted, last = mixer.formula(own | heads)
        assert gap(np.concatenate(parts[row]), wanted[0]) < FORWARD
        assert gap(state[row], last[0]) < FORWARD


@ALL
def test_bfloat16_inputs_have_a_float32_state(mixer: Mixer) -> None:
    """256 slots whose state hardly forgets: only the outputs are rounded to bfloat16, by at most 2^-9 of themselves."""
    rng, slots = np.random.default_rng(0), 256
    x = {name: torch.tensor(rng.normal(size=(1, slots, *v.shape[2:]))).bfloat16() for name, v in mixer.slots.items()}
    x |= {name: torch.tensor(v).bfloat16() for name, v in mixer.heads.items()}
    if "beta" in x:
        x["log_decay"], x["beta"] = -0.001 * x["log_decay"].abs(), torch.sigmoid(x["beta"] - 2)
    else:
        x["rate_log"] = torch.full_like(x["rate_log"], -7.0)
    wanted, state = mixer.formula({name: value.double() for name, value in x.items()})
    wide = ("log_decay", "bias", "rate_log", "skip")  # layers compute these in float32, or have them as parameters
    inputs = {n: jnp.asarray(v.float().numpy(), jnp.float32 if n in wide else jnp.bfloat16) for n, v in x.items()}
    packed = jax.jit(functools.partial(mixer.packed, chunk=64), compiler_options=QUICK)
    y, last = packed(inputs, jnp.ones((1, slots), jnp.int32))
    assert y.dtype == jnp.bfloat16 and last.dtype == jnp.float32
    tolerance = 2**-8 * np.abs(wanted.numpy()) + 1e-5
    assert np.all(np.abs(np.asarray(y, np.float64) - wanted.numpy()) < tolerance)
    assert gap(last, state) < 2e-5

    in_bfloat16, _ = mixer.formula(x)
    assert np.max(np.abs(in_bfloat16.double().numpy() - wanted.numpy()) / tolerance) > 10
