"""Makes the text that a run prints: the table before its first step, warnings, and its last lines."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mice_jax.cli.format import format_bytes
from mice_jax.config import Config, Optim
from mice_jax.config_checks import UNREAD_BY_OPTIMIZER, UNREAD_BY_SCHEDULE, beta2_of, rate_of
from mice_jax.data.dataset import Dataset
from mice_jax.data.loader import StepSource
from mice_jax.errors import format_count
from mice_jax.model_source import ModelSource
from mice_jax.models import hf, untrained
from mice_jax.models.families import FAMILIES
from mice_jax.models.spec import ModelSpec
from mice_jax.models.transformer import Decoder
from mice_jax.sharding import replicated_dims
from mice_jax.storage.paths import RunPath
from mice_jax.storage.workdir import Workdir
from mice_jax.training import memory_model
from mice_jax.training.build import Model, RunData, length_warnings, peak_rate
from mice_jax.training.lifecycle import Run
from mice_jax.training.phases import PhaseSpan

SAMPLED_STEPS = 16  # The table shows the mean over this many first steps.


# ---------------------------------------------------------------------------------------- before the first step
def table(config: Config, source: ModelSource, data: RunData, steps: StepSource, start: int, model: Model) -> Table:
    """Returns the table that a run starts with: model, mesh, data, step, memory, optimizer and phases.

    Args:
      config: The run's config.
      source: The model that the run starts from.
      data: The run's data.
      steps: The run's steps, packed.
      start: The number of steps that are done already.
      model: The run's model and how it is computed.
    """
    made = Table(show_header=False, box=box.SIMPLE, padding=(0, 1))
    made.add_column(style="bold", no_wrap=True)
    made.add_column(overflow="fold")
    mesh, compute = model.memory_inputs.mesh, model.compute
    memory = memory_model.estimate_memory(model.memory_inputs, model.rows, compute.remat)
    lines = {
        "model": f"{source.architecture}, {_num_params(model)}, from {config.model.init_from}"
        + (f" at commit {source.hosted.commit}" if source.hosted else ""),
        "mesh": ", ".join(f"{k} {v}" for k, v in mesh.shape.items()) + f" on {jax.devices()[0].device_kind}",
        "data": _data(data.dataset),
        "step": _step(config, steps, data.total_steps),
        "compute": f"{jnp.dtype(compute.dtype).name}, {compute.attention} attention, remat {compute.remat}",
        "memory": _memory(memory, model.memory),
        "optimizer": _optimizer(config),
        "run": format_count(data.total_steps, "step") + (f", resumed after step {start:,}" if start else ""),
    }
    if len(data.spans) > 1:
        lines |= {f"phase {i}": _phase(config, span, i) for i, span in enumerate(data.spans, 1)}
    for name, line in lines.items():
        made.add_row(name, escape(line))
    return made


def _num_params(model: Model) -> str:
    padding = f" and {model.num_padding:,} that pad the vocabulary" if model.num_padding else ""
    return f"{model.num_params - model.num_padding:,} parameters{padding}"


def _data(data: Dataset) -> str:
    sources = data.report["sources"].values()
    tokens = sum(s["tokens"] * s["weight"] for s in sources)
    loss_tokens = sum(s["loss_tokens"] * s["weight"] for s in sources)
    held_out = sum(len(h.ids) for h in data.validation)
    samples = round(sum(s["kept"] * s["weight"] for s in sources))  # as they are drawn, like the tokens
    trained = loss_tokens / max(1, tokens)
    return f"{format_count(samples, 'sample')}, {tokens:,.0f} tokens, {trained:.0%} of them trained on" + (
        f", {format_count(held_out, 'sample')} held out" if held_out else ""
    )


def _step(config: Config, steps: StepSource, total_steps: int) -> str:
    """Returns a line with the mean size of the first steps."""
    first = range(min(total_steps, SAMPLED_STEPS))
    samples = [steps.mixture.step(i).samples for i in first]
    tokens = sum(int(steps.corpus.lengths[s].sum()) for s in samples) / len(first)
    microbatches = sum(len(steps.plan(i)) for i in first) / len(first)
    sizes = dict.fromkeys(f"{p.batch_size or config.optim.batch_size:,}" for p in config.data.phases)
    rows, slots = steps.shapes[0].rows, steps.shapes[0].slots
    return (
        f"{' then '.join(sizes)} samples, about {tokens:,.0f} tokens in {microbatches:.3g} microbatches of at most "
        f"{format_count(rows, 'row')} per device by {slots:,} slots"
    )


def _memory(needed: memory_model.MemoryEstimate, there: int) -> str:
    state = needed.resident + needed.gradients
    return (
        f"about {format_bytes(needed.total)} per device ({format_bytes(state)} parameters, moments and gradients, "
        f"{format_bytes(needed.total - state)} activations) of {format_bytes(there)}: an estimate; mice plan has more"
    )


def _optimizer(config: Config) -> str:
    o = config.optim
    parts = [f"{o.name}, {o.schedule} learning rate {rate_of(o):g}"]
    if o.rate_for_batch != "none":
        parts.append(f"from {o.learning_rate:g} at {o.rate_batch_size:,} samples by the {o.rate_for_batch} rule")
    if o.warmup_steps:
        parts.append(f"warm-up {o.warmup_steps} steps")
    else:
        parts.append(f"warm-up ratio {o.warmup_ratio:g}" if o.warmup_ratio else "no warm-up")
    parts.append(f"clipped at {o.grad_clip:g}" if o.grad_clip else "not clipped")
    if o.beta2_half_life:
        parts.append(f"beta2 {beta2_of(o):.6g} by a half-life of {o.beta2_half_life:,g} samples")
    if config.model.param_dtype != "float32":
        parts.append(f"weights held in {config.model.param_dtype}, rounded stochastically")
    if o.moments_dtype != "float32":
        parts.append(f"{o.moments_dtype} moments")
    if o.accumulate_dtype != "float32":
        parts.append(f"gradients summed in {o.accumulate_dtype}")
    if o.reduce_dtype != "float32":
        parts.append(f"gradients summed over devices in {o.reduce_dtype}")
    if o.frozen:
        parts.append(f"frozen: {', '.join(o.frozen)}")
    if o.osft_rank_ratio:
        parts.append(f"the leading {o.osft_rank_ratio:.4g} of each matrix's directions frozen (OSFT)")
    if (lora := config.model.lora).rank:
        on = ", ".join(lora.targets) or "all matrices of the layers"
        parts.append(f"{'DoRA ' if lora.dora else ''}adapters of rank {lora.rank} alone on {on}")
    if config.train.ema_half_life:
        parts.append(f"weights averaged with a half-life of {config.train.ema_half_life:,g} samples")
    return ", ".join(parts)


def _phase(config: Config, span: PhaseSpan, number: int) -> str:
    p, o = span.phase, config.optim
    line = (
        f"{p.name}: steps {span.first + 1:,} to {span.end:,}, {p.batch_size or o.batch_size:,} samples per step, "
        f"learning rate {peak_rate(config, p):g}"
    )
    if number == 1:
        return line
    before = f"the best checkpoint before it by {config.checkpoint.best_metric}"
    start = before if p.seed_from == "best" else "the end of the phase before"
    optimizer = "the optimizer's state reset" if p.optimizer == "reset" else "the optimizer's state carried over"
    schedule = "the schedule restarted" if p.schedule == "restart" else "the schedule continued"
    return f"{line}; from {start}, {optimizer}, {schedule}"


# ---------------------------------------------------------------------------------------- warnings
def warnings(config: Config, source: ModelSource, decoder: Decoder, data: RunData, mesh: Mesh) -> list[str]:
    """Returns warnings about a run that may not do what the user expects.

    Args:
      config: The run's config.
      source: The model that the run starts from.
      decoder: The run's model.
      data: The run's data.
      mesh: The run's mesh.
    """
    return [
        *data.warnings,
        *_model_warnings(config, source, decoder.spec),
        *_optimizer_warnings(config, source),
        *_unread_warnings(config.optim),
        *_mesh_warnings(decoder, mesh),
    ]


def print_warnings(console: Console, warnings: list[str]) -> None:
    """Prints each warning as a paragraph of its own."""
    for warning in warnings:
        console.print(f"[yellow]warning: {escape(warning)}[/yellow]")


def _model_warnings(config: Config, source: ModelSource, spec: ModelSpec) -> Iterator[str]:
    for key, chance in hf.dropouts(source.config).items():
        yield f"{key}={chance} in the model's config.json is not applied: training goes without dropout"
    if source.adapter is not None and source.adapter.dropout and config.model.lora.rank:
        yield f"lora_dropout={source.adapter.dropout} of the adapter is not applied: training goes without dropout"
    if parts := untrained.prefixes(FAMILIES[source.architecture]):
        yield f"only the text decoder is trained: {', '.join(parts)}... are exported as they are"
    yield from length_warnings(config, source)
    rows = source.spec.vocab_size
    if spec.vocab_size != rows:
        made = "drawn like the rest" if source.kind == "random" else f"each the mean of the {rows:,} there are"
        yield (
            f"the tokenizer has added tokens beyond the model's {rows:,} embedding rows: {spec.vocab_size - rows:,} "
            f"rows are added, {made}; the export has {spec.vocab_size:,}"
        )


def _optimizer_warnings(config: Config, source: ModelSource) -> Iterator[str]:
    # Low-rank updates are too small for the effect, as the paper shows.
    if config.optim.name != "muon" or source.kind == "random" or config.model.lora.rank:
        return
    origin = "that were probably pretrained with Adam, as most published models are,"
    if source.kind == "run":
        before = (Workdir(source.folder.parent).read_json("config.json") or {}).get("optim", {}).get("name", "adamw")
        if before == "muon":
            return
        origin = f"that another run trained with {before}"
    yield (
        f"optim.name='muon' continues from weights {origin} and a full fine-tune with Muon then tends to end worse "
        "and to forget more than one with the optimizer of the pretraining, the more so the stronger the updates "
        "(arXiv 2605.10468): compare it with optim.name='adamw' before you rely on it"
    )


def _unread_warnings(optim: Optim) -> Iterator[str]:
    """Yields warnings about fields that are set and that the optimizer or the schedule does not read.

    They are no errors, so that optimizers and schedules can be the axis of a sweep.
    """
    default = Optim()
    for choice, unread in (("name", UNREAD_BY_OPTIMIZER), ("schedule", UNREAD_BY_SCHEDULE)):
        chosen = getattr(optim, choice)
        for field in unread.get(chosen, ()):
            if getattr(optim, field) != getattr(default, field):
                yield f"optim.{field}={getattr(optim, field)} has no effect with optim.{choice}={chosen!r}"


def _mesh_warnings(decoder: Decoder, mesh: Mesh) -> Iterator[str]:
    """Yields warnings about arrays that the mesh does not divide evenly."""
    tensor, heads = mesh.shape["tensor"], decoder.spec.num_heads
    for dim in replicated_dims(decoder.abstract, decoder.axes, mesh):
        yield f"replicated on every device, since the mesh does not divide it: {dim}"
    if heads % tensor:
        yield (
            f"attention works on {-(-heads // tensor) * tensor} heads, of which {heads} are the model's: "
            f"mesh.tensor={tensor} does not divide them"
        )


# ---------------------------------------------------------------------------------------- the end
def not_finite(step: int, measured: dict[str, Any], checkpoints: RunPath, saved_step: int, cause: str) -> str:
    """Returns the error message of a run whose loss or gradient norm is not finite.

    Args:
      step: The step whose update was not made.
      measured: The loss and gradient norm of the step.
      checkpoints: The folder of the run's checkpoints.
      saved_step: The newest step that is saved; 0 if there is none.
      cause: What --debug_nans found, in sentences; "" if it is not set.
    """
    good = "There is no checkpoint yet"
    if saved_step:
        good = f"The last good checkpoint is {checkpoints / str(saved_step)}"
    return (
        f"the loss ({measured['loss']}) or the gradient norm ({measured['grad_norm']}) of step {step} is not finite; "
        f"the update was not made. {good}. {cause or 'Run again with --debug_nans to see which operation fails first.'}"
    )


def skipped(step: int, grad_norm: float, factor: float) -> str:
    """Returns what is printed of a step whose update is skipped because its gradient norm is a spike.

    Args:
      step: The step.
      grad_norm: Its gradient norm.
      factor: The value of train.skip_spikes.
    """
    return (
        f"step {step} makes no update: its gradient norm {grad_norm:.3g} is more than train.skip_spikes={factor:g} "
        "times the median of the latest norms"
    )


def final_message(run: Run) -> str:
    """Returns the last lines that a complete run prints."""
    record, path = run.record, run.workdir.path
    if not record:
        return f"the run in {path} was complete already, at step {run.start}"
    held_out = f", held-out loss {record['eval/loss']:.4f}" if "eval/loss" in record else ""
    if "eval/average/loss" in record:
        held_out += f" ({record['eval/average/loss']:.4f} of the averaged weights)"
    if "eval/exact_match" in record:
        held_out += f", exact match {record['eval/exact_match']:.3f}"
    return (
        f"done: step {record['step']}, {format_count(record['samples'], 'sample')}, "
        f"loss {record['loss']:.4f}{held_out}\n"
        f"next: mice export --workdir={path} --output=HF_DIR"
    )
