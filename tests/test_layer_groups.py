"""How layers of several kinds are divided into groups, each of which is compiled once."""

import itertools
import random

import pytest

from mice_jax.models.layer_groups import Group, Run, find_groups

pytestmark = pytest.mark.smoke


def with_attention_at(layers: int, attention: list[int]) -> tuple[str, ...]:
    return tuple("A" if i in attention else "c" for i in range(layers))


# The kinds of layers of published models, and the number of layers that are compiled of each.
PUBLISHED = {
    "LFM2-1.2B": (with_attention_at(16, [2, 5, 8, 10, 12, 14]), 5),
    "LFM2-2.6B": (with_attention_at(30, [2, 5, 9, 13, 17, 21, 24, 27]), 7),
    "Granite 4 hybrid, 3B": (with_attention_at(40, [5, 15, 25, 35]), 3),
    "Qwen3.5 4B": (tuple("cccA") * 8, 2),
    "attention alone": (("A",) * 40, 1),
}


def layers_of(groups: list[Group]) -> tuple[str, ...]:
    once = [tuple(itertools.chain(*([run.kind] * run.count for run in group.runs))) for group in groups]
    return tuple(itertools.chain(*(kinds * group.repeats for kinds, group in zip(once, groups, strict=True))))


def num_compiled(groups: list[Group]) -> int:
    return sum(len(group.runs) for group in groups)


@pytest.mark.parametrize("model", PUBLISHED)
def test_a_published_model_s_layers_are_divided_into_few_runs(model: str) -> None:
    kinds, expected = PUBLISHED[model]
    groups = find_groups(kinds)
    assert layers_of(groups) == kinds
    assert num_compiled(groups) == expected
    assert num_compiled(find_groups(kinds * 2)) <= max(expected, 2 * expected - 1)


def test_the_groups_of_a_uniform_and_of_a_mixed_list_by_hand() -> None:
    assert find_groups("A") == [Group(1, (Run("A", 1),))]
    assert find_groups("AAAA") == [Group(1, (Run("A", 4),))]
    assert find_groups(tuple("ccAccAc")) == [Group(2, (Run("c", 2), Run("A", 1))), Group(1, (Run("c", 1),))]


def test_any_list_is_covered_in_order_with_no_more_runs_than_it_has() -> None:
    rng = random.Random(0)
    for _ in range(200):
        kinds = tuple(rng.choice("Acm") for _ in range(rng.randint(1, 24)))
        groups = find_groups(kinds)
        assert layers_of(groups) == kinds
        assert num_compiled(groups) <= sum(1 for _ in itertools.groupby(kinds))
