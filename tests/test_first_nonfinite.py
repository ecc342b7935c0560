"""--debug_nans: which operation of which layer makes the first value that is not finite."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.models import mesh_of, packed, random_params, sample_of, spec_of
from mice_jax.models.layer_stacks import layer_of_scopes, layer_scope
from mice_jax.models.transformer import Compute, make_decoder
from mice_jax.optim import make_optimizer
from mice_jax.sharding import put_rows
from mice_jax.step import make_step
from mice_jax.training.first_nonfinite import Finder, describe, explain


def test_layer_of_an_operation_is_told_from_its_scopes() -> None:
    of = layer_of_scopes
    assert layer_scope(4) == "layers_4" and layer_scope(4, 3) == "layers_4_by_3"
    assert of([("embed", 0)]) is None and of([("layers_5/attention", 0)]) == 5
    assert of([("jvp(layers_2)", 3), ("mlp", 0)]) == 5
    assert of([("transpose(jvp(layers_4_by_3))", 2), ("layers_1", 1), ("mlp", 0)]) == 4 + 2 * 3 + 1 + 1
    # A loop inside of a layer, such as that of attention's blocks, does not count layers.
    assert of([("layers_2", 3), ("attention", 7), ("", 0)]) == 5 and of([("layers_2/attention", 7), ("", 0)]) == 2


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda x: jnp.sum(jnp.sqrt(x - 1.0)), "forward pass: sqrt makes the first NaN"),
        # The result of exp becomes NaN in the product, and exp is to blame.
        (lambda x: jnp.sum(jnp.exp(x * 200) * 0), "forward pass: exp makes the first infinite value"),
        # An infinite value that no result depends on is not to blame for a NaN.
        (lambda x: jnp.where(x > 0, 1.0, 1 / (x - 0.5)) + jnp.log(x - 1), "log makes the first NaN"),
        (lambda x: jnp.sum(x), None),
    ],
)
def test_first_operation_that_is_not_finite_is_found(function: Callable, said: str | None) -> None:
    found = Finder(function, mesh_of(1, 1, 1))(jnp.full((3,), 0.5))
    assert found is None if said is None else found is not None and said in describe(found)


@pytest.fixture(scope="module")
def explained() -> Callable[..., str]:
    """Explains a step of a model of three layers in which one value is replaced; one program serves all."""
    mesh, decoder = mesh_of(1, 1, 1), make_decoder(spec_of(num_layers=3))
    compute = Compute(jnp.dtype("float32"), "reference", "none")
    adam = make_optimizer(name="adamw", grad_clip=1.0, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.0)
    fns = make_step(decoder, adam, mesh, compute)
    rng, params = np.random.default_rng(0), random_params(decoder)
    rows = [[sample_of(30, slice(5, None), rng)] for _ in range(2)]
    batches, find = [put_rows(packed(rows, 32), mesh)] * 2, Finder(fns.gradients, mesh)

    def explained(part: str, name: str, layer: int, value: float) -> str:
        changed = jax.tree.map(lambda x: x, params)
        leaf = changed["layers"][part][name]
        changed["layers"][part][name] = leaf.at[(layer, *[0] * (leaf.ndim - 1))].set(value)
        return explain(decoder.spec, find, changed, batches)

    return explained


@pytest.mark.slow
def test_layer_and_operation_of_a_step_are_named(explained: Callable[..., str]) -> None:
    assert explained("mlp", "down", 1, np.nan) == (
        "The parameters were not finite before the step: layers.mlp.down of layer 1."
    )
    # Layer 1 writes a huge value into the residual stream, whose square overflows in the norm of the next layer.
    said = explained("mlp", "down", 1, 1e30)
    assert said.startswith("In microbatch 1 of 2, the forward pass, layer 2, attention: mul at mice_jax/models/param")
    said = explained("attention", "v", 1, 1e30)
    assert "the forward pass, layer 1, mlp: mul at mice_jax/models/parameters.py:" in said
    assert explained("mlp", "down", 1, 0.1).startswith("Computed again, all values")  # as it was: nothing is wrong
