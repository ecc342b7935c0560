"""The typed run config: every field, its default and its check, in one place.

A config file defines `get_config(arg="") -> Config` and sets fields; the command line overrides them
(`--config.optim.learning_rate=1e-5`). The dataclasses are mutable and hold no derived field: whatever follows
from a field is computed by the verb that needs it. 0 or "" says "off" or "chosen", never None, since a flag
cannot set None. `Config.validate()` runs first in every main and reports all problems at once.
"""

import dataclasses
import difflib
import math
import re
import types
import typing
from dataclasses import dataclass, field
from typing import Any


class ConfigError(ValueError):
    """A config that cannot be run; the text names every field at fault, its value and the mend."""

    exit_code = 2


class _Strict:
    """Refuses a misspelt field where it is written, with the nearest name, instead of keeping it unread."""

    def __setattr__(self, name: str, value: Any) -> None:
        names = [f.name for f in dataclasses.fields(self)]  # type: ignore[arg-type]
        if name not in names:
            raise ConfigError(f"{type(self).__name__} has no field {name!r}{nearest(name, names)}")
        object.__setattr__(self, name, value)


def nearest(name: str, names: typing.Iterable[str]) -> str:
    """The end of a sentence: `; did you mean 'x'?` for the closest of `names`, or all of them where none is close."""
    names = list(names)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; it has {', '.join(names)}."


@dataclass
class Source(_Strict):
    # A file, folder or glob of .jsonl, .jsonl.gz, .jsonl.zst, .json, .parquet, here or at gs://, s3://, ...;
    path: str = ""  # tfds:name[/config]:split; hf:name:split
    weight: float = 1.0  # 0.5 = half of it an epoch, 2 = twice
    name: str = ""  # in reports and metrics; "" = the file's name without its suffix
    format: str = "messages"  # messages | alpaca | sharegpt | prompt_completion | text
    half: str = ""  # short | long: that half of it by the length of the answers (trained tokens); "" = all
    max_samples: int = 0  # at most so many, chosen by content, so that fewer are a part of more; 0 = all


@dataclass
class Phase(_Strict):
    name: str = "stacked"
    num_epochs: float = 1.0
    num_steps: int = 0  # exactly so many, in as many epochs as that takes; 0 = num_epochs
    sources: list[Source] = field(default_factory=list)
    replay: float = 0.0  # of earlier phases' samples, this fraction is drawn again in each epoch
    replay_from: str = ""  # the one phase that is replayed; "" = all earlier ones
    batch_size: int = 0  # samples a step; 0 = optim.batch_size
    learning_rate: float = 0.0  # 0 = optim.learning_rate
    # What happens at its start; the first phase has nothing before it:
    optimizer: str = "carry"  # carry | reset: moments go on, or start from nothing
    schedule: str = "go_on"  # go_on | restart: the schedule, with its warm-up, starts over; its horizon ends with
    seed_from: str = "last"  # the phase before the next restart; last | best: the phase before's end, or its best
    validation: list[Source] = field(default_factory=list)  # held-out sources of its own (eval/phase/<name>/loss)


@dataclass
class Model(_Strict):
    init_from: str = ""  # HF folder | "random:path/to/config.json" | another run's workdir or one of its checkpoints
    compute_dtype: str = "auto"  # auto | float32 | bfloat16; auto is float32 on CPU, else bfloat16
    attention: str = "auto"  # auto | one backend's name
    remat: str = "auto"  # auto | none | full | dots


@dataclass
class Data(_Strict):
    tokenizer: str = ""  # "" = that of init_from
    chat_template: str = ""  # "" = the tokenizer's own; else a built-in one's name or a .jinja file's path
    train_on: str = "all"  # all | last: every assistant message of a sample, or its last one alone
    max_length: int = 4096  # tokens; the longest row, and the longest sample that is kept whole
    overlong: str = "drop"  # drop | truncate | error; always counted
    phases: list[Phase] = field(default_factory=list)
    validation: list[Source] = field(default_factory=list)  # held-out sources, or:
    validation_fraction: float = 0.0  # held out of every source by the hash of its content
    drop_remainder: bool = False  # leave out the short last step of an epoch
    skip_bad: bool = False  # count bad lines instead of stopping at the first
    # Token stores and compiled programs; "" = $MICE_JAX_CACHE, or mice_jax in the user's cache folder
    cache_dir: str = ""
    num_workers: int = 0  # loader processes; 0 = a thread in this one
    prepare_workers: int = 0  # processes that tokenise; 0 = one a core, 32 at most


