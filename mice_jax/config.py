"""The typed config of a run: every field with its default. The checks are in config_checks.py.

A config file defines `get_config(arg="") -> Config` and sets fields; the command line overrides them
(`--config.optim.learning_rate=1e-5`). The dataclasses are mutable and have no derived fields: what follows from a
field is computed by the command that needs it. 0 or "" means "off" or "chosen", never None, because a flag cannot set
None. `Config.validate()` runs first in every command and reports all problems at once.
"""

import dataclasses
import re
import typing
from dataclasses import dataclass, field
from typing import Any

from mice_jax.config_checks import flatten, nearest_field, sweep_problems, type_problems, value_problems
from mice_jax.config_checks import nearest as nearest  # for the arguments of configs
from mice_jax.errors import sentence


class ConfigError(ValueError):
    """A config that cannot be run; the text names every wrong field, its value and the fix."""

    exit_code = 2


class _Strict:
    """Raises ConfigError when an unknown field is assigned, with the closest name, and notes which fields were set."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        self = super().__new__(cls)
        names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
        object.__setattr__(self, "_set_by_user", {*names[: len(args)], *kwargs})
        return self

    def __post_init__(self) -> None:
        object.__setattr__(self, "_is_made", True)  # from here on, an assignment is not that of a default

    def __setattr__(self, name: str, value: Any) -> None:
        names = [f.name for f in dataclasses.fields(self)]  # type: ignore[arg-type]
        if name not in names:
            raise ConfigError(f"{type(self).__name__} has no field {name!r}{nearest_field(name, names)}")
        if "_is_made" in self.__dict__:
            self.__dict__["_set_by_user"].add(name)
        object.__setattr__(self, name, value)


def holds_data_out(config: "Config") -> bool:
    """Whether a run has held-out data: files of it, those of a phase, or a fraction of the training data."""
    data = config.data
    return bool(data.validation or data.validation_fraction or any(phase.validation for phase in data.phases))


def is_set(part: Any, name: str) -> bool:
    """Whether a field of a config's part was given to its constructor or assigned, even with its default value."""
    return name in part.__dict__["_set_by_user"]


@dataclass
class Source(_Strict):
    """Samples of one file, glob or data set."""

    path: str = ""
    """A file, folder or glob of .jsonl, .jsonl.gz, .jsonl.zst, .json or .parquet files, on disk or in a bucket; or
    `tfds:name[/config]:split`, or `hf:name:split`."""
    weight: float = 1.0
    """How often a sample is drawn in an epoch: 0.5 draws half of the samples, 2 draws each sample twice."""
    name: str = ""
    """The name in reports and metrics; an empty name means the file's name without its suffix, and sources of one name
    are measured together."""
    format: str = "messages"
    """The format of a record: messages, alpaca, sharegpt, prompt_completion or text."""
    half: str = ""
    """Use the half of the samples with the short or the long answers (in trained tokens); empty means all."""
    max_samples: int = 0
    """Use at most this many samples, chosen by their content, so that a smaller number gives a subset; 0 means all."""


@dataclass
class Phase(_Strict):
    """A part of the run with its own sources; phases run one after another."""

    name: str = "stacked"
    """The name in logs and metrics; no two phases have the same name."""
    num_epochs: float = 1.0
    """The number of passes over the sources; a fraction is allowed."""
    num_steps: int = 0
    """The exact number of steps, in as many epochs as they take; 0 means that num_epochs decides."""
    sources: list[Source] = field(default_factory=list)
    """The sources whose samples the phase mixes."""
    replay: float = 0.0
    """The fraction of the samples of earlier phases that each epoch draws again."""
    replay_from: str = ""
    """The name of the one phase that is replayed; empty means all earlier phases."""
    batch_size: int = 0
    """Samples of a step in this phase; 0 means optim.batch_size."""
    learning_rate: float = 0.0
    """The peak learning rate of this phase; 0 means optim.learning_rate."""
    optimizer: str = "carry"
    """What happens to the moments at the start of the phase: carry keeps them, reset sets them to zero."""
    schedule: str = "go_on"
    """What happens to the schedule at the start of the phase: go_on continues it, restart starts it again with its
    warm-up, over the steps until the next restart."""
    seed_from: str = "last"
    """The state that the phase starts from: last is the end of the previous phase, best its best checkpoint."""
    validation: list[Source] = field(default_factory=list)
    """Held-out sources of this phase, whose loss is logged as eval/phase/<name>/loss."""


