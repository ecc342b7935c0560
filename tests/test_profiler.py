"""Profiler traces of the steps that the config names."""

from pathlib import Path

import jax
import pytest

from mice_jax.config_checks import profiled_steps
from mice_jax.training.profiler import ProfileWriter

pytestmark = pytest.mark.smoke


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("10:13", [10, 11, 12]),
        ("1:2", [1]),
        ("3:3", []),
        ("4:2", []),
        ("0:2", []),
        ("3", []),
        ("a:b", []),
        ("-1:2", []),
    ],
)
def test_profiled_steps_by_hand(text: str, wanted: list[int]) -> None:
    assert list(profiled_steps(text)) == wanted


@pytest.mark.parametrize(
    ("steps", "first", "ends_after", "wanted"),
    [
        ("2:4", 0, 5, ["start", 2, 3, "stop"]),
        ("1:2", 0, 5, ["start", 1, "stop"]),
        ("2:9", 0, 3, ["start", 2, 3, 4, "stop"]),  # the run ends in its fourth step
        ("2:5", 2, 5, ["start", 3, 4, "stop"]),  # it was resumed after its second step
        ("2:5", 6, 8, []),
    ],
)
def test_traced_steps(
    steps: str, first: int, ends_after: int, wanted: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[object] = []

    class Annotation:
        def __init__(self, name: str, step_num: int):
            self.step = step_num

        def __enter__(self) -> None:
            seen.append(self.step)

        def __exit__(self, *exc: object) -> None:
            pass

    monkeypatch.setattr(jax.profiler, "StepTraceAnnotation", Annotation)
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder, **options: seen.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: seen.append("stop"))
    writer = ProfileWriter(steps, tmp_path, first)
    for step in range(first + 1, ends_after + 1):
        writer.write({"step": step})
    writer.close()
    assert seen == wanted


def test_trace_is_written_for_tensorboard_and_perfetto(tmp_path: Path) -> None:
    writer = ProfileWriter("1:2", tmp_path, 0)
    writer.write({"step": 1})
    writer.close()
    [folder] = (tmp_path / "plugins" / "profile").iterdir()
    assert [*folder.glob("*.xplane.pb")] and (folder / "perfetto_trace.json.gz").exists()