@dataclass
class Optim(_Strict):
    batch_size: int = 3840  # samples a step, exactly
    learning_rate: float = 2e-5
    schedule: str = "constant"  # constant | linear | cosine | wsd
    warmup_steps: int = 0
    warmup_ratio: float = 0.0  # of the horizon, instead of warmup_steps
    final_ratio: float = 0.0  # of learning_rate, at the end of linear, cosine and wsd
    decay_ratio: float = 0.1  # of the horizon, the falling end of wsd
    max_steps: int = 0  # 0 = run the phases to their end
    grad_clip: float = 1.0  # global norm; 0 = off
    loss_reduction: str = "token"  # token | sample (each sample weighs the same)
    name: str = "adamw"  # adamw | adafactor | muon | lion | sgd
    beta1: float = 0.9  # sgd's and muon's momentum too
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0  # not on norms and biases
    moments_dtype: str = "float32"  # float32 | bfloat16
    accumulate_dtype: str = "float32"  # float32 | bfloat16: of the sum of a step's gradients
    frozen: list[str] = field(default_factory=list)  # patterns of Hugging Face names: "model.layers.[0-3].*"


@dataclass
class Mesh(_Strict):
    data: int = 1  # whole copies of the model
    fsdp: int = -1  # parameters sharded, samples split; -1 = the devices that are left
    tensor: int = 1  # heads, MLP and vocabulary split


@dataclass
class Train(_Strict):
    rows_per_device: int = 0  # rows of a microbatch on one device; 0 = chosen
    deterministic: bool = False  # bit-equal reruns on GPU too, at some cost
    max_minutes: float = 0.0  # of this process; then the state is saved and it leaves with exit code 75; 0 = no limit
    skip_spikes: float = 0.0  # skip a step whose gradient norm is over so many times its running median; 0 = never


@dataclass
class Checkpoint(_Strict):
    every_samples: int = 250_000  # 0 = at the end only
    every_minutes: float = 0.0  # and so often by the clock; 0 = never
    keep_last: int = 0  # 0 = all
    keep_best: int = 0  # and so many of the best by best_metric
    keep_every: int = 0  # and each that is the first at or past a multiple of so many samples
    best_metric: str = "eval/loss"  # any of metrics.jsonl
    best_mode: str = "min"  # min | max


@dataclass
class Log(_Strict):
    every_steps: int = 1  # terminal and trackers; metrics.jsonl has every step
    trackers: list[str] = field(default_factory=list)  # wandb, mlflow; TensorBoard's events are written always
    project: str = "mice_jax"  # of wandb, and mlflow's experiment


@dataclass
class Eval(_Strict):
    every_samples: int = 0  # held-out loss and tasks; 0 = at the end only
    tasks: list[str] = field(default_factory=list)  # benchmarks, by the names that `mice evaluate` takes
    include_path: str = ""  # folder with YAML files of tasks of one's own
    num_fewshot: int = -1  # examples in a prompt; -1 = as each task says
    limit: int = 0  # documents of each task; 0 = all
    apply_chat_template: bool = False
    system_instruction: str = ""


@dataclass
class Stop(_Strict):
    """Rules that every run is under, beside that of a number that is not finite."""

    margin: float = 1.0  # nats of loss above its phase's start: a run that stays there is stopped
    steps: int = 10  # in a row, of that and of a dead model (loss at ln of the vocabulary, no gradient); 0 = never