@dataclass
class Lora(_Strict):
    """Low-rank adapters, which are trained in place of the model's own weights."""

    rank: int = 0
    """The rank of the adapters; 0 trains the model's own weights."""
    alpha: float = 16.0
    """The factor on what an adapter adds is alpha / rank."""
    rslora: bool = False
    """Make that factor alpha / sqrt(rank), so that a larger rank does not need a larger alpha."""
    dora: bool = False
    """Train the norm of each output of an adapted matrix as a parameter of its own, apart from its direction (DoRA)."""
    targets: list[str] = field(default_factory=list)
    """The ends of the names of matrices with an adapter, such as `q_proj`; none: all matrices of the layers."""


@dataclass
class Model(_Strict):
    """The model and how it computes."""

    init_from: str = ""
    """The initial weights: a Hugging Face folder, a model of the Hub (`owner/name` or `owner/name@revision`), a folder
    with an adapter of PEFT, `random:path/to/config.json`, or the workdir of another run or one of its checkpoints."""
    compute_dtype: str = "auto"
    """The dtype of activations: auto, float32 or bfloat16; auto is float32 on CPU and bfloat16 elsewhere."""
    param_dtype: str = "float32"
    """The dtype in which weights are held between steps: float32, or bfloat16, to which each update is rounded
    stochastically; norms stay in float32."""
    attention: str = "auto"
    """The attention backend, by name; auto chooses the best one that supports the run."""
    remat: str = "auto"
    """What the backward pass computes again to save memory: none, dots, full, or offload, which is full with each
    layer's input in host memory; auto chooses among the first three by the device's memory."""
    lora: Lora = field(default_factory=Lora)
    """Low-rank adapters, which are trained in place of the model's own weights."""


@dataclass
class Data(_Strict):
    """The data and how samples become token ids."""

    tokenizer: str = ""
    """A Hugging Face folder or model of the Hub with the tokenizer; empty means that of model.init_from."""
    chat_template: str = ""
    """The name of a built-in chat template or the path of a .jinja file; empty means the tokenizer's own."""
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Values of variables of the chat template, such as `{"enable_thinking": False}`; they become its defaults, also in
    the exported model, and a record's own `chat_template_kwargs` override them."""
    reasoning: str = "template"
    """What happens to the reasoning of a conversation: template renders it as the template does, last does not train
    turns whose reasoning the template leaves out, per_turn makes a sample of each turn, and drop takes it out."""
    train_on: str = "all"
    """The assistant messages that carry loss: all of a sample, or the last one only."""
    max_length: int = 4096
    """The length of a packed row in tokens, which is also the longest sample that is kept."""
    overlong: str = "drop"
    """What happens to a longer sample: drop, truncate or error; it is counted in any case."""
    phases: list[Phase] = field(default_factory=list)
    """The phases of the run, in order."""
    validation: list[Source] = field(default_factory=list)
    """Held-out sources; set these or validation_fraction."""
    validation_fraction: float = 0.0
    """The fraction of every source that is held out, chosen by the hash of a sample's content."""
    drop_remainder: bool = False
    """Leave out the last step of an epoch if it has fewer samples than a batch."""
    skip_bad: bool = False
    """Count records that cannot be read instead of stopping at the first one."""
    cache_dir: str = ""
    """The folder of token stores and compiled programs; empty means $MICE_JAX_CACHE, or mice_jax in the user's cache
    folder."""
    num_workers: int = 0
    """Processes that load batches; 0 means a thread of the main process."""
    prepare_workers: int = 0
    """Processes that tokenise; 0 means one for each core, but at most 32."""


