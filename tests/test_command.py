"""Flags, overrides, help and exit codes, which all commands share."""

import gc
import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from absl import flags

import mice_jax
from helpers.runs import DEPRECATED, REPOSITORY, setting, write_config
from mice_jax.cli import command, main
from mice_jax.cli.flags import COMMANDS, define_config
from mice_jax.config import Config, ConfigError, field_names, locate
from mice_jax.errors import Paused, Preempted, StoppedByRule, UserError
from mice_jax.runtime import unused_packages, watchdog

pytestmark = [
    pytest.mark.smoke,
    *(pytest.mark.filterwarnings(f"ignore:{message}:DeprecationWarning") for message in DEPRECATED),
]


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    """A config whose files are there, and empty: what a command finds without its imports."""
    (tmp_path / "init").mkdir()
    for name in ("a.jsonl", "v.jsonl", "init/config.json"):
        (tmp_path / name).touch()
    body = f"c.seed = int(arg or 0)\nc.data.validation = [Source(path='{tmp_path}/v.jsonl')]"
    return write_config(tmp_path / "run.py", tmp_path / "a.jsonl", tmp_path / "init", body)


def parse(*argv: str) -> Config:
    """The config that a command gets."""
    got: list[Config] = []
    code = command.run("doc", define_config, lambda v: got.append(command.config_of(v)), list(argv))
    assert code == 0
    return got[0]


