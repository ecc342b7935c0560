"""The grid of a sweep: its axes, its arms and which arms are neighbours.

An arm is one combination of the axes' values. Arms are numbered as the elements of an array of the grid's shape, the
last axis fastest.
"""

import dataclasses
import itertools
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mice_jax.errors import UserError

MIN_ORDERED_VALUES = 3  # an axis with fewer values has no arm with a neighbour on both sides


@dataclasses.dataclass(frozen=True)
class Grid:
    """The arms of a sweep.

    Attributes:
        axes: The values of each axis by the axis' name.
    """

    axes: Mapping[str, Sequence[Any]]

    @property
    def shape(self) -> tuple[int, ...]:
        """The number of values of each axis."""
        return tuple(len(values) for values in self.axes.values())

    @property
    def size(self) -> int:
        """The number of arms."""
        return math.prod(self.shape)

    def values(self, arm: int) -> dict[str, Any]:
        """Returns the value of an arm on each axis."""
        return {name: values[i] for (name, values), i in zip(self.axes.items(), self._index(arm), strict=True)}

    def neighbours(self, arm: int, axis: str) -> list[int]:
        """Returns the arms with the next lower and the next higher value on an axis, other axes equal.

        Args:
            arm: The number of the arm.
            axis: The name of an axis of numbers, in any order.

        Returns:
            Two arms, or one where the arm has the lowest or the highest value of the axis.
        """
        index, position = self._index(arm), list(self.axes).index(axis)
        by_value = sorted(range(len(self.axes[axis])), key=lambda i: self.axes[axis][i])
        rank = by_value.index(index[position])
        beside = [by_value[r] for r in (rank - 1, rank + 1) if 0 <= r < len(by_value)]
        return [self._arm((*index[:position], i, *index[position + 1 :])) for i in beside]

    def blocks(self, names: Iterable[str]) -> list[list[int]]:
        """Returns the arms in blocks that differ in the values of these axes, in the order of the arms."""
        chosen = set(names)
        positions = [i for i, name in enumerate(self.axes) if name in chosen]
        blocks: dict[tuple[int, ...], list[int]] = {}
        for arm in range(self.size):
            index = self._index(arm)
            blocks.setdefault(tuple(index[p] for p in positions), []).append(arm)
        return list(blocks.values())

    def _index(self, arm: int) -> tuple[int, ...]:
        return tuple(int(i) for i in np.unravel_index(arm, self.shape)) if self.shape else ()

    def _arm(self, index: tuple[int, ...]) -> int:
        return int(np.ravel_multi_index(index, self.shape))


def checked_grid(axes: Mapping[str, Iterable[Any]]) -> Grid:
    """Returns the grid of some axes.

    Args:
        axes: The values of each axis by the axis' name.

    Raises:
        UserError: An axis has no values, a value twice, or a number that is not finite.
    """
    if not isinstance(axes, Mapping) or not axes:
        raise UserError(
            f"axes is {axes!r}, which names no axis. Give a dict with the list of values of each axis, as in "
            '{"optim.learning_rate": [1e-5, 2e-5, 4e-5]}.'
        )
    return Grid({name: _checked_values(name, values) for name, values in axes.items()})


def _checked_values(name: str, values: Iterable[Any]) -> list[Any]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise UserError(f"axes[{name!r}] is {values!r}. Give the list of the axis' values.")
    # Values of a numpy array become plain numbers, so that an arm's values can be printed and compared.
    plain = [v.item() if isinstance(v, np.generic) else v for v in values]
    if not plain:
        raise UserError(f"axes[{name!r}] is empty. Give at least one value, or leave the axis out.")
    for value in plain:
        if is_number(value) and not math.isfinite(value):
            raise UserError(f"axes[{name!r}] has the value {value}. Every number of an axis must be finite.")
    for a, b in itertools.combinations(plain, 2):
        if type(a) is type(b) and a == b:
            raise UserError(f"axes[{name!r}] has the value {a!r} twice. Give each value of an axis once.")
    return plain


def is_number(value: Any) -> bool:
    """Returns whether a value is an integer or a float; a bool is neither."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_numeric(values: Sequence[Any]) -> bool:
    """Returns whether all values of an axis are numbers."""
    return all(map(is_number, values))
