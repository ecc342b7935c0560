"""The flags of every command, and the table of commands.

This module imports absl, ml_collections and the config only, so that `--help` and wrong flags are answered at once: the
commands themselves import jax and transformers, which takes seconds.
"""

import ast
import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any, NamedTuple

from absl import flags
from ml_collections import config_flags

from mice_jax.cli import flag_checks
from mice_jax.config import Phase, Published, Source

Values = flags.FlagValues
DefineFlags = Callable[[Values, list[str]], None]

DEFAULT_MAX_NEW_TOKENS = 256  # also halved for models of few positions, see generate.py
DEFAULT_REPORT_PORT = 8008
DEFAULT_JUDGE_KEY_ENV = "OPENAI_API_KEY"


# ---------------------------------------------------------------------------------------- shared by commands
class _FieldParser(flags.ArgumentParser):
    """Reads a config field's text by a function; ml_collections also passes the field's present value, which stays."""

    def __init__(self, read: Callable[[str], Any]) -> None:
        self._read = read

    def parse(self, argument: Any) -> Any:
        return self._read(argument) if isinstance(argument, str) else argument


def _object(text: str) -> Any:
    """Reads an object, such as data.template_kwargs."""
    return _literal(text, 'it must be a JSON object, such as {"enable_thinking": false}')


def _items(text: str) -> list[Any]:
    """Reads a list: its items with commas between them, with or without brackets and quotes."""
    text = text.strip()
    if text.startswith("[") and text.endswith("]"):
        with contextlib.suppress(ValueError):
            return _literal(text, "it is no list")
        text = text[1:-1]  # items without quotes, which a shell may have removed
    return flags.ListParser().parse(text)


def _numbers(text: str) -> list[Any]:
    """Reads a list of numbers; an item that is neither text nor number is left to the check of the config's types."""
    items = _items(text)
    for i, item in enumerate(items):
        try:
            items[i] = float(item) if isinstance(item, str) else item
        except ValueError:
            raise ValueError(f"{item!r} is not a number; write numbers such as 0.1,0.5, or [] for none") from None
    return items


def _no_parts(part: type, text: str) -> list[Any]:
    """Reads an empty list of phases or sources; ValueError says how to set another."""
    if _items(text):
        first = dataclasses.fields(part)[0].name  # type: ignore[arg-type]
        raise ValueError(
            f"write this list of {part.__name__}(...) in the config file; a flag sets one field of an element, such as "
            f"{first} by adding [0].{first} to the list's name, or makes the list empty by []"
        )
    return []


def _literal(text: str, problem: str) -> Any:
    """Returns the value that a text writes as JSON, or as `mice config` prints it; else raises ValueError."""
    for read in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError, TypeError):
            return read(text)
    raise ValueError(problem)


READERS: dict[Any, Callable[[str], Any]] = {
    dict[str, Any]: _object,
    list[str]: _items,
    list[float]: _numbers,
    **{list[part]: functools.partial(_no_parts, part) for part in (Phase, Source, Published)},
}
for _type, _read in READERS.items():
    config_flags.register_flag_parser_for_type(_type, _FieldParser(_read))


def define_config(values: Values, argv: list[str]) -> None:
    """Defines --config and, from the arguments that follow it, its overrides."""
    config_flags.DEFINE_config_file(
        "config", None, "FILE.py[:arg] that defines get_config(arg)", flag_values=values, sys_argv=argv
    )


def define_processes(values: Values) -> None:
    """Defines the flags by which the processes of one run find each other."""
    flags.DEFINE_string("coordinator_address", None, "host:port of process 0", flag_values=values)
    flags.DEFINE_integer("num_processes", None, "number of processes of the run", flag_values=values)
    flags.DEFINE_integer("process_id", None, "index of this process, from 0", flag_values=values)
    flags.DEFINE_integer(
        "expect_devices", None, "fail unless all processes together have this many devices", flag_values=values
    )


def _define_model(values: Values) -> None:
    flags.DEFINE_string("model", None, "Hugging Face folder or owner/name, or workdir of a run", flag_values=values)
    flags.DEFINE_integer("step", None, "checkpoint of a run; default the newest", flag_values=values)
    flags.DEFINE_string("compute_dtype", "auto", "float32, bfloat16 or auto (float32 on CPU only)", flag_values=values)
    flags.DEFINE_string(
        "chat_template", "", "F.jinja or the name of a built-in one; default the tokenizer's own", flag_values=values
    )


