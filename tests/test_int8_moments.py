"""Moments of one byte an entry: what a code stands for, how far they lead from float32, where they lie on a mesh."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from helpers.models import mesh_of, spec_of
from mice_jax.models.transformer import make_decoder
from mice_jax.numerics import blockwise
from mice_jax.numerics.blockwise import Quantized, block_size, dequantize, quantize
from mice_jax.optim import make_optimizer
from mice_jax.step import make_abstract_state
from mice_jax.training.memory_model import bytes_per_device

ADAM: dict[str, Any] = {"grad_clip": 0.0, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.0}


# ---------------------------------------------------------------------------------------- codes
def test_block_is_the_largest_divisor_that_is_long_enough() -> None:
    found = {n: block_size(n) for n in (4096, 960, 576, 80, 64, 17, 12, 254, 131)}
    assert found == {4096: 128, 960: 120, 576: 96, 80: 80, 64: 64, 17: 17, 12: 0, 254: 127, 131: 0}


@pytest.mark.parametrize("signed", [False, True])
def test_codes_stand_for_fourth_powers_and_return_to_themselves(signed: bool) -> None:
    most = 127 if signed else 255
    codes = np.arange(-127 if signed else 0, most + 1)
    codes = np.pad(codes, (0, -len(codes) % 128)).reshape(2, 128)
    codes[:, 127] = most  # each block has the code of its largest entry
    scales = np.array([[3.0], [1e-12]], np.float32)
    stored = Quantized(jnp.asarray(codes, jnp.int8 if signed else jnp.uint8), jnp.asarray(scales))
    values = jax.jit(dequantize)(stored)
    wanted = np.sign(codes) * (codes.astype(np.float64) / most) ** 4 * scales
    np.testing.assert_allclose(values, wanted, rtol=1e-6)  # a few roundings of float32
    np.testing.assert_array_equal(np.asarray(values)[:, 127:], scales)  # not rounded
    again = jax.jit(functools.partial(quantize, signed=signed))(values)
    np.testing.assert_array_equal(again.codes, codes)
    np.testing.assert_array_equal(again.scales, scales)


def relative_errors(x: np.ndarray, signed: bool, square_roots: int = blockwise.SQUARE_ROOTS) -> np.ndarray:
    return np.abs(np.asarray(stored_and_read(x.astype(np.float32), signed, square_roots), np.float64) / x - 1)


@functools.partial(jax.jit, static_argnums=(1, 2))
def stored_and_read(x: np.ndarray, signed: bool, square_roots: int = blockwise.SQUARE_ROOTS) -> jax.Array:
    return dequantize(quantize(jnp.asarray(x), signed=signed, square_roots=square_roots), square_roots)


def test_error_of_an_entry_is_half_a_code_and_linear_codes_lose_it() -> None:
    """Two blocks of very different scales, each with entries of 0 to 9 decades below its largest."""
    decades = np.arange(0, 9.6, 0.6)
    x = np.stack([2.0 * 10.0**-decades, 1e-9 * 10.0**-decades])
    codes = 255 * 10.0 ** (-decades / 4)  # before rounding: 1.4 for the smallest entry
    bound = (1 + 0.5 / codes) ** 4 - 1 + 1e-5
    assert bound[0] < 0.01 and bound[5] < 0.05  # 1 % at the largest entries, 5 % three decades below
    assert (relative_errors(x, signed=False) < bound).all()
    assert relative_errors(x, signed=False).max(axis=0)[3:].max() > 0.01, "half a code is what it comes close to"
    bound = (1 + 0.5 / (codes * 127 / 255)) ** 4 - 1 + 1e-5
    signs = np.where(np.arange(16) % 2, -1.0, 1.0)
    assert (relative_errors(x * signs, signed=True)[:, :12] < bound[:12]).all()
    # Of linear codes, one has a 255th of the largest entry, which is all that is known of whatever is smaller.
    linear = relative_errors(x, signed=False, square_roots=0)
    assert (linear[:, 5:] > 1).all() and (linear[:, :3] < 0.1).all()
    lost = stored_and_read(x.astype(np.float32), True, 0)
    assert not np.asarray(lost)[:, 5:].any()


def test_second_moment_that_is_not_zero_never_becomes_zero() -> None:
    x = np.zeros((1, 32), np.float32)
    x[0, :3] = 1.0, 1e-12, 1e-30
    stored = np.asarray(stored_and_read(x, False))
    assert stored[0, 1] == stored[0, 2] == pytest.approx(255.0**-4)  # the smallest above zero: updates get smaller
    assert not stored[0, 3:].any() and stored[0, 0] == 1
    assert not np.asarray(stored_and_read(x, True))[0, 1:].any()
    assert not np.asarray(stored_and_read(np.zeros((1, 32), np.float32), False)).any()


# ---------------------------------------------------------------------------------------- an optimizer's state
def test_moments_of_matrices_are_bytes_and_those_of_vectors_are_not() -> None:
    shapes = {"layers": {"q": (2, 4, 8, 256), "o": (2, 256, 4, 8), "scale": (2, 256), "gate_bias": (2, 256)}}
    params = jax.tree.map(jnp.zeros, shapes, is_leaf=lambda s: isinstance(s, tuple))
    _, adam, _ = make_optimizer(**ADAM, moments_dtype="int8").init(params)
    for moment, dtype in ((adam.mu["layers"], jnp.int8), (adam.nu["layers"], jnp.uint8)):
        assert moment["q"].codes.dtype == dtype and moment["q"].codes.shape == (2, 4, 8, 256)
        assert moment["q"].scales.shape == (2, 4, 8, 2) and moment["q"].scales.dtype == jnp.float32
        # The last dim of `o` has no block of sixteen; norms and biases are vectors, whatever their number of dims.
        assert {k: m.dtype for k, m in moment.items() if k != "q"} == dict.fromkeys(
            ("o", "scale", "gate_bias"), jnp.dtype("float32")
        )
    entries = 2 * 4 * 8 * 256
    assert sum(x.nbytes for x in jax.tree.leaves([adam.mu["layers"]["q"], adam.nu["layers"]["q"]])) == 2 * entries * (
        1 + 4 / 128
    )


def test_codes_and_scales_are_split_as_their_parameter_is() -> None:
    decoder = make_decoder(spec_of(d_model=256, d_ff=128), 2)
    optimizer = make_optimizer(**ADAM, moments_dtype="int8")
    mesh = mesh_of(2, 2, 2)
    state = make_abstract_state(decoder, optimizer, mesh)
    gate, down = (state.opt_state[1].nu["layers"]["mlp"][name] for name in ("gate", "down"))
    # [layers mlp embed] has two blocks in `embed`, one for each device; [layers embed mlp] has one block in `mlp`.
    assert gate.codes.sharding.spec == gate.scales.sharding.spec == PartitionSpec(None, "tensor", "fsdp")
    assert down.codes.sharding.spec == PartitionSpec(None, "fsdp", "tensor")
    assert down.scales.sharding.spec == PartitionSpec(None, "fsdp", None)
    whole = bytes_per_device(make_abstract_state(decoder, make_optimizer(**ADAM), mesh).opt_state)
    assert bytes_per_device(state.opt_state) < 0.35 * whole  # a quarter, scales, biases and the output projection


def test_blocks_that_straddle_devices_have_the_codes_of_one_device() -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 192)).astype(np.float32) ** 5)
    alone = jax.jit(functools.partial(quantize, signed=True))(x)
    mesh = mesh_of(1, 4, 2)  # 96 entries are a block, and each device has 48
    split = jax.device_put(x, NamedSharding(mesh, PartitionSpec("tensor", "fsdp")))
    for found, wanted in zip(jax.jit(functools.partial(quantize, signed=True))(split), alone, strict=True):
        np.testing.assert_array_equal(found, wanted)


# ---------------------------------------------------------------------------------------- 200 steps
STEPS, VOCAB, WIDTH = 200, 64, 32


@functools.cache
def trained(moments_dtype: str, linear: bool = False) -> dict[str, Any]:
    """How far a two-layer model of a Markov chain's next token has moved after 200 steps of Adam."""
    rng = np.random.default_rng(0)
    chain = rng.integers(0, VOCAB, size=(VOCAB, 3))
    tokens = (VOCAB * rng.random((STEPS, 64)) ** 3).astype(np.int32)  # few are frequent, and some rare
    pairs = np.stack([tokens, chain[tokens, rng.integers(0, 3, size=tokens.shape)]], axis=1)
    shapes = {"embed": {"table": (VOCAB, WIDTH)}, "layers": {"up": (2 * WIDTH, WIDTH)}, "head": {"weight": (VOCAB, 64)}}
    start = jax.tree.map(
        lambda s: jnp.asarray(0.2 * rng.normal(size=s), jnp.float32), shapes, is_leaf=lambda s: isinstance(s, tuple)
    )
    optimizer = make_optimizer(**ADAM, moments_dtype=moments_dtype)

    def loss(params: Any, pair: jax.Array) -> jax.Array:
        hidden = jax.nn.silu(params["embed"]["table"][pair[0]] @ params["layers"]["up"].T)
        logits = jax.nn.log_softmax(hidden @ params["head"]["weight"].T)
        return -jnp.mean(jnp.take_along_axis(logits, pair[1][:, None], axis=1))

    def step(carry: Any, pair: jax.Array) -> tuple[Any, None]:
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params, pair), state, params)
        return (jax.tree.map(lambda p, u: p - 3e-3 * u, params, updates), state), None

    with pytest.MonkeyPatch.context() as patch:
        if linear:  # and without a smallest code above zero
            patch.setattr(blockwise, "quantize", lambda x, *, signed: quantize(x, signed=True, square_roots=0))
            patch.setattr(blockwise, "dequantize", lambda stored: dequantize(stored, 0))
        run = jax.jit(lambda p: jax.lax.scan(step, (p, optimizer.init(p)), jnp.asarray(pairs)))
        (params, _), _ = run(start)
    return jax.tree.map(lambda after, before: np.asarray(after - before, np.float64), params, start)


