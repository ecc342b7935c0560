"""What a model does between the product of a query with a key and the softmax."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Scoring:
    """How a query's product with a key becomes a score, and which keys it may see besides causality and segments.

    Slots are counted along the row: between two tokens of one segment they differ as the positions do.
    """

    scale: float
    window: int | None  # a query at slot t sees keys of slots t-window+1 .. t; None: all before it
    softcap: float | None  # score -> softcap * tanh(score / softcap), before the mask; None: as it is

    def __post_init__(self) -> None:
        assert self.window is None or self.window >= 1, "a query sees itself"
        assert self.softcap is None or self.softcap > 0

    def scores(self, products: jax.Array) -> jax.Array:
        """float32 products -> scores, of any shape."""
        return softcapped(products * self.scale, self.softcap)

    def slopes(self, scores: jax.Array) -> jax.Array | float:
        """The derivatives of `scores` by the products that gave them."""
        return self.scale if self.softcap is None else self.scale * (1 - jnp.square(scores / self.softcap))

    def in_reach(self, queries: jax.Array, keys: jax.Array) -> jax.Array:
        """Slots [T] of queries and [S] of keys -> [T S]: which keys causality and the window leave."""
        distance = queries[:, None] - keys[None, :]
        return distance >= 0 if self.window is None else (distance >= 0) & (distance < self.window)


def softcapped(x: jax.Array, cap: float | None) -> jax.Array:
    """cap * tanh(x / cap), entry by entry; x itself without a cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)
