"""The layers of a model: their parameters in stacks, and the scan through them.

Every part of a layer is stacked along a leading dim. In a model with several kinds of layers, mixers and MLPs that not
all layers have are stacked over those that have them, and the other parts over all layers. Layers are scanned in
repeating groups (layer_groups.py): compile time depends on how irregular the list of kinds is, but not on its length.
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from mice_jax.models.attention.segments import SAVED_NAME
from mice_jax.models.layer_groups import Group, Run, find_groups
from mice_jax.models.layers import ApplyMixer, Block, make_part, mixer_name, mlp_name
from mice_jax.models.lora import LoRA
from mice_jax.models.parameters import Adapted
from mice_jax.models.spec import AttentionKind, Kind, ModelSpec

# B rows, T slots, D d_model, L layers

T = TypeVar("T")
Params = dict[str, Any]

LAYER_INPUT = "layer_input"  # names the input of a layer, for the policy that offloads it
REMAT_POLICIES = {
    "full": None,  # saves the input of a layer only
    # Saves the input of a layer in host memory, and brings it back for the layer's backward pass.
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[LAYER_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    # Saves the results of products with weights, of our own attention kernels and of recurrent scans: recomputing the
    # rest is cheap.
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(SAVED_NAME),
    ),
}


class LayerProperties(NamedTuple):
    """What differs between layers of a kind besides parameters, scanned with them."""

    rope: jax.Array  # [L] int32, index into the distinct ropes of the kind
    window: jax.Array  # [L] int32, index into its distinct windows
    own_inputs: jax.Array | None  # [L B T P], in models with embeddings of each layer


LAYER_SCOPE = re.compile(r"\blayers_(\d+)(?:_by_(\d+))?\b")

# The keys and values that layers lend, by the names of their attention.
Lent = dict[str, Any]
# Returns what applies the mixer of a layer, given the properties of the layer and what earlier layers lend.
MixerOf = Callable[[LayerProperties, Lent], ApplyMixer]


class _Rows(NamedTuple):
    """Rows of the stacks of some layers.

    Attributes:
      params: By their names in the tree of parameters, the parts of all of the layers, and those of some of them.
      properties: The properties of all of the layers.
    """

    params: Params
    properties: LayerProperties


def stack_layers(spec: ModelSpec, rngs: nnx.Rngs, lora: LoRA | None = None) -> Block:
    """Makes the layers of a model as one block of stacked parameters; parts that not all layers have are in it too.

    Args:
      spec: the model.
      rngs: the source of random parameters.
      lora: the adapters of the layers' weights, if any.
    """
    layers = _stacks(spec, rngs)
    if lora is not None:
        for target in lora.targets:
            part, name = target.split(".")
            module = getattr(layers, part)
            setattr(module, name, Adapted(getattr(module, name), lora, rngs))
    return layers


def _stacks(spec: ModelSpec, rngs: nnx.Rngs) -> Block:
    varying = _varying_parts(spec)

    def stacked(count: int, make: Callable[[nnx.Rngs], T]) -> T:
        @nnx.split_rngs(splits=count)
        @nnx.vmap(in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers"})
        def made(rngs: nnx.Rngs) -> T:
            return make(rngs)

        return made(rngs)

    layers = stacked(spec.num_layers, lambda rngs: Block(spec, spec.mixers[0], rngs, without=varying))
    for name in varying:
        rows = layers_of_stack(spec, name)
        part = stacked(len(rows), functools.partial(make_part, spec, spec.mixers[rows[0]], name))
        setattr(layers, name, part)
    return layers


def _parts(kind: Kind) -> tuple[str, str]:
    """Returns the names of the parts of a layer that may differ between kinds."""
    return mixer_name(kind), mlp_name(kind)


def _varying_parts(spec: ModelSpec) -> list[str]:
    """Returns the names of the parts that some layers have and others lack."""
    parts = [_parts(kind) for kind in spec.mixers]
    return [name for name in dict.fromkeys(sum(parts, ())) if not all(name in of_layer for of_layer in parts)]


def layers_of_stack(spec: ModelSpec, name: str) -> list[int]:
    """Returns the layers in a stack of parameters.

    Args:
      spec: the model.
      name: the name of the stack in the tree of the layers' parameters.

    Returns:
      The index of the layer of each row.
    """
    if name not in _varying_parts(spec):
        return list(range(spec.num_layers))
    return [i for i, kind in enumerate(spec.mixers) if name in _parts(kind)]


def layer_scope(first: int, stride: int = 1) -> str:
    """Names the operations of some layers, for profiles and for messages.

    Args:
      first: the index of the first of the layers, counted from the first of the group of which they are a part.
      stride: the number of layers in one iteration of the loop through them.

    Returns:
      A name, from which `layer_of_scopes` tells the layer of an operation.
    """
    return f"layers_{first}" if stride == 1 else f"layers_{first}_by_{stride}"


def is_loop_of_layers(names: str) -> bool:
    """Returns whether a loop with these scopes goes through layers; one inside of a layer has more names."""
    found = list(LAYER_SCOPE.finditer(names))
    return bool(found) and not names[found[-1].end() :].strip(")")


def layer_of_scopes(scopes: Sequence[tuple[str, int]]) -> int | None:
    """Returns the index of the layer to which an operation belongs; None if it belongs to none.

    Args:
      scopes: the names of the scopes in which the operation is, from the outside in. The first of each pair has those
        of one loop, or of the operation itself; the second is the iteration of that loop, 0 for the operation itself.
    """
    layer = None
    for names, iteration in scopes:
        for found in LAYER_SCOPE.finditer(names):
            layer = (layer or 0) + int(found[1])
            if is_loop_of_layers(names):
                layer += iteration * int(found[2] or 1)
    return layer


class StackedLayers:
    """The layers of a model, inside a traced function.

    Args:
      spec: the model.
      stacks: its layers, from `stack_layers`.
    """

    def __init__(self, spec: ModelSpec, stacks: Block):
        self._spec = spec
        self._params: Params = nnx.to_pure_dict(nnx.state(stacks, nnx.Param))
        self._varying = set(_varying_parts(spec))
        self._structures = {kind: self._structure(stacks, kind) for kind in set(spec.mixers)}

    def _structure(self, stacks: Block, kind: Kind) -> tuple[Any, Any]:
        """Returns the structure of a layer of this kind alone, and a state into which parameters can be put."""
        block = nnx.merge(*nnx.split(stacks))
        for other in self._varying - {*_parts(kind)}:
            delattr(block, other)
        block.mixer_name, block.mlp_name = _parts(kind)
        return nnx.split(block)

    def layer(self, kind: Kind, params: Params) -> Block:
        """Returns the module of one layer.

        Args:
          kind: its kind.
          params: its parameters.
        """
        graph, structure = self._structures[kind]
        state = jax.tree.map(lambda x: x, structure)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state)

    def scan(
        self,
        x: jax.Array,
        properties: LayerProperties,
        mixer_of: Callable[[Kind], MixerOf],
        remat: str,
        reduce_dtype: Any,
    ) -> jax.Array:
        """Runs hidden states through all layers.

        Args:
          x: [B T D].
          properties: the properties of all layers.
          mixer_of: returns what applies a mixer.
          remat: "none" or a key of `REMAT_POLICIES`.
          reduce_dtype: the dtype in which gradients are summed over devices.

        Returns:
          [B T D].
        """
        lent: Lent = {}

        def layer(kind: Kind, x: jax.Array, rows: _Rows) -> tuple[jax.Array, Any]:
            own = rows.properties.own_inputs
            x = checkpoint_name(x, LAYER_INPUT)
            return self.layer(kind, rows.params)(x, mixer_of(kind)(rows.properties, lent), reduce_dtype, own)

        def through_run(run: Run, x: jax.Array, rows: _Rows, *, in_loop: bool) -> jax.Array:
            alone, one = run.count == 1, functools.partial(layer, run.kind)
            if remat != "none":
                # Outside of a loop, XLA would merge what the backward pass recomputes with the forward pass.
                one = jax.checkpoint(one, policy=REMAT_POLICIES[remat], prevent_cse=alone and not in_loop)
            if alone:
                x, kept = one(x, jax.tree.map(lambda x: x[0], rows))
                if isinstance(run.kind, AttentionKind) and run.kind.keys == "lent":
                    assert not in_loop, "one layer lends the keys of a name"
                    lent[run.kind.name] = kept
                return x
            return jax.lax.scan(one, x, rows)[0]

        def through_group(group: Group, layers_before: int, x: jax.Array, rows: _Rows) -> jax.Array:
            before = 0 if group.repeats > 1 else layers_before
            runs = [Group(1, (run,)) for run in group.runs]
            for run, own in zip(group.runs, self._split(rows, runs), strict=True):
                with jax.named_scope(layer_scope(before)):
                    x = through_run(run, x, own, in_loop=group.repeats > 1)
                before += run.count
            return x

        groups, before = find_groups(self._spec.mixers), 0
        for group, rows in zip(groups, self._split(_Rows(self._params, properties), groups), strict=True):
            layers_of_one = sum(run.count for run in group.runs)
            if group.repeats == 1:
                x = through_group(group, before, x, rows)
            else:
                rows = jax.tree.map(lambda x, n=group.repeats: x.reshape(n, -1, *x.shape[1:]), rows)
                once = functools.partial(through_group, group, before)
                with jax.named_scope(layer_scope(before, layers_of_one)):
                    x, _ = jax.lax.scan(lambda x, rows, once=once: (once(x, rows), None), x, rows)
            before += group.repeats * layers_of_one
        return x

    def _split(self, rows: _Rows, groups: Sequence[Group]) -> list[_Rows]:
        """Splits the rows of some layers by the groups that follow one another in them.

        Args:
          rows: the rows.
          groups: the groups, which have all of the layers together.

        Returns:
          The rows of each group.
        """

        def split(stacks: Any, sizes: list[int]) -> list[Any]:
            leaves, structure = jax.tree.flatten(stacks)
            parts = [jax.lax.split(leaf, sizes) for leaf in leaves]  # the gradient is one concatenation
            return [structure.unflatten(of_group) for of_group in zip(*parts, strict=True)] or [stacks] * len(sizes)

        layers = [sum(run.count for run in group.runs) * group.repeats for group in groups]
        params: list[Params] = [{} for _ in groups]
        for name, stacks in rows.params.items():
            sizes = layers
            if name in self._varying:
                sizes = [sum(run.count for run in g.runs if name in _parts(run.kind)) * g.repeats for g in groups]
            for of_group, part, size in zip(params, split(stacks, sizes), sizes, strict=True):
                if size:
                    of_group[name] = part
        return [_Rows(*of_group) for of_group in zip(params, split(rows.properties, layers), strict=True)]