@dataclass
class Optim(_Strict):
    """The optimizer, its schedule and the loss."""

    batch_size: int = 3840
    """The exact number of samples of a step, on any mesh; the default, unless it is set, is an error where an epoch has
    fewer samples."""
    learning_rate: float = 2e-5
    """The peak learning rate."""
    rate_for_batch: str = "none"
    """How the learning rate follows the batch size: none, sqrt or linear; learning_rate then belongs to steps of
    rate_batch_size samples."""
    rate_batch_size: int = 0
    """The samples of a step to which learning_rate, and that of a phase, belongs where rate_for_batch is sqrt or
    linear."""
    schedule: str = "constant"
    """The schedule after warm-up: constant, linear, cosine or wsd."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    warmup_ratio: float = 0.0
    """Warm-up as a fraction of the horizon, instead of warmup_steps."""
    final_ratio: float = 0.0
    """The learning rate at the end of linear, cosine and wsd, as a fraction of the peak."""
    decay_ratio: float = 0.1
    """The fraction of the horizon over which wsd decays, at its end."""
    max_steps: int = 0
    """The number of steps after which the run ends; 0 runs the phases to their end."""
    grad_clip: float = 1.0
    """The global norm to which gradients are clipped; 0 means no clipping."""
    loss_reduction: str = "token"
    """What weighs the same in the loss of a step: each trained token, or each sample."""
    name: str = "adamw"
    """The optimizer: adamw, adafactor, muon, lion or sgd."""
    beta1: float = 0.9
    """The decay of the first moment, which is also the momentum of sgd and muon."""
    beta2: float = 0.95
    """The decay of the second moment."""
    beta2_half_life: float = 0.0
    """The samples after which a gradient's weight in the second moment has halved, at any batch size; 0 means that
    beta2 decides."""
    eps: float = 1e-8
    """The term added to the denominator of the update."""
    weight_decay: float = 0.0
    """Decoupled weight decay, which is not applied to norms and biases."""
    moments_dtype: str = "float32"
    """The dtype of the optimizer's moments: float32, bfloat16, or int8 for those of matrices, with a float32 scale for
    each block of at most 128 entries."""
    offload_moments: bool = False
    """Keep the optimizer's moments in host memory, except 8-bit moments of parameters that are not stacked over layers,
    and bring those of one layer at a time to the devices."""
    accumulate_dtype: str = "float32"
    """The dtype in which the gradients of a step are summed over microbatches, and to which those of bfloat16 weights
    are rounded before: float32 or bfloat16."""
    reduce_dtype: str = "float32"
    """The dtype in which gradients are summed over devices: float32 or bfloat16; those of norms always in float32."""
    frozen: list[str] = field(default_factory=list)
    """Patterns of Hugging Face parameter names that are not trained, such as `model.layers.[0-3].*`."""
    osft_rank_ratio: float = 0.0
    """The share of the directions of each matrix in the layers, the leading ones of its decomposition at the start of a
    phase, that is frozen (OSFT); 0 freezes none."""


@dataclass
class Mesh(_Strict):
    """The sizes of the mesh axes; one of them may be -1, which means all remaining devices."""

    data: int = 1
    """The number of copies of the model."""
    fsdp: int = -1
    """The number of devices over which parameters are sharded and samples split."""
    tensor: int = 1
    """The number of devices over which heads, MLP and vocabulary are split."""
    sequence: int = 1
    """The number of devices over which the slots of each row are split, for long samples."""


@dataclass
class Train(_Strict):
    """The training loop."""

    rows_per_device: int = 0
    """Rows of a microbatch on one device; 0 means that the estimate of memory chooses."""
    deterministic: bool = False
    """Make runs on a GPU repeat bit for bit, at some cost in speed."""
    max_minutes: float = 0.0
    """Save the state and exit with code 75 after this many minutes of the process; 0 means no limit."""
    pause_at_share: float = 0.0
    """Save the state and exit with code 75 after the first step at or past this share of all steps; 0 never pauses."""
    ema_half_life: float = 0.0
    """The samples after which a step's weights count half in the running average of the weights; 0 keeps none."""
    skip_spikes: float = 0.0
    """Skip a step whose gradient norm is more than this many times its running median; 0 never skips."""