@dataclass
class Published(_Strict):
    """A number that was published of this very run: the report shows it beside ours; nothing else reads it."""

    metric: str = ""
    value: float = 0.0
    where: str = ""  # "optim.batch_size=128": of a config with this value only, so that a sweep's base can hold all


@dataclass
class Config(_Strict):
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    optim: Optim = field(default_factory=Optim)
    mesh: Mesh = field(default_factory=Mesh)
    train: Train = field(default_factory=Train)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    log: Log = field(default_factory=Log)
    eval: Eval = field(default_factory=Eval)
    stop: Stop = field(default_factory=Stop)
    seed: int = 0
    published: list[Published] = field(default_factory=list)

    def validate(self) -> None:
        """Raises ConfigError, naming every problem: field, value, mend."""
        problems = _type_problems(self, Config, "")
        if not problems:  # values are only worth checking once they have their types
            problems = _value_problems(self)
        if not problems:
            return
        if len(problems) == 1:
            raise ConfigError(f"in the config, {problems[0]}.")
        listed = "; ".join(f"({i}) {p}" for i, p in enumerate(problems, 1))
        raise ConfigError(f"the config has {len(problems)} problems: {listed}.")


# Fields that a resumed run may change: they alter neither what is trained on nor the arithmetic of a step.
RESUMABLE = ("mesh", "train.rows_per_device", "model.attention", "model.remat", "data.cache_dir",
             "data.num_workers", "data.prepare_workers", "train.max_minutes", "checkpoint.every_samples",
             "checkpoint.every_minutes", "checkpoint.keep_last", "checkpoint.keep_best", "checkpoint.keep_every",
             "log", "eval", "stop", "published")  # fmt: skip


@dataclass
class Sweep(_Strict):
    """Many runs that differ in a few fields: what `get_sweep(arg="")` of a sweep's file returns."""

    base: Config = field(default_factory=Config)
    # By a field's dotted name, the values to try; with search="random" or "tpe", also Range(...).
    axes: dict[str, Any] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=list)  # each combination runs with each; [] = that of base
    metric: str = "eval/loss"  # any of metrics.jsonl, of a run's last step
    mode: str = "min"  # min | max
    stop: Any = None  # None, a rule's name (paper | median | halving), or one of mice_jax.training.stop_rules
    search: str = "grid"  # grid | random | tpe
    trials: int = 0  # of random and tpe

    def validate(self) -> None:
        """Raises ConfigError, naming every problem, those of the trials' configs but for the axes' values too."""
        problems = []
        names = field_names()
        for name, values in self.axes.items():
            if re.sub(r"\[[0-9]+\]", "[]", name) not in names:
                problems.append(f"axes has {name!r}, which is no field of the config{nearest(name, names)}")
            elif isinstance(values, Range):
                problems += [f"axes[{name!r}] is a Range: a grid needs a list"] * (self.search == "grid")
                if not (values.low < values.high and (values.low > 0 or not values.log)):
                    problems.append(f"axes[{name!r}]={values}: low must be below high, and above 0 where log=True")
            elif not isinstance(values, list | tuple) or not values:
                problems.append(f"axes[{name!r}]={values!r} must be a list of at least one value")
            elif len({repr(v) for v in values}) < len(values):
                problems.append(f"axes[{name!r}]={values!r} has a value twice")
        if "seed" in self.axes:
            problems.append("axes has 'seed': give seeds=[...]")
        if len(set(self.seeds)) < len(self.seeds):
            problems.append(f"seeds={self.seeds} has one twice")
        if self.mode not in ("min", "max"):
            problems.append(f"mode={self.mode!r} is not one of min, max")
        if self.search not in ("grid", "random", "tpe"):
            problems.append(f"search={self.search!r} is not one of grid, random, tpe")
        elif (self.search == "grid") != (self.trials == 0) or self.trials < 0:
            problems.append(
                f"trials={self.trials} with search={self.search!r}: give it to random and tpe, and only there"
            )
        if problems:
            raise ConfigError(f"the sweep has {len(problems)} problem(s): {'; '.join(problems)}.")


