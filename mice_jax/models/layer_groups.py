"""Divides a list of layers of several kinds into repeating groups, each of which is compiled once.

A group is a short sequence of runs of layers of one kind, and is repeated. The number of runs over all groups is the
number of layers that are compiled, whatever the depth of the model: 5 for the 16 layers of LFM2-1.2B.
"""

import itertools
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple


class Run(NamedTuple):
    """Layers of one kind that follow one another."""

    kind: Any
    count: int


class Group(NamedTuple):
    """A sequence of runs, which is repeated."""

    repeats: int
    runs: tuple[Run, ...]


def find_groups(kinds: Sequence[Hashable]) -> list[Group]:
    """Divides layers into groups with as few runs as possible, and among those as few groups as possible.

    Args:
      kinds: the kind of each layer.

    Returns:
      The groups, whose layers one after another are those of `kinds`.
    """
    # best[i] is the cheapest division of the first i layers, as (runs, number of groups, groups).
    best: list[tuple[int, int, list[Group]]] = [(0, 0, [])]
    for end in range(1, len(kinds) + 1):
        best.append(min(_endings(kinds, best, end), key=lambda division: division[:2]))
    return best[-1][2]


def _endings(
    kinds: Sequence[Hashable], best: list[tuple[int, int, list[Group]]], end: int
) -> list[tuple[int, int, list[Group]]]:
    """Returns divisions of the first `end` layers, one for each last group that they may end with."""
    found = []
    for size in range(1, end + 1):
        unit = kinds[end - size : end]
        runs = tuple(Run(kind, len(list(same))) for kind, same in itertools.groupby(unit))
        start, repeats = end - size, 1
        while True:
            num_runs, num_groups, before = best[start]
            found.append((num_runs + len(runs), num_groups + 1, [*before, Group(repeats, runs)]))
            if len(runs) == 1 or start < size or kinds[start - size : start] != unit:
                break
            start, repeats = start - size, repeats + 1
    return found