@dataclass
class Checkpoint(_Strict):
    """When the state is saved, and which checkpoints are kept; with no keep_ field set, all are."""

    every_samples: int = 250_000
    """Save at the first step at or past each multiple of this many samples; 0 saves at the end only."""
    every_minutes: float = 0.0
    """Save after this many minutes too; 0 means never."""
    keep_last: int = 0
    """Keep this many of the newest checkpoints; where this and the next two fields are 0, all are kept."""
    keep_best: int = 0
    """Keep this many of the checkpoints that are best by best_metric."""
    keep_every: int = 0
    """Keep each checkpoint that is the first at or past a multiple of this many samples."""
    best_metric: str = "eval/loss"
    """The metric of metrics.jsonl that ranks checkpoints."""
    best_mode: str = "min"
    """Whether a lower (min) or a higher (max) value of best_metric is better."""


@dataclass
class Log(_Strict):
    """The terminal and the trackers; metrics.jsonl has every step in any case."""

    every_steps: int = 1
    """Print and send to trackers one step in this many."""
    noise_every: int = 8
    """Compute one step in this many as two microbatches where it has one, to estimate the gradient noise; 0 = never."""
    profile_steps: str = ""
    """Write a profiler trace of these steps below the run's `tensorboard` folder, for TensorBoard's profile page and
    for Perfetto: "10:13" traces the steps 10, 11 and 12; empty traces none."""
    trackers: list[str] = field(default_factory=list)
    """Trackers besides TensorBoard, whose events are always written: wandb, mlflow."""
    project: str = "mice_jax"
    """The project of wandb and the experiment of mlflow."""


@dataclass
class Eval(_Strict):
    """Evaluation during the run."""

    every_samples: int = 0
    """Evaluate at the first step at or past each multiple of this many samples; 0 evaluates at the end only."""
    at_shares: list[float] = field(default_factory=list)
    """Evaluate also at the first step at or past each of these shares of the run's steps, such as 0.2."""
    tasks: list[str] = field(default_factory=list)
    """Benchmarks to score, by the names that `mice evaluate` takes."""
    include_path: str = ""
    """A folder with YAML files of your own tasks."""
    num_fewshot: int = -1
    """Examples in a prompt; -1 takes the number of each task."""
    limit: int = 0
    """Documents of each task; 0 means all."""
    apply_chat_template: bool = False
    """Ask in the tokenizer's chat template."""
    system_instruction: str = ""
    """A text at the start of each prompt."""
    retain: list[str] = field(default_factory=list)
    """Names of held-out sources of what the base model knew before; the means over sources leave them out, and the
    report shows how much of them is kept."""
    exact_match: bool = False
    """Measure on held-out data also the share of samples whose answers greedy decoding writes token for token."""
    answers: int = 0
    """Held-out prompts that the model answers in full each time that the held-out loss is measured; the report shows
    its answers."""


@dataclass
class Stop(_Strict):
    """Rules that stop a run early; a number that is not finite stops it in any case."""

    margin: float = 1.0
    """Stop a run whose loss stays this far (in nats) above its value at the start of the phase."""
    steps: int = 10
    """Steps in a row of such a loss, or of a dead model (a loss of ln(vocabulary) and no gradient), after which the run
    stops; 0 never stops it."""


