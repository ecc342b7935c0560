"""Which programs of a run are compiled before its first step."""

from types import SimpleNamespace
from typing import Any

import pytest

from helpers.models import mesh_of
from mice_jax.data.packing import Shape
from mice_jax.training.precompile import step_programs

FNS: Any = SimpleNamespace(
    abstract_state=SimpleNamespace(average=None, params="params"),
    abstract_params="params",
    abstract_sums="sums",
    apply="apply",
    accumulate="accumulate",
    evaluate="evaluate",
    from_params="from_params",
)
SHAPES = [Shape(2, 16), Shape(1, 16)]


@pytest.mark.parametrize(
    ("evaluates_first", "may_compile_later", "first"),
    [
        (True, True, ["apply", "accumulate", "evaluate"]),
        (False, True, ["apply", "accumulate"]),  # a resumed run, which evaluates later
        (True, False, ["apply", "accumulate", "accumulate", "evaluate", "from_params"]),
        (False, False, ["apply", "accumulate", "accumulate", "evaluate", "from_params"]),
    ],
)
def test_programs_are_compiled_later_only_where_they_may_be(
    evaluates_first: bool, may_compile_later: bool, first: list[str]
) -> None:
    programs = step_programs(
        FNS, SHAPES, SHAPES[:1], SHAPES[1:], mesh_of(1, 1, 1),
        resets=True, evaluates_first=evaluates_first, may_compile_later=may_compile_later,
    )  # fmt: skip
    assert [program.function for program in programs if program.first] == first
    assert len(programs) == 5 and programs[0].function == "apply"
    assert not any(program.first for program in programs[len(first) :])
