"""Answer prompts with a model, or chat with it.

  mice generate --model=runs/demo --prompt="Why do mice run?"
  mice generate --model=hf_folder --input=questions.jsonl --output=answers.jsonl --max_new_tokens=512
  mice generate --model=runs/demo --step=400          a chat; /help lists its commands

A line of --input is {"messages": [...]} or {"prompt": "..."}, with optional "tools", "documents" and
"chat_template_kwargs". A line of --output is that of the input with the added fields "response", and "stopped": whether
the model ended the answer itself. An output that exists is continued after its last complete line, by the same model
and settings (OUTPUT.settings.json).
"""

from mice_jax.cli import command

if __name__ == "__main__":
    command.before_imports("generate")  # Handles --help and wrong flags before the imports below, which take seconds.

# isort: split
import codecs
import dataclasses
import functools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from mice_jax.cli import flag_checks
from mice_jax.cli.flags import define_generate
from mice_jax.cli.progress_display import Display
from mice_jax.data.chat import ChatEncoder
from mice_jax.data.sources import ROLES
from mice_jax.data.template_source import RESERVED
from mice_jax.data.tokenizer import load_tokenizer
from mice_jax.errors import UserError, format_count
from mice_jax.inference.chat import ChatModel, Message
from mice_jax.inference.generation_config import FILE, GenerationDefaults
from mice_jax.inference.sampler import Sampler, Sampling, check_fits, default_max_new_tokens
from mice_jax.inference.terminal_chat import TerminalChat, run_chat
from mice_jax.model_source import (
    check_vocabulary,
    compute_dtype,
    fingerprint,
    generation_config_of,
    resolve_model,
    resolve_step,
)
from mice_jax.models.spec import ModelSpec
from mice_jax.runtime import compile_cache, precision, xla_flags
from mice_jax.runtime.devices import find_devices
from mice_jax.storage.cache import cache_folder
from mice_jax.storage.paths import write_atomically
from mice_jax.training import build

SAMPLING_FLAGS = ("temperature", "top_p", "top_k")  # generation_config.json may have defaults for these.
ADDED_FIELDS = ("response", "stopped")  # An output line has these and the input's fields.


def generate(values: command.Values) -> None:
    """Answers a prompt, a file of prompts, or the user in a chat, depending on the flags.

    Args:
      values: The values of the command's flags.

    Raises:
      UserError: A flag or the input is not valid, or the model cannot be loaded.
    """
    # ------------------------------------------------------------------------------------ input
    xla_flags.set_flags(deterministic=False)
    model_name = command.required(values, "model")
    flag_checks.check_generate(values)
    source = resolve_model(model_name, values.step)
    max_new_tokens = values.max_new_tokens
    if max_new_tokens is None:
        max_new_tokens = default_max_new_tokens(source.spec)
    tokenizer = load_tokenizer(str(source.tokenizer_folder), values.chat_template)
    check_vocabulary(source, tokenizer.get_vocab())
    encoder = ChatEncoder(tokenizer)
    defaults = generation_config_of(source, tokenizer)
    flags_given = {name: values[name].value for name in SAMPLING_FLAGS}
    sampling = defaults.sampling(max_new_tokens, **flags_given, seed=values.seed)
    for note in _notes(values, defaults, source.folder):
        print(note, file=sys.stderr)
    # An answer ends with the token that ends a turn in the chat template, or with one of the generation config.
    stop_ids = [*encoder.stop_ids(), *defaults.stop_ids]
    platform = find_devices()[0].platform
    dtype, step = compute_dtype(values.compute_dtype, platform), resolve_step(source, values.step)
    precision.set_float32_matmul_precision(dtype, platform)
    system = [] if values.system is None else [{"role": "system", "content": values.system}]
    job = None
    # The input is read before the model is loaded, so that its errors appear at once.
    if values.input is not None:
        job = _Job.open(Path(values.input), Path(values.output), system, encoder, sampling, source.spec)
        job.check_settings(_settings(values, fingerprint(source, step), step, encoder, sampling, stop_ids, dtype))
        if job.num_answered:
            print(f"{job.output} has {job.num_answered} of {len(job.records)} answers already; the others follow.")
        if job.num_answered == len(job.records):
            return
    elif values.prompt is not None:
        check_fits(encoder.prompt_ids(_with_question(system, values.prompt)), sampling, source.spec, "--prompt")

    # ------------------------------------------------------------------------------------ model
    compile_cache.enable(cache_folder(""))
    loaded = build.load_for_inference(source, step=step, dtype=dtype)
    model = ChatModel(Sampler(loaded.decoder, dtype), loaded.params, encoder, stop_ids, tuple(values.stop))

    # ------------------------------------------------------------------------------------ answers
    with jax.set_mesh(loaded.mesh):
        if job is not None:
            _answer_file(job, model, sampling, values.batch_size)
        elif values.prompt is not None:
            print_answer(model, _with_question(system, values.prompt), sampling)
        else:
            run_chat(TerminalChat(functools.partial(print_answer, model, sampling=sampling), values.system or ""))


