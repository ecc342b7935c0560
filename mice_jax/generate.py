"""Answer prompts with a model, or chat with it.

  mice generate --model=runs/demo --prompt="Why do mice run?"
  mice generate --model=hf_folder --input=questions.jsonl --output=answers.jsonl --max_new_tokens=512
  mice generate --model=runs/demo --step=400          a chat; /reset begins anew, /exit ends it

A line of --input is {"messages": [...]}, with "tools" if there are any, or {"prompt": "..."}. A line of --output is
that of the input with its "response", and "stopped": whether the model ended it by itself. An output that is there
already is continued after its last whole line, by the same model and settings (OUTPUT.settings.json).
"""

from mice_jax.cli import command

if __name__ == "__main__":
    command.before_imports("generate")  # --help and wrong flags need none of the imports below, which take seconds

# isort: split
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from mice_jax.cli.flags import DEFAULT_MAX_NEW_TOKENS, define_generate
from mice_jax.cli.progress_display import Display
from mice_jax.data.chat import ChatEncoder
from mice_jax.data.sources import ROLES
from mice_jax.data.tokenizer import load_tokenizer
from mice_jax.errors import UserError
from mice_jax.inference.chat import ChatModel, Message
from mice_jax.inference.generation_config import FILE, GenerationDefaults
from mice_jax.inference.sampler import Sampler, Sampling, cast_params, check_fits
from mice_jax.model_source import (
    check_vocabulary,
    compute_dtype,
    fingerprint,
    generation_config_of,
    load_params,
    resolve_model,
    resolve_step,
)
from mice_jax.models.spec import ModelSpec
from mice_jax.models.transformer import make_decoder
from mice_jax.runtime import compile_cache, xla_flags
from mice_jax.sharding import make_mesh, param_shardings
from mice_jax.storage.cache import cache_folder
from mice_jax.storage.paths import write_atomically

DRAWN = ("temperature", "top_p", "top_k")
ADDED = ("response", "stopped")  # what an output's line has besides its input's