# ---------------------------------------------------------------------------------------- one function a command
def define_train(values: Values, argv: list[str]) -> None:
    """Defines the flags of `mice train`."""
    define_config(values, argv)
    flags.DEFINE_string("workdir", None, "folder of the run", flag_values=values)
    debug = "say which operation made the first value that is not finite, if a step ends the run so"
    flags.DEFINE_bool("debug_nans", False, debug, flag_values=values)
    define_processes(values)


def define_prepare(values: Values, argv: list[str]) -> None:
    """Defines the flags of `mice prepare`."""
    define_config(values, argv)
    flags.DEFINE_integer("inspect", 0, "samples of each phase to show", lower_bound=0, flag_values=values)
    flags.DEFINE_bool("ids", False, "show them token by token, with their ids", flag_values=values)
    flags.DEFINE_bool("report", False, "show lengths, copies, epochs and packing too", flag_values=values)
    flags.DEFINE_string("output", None, "file for the report, as JSON", flag_values=values)


def define_plan(values: Values, argv: list[str]) -> None:
    """Defines the flags of `mice plan`."""
    define_config(values, argv)
    flags.DEFINE_string("topology", None, "cpu:N, v5p:2x2x2, h100:8, ...", flag_values=values)
    flags.DEFINE_bool("json", False, "print one JSON object", flag_values=values)
    minutes = "time after which other rows and meshes are estimated instead of compiled"
    flags.DEFINE_float("compile_minutes", 3.0, minutes, lower_bound=0.0, flag_values=values)
    flags.DEFINE_float("price_per_hour", 0.0, "price of one chip, for the cost", lower_bound=0.0, flag_values=values)
    mean = "mean tokens of a sample; 0 = measure the data"
    flags.DEFINE_float("mean_length", 0.0, mean, lower_bound=0.0, flag_values=values)
    flags.DEFINE_string("device_file", "", "*.gpu_target_config.pbtxt of an NVIDIA GPU", flag_values=values)


def define_sweep(values: Values, argv: list[str]) -> None:
    """Defines the flags of `mice sweep`."""
    flags.DEFINE_string("config", None, "FILE.py[:arg] that defines get_sweep(arg)", flag_values=values)
    flags.DEFINE_string("workdir", None, "folder of the sweep", flag_values=values)
    flags.DEFINE_integer("workers", 1, "trials at a time, each on its share of devices", 1, flag_values=values)
    flags.DEFINE_bool("worker", False, "join a running sweep as one more worker, and end with it", flag_values=values)
    flags.DEFINE_string("storage", "", "URL of the Optuna database; default SQLite in the workdir", flag_values=values)
    define_processes(values)
    flags.DEFINE_bool("dry_run", False, "print the trials, their steps and cost, and end", flag_values=values)


def define_branch(values: Values, argv: list[str]) -> None:
    """Defines the flags of `mice branch`."""
    flags.DEFINE_string("from", None, "folder of the run", flag_values=values)
    flags.DEFINE_integer("at", None, "samples of the checkpoint to branch off from", flag_values=values)
    axes = "FIELD=VALUE,VALUE, such as optim.batch_size=16,32,64; may be repeated"
    flags.DEFINE_multi_string("axes", [], axes, flag_values=values)
    samples = "samples that each branch trains on; default to the end of the run"
    flags.DEFINE_integer("for", 0, samples, lower_bound=0, flag_values=values)
    scale = "how the learning rate follows the batch size (sqrt)"
    flags.DEFINE_enum("scale", "sqrt", ["none", "sqrt", "linear"], scale, flag_values=values)
    seeds = "seeds of the orders, with commas; default three, of which the first is the run's"
    flags.DEFINE_list("seeds", [], seeds, flag_values=values)
    tolerance = "loss above the smallest batch size's that does not count (0.01)"
    flags.DEFINE_float("tolerance", 0.01, tolerance, flag_values=values)
    flags.DEFINE_string("workdir", None, "folder of the branches", flag_values=values)
    flags.DEFINE_integer("workers", 1, "branches at a time, each on its share of devices", 1, flag_values=values)
    flags.DEFINE_bool("dry_run", False, "print the branches and end", flag_values=values)


def define_report(values: Values, argv: list[str]) -> None:
    """Defines the flags of `mice report`."""
    flags.DEFINE_list("workdir", None, "folder of a run or a sweep, or several runs with commas", flag_values=values)
    flags.DEFINE_string("output", None, "the page, F.html", flag_values=values)
    serve = "serve the page on this machine instead, following a run in progress"
    flags.DEFINE_bool("serve", False, serve, flag_values=values)
    port = f"the port of --serve ({DEFAULT_REPORT_PORT}); 0 = any that is free"
    flags.DEFINE_integer("port", DEFAULT_REPORT_PORT, port, 0, 65535, flag_values=values)