def drift(moments_dtype: str, **settings: Any) -> float:
    """How far the weights end from those of float32 moments, as a share of how far these have moved."""
    wanted, found = trained("float32"), trained(moments_dtype, **settings)
    apart = jax.tree.map(lambda a, b: np.sum((a - b) ** 2), found, wanted)
    return float(np.sqrt(sum(jax.tree.leaves(apart)) / sum(np.sum(m**2) for m in jax.tree.leaves(wanted))))


def test_200_steps_with_int8_moments_end_close_to_float32() -> None:
    """The bound is the error of one update, relative to it: over steps, errors add up in quadrature, updates agree.

    A first moment is typically a fifth of the largest in its block. Its code is 127 * 0.2^(1/4) = 85, so it is off by
    at most 2 / 85 of itself, by 1.4 % in the root mean square. The code of its square is 255 * 0.04^(1/4) = 114, off by
    1 %, its root by half of that. The moment remembers the errors of earlier steps too: sum(0.81^k)^(1/2) = 2.3 times
    the first is 3.2 %. In bfloat16, rounding to 8 bits is off by 2^-9 / 3^(1/2) in the root mean square.
    """
    assert 0.003 < drift("int8") < 0.032
    assert 0.0003 < drift("bfloat16") < 2.3 * 2**-9 / 3**0.5 * 1.2  # with the second moment's
    # A second moment that becomes zero makes an update of any size; the loss, and then the weights, may overflow.
    assert not drift("int8", linear=True) < 1