def error_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The error paragraph of a command, which prints nothing else."""
    code = command.run("doc", define_config, lambda v: command.config_of(v), list(argv))
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
        ('data.template_kwargs={"a": false}', lambda c: c.data.template_kwargs, {"a": False}),
        ("eval.tasks=gsm8k,ifeval", lambda c: c.eval.tasks, ["gsm8k", "ifeval"]),
        ("data.template_kwargs={'a': None}", lambda c: c.data.template_kwargs, {"a": None}),
        ("eval.tasks=['gsm8k', \"ifeval\"]", lambda c: c.eval.tasks, ["gsm8k", "ifeval"]),
        ("eval.tasks=[gsm8k,ifeval]", lambda c: c.eval.tasks, ["gsm8k", "ifeval"]),
        ("eval.tasks=[]", lambda c: c.eval.tasks, []),
        ("eval.tasks=", lambda c: c.eval.tasks, []),
        ("optim.frozen=model.layers.[0-3].*", lambda c: c.optim.frozen, ["model.layers.[0-3].*"]),
        ("eval.at_shares=0.1,0.5", lambda c: c.eval.at_shares, [0.1, 0.5]),
        ("eval.at_shares=[0.1, 0.5]", lambda c: c.eval.at_shares, [0.1, 0.5]),
        ("eval.at_shares=1", lambda c: c.eval.at_shares, [1.0]),
        ("eval.at_shares=[]", lambda c: c.eval.at_shares, []),
        ("data.validation=[]", lambda c: c.data.validation, []),
    ],
)
def test_an_override_has_the_type_of_its_field(config_file: Path, override: str, get: Any, value: Any) -> None:
    got = get(parse(f"--config={config_file}", f"--config.{override}"))
    assert (got, type(got)) == (value, type(value))


def test_every_field_can_be_set_by_a_flag(config_file: Path) -> None:
    body = "from mice_jax.config import Published\n    c.data.phases[0].validation = [Source()]\n    "
    body += "c.published, c.eval.at_shares, c.eval.tasks = [Published()], [0.2, 1.0], ['a', 'b']\n    return c"
    config_file.write_text(config_file.read_text().replace("return c", body))

    def with_flags(texts: dict[str, str]) -> Config:
        got: list[Config] = []
        argv = [f"--config={config_file}", *(f"--config.{name}={text}" for name, text in texts.items())]
        assert command.run("doc", define_config, lambda v: got.append(command.unchecked_config_of(v)), argv) == 0
        return got[0]

    config, names = with_flags({}), [name.replace("[]", "[0]") for name in field_names()]
    values = {name: getattr(*locate(config, name)) for name in names}
    parts = {name for name in names if any(other.startswith(f"{name}[") for other in names)}
    texts = {name: v if isinstance(v, str) else repr(v) for name, v in values.items() if name not in parts}
    assert len(texts) > 100 and with_flags(texts) == config
    empty = with_flags({name: "[]" for name in sorted(parts, reverse=True)})  # the lists inside of phases first
    assert (empty.data.phases, empty.data.validation, empty.published) == ([], [], [])


def test_overrides_leave_the_other_fields_as_in_the_file(config_file: Path) -> None:
    config = parse(f"--config={config_file}:5", "--config.optim.eps=1e-6", "--config.optim.max_steps=3")
    assert (config.seed, config.optim.eps, config.optim.max_steps) == (5, 1e-6, 3)
    assert (config.optim.batch_size, config.optim.learning_rate) == (8, 1e-2)


def test_config_flag_may_be_separated_by_a_space(config_file: Path) -> None:
    assert parse("--config", f"{config_file}:3", "--config.optim.max_steps=3").seed == 3


def test_one_process_can_run_several_commands(config_file: Path) -> None:
    assert parse(f"--config={config_file}", "--config.seed=1").seed == 1
    assert parse(f"--config={config_file}").seed == 0
    assert "config" not in flags.FLAGS


# ---------------------------------------------------------------------------------------- wrong arguments
@pytest.mark.parametrize(
    ("override", "parts"),
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
        ("eval.at_shares=[0.1,half]", ["eval.at_shares=[0.1,half]: 'half' is not a number", "0.1,0.5"]),
        ("eval.at_shares=[0.1,true]", ["eval.at_shares[1]=True", "must be float"]),
        ("eval.tasks=[1]", ["eval.tasks[0]=1 is of type int and must be str"]),
        ("data.phases=a.jsonl", ["data.phases=a.jsonl: write this list of Phase(...) in the config file", "[0].name"]),
        ("data.validation=a.jsonl", ["list of Source(...) in the config file", "[0].path"]),
    ],
)
def test_a_wrong_override_is_named_with_a_suggestion(
    config_file: Path, capsys: pytest.CaptureFixture[str], override: str, parts: list[str]
) -> None:
    error = error_of(capsys, f"--config={config_file}", f"--config.{override}")
    assert all(part in error for part in parts), error


def test_a_misspelt_flag_gets_a_suggestion(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--confg" in error_of(capsys, f"--confg={config_file}")
    assert "did you mean 'config'" in error_of(capsys, f"--config={config_file}", "--confi=1")


def test_an_argument_without_a_flag_is_an_error(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "'again'" in error_of(capsys, f"--config={config_file}", "again")


def test_a_missing_config_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--config is missing" in error_of(capsys)
    error = error_of(capsys, f"--config={tmp_path}/none.py:arg")
    assert f"the file {tmp_path}/none.py does not exist" in error


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("def get_config(:\n", ["line 1", "not valid Python"]),
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
def test_a_broken_config_file_is_reported_with_its_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    parts: list[str],
) -> None:
    monkeypatch.delitem(sys.modules, "config_config", raising=False)  # as ml_collections calls the file it read last
    broken = tmp_path / "broken.py"
    broken.write_text(text)
    error = error_of(capsys, f"--config={broken}")
    assert all(part in error for part in parts), error
    assert str(broken) in error or "--config" in error, error


# ---------------------------------------------------------------------------------------- exit codes
@pytest.mark.parametrize(
    ("error", "code", "label"),
    [
        (UserError("no such row"), 2, "error"),
        (ConfigError("no such field"), 2, "error"),
        (StoppedByRule("not finite"), 3, "stopped"),
        (Preempted("saved"), 75, "preempted"),
        (Paused("at a fifth"), 75, "paused"),
    ],
)
def test_each_error_class_has_its_exit_code_and_label(
    capsys: pytest.CaptureFixture[str], error: Exception, code: int, label: str
) -> None:
    def fail(_: command.Values) -> None:
        raise error

    assert command.run("doc", lambda v, argv: None, fail, []) == code
    assert capsys.readouterr().err == f"{label}: {error}\n"


def test_interrupt_is_one_line_and_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(_: command.Values) -> None:
        raise KeyboardInterrupt

    assert command.run("doc", lambda v, argv: None, interrupt, []) == 130
    assert capsys.readouterr().err == "interrupted: run the same command again\n"


def test_interrupt_of_the_imports_is_one_line_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "_run", interrupted)
    with pytest.raises(SystemExit, match="130"):
        main.main()
    assert capsys.readouterr().err == "interrupted: run the same command again\n"


def test_a_bug_keeps_its_traceback() -> None:
    def fail(_: command.Values) -> None:
        raise KeyError("ours")

    with pytest.raises(KeyError, match="ours"):
        command.run("doc", lambda v, argv: None, fail, [])


# ---------------------------------------------------------------------------------------- help and the command line
def mice(monkeypatch: pytest.MonkeyPatch, *argv: str) -> int:
    """The exit code of `mice` with these arguments."""
    monkeypatch.setattr(sys, "argv", ["mice", *argv])
    with pytest.raises(SystemExit) as ended:
        main.main()
    return int(str(ended.value.code))


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_short_and_has_an_example(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for flag in ("--help", "-h"):
        assert mice(monkeypatch, name, flag) == 0
        out, err = capsys.readouterr()
        assert f"mice {name} --" in out and "Flags:" in out and err == ""
        assert len(out.splitlines()) < 40
        assert max(map(len, out.splitlines())) <= 120


def test_help_imports_neither_jax_nor_transformers() -> None:
    """Each command's module is run as a script in turn, as `python -m mice_jax.train --help` does."""
    code = f"""
import contextlib, io, runpy, sys
for module in {[c.module for c in COMMANDS.values()]}:
    sys.argv = [module, "--help"]
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as out:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    assert "Flags:" in out.getvalue(), module
print([m for m in ("jax", "numpy", "transformers", "fsspec", "pyarrow", "rich") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_mice_lists_its_commands_and_its_version(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert mice(monkeypatch) == mice(monkeypatch, "--help") == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out and command.summary in out for name, command in COMMANDS.items())
    assert mice(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"mice_jax {mice_jax.__version__}\n"


@pytest.mark.parametrize(("name", "suggestion"), [("trian", "did you mean 'train'?"), ("xyz", "it has train, prepare")])
def test_a_misspelt_command_gets_a_suggestion(
    name: str, suggestion: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert mice(monkeypatch, name) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: unknown command '{name}'; {suggestion}") and err.count("\n") == 1


@pytest.mark.parametrize("arguments", [("--help",), ("train", "--help"), ("train", "--config=absent.py")])
def test_a_closed_pipe_leaves_no_traceback(arguments: tuple[str, ...]) -> None:
    """As in `mice --help | head -1`; here the reader has left before the first line."""
    read, write = os.pipe()
    os.close(read)
    try:
        process = subprocess.run(
            [sys.executable, "-m", "mice_jax", *arguments], stdout=write, stderr=subprocess.PIPE, timeout=60
        )
    finally:
        os.close(write)
    if "--help" in arguments:
        assert (process.returncode, process.stderr) == (command.CLOSED_PIPE, b"")
    else:
        assert process.returncode == 2 and process.stderr.startswith(b"error: ")


def test_a_broken_pipe_that_is_not_the_terminal_s_is_a_bug() -> None:
    def fail() -> int:
        raise BrokenPipeError("a socket")

    with pytest.raises(BrokenPipeError, match="a socket"):
        command.exit_on_closed_pipe(fail)


# ---------------------------------------------------------------------------------------- completion
def test_zsh_and_bash_complete_files_behind_a_flag_and_its_equals_sign(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "run.py").touch()
    assert main._run(["--completion"]) == 0
    script = capsys.readouterr().out
    for shell in filter(shutil.which, ("bash", "zsh")):
        for typed, completed in (("--config=ru", "--config=run.py --config=runs/"), ("--config=x", "")):
            arrays = "emulate sh; setopt ksharrays; " if shell == "zsh" else ""
            ask = f'{arrays}COMP_WORDS=(mice train {typed}); COMP_CWORD=2; _mice; echo "${{COMPREPLY[*]}}"'
            done = subprocess.run(
                [shell, "-c", f"{script}\n{ask}"], capture_output=True, text=True, timeout=60, cwd=tmp_path
            )
            assert (done.stdout.strip(), done.stderr) == (completed, ""), shell


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        (["tr"], "train"),
        (["plan", "--topo"], "--topology="),
        (["sweep", "--dry"], "--dry_run"),
        (["train", "--config.optim.learn"], "--config.optim.learning_rate="),
        (["report", "--config.optim.learn"], ""),  # it has no config
        (["train", "--workdir", "=", "runs"], ""),  # a value, as bash splits it: the shell completes files
    ],
)
def test_bash_completes_what_is_typed(typed: list[str], completed: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["mice", "--completion"])
        main.main()
    words = " ".join(["mice", *typed])
    ask = f'COMP_WORDS=({words}); COMP_CWORD={len(typed)}; _mice; echo "${{COMPREPLY[*]}}"'
    bash = ["bash", "-c", f"{capsys.readouterr().out}\n{ask}"]
    answer = subprocess.run(bash, capture_output=True, text=True, timeout=60)
    assert (answer.stdout.strip(), answer.stderr) == (completed, "")


# ---------------------------------------------------------------------------------------- mice config
def test_config_prints_values_with_their_defaults(
    config_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert mice(monkeypatch, "config", f"--config={config_file}", "--config.optim.learning_rate=0.5") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "c.optim.learning_rate = 0.5  # default 2e-05" in lines
    assert "c.optim.schedule = 'constant'" in lines
    assert f"c.data.validation = [Source(path='{config_file.parent}/v.jsonl')]  # default []" in lines


def test_what_config_prints_is_a_config(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert mice(monkeypatch, "config", f"--config={config_file}:7", "--config.optim.eps=1e-6") == 0
    body = "\n    ".join(capsys.readouterr().out.splitlines())
    copy = tmp_path / "copy.py"
    copy.write_text(
        f"from mice_jax.config import *\n\ndef get_config(arg=''):\n    c = Config()\n    {body}\n    return c\n"
    )
    assert parse(f"--config={copy}") == parse(f"--config={config_file}:7", "--config.optim.eps=1e-6")


def test_config_prints_an_invalid_config_and_its_problems(
    config_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert mice(monkeypatch, "config", f"--config={config_file}", "--config.optim.batch_size=0") == 2
    out, err = capsys.readouterr()
    assert "c.optim.batch_size = 0  # default 3840" in out
    assert err.startswith("error: in the config, optim.batch_size=0")


# ---------------------------------------------------------------------------------------- before the imports
def run_train(monkeypatch: pytest.MonkeyPatch, *argv: str) -> tuple[int, bool]:
    """The exit code of `mice train`, and whether the command was imported."""
    imported: list[str] = []

    class Train:
        @staticmethod
        def main(arguments: list[str]) -> int:
            return 0

    with monkeypatch.context() as patch:
        patch.setattr(importlib, "import_module", lambda name: imported.append(name) or Train)
        return mice(patch, "train", *argv), bool(imported)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=absent.py"], "the file absent.py does not exist"),
        (["--config=FILE", "--config.optim.batchsize=3"], "did you mean 'optim.batch_size'"),
        (["--config", "FILE", "--config.optim.batch_size", "-1", "--workdir", "w"], "optim.batch_size=-1"),
        (["--workdir=w"], "--config is missing"),
        (["--config=FILE"], "--workdir is missing: folder of the run. See --help"),
        (["--config=FILE", "--wrkdir=w"], "unknown flag --wrkdir; did you mean 'workdir'?"),
    ],
)
def test_wrong_arguments_are_reported_before_slow_imports(
    arguments: list[str],
    message: str,
    config_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [a.replace("FILE", str(config_file)) for a in arguments]
    assert run_train(monkeypatch, *arguments) == (2, False)
    out, err = capsys.readouterr()
    assert message in err and err.startswith("error: ") and not out


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("evaluate", ["--tasks=arc_chalenge,gsm8k", "--model=m"], "'arc_chalenge'; the nearest are arc_challenge"),
        ("train", ["--config=FILE", "--workdir=w", "--config.eval.tasks=barn"], "no task 'barn'"),
        (
            "evaluate",
            ["--model=m", "--tasks=barns", "--include_path=FOLDER"],
            "FOLDER define barn_choice, barns_of_wood.",
        ),
    ],
)
def test_unknown_task_is_reported_before_slow_imports(
    command: str,
    arguments: list[str],
    message: str,
    config_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "a.yaml").write_text("task: barn_choice\n")
    (tmp_path / "tasks" / "b.yaml").write_text("output_type: x\ntask: 'barns_of_wood'\n")
    places = {"FILE": str(config_file), "FOLDER": str(tmp_path / "tasks")}
    for name, path in places.items():
        arguments, message = [a.replace(name, path) for a in arguments], message.replace(name, path)
    monkeypatch.setattr(importlib, "import_module", lambda name: pytest.fail(f"{name} was imported"))
    assert mice(monkeypatch, command, *arguments) == 2
    assert message in capsys.readouterr().err


def test_right_arguments_reach_the_command(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [f"--config={config_file}", "--config.optim.batch_size=3", "--noconfig.data.drop_remainder"]
    assert run_train(monkeypatch, *arguments, "--workdir=w") == (0, True)


def test_unused_packages_and_garbage_wait_while_a_command_is_imported(
    config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bool, bool]] = []

    def look() -> None:
        seen.append(("a_large_package" in sys.modules, gc.isenabled()))

    class Train:
        @staticmethod
        def main(arguments: list[str]) -> int:
            look()
            return 0

    def import_module(name: str) -> type[Train]:
        look()
        return Train

    monkeypatch.setattr(unused_packages, "PACKAGES", ("a_large_package",))
    monkeypatch.setattr(importlib, "import_module", import_module)
    assert mice(monkeypatch, "train", f"--config={config_file}", "--workdir=w") == 0
    assert seen == [(True, False), (False, True)]


def test_a_process_of_several_trains_in_a_child_before_any_slow_import(
    monkeypatch: pytest.MonkeyPatch, config_file: Path
) -> None:
    started = []
    monkeypatch.setattr(watchdog, "run_child", lambda module, argv, workdir: started.append((module, argv)) or 75)
    flags = [f"--config={config_file}", "--workdir=w"]
    place = ["--coordinator_address=a:1", "--num_processes=2", "--process_id=0"]
    assert run_train(monkeypatch, *flags, *place) == (75, False)
    for variable, value in (("SLURM_NTASKS", "2"), ("OMPI_COMM_WORLD_SIZE", "2"), ("TPU_WORKER_HOSTNAMES", "a,b")):
        with monkeypatch.context() as patch:
            patch.setenv(variable, value)
            assert run_train(patch, *flags) == (75, False), variable
    assert started == [("mice_jax.train", [*flags, *place]), *[("mice_jax.train", flags)] * 3]
    monkeypatch.setenv(watchdog.PARENT_PIPE, "3")
    assert run_train(monkeypatch, *flags, *place) == (0, True)


def test_wrong_config_of_a_process_of_several_reaches_the_others(
    monkeypatch: pytest.MonkeyPatch, config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sent = []
    monkeypatch.setattr(watchdog, "broadcast_startup_error", lambda address, error: sent.append((address, error)))
    place = ["--coordinator_address=a:1", "--num_processes=2", "--process_id=1"]
    assert run_train(monkeypatch, "--config=absent.py", *place) == (2, False)
    [(address, error)] = sent
    assert address == ("a:1", 2, 1) and "the file absent.py does not exist" in error
    # Without all three flags there is no address to send anything to.
    assert run_train(monkeypatch, f"--config={config_file}", "--workdir=w", "--num_processes=2") == (2, False)
    said = capsys.readouterr().err
    assert "--coordinator_address and --process_id missing" in said and len(sent) == 1
    assert run_train(monkeypatch, "--config=absent.py") == (2, False) and len(sent) == 1


IMPORTS = """
import importlib.util, sys
from mice_jax.runtime import slow_imports
slow_imports.begin()
import mice_jax.train
slow_imports.end()
setting = f"--config={sys.argv[1]}", f"--workdir={sys.argv[2]}"
assert mice_jax.train.main(setting) == 0
heavy = {"torch", "tensorflow", "scipy", "lm_eval", "pandas", "numba", "google.cloud.storage"}
print(*sorted(heavy & {*sys.modules}), file=sys.stderr)
import pandas, pyarrow
table = pyarrow.Table.from_pandas(pandas.DataFrame({"when": pandas.to_datetime(["2026-01-02"])}))
print(table.to_pandas().when[0].year, pyarrow.array(pandas.Categorical(["a"])).to_pylist(), file=sys.stderr)
print(importlib.util.find_spec("torch") is not None, file=sys.stderr)
"""


@pytest.mark.slow
def test_train_imports_none_of_the_large_packages_that_it_does_not_use(tmp_path: Path) -> None:
    """A whole run: pyarrow and numba would import pandas and scipy in the middle of it."""
    config = setting(tmp_path, "c.optim.max_steps = 1")
    code = [sys.executable, "-c", IMPORTS, str(config), str(tmp_path / "run")]
    done = subprocess.run(code, capture_output=True, text=True, timeout=300, cwd=REPOSITORY)
    assert done.stderr.splitlines()[-3:] == ["", "2026 ['a']", "True"], done.stdout + done.stderr