def define_evidence(values: Values, argv: list[str]) -> None:
    """Defines the flags of `mice evidence`."""
    flags.DEFINE_list("sweeps", [], "folders of finished sweeps, or files F.npz, with commas", flag_values=values)
    flags.DEFINE_integer("synthetic", 5, "synthetic sweeps of each kind (5)", lower_bound=0, flag_values=values)
    flags.DEFINE_list("rules", [], "names of rules, with commas between; default all", flag_values=values)
    seeds = "seeds that a rule chooses by; the others score it (3)"
    flags.DEFINE_integer("seeds", 3, seeds, lower_bound=1, flag_values=values)
    flags.DEFINE_integer("workers", 4, "runs at a time (4)", lower_bound=1, flag_values=values)
    flags.DEFINE_string("output", None, "results, F.json", flag_values=values)


def define_evaluate(values: Values, argv: list[str]) -> None:
    """Defines the flags of `mice evaluate`."""
    _define_model(values)
    flags.DEFINE_bool("all_checkpoints", False, "score every checkpoint of a run", flag_values=values)
    flags.DEFINE_list("tasks", [], "names of tasks or groups, with commas between", flag_values=values)
    flags.DEFINE_string("include_path", "", "folder with YAML files of your own tasks", flag_values=values)
    flags.DEFINE_string("output", None, "file for the results, F.json; default none", flag_values=values)
    shots = "examples in a prompt; default that of the task, and 5 for mmlu"
    flags.DEFINE_integer("num_fewshot", None, shots, flag_values=values)
    limit = "documents of each task, or a fraction of them below 1: for a quick trial"
    flags.DEFINE_float("limit", None, limit, flag_values=values)
    flags.DEFINE_bool("apply_chat_template", False, "ask in the tokenizer's chat template", flag_values=values)
    multiturn = "give examples as turns of the conversation; default as apply_chat_template"
    flags.DEFINE_bool("fewshot_as_multiturn", None, multiturn, flag_values=values)
    flags.DEFINE_string("system_instruction", None, "text at the start of each prompt", flag_values=values)
    flags.DEFINE_bool("log_samples", False, "write each document with its requests and answers too", flag_values=values)
    flags.DEFINE_integer("batch_size", 16, "answers generated at once (16)", flag_values=values)
    define_mt_bench(values)
    define_processes(values)


def define_mt_bench(values: Values) -> None:
    """Defines the flags that only the task `mt_bench` reads."""
    flags.DEFINE_string("judge_url", None, "mt_bench: OpenAI-compatible endpoint, https://host/v1", flag_values=values)
    flags.DEFINE_string("judge_model", None, "mt_bench: name of the judge at the endpoint", flag_values=values)
    key = f"mt_bench: environment variable with the endpoint's key ({DEFAULT_JUDGE_KEY_ENV})"
    flags.DEFINE_string("judge_key_env", DEFAULT_JUDGE_KEY_ENV, key, flag_values=values)
    folder = "mt_bench: question.jsonl, next to reference_answer/; default those of an installed fastchat"
    flags.DEFINE_string("questions", None, folder, flag_values=values)
    flags.DEFINE_string("judge_prompts", None, "mt_bench: judge_prompts.jsonl; default likewise", flag_values=values)
    flags.DEFINE_integer("repeats", 1, "mt_bench: times that all is answered and judged (1)", flag_values=values)


def define_export(values: Values, argv: list[str]) -> None:
    """Defines the flags of `mice export`."""
    flags.DEFINE_string("workdir", None, "folder of the run", flag_values=values)
    flags.DEFINE_string("output", None, "folder to write; it must be absent or empty", flag_values=values)
    flags.DEFINE_integer("step", None, "checkpoint to export; default the newest", flag_values=values)
    flags.DEFINE_string("dtype", None, "float32 or bfloat16; default as in init_from", flag_values=values)
    average = "export the average of the weights that train.ema_half_life kept, not the weights"
    flags.DEFINE_bool("average", False, average, flag_values=values)
    adapter = "write the adapter of a run with model.lora as PEFT loads it, not the merged model"
    flags.DEFINE_bool("adapter", False, adapter, flag_values=values)
    flags.DEFINE_string("push_to", None, "repository of the Hub to upload to, ORG/NAME", flag_values=values)