def _notes(values: command.Values, defaults: GenerationDefaults, folder: Path) -> list[str]:
    """Returns sentences about the fields of the model's generation_config.json that apply, or that are ignored."""
    applied = [
        f"{n}={getattr(defaults, n)}" for n in SAMPLING_FLAGS if values[n].value is None and getattr(defaults, n)
    ]
    temperature = values.temperature if values.temperature is not None else defaults.temperature
    notes = []
    if temperature and applied:
        notes.append(
            f"{folder / FILE} has {', '.join(applied)}: answers are drawn with these, unless flags override them"
        )
    if defaults.ignored_fields:
        ignored = ", ".join(defaults.ignored_fields)
        notes.append(f"warning: {folder / FILE} has {ignored}, which transformers applies and mice_jax ignores")
    return notes


def _with_question(system: list[Message], prompt: str) -> list[Message]:
    return [*system, {"role": "user", "content": prompt}]


# ---------------------------------------------------------------------------------------- one at a time
def print_answer(model: ChatModel, messages: list[Message], sampling: Sampling) -> str:
    """Prints the answer to a conversation while it is generated.

    Args:
      model: The model that answers.
      messages: The conversation so far; the last message is the user's.
      sampling: How tokens are chosen.

    Returns:
      The text of the answer.

    Raises:
      UserError: The conversation is too long, or the chat template does not accept it.
    """
    prompt = model.prompt(messages, None, sampling, "the conversation")
    completion = model.stream(prompt, sampling, lambda piece: print(piece, end="", flush=True))
    print()
    if not completion.stopped:
        print(f"(cut at max_new_tokens={sampling.max_new_tokens})", file=sys.stderr)
    return completion.text


# ---------------------------------------------------------------------------------------- a file
def _settings(
    values: command.Values,
    weights: str,
    step: int | None,
    encoder: ChatEncoder,
    sampling: Sampling,
    stop_ids: list[int],
    dtype: Any,
) -> dict[str, Any]:
    """Returns everything besides the questions that answers depend on.

    The model's path is included for messages only: it may change between two commands.
    """
    return {
        "model": values.model,
        "weights": weights[:16],
        "step": step,
        "template": encoder.fingerprint()[:16],
        "system": values.system,
        **dataclasses.asdict(sampling),
        "stop": list(values.stop),
        "stop_ids": sorted(set(stop_ids)),
        "compute_dtype": str(dtype),
    }


@dataclasses.dataclass(frozen=True)
class _Job:
    """The questions of a file, and the file that answers are appended to.

    Attributes:
      records: The objects of the input's lines.
      prompts: The token ids of each question.
      output: The file of answers.
      num_answered: The number of answers that an earlier command wrote.
    """

    records: list[dict[str, Any]]
    prompts: list[list[int]]
    output: Path
    num_answered: int

    @classmethod
    def open(
        cls,
        questions: Path,
        output: Path,
        system: list[Message],
        encoder: ChatEncoder,
        sampling: Sampling,
        spec: ModelSpec,
    ) -> "_Job":
        """Reads both files, checks every line, and removes an incomplete last line of the output.

        Args:
          questions: The file of questions.
          output: The file of answers, which may have some already.
          system: The system message of each conversation that has none, as a list of at most one message.
          encoder: Renders and tokenises conversations.
          sampling: How the questions are answered.
          spec: The model's architecture.

        Raises:
          UserError: A line is not valid, a prompt is too long, or the output has answers to another input.
        """
        records, prompts = [], []
        for where, record in _records(questions):
            try:
                prompt = encoder.prompt_ids(_messages(record, system), **_inputs(record))
            except UserError as e:
                raise UserError(f"{where}: {e}") from None
            check_fits(prompt, sampling, spec, where)
            records.append(record)
            prompts.append(prompt)
        if not records:
            raise UserError(f"--input={questions} has no line.")
        return cls(records, prompts, output, _num_answered(questions, output, records))

    def check_settings(self, settings: dict[str, Any]) -> None:
        """Writes the settings to OUTPUT.settings.json; raises UserError if earlier answers had other settings."""
        file = self.output.with_name(f"{self.output.name}.settings.json")
        if self.num_answered:
            try:
                earlier: Any = json.loads(file.read_text())
                changed = [f"{k} {earlier[k]!r} (now {v!r})" for k, v in settings.items() if earlier[k] != v]
            except (OSError, ValueError, LookupError, TypeError):
                raise UserError(
                    f"{file}, which says how the answers in --output={self.output} were made, is missing or damaged. "
                    "Restore it, give another --output, or remove the answers."
                ) from None
            if any(settings[k] != earlier[k] for k in settings.keys() - {"model"}):
                raise UserError(
                    f"--output={self.output} was written with {', '.join(changed)}. Ask as before, give another "
                    "--output, or remove the file."
                )
        write_atomically(file, json.dumps(settings, indent=2) + "\n")


