"""Which texts share work: requests to score are put together into trees, and trees into rows of one shape.

Sorted, a text follows those that it has most in common with. A tree is a run of texts that each share enough with the
one before: the first is its trunk, and each of the others branches off from it, or from a branch, where they part. So
the options of a question cost its prompt once, whatever the text was split into, and so do questions that begin with
the same examples.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mice_jax.packing_limits import max_segments

# B rows, T slots, P slots of trunks, M scored tokens

LEAST_SHARED = 4  # a text is a branch where it shares at least one in so many of its tokens, else a tree of its own
BRANCH_SLOTS = 1024  # of a tree's branches, or as many as the longest text has: its trunk is then computed anew
TILE = 128  # slots; what kernels want
BESIDE = 32  # slots of branches come in so many, where they are few
LEAST_ROW, MOST_ROW = 512, 2048  # slots of the trunks of a row, where there are so many: short texts share rows
ATTENDED = 16384  # slots of a row at which attention costs about as much as all else


class Request(NamedTuple):
    """Tokens to score: of the ids that a model is given, the last len(targets) are to be followed by these."""

    ids: np.ndarray
    targets: np.ndarray


class Shape(NamedTuple):
    """Of a row: slots of trunks and of branches, and scored tokens."""

    trunks: int
    branches: int
    scored: int


@dataclasses.dataclass(frozen=True)
class Tree:
    """Texts that begin alike; its nodes are tokens, numbered as a walk through it meets them."""

    tokens: np.ndarray
    positions: np.ndarray
    reach: np.ndarray  # for each node, the number that follows those of its descendants
    trunk: int  # so many first nodes are one path
    length: int  # of the longest text
    scored: list[tuple[int, np.ndarray]]  # a request, and the nodes of which it has the targets

    @property
    def branches(self) -> int:
        return len(self.tokens) - self.trunk

    @property
    def num_scored(self) -> int:
        return sum(len(nodes) for _, nodes in self.scored)


def grow(requests: Sequence[Request], kind: Sequence[int] | None = None) -> list[Tree]:
    """The trees of all requests; none holds requests of two kinds."""
    if not requests:
        return []
    kind = kind or [0] * len(requests)
    most = max(BRANCH_SLOTS, *(len(r.ids) for r in requests))
    order = sorted(range(len(requests)), key=lambda i: (kind[i], requests[i].ids.astype(">i4").tobytes()))
    trees, texts, shared, branches = [], [order[0]], [0], 0
    for before, i in itertools.pairwise(order):
        ids = requests[i].ids
        common = _common(requests[before].ids, ids)
        more = len(ids) - common
        if kind[before] == kind[i] and common * LEAST_SHARED >= len(ids) and branches + more <= most:
            texts, shared, branches = [*texts, i], [*shared, common], branches + more
        else:
            trees.append(_tree(requests, texts, shared))
            texts, shared, branches = [i], [0], 0
    return [*trees, _tree(requests, texts, shared)]


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """How many first tokens two texts share."""
    n = min(len(a), len(b))
    differing = np.flatnonzero(a[:n] != b[:n])
    return int(differing[0]) if len(differing) else n


def _tree(requests: Sequence[Request], texts: list[int], shared: list[int]) -> Tree:
    """The tree of sorted texts, each of which shares so many tokens with the one before."""
    sizes = [len(requests[i].ids) - s for i, s in zip(texts, shared, strict=True)]
    size = sum(sizes)
    tokens, positions, reach = np.empty(size, np.int32), np.empty(size, np.int32), np.full(size, size, np.int32)
    path = np.empty(0, np.int32)  # the nodes of the text that was added last
    scored, end = [], 0
    for i, common, more in zip(texts, shared, sizes, strict=True):
        new = np.arange(end, end + more, dtype=np.int32)
        reach[path[common:]] = end
        path = np.concatenate([path[:common], new])
        tokens[new], positions[new] = requests[i].ids[common:], np.arange(common, common + more)
        scored.append((i, path[len(path) - len(requests[i].targets) :]))
        end += more
    return Tree(tokens, positions, reach, sizes[0], max(len(requests[i].ids) for i in texts), scored)


# ---------------------------------------------------------------------------------------- rows
def pack(trees: Sequence[Tree]) -> tuple[Shape, list[list[Tree]]]:
    """Rows of trees, and the one shape that holds each of them: of a few shapes, the one that costs least."""
    longest, trunks = max(t.trunk for t in trees), sum(t.trunk for t in trees)
    sizes = [rounded_up(max(longest, min(LEAST_ROW, trunks)))]
    while (more := rounded_up(sizes[-1] + 1)) <= min(MOST_ROW, rounded_up(trunks)):
        sizes.append(more)
    packed = [_filled(trees, slots) for slots in sizes]

    def cost(way: tuple[Shape, list[list[Tree]]]) -> float:
        slots = way[0].trunks + way[0].branches
        return len(way[1]) * slots * (1 + slots / ATTENDED)

    return min(packed, key=cost)


def _filled(trees: Sequence[Tree], slots: int) -> tuple[Shape, list[list[Tree]]]:
    """Rows with so many slots of trunks, each tree in the first that has room, the largest first."""
    trunks, branches = sum(t.trunk for t in trees), sum(t.branches for t in trees)
    # As many slots of branches as trees that fill the trunks have on average, and some.
    beside = max(max(t.branches for t in trees), -(-slots * branches // trunks))
    beside = rounded_up(beside) if beside > 2 * TILE else -(-beside // BESIDE) * BESIDE
    rows: list[list[Tree]] = []
    # What is left in each row: slots of trunks, of branches, segments.
    left = np.empty((len(trees), 3), np.int64)
    for tree in sorted(trees, key=lambda t: (t.trunk, t.branches), reverse=True):
        need = (tree.trunk, tree.branches, 1)
        fits = np.flatnonzero((left[: len(rows)] >= need).all(axis=1))
        row = int(fits[0]) if len(fits) else len(rows)
        if row == len(rows):
            rows.append([])
            left[row] = slots, beside, max_segments(slots)
        rows[row].append(tree)
        left[row] -= need
    scored = max(sum(t.num_scored for t in row) for row in rows)
    return Shape(slots, beside, 1 << (scored - 1).bit_length()), rows


def rounded_up(slots: int) -> int:
    """The next of 128, 256, 384, 512, 768, 1024, 1536, ...: few shapes, few programs."""
    tiles = max(1, -(-slots // TILE))
    whole = 1 << (tiles - 1).bit_length()
    return TILE * (whole * 3 // 4 if whole >= 4 and tiles <= whole * 3 // 4 else whole)


def arrays(
    rows: Sequence[Sequence[Tree]], shape: Shape, requests: Sequence[Request]
) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """What is computed of rows: tokens and where they stand, [B T] each, and what is scored of it, [B M] each.

    Also returns, for each row, the requests that its scored slots belong to.
    """
    b, t = len(rows), shape.trunks + shape.branches
    made = {name: np.zeros((b, t), np.int32) for name in ("tokens", "positions", "reach", "lengths")}
    made |= {"number": np.full((b, t), -1, np.int32), "segment_ids": np.zeros((b, shape.trunks), np.int32)}
    made |= {name: np.zeros((b, shape.scored), np.int32) for name in ("slots", "targets")}
    owners = []
    for r, row in enumerate(rows):
        at, beside, first, count = 0, shape.trunks, 0, 0
        owner: list[np.ndarray] = [np.empty(0, np.int64)]
        for segment, tree in enumerate(row, 1):
            slots = np.concatenate([np.arange(at, at + tree.trunk), np.arange(beside, beside + tree.branches)])
            made["tokens"][r, slots], made["positions"][r, slots] = tree.tokens, tree.positions
            made["number"][r, slots] = first + np.arange(len(slots))
            made["reach"][r, slots] = first + tree.reach
            made["lengths"][r, slots] = tree.length
            made["segment_ids"][r, at : at + tree.trunk] = segment
            for i, nodes in tree.scored:
                here = slice(count, count + len(nodes))
                made["slots"][r, here], made["targets"][r, here] = slots[nodes], requests[i].targets
                owner.append(np.full(len(nodes), i))
                count += len(nodes)
            at, beside, first = at + tree.trunk, beside + tree.branches, first + len(slots)
        owners.append(np.concatenate(owner))
    return made, owners