def generate(values: command.Values) -> None:
    # ------------------------------------------------------------------------------------ what is asked
    xla_flags.set_flags(deterministic=False)
    origin = resolve_model(command.required(values, "model"), values.step)
    max_new_tokens = values.max_new_tokens
    if max_new_tokens is None:
        max_new_tokens = min(DEFAULT_MAX_NEW_TOKENS, origin.spec.max_positions // 2)
    if values.prompt is not None and values.input is not None:
        raise UserError("--prompt and --input are both given; give one of them.")
    if (values.input is None) != (values.output is None):
        raise UserError("--input and --output go together: the answers to one file are written to another.")
    if not all(values.stop):
        raise UserError("--stop is empty: it would end every answer before its first character.")
    if values.batch_size < 1:
        raise UserError(f"--batch_size={values.batch_size} must be at least 1.")
    tokenizer = load_tokenizer(str(origin.folder), values.chat_template)
    check_vocabulary(origin, tokenizer.get_vocab())
    encoder = ChatEncoder(tokenizer)
    generation = generation_config_of(origin, tokenizer)
    sampling = _sampling(values, generation, max_new_tokens)
    for remark in _remarks(values, generation, origin.folder):
        print(remark, file=sys.stderr)
    # What ends a turn in the chat template, and what the model's own generation config adds.
    stop_ids = [*encoder.stop_ids(), *generation.stop_ids]
    dtype, step = compute_dtype(values.compute_dtype), resolve_step(origin, values.step)
    system = [] if values.system is None else [{"role": "system", "content": values.system}]
    job = None  # read before the model is, so that what is wrong is said at once
    if values.input is not None:
        job = _Job.open(Path(values.input), Path(values.output), system, encoder, sampling, origin.spec)
        job.check_settings(_settings(values, fingerprint(origin, step), step, encoder, sampling, stop_ids, dtype))
        if job.num_kept:
            print(f"{job.output} has {job.num_kept} of {len(job.records)} answers already: they are kept.")
        if job.num_kept == len(job.records):
            return
    elif values.prompt is not None:
        check_fits(encoder.prompt_ids(_asked(system, values.prompt)), sampling, origin.spec, "--prompt")

    # ------------------------------------------------------------------------------------ model
    compile_cache.enable(cache_folder(""))
    mesh = make_mesh(1, -1, 1)
    decoder = make_decoder(origin.spec, mesh.shape["tensor"])
    shardings = param_shardings(decoder.abstract, decoder.axes, mesh)
    params = cast_params(load_params(origin, decoder, shardings, step=step), dtype)
    speaker = ChatModel(Sampler(decoder, dtype), params, encoder, stop_ids, tuple(values.stop))

    # ------------------------------------------------------------------------------------ answers
    with jax.set_mesh(mesh):
        if job is not None:
            _answer_file(job, speaker, sampling, values.batch_size)
        elif values.prompt is not None:
            say(speaker, _asked(system, values.prompt), sampling)
        else:
            _chat(speaker, system, sampling)


def _sampling(values: command.Values, generation: GenerationDefaults, max_new_tokens: int) -> Sampling:
    """As the flags say, else as the model's folder does, else greedy."""
    temperature, top_p, top_k = (
        getattr(generation, name) if values[name].value is None else values[name].value for name in DRAWN
    )
    return Sampling(max_new_tokens, temperature or 0.0, 1.0 if top_p is None else top_p, top_k or 0, values.seed)


def _remarks(values: command.Values, generation: GenerationDefaults, folder: Path) -> list[str]:
    """What the user did not say and may not expect of the model's own generation_config.json."""
    taken = [f"{n}={getattr(generation, n)}" for n in DRAWN if values[n].value is None and getattr(generation, n)]
    drawn = values.temperature if values.temperature is not None else generation.temperature
    said = []
    if drawn and taken:
        said.append(f"{folder / FILE} has {', '.join(taken)}: answers are drawn so, unless flags say otherwise")
    if generation.ignored_fields:
        wishes = ", ".join(generation.ignored_fields)
        said.append(f"warning: {folder / FILE} has {wishes}, which is not done here; transformers would do it")
    return said


def _asked(system: list[Message], prompt: str) -> list[Message]:
    return [*system, {"role": "user", "content": prompt}]


# ---------------------------------------------------------------------------------------- one at a time
def say(speaker: ChatModel, messages: list[Message], sampling: Sampling) -> str:
    """Prints the answer as it comes, and returns it."""
    prompt = speaker.prompt(messages, None, sampling, "the conversation")
    spoken = speaker.speak(prompt, sampling, lambda piece: print(piece, end="", flush=True))
    print()
    if not spoken.stopped:
        print(f"(cut at max_new_tokens={sampling.max_new_tokens})", file=sys.stderr)
    return spoken.text


def _chat(speaker: ChatModel, system: list[Message], sampling: Sampling) -> None:
    print("A chat: /reset begins anew, /exit ends it.")
    messages = list(system)
    while True:
        try:
            said = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if said == "/exit":
            return
        if said == "/reset":
            messages = list(system)
        elif said:
            asked = _asked(messages, said)
            try:
                messages = [*asked, {"role": "assistant", "content": say(speaker, asked, sampling)}]
            except UserError as e:  # too long by now, or more than the template takes: what was said before stands
                print(f"{e} /reset begins anew.", file=sys.stderr)


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
    """All that answers depend on besides their questions, and the model's place, which may change."""
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
    """Lines to answer, and the file that answers are added to."""

    records: list[dict[str, Any]]
    prompts: list[list[int]]
    output: Path
    num_kept: int  # answers that are there

    @classmethod
    def open(
        cls,
        source: Path,
        output: Path,
        system: list[Message],
        encoder: ChatEncoder,
        sampling: Sampling,
        spec: ModelSpec,
    ) -> "_Job":
        """Reads both files, checks every line, and cuts an output's last line where it is not whole."""
        records, prompts = [], []
        for where, record in _records(source):
            try:
                prompt = encoder.prompt_ids(_messages(record, system), record.get("tools"))
            except UserError as e:
                raise UserError(f"{where}: {e}") from None
            check_fits(prompt, sampling, spec, where)
            records.append(record)
            prompts.append(prompt)
        if not records:
            raise UserError(f"--input={source} holds no line.")
        return cls(records, prompts, output, _kept(source, output, records))

    def check_settings(self, settings: dict[str, Any]) -> None:
        """UserError where the answers that are there were made in another way; else notes how, beside them."""
        file = self.output.with_name(f"{self.output.name}.settings.json")
        if self.num_kept:
            try:
                there: Any = json.loads(file.read_text())
                changed = [f"{k} {there[k]!r} (now {v!r})" for k, v in settings.items() if there[k] != v]
            except (OSError, ValueError, LookupError, TypeError):
                raise UserError(
                    f"{file}, which says how the answers in --output={self.output} were made, is missing or no such "
                    "file. Put it back, give another --output, or remove the answers."
                ) from None
            if any(settings[k] != there[k] for k in settings.keys() - {"model"}):
                raise UserError(
                    f"--output={self.output} was written with {', '.join(changed)}. Ask as before, give another "
                    "--output, or remove the file."
                )
        write_atomically(file, json.dumps(settings, indent=2) + "\n")


def _answer_file(job: _Job, speaker: ChatModel, sampling: Sampling, batch_size: int) -> None:
    records, prompts = job.records[job.num_kept :], job.prompts[job.num_kept :]
    numbers = range(job.num_kept, len(job.records))
    answers = speaker.answers(prompts, sampling, numbers, batch_size=batch_size)
    with job.output.open("a", encoding="utf-8") as f, Display(Console(stderr=True)) as display:
        told = display.watch("answering")
        for done, (record, answer) in enumerate(zip(records, answers, strict=True), 1):
            line = record | {"response": answer.text, "stopped": answer.stopped}
            f.write(json.dumps(line, ensure_ascii=False) + "\n")
            f.flush()
            told(done / len(records), done)
    print(f"answered {len(records)} lines in {job.output}")


def _records(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line's object and its place."""
    for number, line in enumerate(_read(file).split(b"\n"), 1):
        if line.strip():
            where = f"{file} line {number}"
            try:
                record = json.loads(line)
                json.dumps(record, ensure_ascii=False).encode()
            except UnicodeEncodeError:
                raise UserError(f"{where} holds half of a character (a lone surrogate).") from None
            except (ValueError, RecursionError) as e:
                raise UserError(f"{where} is not JSON: {e}.") from None
            if not isinstance(record, dict):
                raise UserError(f"{where} is no object; it must be one with `messages` or `prompt`.")
            yield where, record


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as e:
        raise UserError(f"{file} cannot be read: {e.strerror}.") from None


def _messages(record: dict[str, Any], system: list[Message]) -> list[Message]:
    """The conversation to go on with; UserError says what is wrong with it."""
    if ("messages" in record) == ("prompt" in record):
        raise UserError("it must have either `messages` or `prompt`.")
    if "prompt" in record:
        if not isinstance(record["prompt"], str):
            raise UserError("`prompt` must be a string.")
        return _asked(system, record["prompt"])
    messages = record["messages"]
    if not isinstance(messages, list) or not messages:
        raise UserError("`messages` must be a list of at least one message.")
    messages = [_message(m, f"messages[{i}]") for i, m in enumerate(messages)]
    last = messages[-1]["role"]
    if last not in ("user", "tool"):
        raise UserError(f"the last message is of role {last!r}; only a user's or a tool's is answered.")
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


def _kept(source: Path, output: Path, records: list[dict[str, Any]]) -> int:
    """How many answers an output holds, its cut last line removed; UserError where they are not to these records."""
    if not output.parent.is_dir():
        raise UserError(f"--output={output}: there is no folder {output.parent}.")
    if output.exists() and output.samefile(source):
        raise UserError(f"--output={output} is --input itself; give another file.")
    content = _read(output) if output.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    lines = whole.split(b"\n")[:-1]
    if len(lines) > len(records):
        raise UserError(f"--output={output} has {len(lines)} lines, --input={source} {len(records)}: {_MEND}")
    for number, (line, record) in enumerate(zip(lines, records, strict=False), 1):
        if not _answers(line, record):
            raise UserError(f"--output={output} line {number} is no answer to prompt {number} of {source}: {_MEND}")
    try:
        with output.open("ab") as f:
            f.truncate(len(whole))
    except OSError as e:
        raise UserError(f"--output={output} cannot be written: {e.strerror}.") from None
    return len(lines)


_MEND = "it was written from another input. Give another --output, or remove the file."


def _answers(line: bytes, record: dict[str, Any]) -> bool:
    try:
        found = json.loads(line)
    except ValueError:
        return False
    if not isinstance(found, dict) or not found.keys() >= set(ADDED):
        return False
    return _asks(found) == _asks(record)


def _asks(record: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in record.items() if k not in ADDED}


def main(argv: Sequence[str] | None = None) -> int:
    return command.run(__doc__, define_generate, generate, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