def _answer_file(job: _Job, model: ChatModel, sampling: Sampling, batch_size: int) -> None:
    """Answers the questions that have no answer yet, and appends each answer to the output at once."""
    records, prompts = job.records[job.num_answered :], job.prompts[job.num_answered :]
    numbers = range(job.num_answered, len(job.records))
    answers = model.answers(prompts, sampling, numbers, batch_size=batch_size)
    with job.output.open("a", encoding="utf-8") as f, Display(Console(stderr=True)) as display:
        report = display.watch("answering")
        for done, (record, answer) in enumerate(zip(records, answers, strict=True), 1):
            line = record | {"response": answer.text, "stopped": answer.stopped}
            f.write(json.dumps(line, ensure_ascii=False) + "\n")
            f.flush()
            report(done / len(records), done)
    print(f"answered {format_count(len(records), 'line')} in {job.output}")


def _records(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the file and line number of each line, and its object."""
    for number, line in enumerate(_read(file).removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
        if line.strip():
            where = f"{file} line {number}"
            try:
                record = json.loads(line)
                json.dumps(record, ensure_ascii=False).encode()
            except UnicodeEncodeError:
                raise UserError(f"{where} has half of a character (a lone surrogate).") from None
            except (ValueError, RecursionError) as e:
                raise UserError(f"{where} is not JSON: {e}.") from None
            if not isinstance(record, dict):
                raise UserError(f"{where} is not an object; it must be one with `messages` or `prompt`.")
            yield where, record


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as e:
        raise UserError(f"{file} cannot be read: {e.strerror}.") from None


def _inputs(record: dict[str, Any]) -> dict[str, Any]:
    """What the template gets besides the messages; raises UserError if it is not valid."""
    for name in ("tools", "documents"):
        value = record.get(name)
        if value is not None and not (isinstance(value, list) and all(isinstance(v, dict) for v in value)):
            raise UserError(f"`{name}` must be a list of objects.")
    kwargs = record.get("chat_template_kwargs")
    if kwargs is not None and not isinstance(kwargs, dict):
        raise UserError("`chat_template_kwargs` must be an object.")
    taken = sorted(set(kwargs or {}) & set(RESERVED))
    if taken:
        raise UserError(f"`chat_template_kwargs` has {taken[0]!r}, which every conversation sets by itself.")
    return {"tools": record.get("tools"), "documents": record.get("documents"), "template_kwargs": kwargs}


def _messages(record: dict[str, Any], system: list[Message]) -> list[Message]:
    """Returns the conversation of a record; raises UserError if it is not valid."""
    if ("messages" in record) == ("prompt" in record):
        raise UserError("it must have either `messages` or `prompt`.")
    if "prompt" in record:
        if not isinstance(record["prompt"], str):
            raise UserError("`prompt` must be a string.")
        return _with_question(system, record["prompt"])
    messages = record["messages"]
    if not isinstance(messages, list) or not messages:
        raise UserError("`messages` must be a list of at least one message.")
    messages = [_message(m, f"messages[{i}]") for i, m in enumerate(messages)]
    last = messages[-1]["role"]
    if last not in ("user", "tool"):
        raise UserError(f"the last message is of role {last!r}; it must be that of a user or a tool.")
    return messages if messages[0]["role"] == "system" else [*system, *messages]


def _message(message: Any, at: str) -> Message:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise UserError(f"{at} must be an object whose `role` is one of {', '.join(ROLES)}.")
    content = message.get("content")
    if isinstance(content, list):
        if not all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
            raise UserError(f'{at}.content must be a string or a list of {{"type": "text", "text": "..."}}.')
        content = "".join(p["text"] for p in content)
    if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        raise UserError(f"{at}.content must be a string.")
    return message | {"content": content}


def _num_answered(questions: Path, output: Path, records: list[dict[str, Any]]) -> int:
    """Removes an output's incomplete last line and returns its number of answers.

    Raises:
      UserError: The output has answers to other records, or cannot be written.
    """
    content = _read(output) if output.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    lines = whole.split(b"\n")[:-1]
    if len(lines) > len(records):
        has = format_count(len(lines), "line")
        raise UserError(f"--output={output} has {has}, --input={questions} {len(records)}: {_OTHER_INPUT}")
    for number, (line, record) in enumerate(zip(lines, records, strict=False), 1):
        if not _answers(line, record):
            raise UserError(
                f"--output={output} line {number} is not an answer to prompt {number} of {questions}: {_OTHER_INPUT}"
            )
    try:
        with output.open("ab") as f:
            f.truncate(len(whole))
    except OSError as e:
        raise UserError(f"--output={output} cannot be written: {e.strerror}.") from None
    return len(lines)


_OTHER_INPUT = "it was written from another input. Give another --output, or remove the file."


def _answers(line: bytes, record: dict[str, Any]) -> bool:
    """Returns whether a line of the output is an answer to a record of the input."""
    try:
        found = json.loads(line)
    except ValueError:
        return False
    if not isinstance(found, dict) or not found.keys() >= set(ADDED_FIELDS):
        return False
    return _asks(found) == _asks(record)


def _asks(record: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of a record without those that an answer adds."""
    return {k: v for k, v in record.items() if k not in ADDED_FIELDS}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code; `argv` is by default that of the process."""
    return command.run(__doc__, define_generate, generate, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
