"""Checks of the values of flags, alone and together, which need none of a command's imports.

They are made before these imports, and again where the values are used, for those who call that from Python.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from mice_jax.cli.task_names import MT_BENCH
from mice_jax.errors import UserError
from mice_jax.storage.outputs import check_output_file

COMPUTE_DTYPES = ("auto", "float32", "bfloat16")
STORED_DTYPES = ("float32", "bfloat16")


# ---------------------------------------------------------------------------------------- one function a command
def check_generate(values: flags.FlagValues) -> None:
    """Checks the flags of `mice generate`."""
    if values.prompt is not None and values.input is not None:
        raise UserError("--prompt and --input are both given; give one of them.")
    if (values.input is None) != (values.output is None):
        raise UserError("--input and --output go together: the answers to one file are written to another.")
    if not all(values.stop):
        raise UserError("--stop is empty: it would end every answer before its first character.")
    _check_batch_size(values.batch_size)
    check_compute_dtype(values.compute_dtype)
    check_sampling(values.max_new_tokens, values.temperature, values.top_p, values.top_k, values.seed)
    if values.input is not None:
        if not Path(values.input).is_file():
            raise UserError(f"--input={values.input} is not a file; paths are relative to {Path.cwd()}.")
        check_output_file(Path(values.output), "F.jsonl")
        if Path(values.output).exists() and Path(values.output).samefile(values.input):
            raise UserError(f"--output={values.output} is --input itself; give another file.")


def check_evaluate(values: flags.FlagValues) -> None:
    """Checks the flags of `mice evaluate`."""
    if not values.tasks:
        raise UserError("--tasks is missing; give at least one, as in --tasks=mmlu,gsm8k.")
    if values.all_checkpoints and values.step is not None:
        raise one_step_and_all()
    check_scoring(values.num_fewshot, values.limit, values.apply_chat_template, values.fewshot_as_multiturn)
    if values.output is not None:
        check_output_file(Path(values.output), "F.json")
    _check_batch_size(values.batch_size)
    check_compute_dtype(values.compute_dtype)
    if MT_BENCH in values.tasks:
        _check_mt_bench(values)


def check_prepare(values: flags.FlagValues) -> None:
    """Checks the flags of `mice prepare`."""
    if values.output:
        check_output_file(Path(values.output), "F.json")
    if values.ids and not values.inspect:
        raise UserError("--ids shows the samples of --inspect=N token by token: give that too.")


def check_export(values: flags.FlagValues) -> None:
    """Checks the flags of `mice export`."""
    if values.dtype is not None and values.dtype not in STORED_DTYPES:
        raise UserError(f"--dtype={values.dtype} is not one of {', '.join(STORED_DTYPES)}.")
    if values.push_to is not None:
        from mice_jax.storage.hub import check_upload  # it imports huggingface_hub, which --help does not need

        check_upload(values.push_to)


def check_branch(values: flags.FlagValues) -> None:
    """Checks the flags of `mice branch`."""
    if not values.dry_run and values.workdir is None:
        raise UserError("--workdir is missing: the folder of the branches. --dry_run plans them without one.")
    if not any(values.axes):
        raise UserError(
            "--axes is missing: what do the branches differ in? For instance --axes=optim.batch_size=16,32,64."
        )
    parse_seeds(values.seeds)


# ---------------------------------------------------------------------------------------- parts
def check_compute_dtype(name: str) -> None:
    """Raises UserError where a name is not that of a dtype to compute in."""
    if name not in COMPUTE_DTYPES:
        raise UserError(f"compute_dtype={name} is not one of {', '.join(COMPUTE_DTYPES)}.")


def check_sampling(
    max_new_tokens: int | None, temperature: float | None, top_p: float | None, top_k: int | None, seed: int
) -> None:
    """Checks how answers are drawn; None, which takes the model's default, is right.

    Args:
      max_new_tokens: As in `Sampling`.
      temperature: Likewise.
      top_p: Likewise.
      top_k: Likewise.
      seed: Likewise.

    Raises:
      UserError: It lists all values that are out of their bounds.
    """
    wrong = []
    if max_new_tokens is not None and max_new_tokens < 1:
        wrong.append(f"max_new_tokens={max_new_tokens} must be at least 1")
    if temperature is not None and not 0 <= temperature < float("inf"):
        wrong.append(f"temperature={temperature} must be a number from 0 up (0 = the likeliest token)")
    if top_p is not None and not 0 < top_p <= 1:
        wrong.append(f"top_p={top_p} must be above 0 and at most 1 (1 = off)")
    if top_k is not None and top_k < 0:
        wrong.append(f"top_k={top_k} must not be negative (0 = off)")
    if not 0 <= seed < 2**31:
        wrong.append(f"seed={seed} must be from 0 to {2**31 - 1}")
    if wrong:
        raise UserError("; ".join(wrong) + ".")


def check_scoring(
    num_fewshot: int | None, limit: float | None, apply_chat_template: bool, fewshot_as_multiturn: bool | None
) -> None:
    """Checks how the harness's tasks are asked; None, which takes a default, is right.

    Args:
      num_fewshot: As in `Settings` of evals/benchmarks.py.
      limit: Likewise.
      apply_chat_template: Likewise.
      fewshot_as_multiturn: Likewise.

    Raises:
      UserError: It lists all values that are wrong.
    """
    wrong = []
    if num_fewshot is not None and num_fewshot < 0:
        wrong.append(f"num_fewshot={num_fewshot} must be at least 0")
    if limit is not None and not (0 < limit < 1 or (limit >= 1 and limit % 1 == 0)):
        wrong.append(f"limit={limit} must be a number of documents, or a fraction between 0 and 1")
    if fewshot_as_multiturn and not apply_chat_template:
        wrong.append("fewshot_as_multiturn needs apply_chat_template")
    if wrong:
        raise UserError("; ".join(wrong) + ".")


def one_step_and_all() -> UserError:
    """Returns the error for a model whose checkpoints are all to be scored, and one of them is named."""
    return UserError("--all_checkpoints scores all steps of a run, but one of them is named too. Leave one out.")


def check_judge(url: str | None, model: str | None) -> None:
    """Raises UserError where the address or the name of MT-Bench's judge is missing."""
    if not url or not model:
        raise UserError("a judge is needed: give --judge_url=https://host/v1 and --judge_model=NAME.")


def parse_seeds(texts: Sequence[str]) -> list[int]:
    """Returns the seeds of `mice branch`; raises UserError where one is no whole number."""
    try:
        return [int(text) for text in texts]
    except ValueError:
        raise UserError(f"--seeds={','.join(texts)} must be whole numbers with commas between, as in 0,1,2.") from None


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise UserError(f"--batch_size={batch_size} must be at least 1.")


def _check_mt_bench(values: flags.FlagValues) -> None:
    if values.output is None:
        raise UserError(f"--output is missing: {MT_BENCH} keeps answers and grades next to it. Give a file.")
    if values.tasks == [MT_BENCH]:
        for name in ("num_fewshot", "apply_chat_template", "fewshot_as_multiturn", "log_samples"):
            if values[name].present:
                raise UserError(
                    f"--{name} is for the harness's tasks; {MT_BENCH} asks its questions without examples, in the "
                    "chat template, and keeps every answer. Leave it out."
                )
    if values.repeats < 1:
        raise UserError(f"--repeats={values.repeats} must be at least 1.")
    check_judge(values.judge_url, values.judge_model)
