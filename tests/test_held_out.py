"""The loss over what is held out: that the devices are kept busy, and that every microbatch counts once."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from helpers.runs import make_chats, read_all_metrics, run_train, setting, write_jsonl
from mice_jax.data.dataset import HeldOut
from mice_jax.training import held_out

HELD = [("a", ("one",)), ("a", ("two",)), ("b", ("two",))]


def test_next_rows_are_sent_before_a_microbatch_is_awaited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = write_jsonl(tmp_path / "held.jsonl", make_chats(60, seed=5))
    body = f"c.data.validation = [Source(path='{held}')]\nc.optim.max_steps = 1\nc.optim.learning_rate = 0.0"
    config = setting(tmp_path, body)
    happened: list[str] = []
    evaluate, put_rows, device_get = held_out.evaluate, held_out.put_rows, jax.device_get

    def get(x: Any) -> Any:
        happened.append("await")
        return device_get(x)

    def watched(*args: Any) -> Any:
        with monkeypatch.context() as within:
            within.setattr(held_out, "put_rows", lambda *a: happened.append("put") or put_rows(*a))
            within.setattr(jax, "device_get", get)
            return evaluate(*args)

    monkeypatch.setattr(held_out, "evaluate", watched)
    assert run_train(config, tmp_path / "run") == 0
    microbatches = happened.count("put") // 2
    assert microbatches > 2
    assert happened == ["put", *["put", "await"] * (microbatches - 1), "await"] * 2, "before the first step, and after"
    first, last = read_all_metrics(tmp_path / "run")
    assert first == {"step": 0, "samples": 0} | {k: v for k, v in last.items() if k.startswith("eval/")}
    assert first["eval/loss"] > 0, "equal, because the learning rate is 0"


def test_loss_and_accuracy_by_source_and_phase_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers of a microbatch are its sums of loss, weight and correct tokens; b has the fewest tokens."""
    sums = {0: [(8.0, 4.0, 1.0), (4.0, 2.0, 2.0)], 1: [(30.0, 10.0, 1.0)], 2: [(1.0, 2.0, 1.0)]}
    held = [HeldOut(name, np.array([i]), phases) for i, (name, phases) in enumerate(HELD)]
    monkeypatch.setattr(held_out, "put_rows", lambda rows, mesh: rows)

    def steps(mixture: Any) -> Any:
        return [{"microbatches": sums[int(mixture.phases[0].pools[0].ids[0])]}]

    def measured(by_phase: bool) -> dict[str, float]:
        return held_out.evaluate(lambda rows: rows, held, steps, None, by_phase)  # type: ignore[arg-type]

    found = measured(by_phase=True)
    by_group = {"eval": (43, 18, 5), "eval/a": (42, 16, 4), "eval/b": (1, 2, 1), "eval/phase/one": (12, 6, 3)}
    by_group["eval/phase/two"] = (31, 12, 2)
    expected = {"eval/macro_loss": (42 / 16 + 1 / 2) / 2}
    for group, (loss, weight, correct) in by_group.items():
        expected |= {f"{group}/loss": loss / weight, f"{group}/token_accuracy": correct / weight}
    assert found == expected and list(found) == held_out.metric_names(held, True)
    assert measured(by_phase=False) == {k: v for k, v in expected.items() if "phase" not in k}


def test_one_behind_yields_each_item_once_and_in_order() -> None:
    def queue(count: int) -> Any:
        for i in range(count):
            queued.append(i)
            yield i

    for count in range(4):
        queued: list[int] = []
        assert [(i, len(queued)) for i in held_out._one_behind(queue(count))] == [
            (i, min(i + 2, count)) for i in range(count)
        ]
