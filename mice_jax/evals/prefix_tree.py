"""Packs texts into prefix trees, in which texts with a common beginning share its computation.

Texts are sorted, so that each follows the text with which it has the longest prefix in common. A tree is a sequence of
texts that each share enough tokens with the text before. The first text is the trunk; each of the others branches off
from the trunk, or from a branch, at its first different token. The prompt of a question is therefore computed once for
all of its options, and few-shot examples once for all questions that begin with them.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mice_jax.packing_limits import max_segments

# Shapes: B rows, T slots of a row (first those of trunks, then those of branches), M scored tokens of a row.

# A text joins a tree as a branch if it shares at least 1/4 of its tokens with the text before.
MIN_SHARED_DIVISOR = 4
# The maximum number of slots of a tree's branches, if no text is longer. Further texts begin a new tree.
MAX_BRANCH_SLOTS = 1024
# The number of slots of trunks is a multiple of this, because attention kernels work on such tiles.
TILE = 128
# The number of slots of branches is a multiple of this if it is small.
BRANCH_TILE = 32
# The number of trunk slots in a row, if there are enough texts to fill it. Short texts share a row.
MIN_ROW_SLOTS, MAX_ROW_SLOTS = 512, 2048
# In a row of this many slots, attention costs about as much as everything else.
ATTENTION_PARITY_SLOTS = 16384


class Request(NamedTuple):
    """A text to score.

    Attributes:
      ids: The tokens that the model is given, int32 [T].
      targets: The tokens that are scored, int32 [M]: each follows one of the last M ids.
    """

    ids: np.ndarray
    targets: np.ndarray


class Shape(NamedTuple):
    """The shape of a row.

    Attributes:
      trunks: The number of slots for trunks.
      branches: The number of slots for branches.
      scored: The number of scored tokens.
    """

    trunks: int
    branches: int
    scored: int


@dataclasses.dataclass(frozen=True)
class Tree:
    """A tree of N nodes, which are tokens in depth-first order, for texts with a common beginning.

    Attributes:
      tokens: The token of each node, int32 [N].
      positions: The position of each node in its text, int32 [N].
      subtree_end: For each node, one more than the largest index of its descendants, int32 [N].
      trunk: The number of nodes of the trunk, which come first.
      length: The length of the longest text.
      scored: For each text, the request's index and the nodes that its targets follow.
    """

    tokens: np.ndarray
    positions: np.ndarray
    subtree_end: np.ndarray
    trunk: int
    length: int
    scored: list[tuple[int, np.ndarray]]

    @property
    def branches(self) -> int:
        """The number of nodes outside the trunk."""
        return len(self.tokens) - self.trunk

    @property
    def num_scored(self) -> int:
        """The number of tokens to score."""
        return sum(len(nodes) for _, nodes in self.scored)


def build_prefix_trees(requests: Sequence[Request], group: Sequence[int] | None = None) -> list[Tree]:
    """Builds the prefix trees of all requests.

    Args:
      requests: The texts.
      group: The group of each text; texts of different groups share no tree. None puts all in one group.
    """
    if not requests:
        return []
    group = group or [0] * len(requests)
    most = max(MAX_BRANCH_SLOTS, *(len(r.ids) for r in requests))
    order = sorted(range(len(requests)), key=lambda i: (group[i], requests[i].ids.astype(">i4").tobytes()))
    trees, texts, shared, branches = [], [order[0]], [0], 0
    for before, i in itertools.pairwise(order):
        ids = requests[i].ids
        common = _common(requests[before].ids, ids)
        more = len(ids) - common
        if group[before] == group[i] and common * MIN_SHARED_DIVISOR >= len(ids) and branches + more <= most:
            texts, shared, branches = [*texts, i], [*shared, common], branches + more
        else:
            trees.append(_tree(requests, texts, shared))
            texts, shared, branches = [i], [0], 0
    return [*trees, _tree(requests, texts, shared)]


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """Returns the number of tokens at the beginning that two texts share."""
    n = min(len(a), len(b))
    differing = np.flatnonzero(a[:n] != b[:n])
    return int(differing[0]) if len(differing) else n


def _tree(requests: Sequence[Request], texts: list[int], shared: list[int]) -> Tree:
    """Builds the tree of sorted texts, each of which shares `shared` tokens with the text before."""
    sizes = [len(requests[i].ids) - s for i, s in zip(texts, shared, strict=True)]
    size = sum(sizes)
    tokens, positions, subtree_end = np.empty(size, np.int32), np.empty(size, np.int32), np.full(size, size, np.int32)
    path = np.empty(0, np.int32)  # These are the nodes of the text before.
    scored, end = [], 0
    for i, common, more in zip(texts, shared, sizes, strict=True):
        new = np.arange(end, end + more, dtype=np.int32)
        subtree_end[path[common:]] = end
        path = np.concatenate([path[:common], new])
        tokens[new], positions[new] = requests[i].ids[common:], np.arange(common, common + more)
        scored.append((i, path[len(path) - len(requests[i].targets) :]))
        end += more
    return Tree(tokens, positions, subtree_end, sizes[0], max(len(requests[i].ids) for i in texts), scored)


# ---------------------------------------------------------------------------------------- rows
def pack(trees: Sequence[Tree]) -> tuple[Shape, list[list[Tree]]]:
    """Packs trees into rows of one shape, the cheapest to compute among a few candidates.

    Args:
      trees: The trees.

    Returns:
      The shape, and the trees of each row.
    """
    longest, trunks = max(t.trunk for t in trees), sum(t.trunk for t in trees)
    sizes = [rounded_up(max(longest, min(MIN_ROW_SLOTS, trunks)))]
    while (more := rounded_up(sizes[-1] + 1)) <= min(MAX_ROW_SLOTS, rounded_up(trunks)):
        sizes.append(more)
    packed = [_filled(trees, slots) for slots in sizes]

    def cost(way: tuple[Shape, list[list[Tree]]]) -> float:
        slots = way[0].trunks + way[0].branches
        return len(way[1]) * slots * (1 + slots / ATTENTION_PARITY_SLOTS)

    return min(packed, key=cost)


def _filled(trees: Sequence[Tree], slots: int) -> tuple[Shape, list[list[Tree]]]:
    """Packs trees into rows of `slots` trunk slots: the largest tree first, each in the first row that has room."""
    trunks, branches = sum(t.trunk for t in trees), sum(t.branches for t in trees)
    # A row gets as many branch slots as the trees that fill its trunk slots have on average, rounded up.
    branch_slots = max(max(t.branches for t in trees), -(-slots * branches // trunks))
    branch_slots = (
        rounded_up(branch_slots) if branch_slots > 2 * TILE else -(-branch_slots // BRANCH_TILE) * BRANCH_TILE
    )
    rows: list[list[Tree]] = []
    # The free trunk slots, branch slots and segments of each row.
    left = np.empty((len(trees), 3), np.int64)
    for tree in sorted(trees, key=lambda t: (t.trunk, t.branches), reverse=True):
        need = (tree.trunk, tree.branches, 1)
        fits = np.flatnonzero((left[: len(rows)] >= need).all(axis=1))
        row = int(fits[0]) if len(fits) else len(rows)
        if row == len(rows):
            rows.append([])
            left[row] = slots, branch_slots, max_segments(slots)
        rows[row].append(tree)
        left[row] -= need
    scored = max(sum(t.num_scored for t in row) for row in rows)
    return Shape(slots, branch_slots, 1 << (scored - 1).bit_length()), rows


def rounded_up(slots: int) -> int:
    """Rounds up to 128, 256, 384, 512, 768, 1024, 1536, ..., so that few shapes have to be compiled."""
    tiles = max(1, -(-slots // TILE))
    whole = 1 << (tiles - 1).bit_length()
    return TILE * (whole * 3 // 4 if whole >= 4 and tiles <= whole * 3 // 4 else whole)


def arrays(
    rows: Sequence[Sequence[Tree]], shape: Shape, requests: Sequence[Request]
) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """Writes rows of trees as arrays.

    Args:
      rows: The trees of each row.
      shape: The shape of every row.
      requests: The texts that the trees were built of.

    Returns:
      A tuple of the int32 arrays by name and, for each row, the index of the request of each scored token. The arrays
      tokens, positions, lengths, number and reach are [B T]: number is the node of a slot (-1 if it is empty), and
      reach is the end of the node's subtree. segment_ids is [B P] for P trunk slots. slots and targets are [B M].
    """
    b, t = len(rows), shape.trunks + shape.branches
    made = {name: np.zeros((b, t), np.int32) for name in ("tokens", "positions", "reach", "lengths")}
    made |= {"number": np.full((b, t), -1, np.int32), "segment_ids": np.zeros((b, shape.trunks), np.int32)}
    made |= {name: np.zeros((b, shape.scored), np.int32) for name in ("slots", "targets")}
    owners = []
    for r, row in enumerate(rows):
        at, branch, first, count = 0, shape.trunks, 0, 0
        owner: list[np.ndarray] = [np.empty(0, np.int64)]
        for segment, tree in enumerate(row, 1):
            slots = np.concatenate([np.arange(at, at + tree.trunk), np.arange(branch, branch + tree.branches)])
            made["tokens"][r, slots], made["positions"][r, slots] = tree.tokens, tree.positions
            made["number"][r, slots] = first + np.arange(len(slots))
            made["reach"][r, slots] = first + tree.subtree_end
            made["lengths"][r, slots] = tree.length
            made["segment_ids"][r, at : at + tree.trunk] = segment
            for i, nodes in tree.scored:
                here = slice(count, count + len(nodes))
                made["slots"][r, here], made["targets"][r, here] = slots[nodes], requests[i].targets
                owner.append(np.full(len(nodes), i))
                count += len(nodes)
            at, branch, first = at + tree.trunk, branch + tree.branches, first + len(slots)
        owners.append(np.concatenate(owner))
    return made, owners