@dataclass
class Branch(_Strict):
    """The run that this one branches off from, whose checkpoint its workdir begins with; `mice branch` sets these."""

    step: int = 0
    """The step of the other run at which this run branches off; 0 means that this run is not a branch."""
    samples: int = 0
    """The number of samples, those of the other run before the branch included, after which the branch ends."""
    batch_size: int = 0
    """The value of optim.batch_size of the other run."""
    seed: int = 0
    """The seed of the other run."""
    beta2: float = 0.0
    """The beta2 of the other run, by which the second moment is corrected where the branch has another one."""
    max_steps: int = 0
    """The value of optim.max_steps of the other run, over which the schedule is spread; 0 means over the phases."""
    data: str = ""
    """The fingerprint of the other run's data, which must be that of this run's; empty means that it is unknown."""


@dataclass
class Published(_Strict):
    """A published number of this very run, which the report shows next to ours; nothing else reads it."""

    metric: str = ""
    """The metric, by its name in metrics.jsonl."""
    value: float = 0.0
    """The published value."""
    where: str = ""
    """A condition such as `optim.batch_size=128`: the number belongs to configs with this value only, so that a sweep's
    base can list all numbers."""


@dataclass
class Config(_Strict):
    """Everything that decides what a run computes and where its parts go."""

    model: Model = field(default_factory=Model)
    """The model and how it computes."""
    data: Data = field(default_factory=Data)
    """The data and how samples become token ids."""
    optim: Optim = field(default_factory=Optim)
    """The optimizer, its schedule and the loss."""
    mesh: Mesh = field(default_factory=Mesh)
    """The sizes of the mesh axes."""
    train: Train = field(default_factory=Train)
    """The training loop."""
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    """When the state is saved, and which checkpoints are kept."""
    log: Log = field(default_factory=Log)
    """The terminal and the trackers."""
    eval: Eval = field(default_factory=Eval)
    """Evaluation during the run."""
    stop: Stop = field(default_factory=Stop)
    """Rules that stop a run early."""
    branch: Branch = field(default_factory=Branch)
    """The run that this one branches off from."""
    seed: int = 0
    """The seed of the sample order and of random initial weights."""
    published: list[Published] = field(default_factory=list)
    """Published numbers of this very run, which the report shows next to ours."""

    def validate(self) -> None:
        """Raises ConfigError with every problem: field, value and fix."""
        problems = type_problems(self, Config, "")
        if not problems:  # values can be checked only once they have the right types
            problems = value_problems(self, flatten(to_dict(self)))
        _raise(problems, "config")


def _raise(problems: list[str], of: str) -> None:
    """Raises ConfigError with all problems of a config or a sweep, if there are any."""
    if len(problems) == 1:
        raise ConfigError(f"in the {of}, {sentence(problems[0])}")
    if problems:
        listed = "; ".join(f"({i}) {p.rstrip('?')}" for i, p in enumerate(problems, 1))
        raise ConfigError(f"the {of} has {len(problems)} problems: {listed}.")


# Fields that may change when a run is resumed: they affect neither the data nor the numerics.
MUTABLE_ON_RESUME = (
    "mesh", "train.rows_per_device", "model.attention", "model.remat", "optim.offload_moments", "data.cache_dir",
    "data.num_workers", "data.prepare_workers", "train.max_minutes", "train.pause_at_share", "checkpoint.every_samples",
    "checkpoint.every_minutes", "checkpoint.keep_last", "checkpoint.keep_best", "checkpoint.keep_every", "log", "eval",
    "stop", "published",
)  # fmt: skip
# Fields that may differ between the processes of a run, since hosts may have other disks and other numbers of cores.
FIELDS_OF_A_HOST = ("data.cache_dir", "data.num_workers", "data.prepare_workers")