@dataclass(frozen=True)
class Range:
    """Of an axis that is searched: from `low` to `high`, even in the logarithm where `log`."""

    low: float
    high: float
    log: bool = False


def locate(config: Config, name: str) -> tuple[Any, str]:
    """The part that holds a field, and its name there, from its dotted name, `data.phases[0].replay` for one."""
    *path, last = re.findall(r"[^.\[\]]+", name)
    part: Any = config
    for key in path:
        part = part[int(key)] if key.isdigit() else getattr(part, key)
    return part, last


def to_dict(config: Config) -> dict[str, Any]:
    """Plain dicts, lists and scalars, for config.json."""
    return dataclasses.asdict(config)


def identity(config: Config) -> str:
    """Of a run: what all of its processes have to agree on."""
    flat = {k: v for k, v in flatten(to_dict(config)).items() if not _is_resumable(k)}
    return repr(sorted(flat.items()))


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """`field: old -> new` for each field that keeps a run from being resumed under `new`."""
    a, b = flatten(old), flatten(new)
    changed = [k for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]
    refused = [k for k in changed if not _is_resumable(k)]
    return [f"{k}: {a.get(k, 'absent')!r} -> {b.get(k, 'absent')!r}" for k in refused]


def _is_resumable(name: str) -> bool:
    return any(name == r or name.startswith(r + ".") for r in RESUMABLE)


def field_names(cls: type = Config, prefix: str = "") -> list[str]:
    """The dotted name of every field that a flag can set; `[]` stands for an index into a list."""
    names = []
    for name, hint in typing.get_type_hints(cls).items():
        is_part = isinstance(hint, type) and dataclasses.is_dataclass(hint)
        names += field_names(hint, f"{prefix}{name}.") if is_part else [prefix + name]
        (element,) = typing.get_args(hint) or (None,)
        if isinstance(element, type) and dataclasses.is_dataclass(element):
            names += field_names(element, f"{prefix}{name}[].")
    return names


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """By dotted name, every plain value of nested dicts and lists."""
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, list):
        items = ((str(i), v) for i, v in enumerate(tree))
    else:
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for k, v in items:
        flat |= flatten(v, f"{prefix}.{k}" if prefix else str(k))
    return flat


def _type_problems(value: Any, hint: Any, name: str) -> list[str]:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, hint):  # type: ignore[arg-type]
            return [f"{name}={value!r} must be a {hint.__name__}(...)"]  # type: ignore[union-attr]
        hints = typing.get_type_hints(hint)
        dot = f"{name}." if name else ""
        return [p for k, h in hints.items() for p in _type_problems(getattr(value, k), h, dot + k)]
    if isinstance(hint, types.GenericAlias):
        if not isinstance(value, list):
            return [f"{name}={value!r} must be a list"]
        (inner,) = typing.get_args(hint)
        return [p for i, v in enumerate(value) for p in _type_problems(v, inner, f"{name}[{i}]")]
    wanted = (int, float) if hint is float else (hint,)
    right = isinstance(value, wanted) and (hint is bool or not isinstance(value, bool))
    kind = type(value).__name__
    return [] if right else [f"{name}={value!r} is of type {kind} and must be {hint.__name__}"]


