"""Flags, overrides, help and exit codes, as every verb has them."""

import importlib
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from absl import flags

from helpers.runs import DEPRECATED, write_config
from mice_jax.cli import command, main
from mice_jax.config import Config, ConfigError
from mice_jax.errors import Preempted, StoppedByRule, UserError
from mice_jax.runtime import watchdog

pytestmark = [pytest.mark.filterwarnings(f"ignore:{message}:DeprecationWarning") for message in DEPRECATED]
VERBS = sorted(main.VERBS)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    body = "c.seed = int(arg or 0)\nc.data.validation = [Source(path='v.jsonl')]"
    return write_config(tmp_path / "run.py", tmp_path / "a.jsonl", tmp_path / "init", body)


def parse(*argv: str) -> Config:
    """The config that a verb gets; fails where the verb would not have begun."""
    got: list[Config] = []
    code = command.run("doc", command.define_config, lambda v: got.append(command.config_of(v)), list(argv))
    assert code == 0
    return got[0]


def refuse(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The paragraph that a verb ends with, which is all it says."""
    code = command.run("doc", command.define_config, lambda v: command.config_of(v), list(argv))
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err
    return err


# ---------------------------------------------------------------------------------------- overrides
@pytest.mark.parametrize(
    ("override", "get", "value"),
    [
        ("optim.learning_rate=1e-5", lambda c: c.optim.learning_rate, 1e-5),
        ("optim.learning_rate=3", lambda c: c.optim.learning_rate, 3.0),
        ("optim.batch_size=64", lambda c: c.optim.batch_size, 64),
        ("seed=9", lambda c: c.seed, 9),
        ("mesh.fsdp=-1", lambda c: c.mesh.fsdp, -1),
        ("optim.schedule=cosine", lambda c: c.optim.schedule, "cosine"),
        ("data.tokenizer=", lambda c: c.data.tokenizer, ""),
        ("data.drop_remainder=true", lambda c: c.data.drop_remainder, True),
        ("data.drop_remainder=False", lambda c: c.data.drop_remainder, False),
        ("data.drop_remainder", lambda c: c.data.drop_remainder, True),
        ("data.phases[0].num_epochs=2.5", lambda c: c.data.phases[0].num_epochs, 2.5),
        ("data.phases[0].name=late", lambda c: c.data.phases[0].name, "late"),
        ("data.phases[0].sources[0].weight=0.5", lambda c: c.data.phases[0].sources[0].weight, 0.5),
        ("data.validation[0].path=w.jsonl", lambda c: c.data.validation[0].path, "w.jsonl"),
    ],
)
def test_an_override_sets_its_field_in_the_field_s_own_type(file: Path, override: str, get: Any, value: Any) -> None:
    got = get(parse(f"--config={file}", f"--config.{override}"))
    assert (got, type(got)) == (value, type(value))


def test_several_overrides_hold_together_and_the_rest_is_the_file_s(file: Path) -> None:
    config = parse(f"--config={file}:5", "--config.optim.eps=1e-6", "--config.optim.max_steps=3")
    assert (config.seed, config.optim.eps, config.optim.max_steps) == (5, 1e-6, 3)
    assert (config.optim.batch_size, config.optim.learning_rate) == (8, 1e-2)


def test_a_config_may_be_given_as_a_word_of_its_own(file: Path) -> None:
    assert parse("--config", f"{file}:3", "--config.optim.max_steps=3").seed == 3


def test_one_process_can_run_any_number_of_verbs(file: Path) -> None:
    assert parse(f"--config={file}", "--config.seed=1").seed == 1
    assert parse(f"--config={file}").seed == 0
    assert "config" not in flags.FLAGS


# ---------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.learning_rte=1", ["optim.learning_rte", "'optim.learning_rate'"]),
        ("optim.batchsize=1", ["optim.batchsize", "'optim.batch_size'"]),
        ("optm.eps=1", ["optm.eps", "'optim.eps'"]),
        ("data.phases[0].num_epoch=2", ["num_epoch", "num_epochs"]),
        ("data.phases[0].sources[0].wieght=2", ["wieght", "weight"]),
        ("data.phases[3].num_epochs=2", ["data.phases[3]"]),
        ("optim.batch_size=many", ["optim.batch_size", "many"]),
        ("optim.batch_size=8.5", ["optim.batch_size", "8.5"]),
        ("optim.learning_rate=small", ["optim.learning_rate", "small"]),
        ("data.drop_remainder=perhaps", ["data.drop_remainder", "perhaps"]),
        ("data.phases[0].num_epochs=long", ["num_epochs", "long"]),
        ("optim.batch_size=0", ["optim.batch_size=0"]),
    ],
)
def test_a_wrong_override_is_named_with_what_it_should_be(
    file: Path, capsys: pytest.CaptureFixture[str], override: str, words: list[str]
) -> None:
    said = refuse(capsys, f"--config={file}", f"--config.{override}")
    assert all(word in said for word in words), said


def test_a_misspelt_flag_is_answered_with_the_nearest(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--confg" in refuse(capsys, f"--confg={file}")
    assert "did you mean 'config'" in refuse(capsys, f"--config={file}", "--confi=1")


def test_an_argument_that_is_no_flag_is_refused(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "'again'" in refuse(capsys, f"--config={file}", "again")


def test_a_missing_config_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--config is missing" in refuse(capsys)
    said = refuse(capsys, f"--config={tmp_path}/none.py:arg")
    assert f"there is no file {tmp_path}/none.py" in said


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def get_config(:\n", ["line 1", "not Python"]),
        ("x = 1\n", ["get_config"]),
        ("def get_config(arg=''):\n    return {}\n", ["dict", "Config"]),
        ("def get_config(arg=''):\n    return None\n", ["get_config"]),
        ("def get_config(arg=''):\n    x = 1\n    return x / 0\n", ["line 3", "ZeroDivisionError"]),
        ("import a_module_that_is_not_there\n", ["line 1", "a_module_that_is_not_there"]),
        (
            "from mice_jax.config import Config\n\ndef get_config(arg=''):\n    c = Config()\n"
            "    c.optim.learning_rte = 1\n    return c\n",
            ["line 5", "learning_rte", "did you mean 'learning_rate'"],
        ),
        (
            "from mice_jax.config import Phase\n\ndef get_config(arg=''):\n    return Phase(num_epoch=1)\n",
            ["line 4", "num_epoch", "'num_epochs'"],
        ),
    ],
)
def test_a_broken_config_file_is_told_by_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    words: list[str],
) -> None:
    monkeypatch.delitem(sys.modules, "config_config", raising=False)  # as ml_collections calls the file it read last
    broken = tmp_path / "broken.py"
    broken.write_text(text)
    said = refuse(capsys, f"--config={broken}")
    assert all(word in said for word in words), said
    assert str(broken) in said or "--config" in said, said


# ---------------------------------------------------------------------------------------- ends
@pytest.mark.parametrize(
    ("error", "code", "word"),
    [
        (UserError("no such row"), 2, "error"),
        (ConfigError("no such field"), 2, "error"),
        (StoppedByRule("not finite"), 3, "stopped"),
        (Preempted("saved"), 75, "preempted"),
    ],
)
def test_each_end_has_its_exit_code_and_word(
    capsys: pytest.CaptureFixture[str], error: Exception, code: int, word: str
) -> None:
    def fail(_: command.Values) -> None:
        raise error

    assert command.run("doc", lambda v, argv: None, fail, []) == code
    assert capsys.readouterr().err == f"{word}: {error}\n"


def test_a_bug_of_our_own_keeps_its_traceback() -> None:
    def fail(_: command.Values) -> None:
        raise KeyError("ours")

    with pytest.raises(KeyError, match="ours"):
        command.run("doc", lambda v, argv: None, fail, [])


@pytest.mark.parametrize("verb", VERBS)
def test_help_is_short_and_has_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--help", "-h"):
        assert importlib.import_module(f"mice_jax.{verb}").main([flag]) == 0
        out, err = capsys.readouterr()
        assert f"mice {verb} --" in out and "Flags:" in out and err == ""
        assert len(out.splitlines()) < 40
        assert max(map(len, out.splitlines())) <= 120


def test_the_command_line_lists_its_verbs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["mice", "--help"])
    main.main()
    assert all(verb in capsys.readouterr().out or verb for verb in VERBS)
    monkeypatch.setattr(sys, "argv", ["mice", "trian"])
    with pytest.raises(SystemExit) as left:
        main.main()
    err = capsys.readouterr().err
    assert left.value.code == 2
    assert err.startswith("error: 'trian'") and all(verb in err for verb in VERBS)


# ---------------------------------------------------------------------------------------- before the imports
def begun(monkeypatch: pytest.MonkeyPatch, *argv: str) -> tuple[int, bool]:
    """How `mice train` ends, and whether the verb was imported."""
    imported: list[str] = []

    class Verb:
        @staticmethod
        def main(arguments: list[str]) -> int:
            return 0

    with monkeypatch.context() as within:
        within.setattr(importlib, "import_module", lambda name: imported.append(name) or Verb)
        within.setattr(sys, "argv", ["mice", "train", *argv])
        with pytest.raises(SystemExit) as ended:
            main.main()
    return int(str(ended.value.code)), bool(imported)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config=absent.py"], "there is no file absent.py"),
        (["--config=FILE", "--config.optim.batchsize=3"], "did you mean 'optim.batch_size'"),
        (["--config", "FILE", "--config.optim.batch_size", "-1", "--workdir", "w"], "optim.batch_size=-1"),
        (["--workdir=w"], "--config is missing"),
    ],
)
def test_a_config_that_cannot_be_run_is_refused_before_a_verb_s_imports(
    arguments: list[str], said: str, file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(file) if a == "FILE" else a.replace("FILE", str(file)) for a in arguments]
    assert begun(monkeypatch, *arguments) == (2, False)
    out, err = capsys.readouterr()
    assert said in err and err.startswith("error: ") and not out


def test_what_may_be_right_goes_to_the_verb(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = [f"--config={file}", "--config.optim.batch_size=3", "--noconfig.data.drop_remainder", "--workdir=w"]
    for arguments in (right, [*right, "--unheard_of=1"], ["--help"]):
        assert begun(monkeypatch, *arguments) == (0, True)


def test_one_of_several_processes_is_refused_by_the_verb_which_tells_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert begun(monkeypatch, "--config=absent.py", "--num_processes=2") == (0, True)
    for variable in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES", watchdog.CHILD):
        with monkeypatch.context() as within:
            within.setenv(variable, "2")
            assert begun(within, "--config=absent.py") == (0, True), variable
    assert begun(monkeypatch, "--config=absent.py") == (2, False)


def test_a_verb_run_by_name_is_the_module_run_by_itself(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = []
    monkeypatch.setattr(sys, "argv", ["mice", "prepare", "--help"])
    with pytest.raises(SystemExit) as left:
        main.main()
    assert left.value.code == 0
    said.append(capsys.readouterr().out)
    monkeypatch.setattr(sys, "argv", ["prepare", "--help"])
    monkeypatch.delitem(sys.modules, "mice_jax.prepare")
    with pytest.raises(SystemExit) as left:
        runpy.run_module("mice_jax.prepare", run_name="__main__")
    assert left.value.code == 0
    assert capsys.readouterr().out == said[0]
