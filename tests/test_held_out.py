"""The loss over what is held out: that the devices are kept busy, and that every microbatch counts once."""

from pathlib import Path
from typing import Any

import jax
import pytest

from helpers.runs import make_chats, read_all_metrics, run_train, setting, write_jsonl
from mice_jax.training import held_out


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