@dataclass
class Sweep(_Strict):
    """Many runs that differ in a few fields: what `get_sweep(arg="")` of a sweep's file returns."""

    base: Config = field(default_factory=Config)
    """The config that the trials vary."""
    axes: dict[str, Any] = field(default_factory=dict)
    """For each field, by its dotted name, the list of values to try; with search random or tpe also a Range."""
    seeds: list[int] = field(default_factory=list)
    """Each combination runs once with each of these seeds; an empty list means the seed of base."""
    metric: str = "eval/loss"
    """The metric of metrics.jsonl to optimise, taken from the last step of a trial; unless it is set, it is
    eval/macro_loss where the base holds out several sources."""
    mode: str = "min"
    """Whether a lower (min) or a higher (max) value is better."""
    stop: Any = "auto"
    """A rule that saves trials: auto, None, bracket, paper, median, halving, or a rule with fields of its own; auto is
    bracket where that rule can work on the sweep, and None elsewhere."""
    search: str = "grid"
    """How combinations are chosen: grid, random or tpe."""
    trials: int = 0
    """The number of trials of random and tpe."""
    claims: str = ""
    """A file of claims to register before the first run, relative to the sweep's file; empty for claims.toml beside
    that file, where there is one, and none for no claims."""

    def validate(self) -> None:
        """Raises ConfigError with every problem of the sweep; the configs of its trials are checked when they start."""
        _raise(sweep_problems(self, field_names(), Range), "sweep")


@dataclass(frozen=True)
class Range:
    """A range of values, for an axis that is searched."""

    low: float
    """The lowest value."""
    high: float
    """The highest value."""
    log: bool = False
    """Search uniformly in the logarithm of the value."""


def locate(config: Config, name: str) -> tuple[Any, str]:
    """The section that holds a field and the field's name there, from a dotted name like `data.phases[0].replay`."""
    *path, last = re.findall(r"[^.\[\]]+", name)
    part: Any = config
    for key in path:
        part = part[int(key)] if key.isdigit() else getattr(part, key)
    return part, last


def to_dict(config: Config) -> dict[str, Any]:
    """The config as plain dicts, lists and scalars, for config.json."""
    return dataclasses.asdict(config)


def from_dict(tree: dict[str, Any]) -> Config:
    """The config that `to_dict` made, or config.json of a run, which has parts that are not of the config.

    Raises:
        ConfigError: A field is unknown to this version.
    """
    return _from_dict(Config, {k: v for k, v in tree.items() if k not in ("resolved", "provenance")})


def _from_dict(hint: Any, value: Any) -> Any:
    if typing.get_origin(hint) is list:
        return [_from_dict(typing.get_args(hint)[0], v) for v in value]
    if not (isinstance(hint, type) and dataclasses.is_dataclass(hint)):
        return value
    hints = typing.get_type_hints(hint)
    made = hint()
    for name, v in value.items():
        setattr(made, name, _from_dict(hints.get(name), v))
    return made


def fields_of_all_processes(config: Config) -> str:
    """Returns a text of every field that all processes of a run must have in common: those not in FIELDS_OF_A_HOST."""
    flat = flatten(to_dict(config))
    return repr(sorted((name, value) for name, value in flat.items() if name not in FIELDS_OF_A_HOST))


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """`field: old -> new` for each difference that prevents resuming a run under `new`."""
    a, b = flatten(old), flatten(new)
    changed = [k for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]
    fixed = [k for k in changed if not _may_change(k)]
    return [f"{k}: {a.get(k, 'absent')!r} -> {b.get(k, 'absent')!r}" for k in fixed]


def _may_change(name: str) -> bool:
    return any(name == m or name.startswith(m + ".") for m in MUTABLE_ON_RESUME)


def field_names(cls: type = Config, prefix: str = "") -> list[str]:
    """The dotted name of every field that a flag can set; `[]` means an index into a list."""
    names = []
    for name, hint in typing.get_type_hints(cls).items():
        is_part = isinstance(hint, type) and dataclasses.is_dataclass(hint)
        names += field_names(hint, f"{prefix}{name}.") if is_part else [prefix + name]
        element = next(iter(typing.get_args(hint)), None)
        if isinstance(element, type) and dataclasses.is_dataclass(element):
            names += field_names(element, f"{prefix}{name}[].")
    return names
