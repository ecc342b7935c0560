"""What a run says before its first step: one table of what will be done, and what the user may come to regret."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from rich import box
from rich.markup import escape
from rich.table import Table

from mice_jax.config import Config
from mice_jax.data import statistics
from mice_jax.data.dataset import Dataset
from mice_jax.data.loader import StepSource
from mice_jax.data.mixture import Mixture
from mice_jax.model_source import ModelSource
from mice_jax.models import hf
from mice_jax.models.spec import ModelSpec
from mice_jax.models.transformer import Compute, Decoder
from mice_jax.sharding import replicated_dims
from mice_jax.training import memory_model
from mice_jax.training.phases import Stretch

LOOKED_AT = 16  # first steps, of which the microbatches and tokens of a step are the mean


def table(
    config: Config,
    origin: ModelSource,
    data: Dataset,
    steps: StepSource,
    stretches: list[Stretch],
    start: int,
    compute: Compute,
    load: memory_model.MemoryInputs,
    memory: int,
) -> Table:
    """Model, mesh, data, step, memory, schedule, run: what a person wants to know before it is done."""
    made = Table(show_header=False, box=box.SIMPLE, padding=(0, 1))
    made.add_column(style="bold", no_wrap=True)
    made.add_column(overflow="fold")
    total_steps, mesh = stretches[-1].end, load.mesh
    num_params = sum(leaf.size for leaf in jax.tree.leaves(load.decoder.abstract))
    lines = {
        "model": f"{origin.architecture}, {num_params:,} parameters, from {config.model.init_from}",
        "mesh": ", ".join(f"{k} {v}" for k, v in mesh.shape.items()) + f" on {jax.devices()[0].device_kind}",
        "data": _data(data),
        "step": _step(config, steps, total_steps),
        "compute": f"{jnp.dtype(compute.dtype).name}, {compute.attention} attention, remat {compute.remat}",
        "memory": _memory(memory_model.estimate_memory(load, steps.shapes[0].rows, compute.remat), memory),
        "optimizer": _optimizer(config),
        "run": f"{total_steps:,} steps" + (f", resumed after step {start:,}" if start else ""),
    }
    lines |= {f"phase {i}": _phase(config, s, i) for i, s in enumerate(stretches, 1) if len(stretches) > 1}
    for name, line in lines.items():
        made.add_row(name, escape(line))
    return made


def _data(data: Dataset) -> str:
    sources = data.report["sources"].values()
    tokens = sum(s["tokens"] * s["weight"] for s in sources)
    loss_tokens = sum(s["loss_tokens"] * s["weight"] for s in sources)
    held_out = sum(len(h.ids) for h in data.validation)
    kept = sum(s["kept"] for s in sources)
    return (
        f"{kept:,} samples, {tokens:,.0f} tokens, {loss_tokens / max(1, tokens):.0%} of them trained on"
        + f", {held_out:,} samples held out" * bool(held_out)
    )


def _step(config: Config, steps: StepSource, total_steps: int) -> str:
    """What the first steps are like on average."""
    first = range(min(total_steps, LOOKED_AT))
    samples = [steps.mixture.step(i).samples for i in first]
    tokens = sum(int(steps.corpus.lengths[s].sum()) for s in samples) / len(first)
    microbatches = sum(len(steps.plan(i)) for i in first) / len(first)
    sizes = dict.fromkeys(f"{p.batch_size or config.optim.batch_size:,}" for p in config.data.phases)
    rows, slots = steps.shapes[0].rows, steps.shapes[0].slots
    return (
        f"{' then '.join(sizes)} samples, about {tokens:,.0f} tokens in {microbatches:.3g} microbatches of at most "
        f"{rows} rows a device by {slots:,} slots"
    )


def _memory(needed: memory_model.MemoryEstimate, there: int) -> str:
    state = needed.resident + needed.gradients
    return (
        f"about {_size(needed.total)} a device ({_size(state)} parameters, moments and gradients, "
        f"{_size(needed.total - state)} activations) of {_size(there)}: an estimate; mice plan has more"
    )


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _optimizer(config: Config) -> str:
    o = config.optim
    warmup = f", warm-up {o.warmup_steps} steps" if o.warmup_steps else f", warm-up ratio {o.warmup_ratio:g}"
    said = f"{o.name}, {o.schedule} learning rate {o.learning_rate:g}"
    said += warmup if o.warmup_steps or o.warmup_ratio else ", no warm-up"
    said += f", clipped at {o.grad_clip:g}" if o.grad_clip else ", not clipped"
    said += f", {o.moments_dtype} moments" * (o.moments_dtype != "float32")
    said += f", gradients summed in {o.accumulate_dtype}" * (o.accumulate_dtype != "float32")
    return said + f", frozen: {', '.join(o.frozen)}" * bool(o.frozen)


def _phase(config: Config, stretch: Stretch, number: int) -> str:
    p, o = stretch.phase, config.optim
    said = (
        f"{p.name}: steps {stretch.first + 1:,} to {stretch.end:,}, {p.batch_size or o.batch_size:,} samples a step, "
        f"learning rate {p.learning_rate or o.learning_rate:g}"
    )
    if number == 1:
        return said
    before = f"the best checkpoint before it by {config.checkpoint.best_metric}"
    seed = before if p.seed_from == "best" else "the end of the phase before"
    optimizer = "the optimizer's state reset" if p.optimizer == "reset" else "the optimizer's state carried on"
    schedule = "the schedule restarted" if p.schedule == "restart" else "the schedule going on"
    return f"{said}; from {seed}, {optimizer}, {schedule}"


# ---------------------------------------------------------------------------------------- warnings
def warnings(
    config: Config, origin: ModelSource, decoder: Decoder, data: Dataset, mixture: Mixture, mesh: Mesh
) -> list[str]:
    """What is not as a user may take it to be."""
    return [
        *statistics.data_warnings(data.report),
        *_of_steps(config, data, mixture),
        *_of_model(config, origin, decoder.spec),
        *_of_mesh(decoder, mesh),
    ]


def _of_steps(config: Config, data: Dataset, mixture: Mixture) -> Iterator[str]:
    if crowded := mixture.crowded_phases():
        left = "data.drop_remainder=True leaves no step" if config.data.drop_remainder else "each step is a whole epoch"
        yield f"a batch is larger than an epoch, so {left}, in {', '.join(crowded)}"
    if config.data.validation_fraction and not data.validation:
        yield f"data.validation_fraction={config.data.validation_fraction} holds out no sample of these few"
    if mixture.samples_left_out:
        yield f"{mixture.samples_left_out:,} samples left out by data.drop_remainder"
    if config.optim.max_steps > len(mixture):
        yield f"optim.max_steps={config.optim.max_steps} is beyond the {len(mixture)} steps that the phases have"


def _of_model(config: Config, origin: ModelSource, spec: ModelSpec) -> Iterator[str]:
    for key, chance in hf.dropouts(origin.config).items():
        yield f"{key}={chance} in the model's config.json is not applied: training goes without dropout"
    if config.data.max_length > origin.spec.max_positions:
        yield (
            f"data.max_length={config.data.max_length} is beyond the max_position_embeddings="
            f"{origin.spec.max_positions} that the model was made for"
        )
    rows = origin.spec.vocab_size
    if spec.vocab_size != rows:
        made = "drawn like the rest" if origin.kind == "random" else f"each the mean of the {rows:,} there are"
        yield (
            f"the tokenizer has added tokens beyond the model's {rows:,} embedding rows: {spec.vocab_size - rows:,} "
            f"rows are added, {made}; the export has {spec.vocab_size:,}"
        )


def _of_mesh(decoder: Decoder, mesh: Mesh) -> Iterator[str]:
    """What the mesh does not divide, and what is done about it."""
    tensor, heads = mesh.shape["tensor"], decoder.spec.num_heads
    for dim in replicated_dims(decoder.abstract, decoder.axes, mesh):
        yield f"held whole on every device, since the mesh does not divide it: {dim}"
    if heads % tensor:
        yield (
            f"attention works on {-(-heads // tensor) * tensor} heads, of which {heads} are the model's: "
            f"mesh.tensor={tensor} does not divide them"
        )