CHOICES = {
    "model.compute_dtype": ("auto", "float32", "bfloat16"),
    "model.remat": ("auto", "none", "full", "dots"),
    "data.overlong": ("drop", "truncate", "error"),
    "data.train_on": ("all", "last"),
    "optim.schedule": ("constant", "linear", "cosine", "wsd"),
    "optim.loss_reduction": ("token", "sample"),
    "optim.name": ("adamw", "adafactor", "muon", "lion", "sgd"),
    "optim.moments_dtype": ("float32", "bfloat16"),
    "optim.accumulate_dtype": ("float32", "bfloat16"),
    "checkpoint.best_mode": ("min", "max"),
}
PHASE_CHOICES = {"optimizer": ("carry", "reset"), "schedule": ("go_on", "restart"), "seed_from": ("last", "best")}
TRACKERS = ("tensorboard", "wandb", "mlflow")
HALVES = ("", "short", "long")
# Inclusive bounds.
BOUNDS = {
    "data.max_length": (2, math.inf),
    "data.num_workers": (0, math.inf),
    "data.prepare_workers": (0, math.inf),
    "optim.batch_size": (1, math.inf),
    "optim.learning_rate": (0, math.inf),
    "optim.warmup_steps": (0, math.inf),
    "optim.warmup_ratio": (0, 1),
    "optim.final_ratio": (0, 1),
    "optim.decay_ratio": (0, 1),
    "optim.max_steps": (0, math.inf),
    "optim.grad_clip": (0, math.inf),
    "optim.eps": (0, math.inf),
    "optim.weight_decay": (0, math.inf),
    "train.rows_per_device": (0, math.inf),
    "train.max_minutes": (0, math.inf),
    "train.skip_spikes": (0, math.inf),
    "checkpoint.every_samples": (0, math.inf),
    "checkpoint.every_minutes": (0, math.inf),
    "checkpoint.keep_last": (0, math.inf),
    "checkpoint.keep_best": (0, math.inf),
    "checkpoint.keep_every": (0, math.inf),
    "stop.margin": (0, math.inf),
    "stop.steps": (0, math.inf),
    "log.every_steps": (1, math.inf),
    "eval.every_samples": (0, math.inf),
    "eval.num_fewshot": (-1, math.inf),
    "eval.limit": (0, math.inf),
    "seed": (0, 2**32 - 1),
}


def _value_problems(c: Config) -> list[str]:
    flat = flatten(to_dict(c))
    problems = []
    for name, choices in CHOICES.items():
        if flat[name] not in choices:
            problems.append(f"{name}={flat[name]!r} is not one of {', '.join(choices)}")
    for name, (low, high) in BOUNDS.items():
        if not low <= flat[name] <= high:  # also false for NaN
            bound = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            problems.append(f"{name}={flat[name]} must be {bound}")
    for name in ("optim.beta1", "optim.beta2", "data.validation_fraction"):
        if not 0 <= flat[name] < 1:
            problems.append(f"{name}={flat[name]} must be at least 0 and less than 1")
    if c.optim.learning_rate == math.inf:
        problems.append(f"optim.learning_rate={c.optim.learning_rate} must be finite")
    if c.optim.warmup_steps and c.optim.warmup_ratio:
        problems.append(
            f"optim.warmup_steps={c.optim.warmup_steps} and optim.warmup_ratio={c.optim.warmup_ratio} "
            "are both set: set one of them to 0"
        )
    if not c.model.init_from:
        problems.append(
            'model.init_from="" says nothing to start from: give a Hugging Face folder, '
            '"random:path/to/config.json", or another run\'s workdir'
        )
    by_source = ["data.validation"] * bool(c.data.validation)
    by_source += [f"data.phases[{i}].validation" for i, p in enumerate(c.data.phases) if p.validation]
    if by_source and c.data.validation_fraction:
        problems.append(
            f"{by_source[0]} and data.validation_fraction={c.data.validation_fraction} are both set: "
            "hold out by sources or by fraction, not both"
        )
    for tracker in c.log.trackers:
        if tracker not in TRACKERS:
            problems.append(f"log.trackers has {tracker!r}, which is not one of {', '.join(TRACKERS)}")
    if 0 < c.train.skip_spikes <= 1:
        problems.append(f"train.skip_spikes={c.train.skip_spikes} must be more than 1, or 0 for never")
    for i, p in enumerate(c.published):
        if not p.metric or (p.where and p.where.partition("=")[0] not in flat):
            problems.append(f"published[{i}]={p!r} must name a metric and, in where, FIELD=VALUE of this config")
    return problems + _mesh_problems(c.mesh) + _phase_problems(c.data)


