"""What is due after a step, as a table."""

import pytest

from mice_jax.config import Config, Phase
from mice_jax.training.cadence import Cadence, Due, last_steps_before_warm_start, uses_best_checkpoint
from mice_jax.training.phases import phase_spans

pytestmark = pytest.mark.smoke

NOTHING = Due(held_out=False, benchmarks=False, checkpoint=False)
ALL = Due(held_out=True, benchmarks=True, checkpoint=True)
SAVE = Due(held_out=False, benchmarks=False, checkpoint=True)
EVALUATE = Due(held_out=True, benchmarks=True, checkpoint=False)
SAVE_WITH_LOSS = Due(held_out=True, benchmarks=False, checkpoint=True)


@pytest.mark.parametrize(
    ("step", "before", "after", "due"),
    [
        (1, 0, 8, NOTHING),
        (3, 16, 24, SAVE),  # the first at or past a multiple of 20
        (4, 24, 32, EVALUATE),  # the first at or past a multiple of 30
        (5, 32, 40, SAVE),  # 40 is a multiple itself
        (6, 40, 100, Due(held_out=True, benchmarks=True, checkpoint=True)),  # several multiples in one step
        (10, 100, 101, ALL),  # the last step, whatever its samples
    ],
)
def test_due_follows_samples_and_the_last_step(step: int, before: int, after: int, due: Due) -> None:
    assert Cadence(total_steps=10, save_every=20, eval_every=30).due(step, before, after) == due


def test_evaluation_is_due_at_the_steps_given_too() -> None:
    cadence = Cadence(total_steps=10, save_every=0, eval_every=0, eval_at=frozenset({3}))
    assert [cadence.due(step, 8 * step - 8, 8 * step) for step in (2, 3, 4)] == [NOTHING, EVALUATE, NOTHING]


def test_zero_means_at_the_end_only() -> None:
    cadence = Cadence(total_steps=3, save_every=0, eval_every=0)
    assert [cadence.due(step, 10**6 * step, 10**6 * (step + 1)) for step in (1, 2, 3)] == [NOTHING, NOTHING, ALL]


def test_a_checkpoint_that_may_be_selected_needs_its_metric() -> None:
    by_loss = Cadence(10, 20, 0, selects=True)
    by_task = Cadence(10, 20, 0, selects=True, selects_by_benchmark=True)
    assert by_loss.due(3, 16, 24) == SAVE_WITH_LOSS
    assert by_task.due(3, 16, 24) == ALL
    assert by_loss.due(4, 24, 32) == by_task.due(4, 24, 32) == NOTHING


def test_the_end_of_a_phase_is_saved_where_the_next_starts_from_the_best() -> None:
    phases = [Phase(name="a"), Phase(name="b", seed_from="best"), Phase(name="c")]
    spans = phase_spans(phases, [3, 6, 10], 10)
    assert last_steps_before_warm_start(spans) == {3}
    cadence = Cadence(10, 0, 0, last_steps_before_warm_start(spans), selects=True)
    assert cadence.due(3, 16, 24) == SAVE_WITH_LOSS and cadence.due(6, 40, 48) == NOTHING


def test_checkpoints_are_selected_by_keep_best_or_by_a_later_phase() -> None:
    config = Config()
    plain, seeded = [Phase(name="a"), Phase(name="b")], [Phase(name="a"), Phase(name="b", seed_from="best")]
    assert not uses_best_checkpoint(config, phase_spans(plain, [1, 2], 2))
    assert uses_best_checkpoint(config, phase_spans(seeded, [1, 2], 2))
    assert not uses_best_checkpoint(config, phase_spans(seeded, [1, 2], 1)), "a phase without steps"
    config.checkpoint.keep_best = 1
    assert uses_best_checkpoint(config, phase_spans(plain, [1, 2], 2))
