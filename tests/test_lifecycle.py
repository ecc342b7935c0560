"""How a run that fails is reported."""

import errno
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


@pytest.mark.parametrize(("number", "reported"), [(errno.ENOSPC, UserError), (errno.EIO, OSError)])
def test_full_disk_is_an_error_of_the_user_s(tmp_path: Path, number: int, reported: type[Exception]) -> None:
    run: Any = Run(tmp_path, owns_process=True)
    run.preemption.restore_handlers()
    run._checkpoints = SimpleNamespace()
    error = run._fail(OSError(number, "what the system says"))
    assert type(error) is reported and "what the system says" in str(error)
    assert "what the system says" in run.workdir.read_json("summary.json")["reason"]


def test_run_has_a_checkpoint_once_one_is_committed(tmp_path: Path) -> None:
    run: Any = Run(tmp_path, owns_process=True)
    run.preemption.restore_handlers()
    (tmp_path / "config.json").write_text('{"resolved": {"remat": "none"}}')
    assert not run_files.has_checkpoint(run.workdir), "it was killed before its first save"
    (tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp").mkdir(parents=True)
    assert not run_files.has_checkpoint(run.workdir)
    (tmp_path / "checkpoints" / "4").mkdir()
    assert run_files.has_checkpoint(run.workdir)