def _mesh_problems(m: Mesh) -> list[str]:
    sizes = {"data": m.data, "fsdp": m.fsdp, "tensor": m.tensor}
    problems = [
        f"mesh.{k}={v} must be at least 1, or -1 for the devices that are left"
        for k, v in sizes.items()
        if v < 1 and v != -1
    ]
    left = [f"mesh.{k}" for k, v in sizes.items() if v == -1]
    if len(left) > 1:
        problems.append(f"{' and '.join(left)} are both -1: only one axis can take what is left")
    return problems


def _phase_problems(d: Data) -> list[str]:
    problems = []
    if not d.phases:
        problems.append("data.phases is empty: give at least one Phase(sources=[Source(path=...)])")
    names = [p.name for p in d.phases]
    for name in sorted({n for n in names if names.count(n) > 1}):
        problems.append(f"data.phases has {names.count(name)} phases named {name!r}: name each once")
    for i, phase in enumerate(d.phases):
        where = f"data.phases[{i}]"
        if not (phase.num_epochs > 0 and math.isfinite(phase.num_epochs)):
            problems.append(f"{where}.num_epochs={phase.num_epochs} must be more than 0")
        if phase.num_steps < 0:
            problems.append(f"{where}.num_steps={phase.num_steps} must be at least 0")
        if phase.num_steps and phase.num_epochs != Phase.num_epochs:
            problems.append(
                f"{where}.num_epochs={phase.num_epochs} and num_steps={phase.num_steps} are both set: leave one of "
                "them at its default"
            )
        if not phase.sources:
            problems.append(f"{where}.sources is empty: give at least one Source(path=...)")
        problems += _replay_problems(where, phase, names[:i])
        problems += _boundary_problems(where, phase, i)
    lists = [(f"data.phases[{i}].sources", p.sources) for i, p in enumerate(d.phases)]
    lists += [(f"data.phases[{i}].validation", p.validation) for i, p in enumerate(d.phases)]
    for where, sources in [*lists, ("data.validation", d.validation)]:
        for j, s in enumerate(sources):
            if not s.path:
                problems.append(f'{where}[{j}].path="" must name a file')
            if not (s.weight > 0 and math.isfinite(s.weight)):
                problems.append(f"{where}[{j}].weight={s.weight} must be more than 0")
            if s.max_samples < 0:
                problems.append(f"{where}[{j}].max_samples={s.max_samples} must be at least 0")
            if s.half not in HALVES:
                problems.append(f"{where}[{j}].half={s.half!r} is not one of {', '.join(map(repr, HALVES))}")
    return problems


def _boundary_problems(where: str, phase: Phase, index: int) -> list[str]:
    problems = []
    if phase.batch_size < 0:
        problems.append(f"{where}.batch_size={phase.batch_size} must be at least 1, or 0 for optim.batch_size")
    if not 0 <= phase.learning_rate < math.inf:
        problems.append(f"{where}.learning_rate={phase.learning_rate} must be more than 0, or 0 for that of optim")
    for name, choices in PHASE_CHOICES.items():
        value = getattr(phase, name)
        if value not in choices:
            problems.append(f"{where}.{name}={value!r} is not one of {', '.join(choices)}")
        elif index == 0 and value != choices[0]:
            problems.append(f"{where}.{name}={value!r}: there is no phase before it, leave it {choices[0]!r}")
    return problems


def _replay_problems(where: str, phase: Phase, earlier: list[str]) -> list[str]:
    problems = []
    if not (phase.replay >= 0 and math.isfinite(phase.replay)):
        problems.append(f"{where}.replay={phase.replay} must be at least 0")
    if phase.replay and not earlier:
        problems.append(f"{where}.replay={phase.replay}: there is no phase before it to replay")
    elif phase.replay_from and phase.replay_from not in earlier:
        known = f"those are {', '.join(earlier)}" if earlier else "there is none"
        problems.append(f"{where}.replay_from={phase.replay_from!r} is no phase before it; {known}")
    if phase.replay_from and not phase.replay:
        problems.append(
            f"{where}.replay_from={phase.replay_from!r} without a replay: give it, 0.01 for one in a hundred"
        )
    return problems
