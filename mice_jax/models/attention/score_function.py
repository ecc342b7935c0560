"""The computation between the product of a query with a key and the softmax."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Scoring:
    """How the product of a query with a key becomes a score, and which keys are visible besides causality and segments.

    Windows count slots of the row, whose differences equal those of positions between two tokens of one segment.
    """

    scale: float
    window: int | None  # a query at slot t sees the keys of slots t-window+1 .. t; None for all up to t
    softcap: float | None  # score -> softcap * tanh(score / softcap), before the mask; None for no soft cap

    def __post_init__(self) -> None:
        assert self.window is None or self.window >= 1, "a query sees itself"
        assert self.softcap is None or self.softcap > 0

    def scores(self, products: jax.Array) -> jax.Array:
        """Maps float32 products of any shape to scores."""
        return softcapped(products * self.scale, self.softcap)

    def score_grad(self, scores: jax.Array) -> jax.Array | float:
        """Computes the derivatives of scores of any shape with respect to the products that gave them."""
        return self.scale if self.softcap is None else self.scale * (1 - jnp.square(scores / self.softcap))

    def position_mask(self, queries: jax.Array, keys: jax.Array) -> jax.Array:
        """Returns the keys visible under causality and the window.

        Args:
          queries: [T] int32, slots of queries.
          keys: [S] int32, slots of keys.

        Returns:
          [T S] bool.
        """
        distance = queries[:, None] - keys[None, :]
        return distance >= 0 if self.window is None else (distance >= 0) & (distance < self.window)


def softcapped(x: jax.Array, cap: float | None) -> jax.Array:
    """Returns cap * tanh(x / cap) for x of any shape; x itself if `cap` is None."""
    return x if cap is None else cap * jnp.tanh(x / cap)
