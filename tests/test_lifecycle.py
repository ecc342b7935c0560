"""How a run that fails is reported."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mice_jax.errors import UserError
from mice_jax.training import run_files
from mice_jax.training.lifecycle import Run

pytestmark = pytest.mark.smoke


def test_reason_of_a_failure_is_kept_where_its_summary_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run: Any = Run(tmp_path, owns_process=True)
    run.preemption.restore_handlers()
    run._checkpoints = SimpleNamespace()

    def write_json(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run.workdir, "write_json", write_json)
    reason = UserError("the checkpoint could not be written")
    assert run._fail(reason) is reason
    assert "summary.json" in (said := capsys.readouterr().err) and "No space left" in said


def test_run_has_a_checkpoint_once_one_is_committed(tmp_path: Path) -> None:
    run: Any = Run(tmp_path, owns_process=True)
    run.preemption.restore_handlers()
    (tmp_path / "config.json").write_text('{"resolved": {"remat": "none"}}')
    assert not run_files.has_checkpoint(run.workdir), "it was killed before its first save"
    (tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp").mkdir(parents=True)
    assert not run_files.has_checkpoint(run.workdir)
    (tmp_path / "checkpoints" / "4").mkdir()
    assert run_files.has_checkpoint(run.workdir)