def define_average(values: Values, argv: list[str]) -> None:
    """Defines the flags of `mice average`."""
    flags.DEFINE_string("workdir", None, "folder of the run", flag_values=values)
    flags.DEFINE_integer("last", None, "how many of the newest checkpoints", lower_bound=1, flag_values=values)
    flags.DEFINE_string("output", None, "folder to write; default WORKDIR/averages/STEP_last_K", flag_values=values)


def define_generate(values: Values, argv: list[str]) -> None:
    """Defines the flags of `mice generate`."""
    _define_model(values)
    flags.DEFINE_string("prompt", None, "the user's message; the answer is printed", flag_values=values)
    flags.DEFINE_string("input", None, "questions, F.jsonl", flag_values=values)
    flags.DEFINE_string("output", None, "answers to --input, F.jsonl", flag_values=values)
    flags.DEFINE_string("system", None, "system message of a conversation that has none", flag_values=values)
    longest = f"longest answer ({DEFAULT_MAX_NEW_TOKENS}, or half of the model's positions if they are few)"
    flags.DEFINE_integer("max_new_tokens", None, longest, flag_values=values)
    flags.DEFINE_multi_string("stop", [], "a text that ends answers", flag_values=values)
    default = "default that of generation_config.json, else"
    flags.DEFINE_float("temperature", None, f"0 takes the likeliest token each time; {default} 0", flag_values=values)
    top_p = f"sample from the likeliest tokens that hold this probability; {default} 1"
    flags.DEFINE_float("top_p", None, top_p, flag_values=values)
    top_k = f"sample from this many of the likeliest tokens, 0 = all; {default} 0"
    flags.DEFINE_integer("top_k", None, top_k, flag_values=values)
    flags.DEFINE_integer("seed", 0, "seed of the sampling (0)", flag_values=values)
    flags.DEFINE_integer("batch_size", 16, "lines of --input answered at once (16)", flag_values=values)


# ---------------------------------------------------------------------------------------- the table
class Command(NamedTuple):
    """A command of `mice`: the module with its `main(argv)`, its flags, and one line for the list of commands.

    Flags are checked before the imports of the command's module.
    """

    module: str
    define_flags: DefineFlags
    summary: str
    reads_run_config: bool = False  # --config must be a valid config of a run
    required: tuple[str, ...] = ()  # flags without which the command can do nothing
    check_flags: Callable[[Values], None] = lambda values: None  # raises UserError where a flag is wrong


COMMANDS = {
    "train": Command("mice_jax.train", define_train, "fine-tune a model, or resume a run", True, required=("workdir",)),
    "prepare": Command(
        "mice_jax.prepare",
        define_prepare,
        "tokenise the data ahead of a run, and look at it",
        True,
        check_flags=flag_checks.check_prepare,
    ),
    "plan": Command(
        "mice_jax.plan", define_plan, "predict memory, time and cost on given devices", True, required=("topology",)
    ),
    "config": Command("mice_jax.cli.show_config", define_config, "print the resolved config of a run"),
    "sweep": Command(
        "mice_jax.sweep",
        define_sweep,
        "run many trials of a config, and stop the poor ones early",
        required=("config", "workdir"),
    ),
    "branch": Command(
        "mice_jax.branch",
        define_branch,
        "go on from a run's checkpoint with other settings",
        required=("from", "at"),
        check_flags=flag_checks.check_branch,
    ),
    "report": Command(
        "mice_jax.report",
        define_report,
        "write one HTML page of a run, of several, or of a sweep",
        required=("workdir",),
    ),
    "evidence": Command("mice_jax.evidence", define_evidence, "measure what the rules of sweeps save and lose"),
    "evaluate": Command(
        "mice_jax.evaluate",
        define_evaluate,
        "score a model on benchmarks",
        required=("model",),
        check_flags=flag_checks.check_evaluate,
    ),
    "export": Command(
        "mice_jax.export",
        define_export,
        "write a run's model as a Hugging Face folder",
        required=("workdir", "output"),
        check_flags=flag_checks.check_export,
    ),
    "average": Command(
        "mice_jax.average",
        define_average,
        "average the weights of a run's last checkpoints",
        required=("workdir", "last"),
    ),
    "generate": Command(
        "mice_jax.generate",
        define_generate,
        "answer prompts with a model, or chat",
        required=("model",),
        check_flags=flag_checks.check_generate,
    ),
}
