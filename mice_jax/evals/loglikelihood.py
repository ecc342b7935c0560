"""Log-probabilities of given tokens after given contexts, for many requests at once, in rows of prefix trees."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mice_jax.evals import prefix_tree
from mice_jax.evals.prefix_tree import Request
from mice_jax.inference.sampler import cast_params
from mice_jax.loss import tokens_per_chunk
from mice_jax.models import rope
from mice_jax.models.attention import AttentionRequirements, choose_backend
from mice_jax.models.attention.tree import Trees
from mice_jax.models.spec import LongScaling, ModelSpec
from mice_jax.models.transformer import Compute, Decoder, Params
from mice_jax.sharding import constrain, local_shards, num_shards, put_rows

# Shapes: B rows, T slots, M scored tokens of a row, C scored tokens of a chunk, D d_model, V vocabulary.

# The maximum number of slots of a batch on one device. Larger batches are not faster.
CPU_SLOTS, DEVICE_SLOTS = 4096, 16384

Score = tuple[float, bool]  # The sum of log-probabilities, and whether every token was the likeliest.
Watch = Callable[[int], None]  # It is called with the number of requests that are done.


class Scorer:
    """Scores requests with a decoder. Its functions are compiled once for each shape; each call brings the parameters.

    Every process of a run makes the same calls, and gets all scores.
    """

    def __init__(self, decoder: Decoder, mesh: Mesh, dtype: Any):
        """Makes a scorer.

        Args:
          decoder: The model's functions.
          mesh: The devices.
          dtype: The dtype to compute in.
        """
        self._spec, self._mesh, self._dtype = decoder.spec, mesh, jnp.dtype(dtype)
        self._score = shared_score(decoder, self._dtype)

    def score(self, params: Params, requests: Sequence[Request], watch: Watch = lambda done: None) -> list[Score]:
        """Scores requests.

        Args:
          params: The parameters, on the scorer's mesh.
          requests: The texts, none longer than the model's positions.
          watch: Called with the number of requests that are done.

        Returns:
          For each request, the sum of the log-probabilities of its targets, and whether each of them was the likeliest.
        """
        if not requests:
            return []
        assert all(0 < len(r.targets) <= len(r.ids) <= self._spec.max_positions for r in requests)
        shape, rows = prefix_tree.pack(prefix_tree.build_prefix_trees(requests, _tree_groups(requests, self._spec)))
        sums, best = np.zeros(len(requests)), np.ones(len(requests), bool)
        done = 0
        pending: tuple[Any, list[np.ndarray]] | None = None
        for batch in [*self._batches(shape, rows), None]:
            computed = None
            if batch is not None:
                arrays, owners = prefix_tree.arrays(batch, shape, requests)
                computed = self._run(params, arrays, shape), owners
            # The scores of a batch are read while the next batch is computed.
            if pending is not None:
                logprobs, likeliest = (np.asarray(x) for x in pending[0])
                for r, owner in enumerate(pending[1]):
                    np.add.at(sums, owner, logprobs[r, : len(owner)].astype(np.float64))
                    np.logical_and.at(best, owner, likeliest[r, : len(owner)])
                    done += len(np.unique(owner))
                watch(done)
            pending = computed
        return [(float(s), bool(b)) for s, b in zip(sums, best, strict=True)]

    def _batches(
        self, shape: prefix_tree.Shape, rows: list[list[prefix_tree.Tree]]
    ) -> list[list[list[prefix_tree.Tree]]]:
        """Divides rows into batches of one size; the last is filled up with empty rows."""
        shards = num_shards(self._mesh)
        slots = CPU_SLOTS if self._mesh.devices.flat[0].platform == "cpu" else DEVICE_SLOTS
        fitting = max(1, slots // (shape.trunks + shape.branches))
        size = shards * min(fitting, -(-len(rows) // shards))
        batches = [rows[i : i + size] for i in range(0, len(rows), size)]
        return [batch + [[]] * (size - len(batch)) for batch in batches]

    def _run(
        self, params: Params, arrays: dict[str, np.ndarray], shape: prefix_tree.Shape
    ) -> tuple[jax.Array, jax.Array]:
        """Returns log-probabilities [B M] and whether each target is the likeliest [B M], replicated on all devices."""
        device = self._mesh.devices.flat[0]
        attention = choose_backend(
            "auto",
            AttentionRequirements(
                self._spec,
                platform=device.platform,
                compute_capability=getattr(device, "compute_capability", None),
                dtype=str(self._dtype),
                max_length=shape.trunks,
                deterministic=False,
            ),
        )
        shards = num_shards(self._mesh)
        size = len(arrays["tokens"]) // shards
        ours = [r for s in local_shards(self._mesh) for r in range(s * size, (s + 1) * size)]
        on_devices = put_rows({name: x[ours] for name, x in arrays.items()}, self._mesh, whole=True)
        chunk = min(shape.scored, max(1, 1 << (tokens_per_chunk(self._spec.vocab_size) // size).bit_length() - 1))
        with jax.set_mesh(self._mesh):
            return self._score(params, on_devices, attention=attention, chunk=chunk)


def _tree_groups(requests: Sequence[Request], spec: ModelSpec) -> list[int] | None:
    """Returns the group of each request, or None for a single group. Only texts of one group may share a tree.

    With LongRoPE, texts longer than its limit have other rotations than shorter ones. The state of a recurrent mixer
    cannot branch, so with such mixers each text is a group of its own.
    """
    if spec.is_recurrent:
        return list(range(len(requests)))
    if not rope.needs_lengths(spec.ropes):
        return None
    limits = {r.scaling.original_positions for r in spec.ropes if r and isinstance(r.scaling, LongScaling)}
    return [sum(len(r.ids) > limit for limit in limits) for r in requests]


@functools.lru_cache(maxsize=4)
def shared_score(decoder: Decoder, dtype: Any) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Jits the scoring of a decoder, once for all scorers that have it."""
    return jax.jit(functools.partial(_score, decoder, dtype), static_argnames=("attention", "chunk"))


def _score(
    decoder: Decoder, dtype: Any, params: Params, rows: dict[str, jax.Array], *, attention: str, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """Returns the log-probability of each target [B M], and whether no token is likelier [B M]."""
    model = decoder.bind(cast_params(params, dtype))
    compute = Compute(dtype, attention, "none")
    if decoder.spec.is_recurrent:  # Every tree is a trunk without branches, which is an ordinary segment of a row.
        hidden = model.hidden(rows["tokens"], rows["positions"], rows["segment_ids"], compute)
    else:
        forest = Trees(rows["segment_ids"], rows["positions"], rows["number"], rows["reach"])
        hidden = model.hidden_of_trees(rows["tokens"], rows["lengths"], forest, compute)
    hidden = jnp.take_along_axis(hidden, rows["slots"][..., None], axis=1)  # [B M D]

    def compare(scored: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        hidden, targets = scored  # [B C D], [B C]
        logits = model.logits(hidden)
        column = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2)
        # A gather along a sharded vocabulary would collect the logits on one device, so this compares instead.
        at_target = jnp.sum(jnp.where(column == targets[..., None], logits, 0), axis=-1)
        return at_target - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == targets

    def chunks(x: jax.Array) -> jax.Array:  # [B M ...] -> [M/C B C ...]
        return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)

    found = jax.lax.map(compare, (chunks(hidden), chunks(rows["targets"])))
    logprobs, best = (jnp.moveaxis(x, 0, 1).reshape(rows["targets"].shape) for x in found)
    return constrain(logprobs, None, None), constrain(best, None, None)
