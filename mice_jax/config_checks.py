"""The checks of a config: types, choices, bounds, and fields that exclude each other.

Every check returns its problems, as sentences with the field, the value and the fix. This module does not import
config.py, which imports it; so it takes a config as `Any`.
"""

import dataclasses
import json
import math
import re
import sys
import types
import typing
from collections.abc import Collection
from typing import Any

from mice_jax.errors import did_you_mean

CHOICES = {
    "model.compute_dtype": ("auto", "float32", "bfloat16"),
    "model.param_dtype": ("float32", "bfloat16"),
    "model.attention": ("auto", "splash", "cudnn", "pallas", "blockwise", "reference"),
    "model.remat": ("auto", "none", "full", "dots", "offload"),
    "data.overlong": ("drop", "truncate", "error"),
    "data.train_on": ("all", "last"),
    "data.reasoning": ("template", "last", "per_turn", "drop"),
    "optim.rate_for_batch": ("none", "sqrt", "linear"),
    "optim.schedule": ("constant", "linear", "cosine", "wsd"),
    "optim.loss_reduction": ("token", "sample"),
    "optim.name": ("adamw", "adafactor", "muon", "lion", "sgd"),
    "optim.moments_dtype": ("float32", "bfloat16", "int8"),
    "optim.accumulate_dtype": ("float32", "bfloat16"),
    "optim.reduce_dtype": ("float32", "bfloat16"),
    "checkpoint.best_mode": ("min", "max"),
}
PHASE_CHOICES = {"optimizer": ("carry", "reset"), "schedule": ("go_on", "restart"), "seed_from": ("last", "best")}
# What fields are called elsewhere.
OTHER_NAMES = {
    "lr": "learning_rate",
    "bs": "batch_size",
    "wd": "weight_decay",
    "epochs": "num_epochs",
    "num_train_epochs": "num_epochs",
    "per_device_train_batch_size": "rows_per_device",
    "warmup": "warmup_ratio",
    "scheduler": "schedule",
    "lr_scheduler_type": "schedule",
    "optimizer": "name",
    "max_seq_length": "max_length",
    "max_grad_norm": "grad_clip",
    "model_name_or_path": "init_from",
}
# Fields of config.optim that an optimizer, or a schedule, does not read.
UNREAD_BY_OPTIMIZER = {"adafactor": ("beta1", "beta2", "eps"), "lion": ("eps",), "sgd": ("beta2", "eps")}
UNREAD_BY_SCHEDULE = {
    "constant": ("final_ratio", "decay_ratio"), "linear": ("decay_ratio",), "cosine": ("decay_ratio",)
}  # fmt: skip
OPTIMIZERS_WITH_BETA2 = tuple(n for n in CHOICES["optim.name"] if "beta2" not in UNREAD_BY_OPTIMIZER.get(n, ()))
FLOAT32_ROUNDING = 2.0**-24  # a number this close to 1 is 1 in float32
TRACKERS = ("tensorboard", "wandb", "mlflow")
HALVES = ("", "short", "long")
FORMATS = ("messages", "alpaca", "sharegpt", "prompt_completion", "text")
# Inclusive bounds; a field that is not a number is outside of them.
BOUNDS = {
    "data.max_length": (2, math.inf),
    "data.num_workers": (0, math.inf),
    "data.prepare_workers": (0, math.inf),
    "model.lora.rank": (0, math.inf),
    "optim.batch_size": (1, math.inf),
    "optim.learning_rate": (0, math.inf),
    "optim.rate_batch_size": (0, math.inf),
    "optim.warmup_steps": (0, math.inf),
    "optim.warmup_ratio": (0, 1),
    "optim.final_ratio": (0, 1),
    "optim.decay_ratio": (0, 1),
    "optim.max_steps": (0, math.inf),
    "optim.grad_clip": (0, math.inf),
    "optim.beta2_half_life": (0, math.inf),
    "optim.eps": (0, math.inf),
    "optim.weight_decay": (0, math.inf),
    "train.rows_per_device": (0, math.inf),
    "train.max_minutes": (0, math.inf),
    "train.pause_at_share": (0, 1),
    "train.ema_half_life": (0, sys.float_info.max),
    "train.skip_spikes": (0, math.inf),
    "checkpoint.every_samples": (0, math.inf),
    "checkpoint.every_minutes": (0, math.inf),
    "checkpoint.keep_last": (0, math.inf),
    "checkpoint.keep_best": (0, math.inf),
    "checkpoint.keep_every": (0, math.inf),
    "branch.step": (0, math.inf),
    "branch.samples": (0, math.inf),
    "branch.batch_size": (0, math.inf),
    "branch.seed": (0, 2**32 - 1),
    "branch.max_steps": (0, math.inf),
    "stop.margin": (0, math.inf),
    "stop.steps": (0, math.inf),
    "log.every_steps": (1, math.inf),
    "log.noise_every": (0, math.inf),
    "eval.every_samples": (0, math.inf),
    "eval.num_fewshot": (-1, math.inf),
    "eval.limit": (0, math.inf),
    "eval.answers": (0, 1000),
    "seed": (0, 2**32 - 1),
}


def nearest(name: str, names: typing.Iterable[str]) -> str:
    """The end of an error message: `; did you mean 'x'?` for the closest of `names`, or all names if none is close."""
    names = list(names)
    return did_you_mean(name, names, f"; it has {', '.join(names)}.", cutoff=0.5)


def nearest_field(name: str, names: typing.Iterable[str]) -> str:
    """Returns the end of an error message about an unknown field of a config.

    Args:
      name: the unknown field; dotted if the names are.
      names: the fields that there are.
    """
    plain = re.sub(r"\[-?[0-9]+\]", "[]", name)
    names = list(names)
    if group := next((n for n in names if n.startswith(f"{plain}.")), None):
        return f", which is a group of fields; set one of them, such as {_with_indices(group, name)}."
    group, _, last = plain.rpartition(".")
    alike = [n for n in names if n.rpartition(".")[2] == OTHER_NAMES.get(last, last)]
    alike.sort(key=lambda n: (n.rpartition(".")[0] != group, "[]" in n))
    if alike:
        return f"; did you mean {_with_indices(alike[0], name)!r}?"
    return nearest(name, [_with_indices(n, name) for n in names])


def _with_indices(field: str, given: str) -> str:
    """Returns a field's name with the indices that a similar name gives to its lists, and 0 for the others."""
    parts = [part.rstrip("]").partition("[") for part in given.split(".")]
    by_name = {part: index for part, _, index in parts if index}
    by_place = {place: index for place, (_, _, index) in enumerate(parts) if index}

    def indexed(place: int, part: str) -> str:
        base = part.removesuffix("[]")
        return part if part == base else f"{base}[{by_name.get(base) or by_place.get(place, '0')}]"

    return ".".join(indexed(place, part) for place, part in enumerate(field.split(".")))


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Every scalar of nested dicts and lists, by its dotted name."""
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


def type_problems(value: Any, hint: Any, name: str) -> list[str]:
    """Values whose type is not that of their field.

    Args:
      value: a config, a section, a list or a scalar.
      hint: the type annotation it must match.
      name: its dotted name; empty for the config itself.

    Returns:
      A sentence for each problem.
    """
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, hint):  # type: ignore[arg-type]
            return [f"{name}={value!r} must be a {hint.__name__}(...)"]  # type: ignore[union-attr]
        hints = typing.get_type_hints(hint)
        dot = f"{name}." if name else ""
        return [p for k, h in hints.items() for p in type_problems(getattr(value, k), h, dot + k)]
    if typing.get_origin(hint) is dict:
        return _object_problems(value, name)
    if isinstance(hint, types.GenericAlias):
        if not isinstance(value, list):
            return [f"{name}={value!r} must be a list"]
        (inner,) = typing.get_args(hint)
        return [p for i, v in enumerate(value) for p in type_problems(v, inner, f"{name}[{i}]")]
    allowed = (int, float) if hint is float else (hint,)
    matches = isinstance(value, allowed) and (hint is bool or not isinstance(value, bool))
    kind = type(value).__name__
    return [] if matches else [f"{name}={value!r} is of type {kind} and must be {hint.__name__}"]


def _object_problems(value: Any, name: str) -> list[str]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        return [f"{name}={value!r} must be a dict whose keys are strings"]
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as e:
        return [f"{name}={value!r} must hold JSON values only: {e}"]
    return []


def value_problems(c: Any, flat: dict[str, Any]) -> list[str]:
    """Values that are outside of their choices or bounds, or that exclude each other.

    Args:
      c: a Config whose types are right.
      flat: its fields by dotted name, as `flatten` gives them.

    Returns:
      A sentence for each problem.
    """
    problems = []
    for name, choices in CHOICES.items():
        if flat[name] not in choices:
            near = did_you_mean(str(flat[name]), choices, "")
            problems.append(f"{name}={flat[name]!r} is not one of {', '.join(choices)}{near}")
    for name, (low, high) in BOUNDS.items():
        if not low <= flat[name] <= high:  # also false for NaN
            bound = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            problems.append(f"{name}={flat[name]} must be {bound}")
    for name in ("optim.beta1", "optim.beta2", "branch.beta2", "data.validation_fraction"):
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
            'model.init_from="" names no initial weights: give a Hugging Face folder, a model of the Hub '
            '("owner/name"), "random:path/to/config.json", or another run\'s workdir'
        )
    by_source = ["data.validation"] if c.data.validation else []
    by_source += [f"data.phases[{i}].validation" for i, p in enumerate(c.data.phases) if p.validation]
    if by_source and c.data.validation_fraction:
        problems.append(
            f"{by_source[0]} and data.validation_fraction={c.data.validation_fraction} are both set: "
            "hold out by sources or by fraction, not both"
        )
    if c.eval.exact_match and not (by_source or c.data.validation_fraction):
        problems.append(
            "eval.exact_match=True measures held-out samples, and none are held out: set data.validation or "
            "data.validation_fraction, or leave it false"
        )
    if c.eval.answers and not (by_source or c.data.validation_fraction):
        problems.append(
            f"eval.answers={c.eval.answers} asks held-out prompts, and none are held out: set data.validation or "
            "data.validation_fraction, or leave it 0"
        )
    for tracker in c.log.trackers:
        if tracker not in TRACKERS:
            problems.append(f"log.trackers has {tracker!r}, which is not one of {', '.join(TRACKERS)}")
    if c.log.profile_steps and not profiled_steps(c.log.profile_steps):
        problems.append(
            f"log.profile_steps={c.log.profile_steps!r} names no steps: write FIRST:END, such as 10:13 for the steps "
            "10, 11 and 12"
        )
    if 0 < c.train.skip_spikes <= 1:
        problems.append(f"train.skip_spikes={c.train.skip_spikes} must be more than 1, or 0 for never")
    if not all(0 < share <= 1 for share in c.eval.at_shares):
        problems.append(f"eval.at_shares={c.eval.at_shares} must be shares of the run, more than 0 and at most 1")
    for i, p in enumerate(c.published):
        if not p.metric or (p.where and p.where.partition("=")[0] not in flat):
            problems.append(f"published[{i}]={p!r} must name a metric and, in where, FIELD=VALUE of this config")
    problems += _lora_problems(c) + _osft_problems(c) + _moments_problems(c)
    problems += _half_life_problems(c) + _rate_problems(c) + _offload_problems(c.optim)
    return problems + _branch_problems(c) + _mesh_problems(c.mesh, c.data.max_length) + _phase_problems(c.data)


def profiled_steps(text: str) -> range:
    """Returns the steps that "FIRST:END" names, without END; no steps if the text is not of this form."""
    first, _, end = text.partition(":")
    if not (first.isdecimal() and end.isdecimal() and int(first) > 0):
        return range(0)
    return range(int(first), int(end))


def beta2_of(optim: Any) -> float:
    """Returns the beta2 of an optimizer's config: that of its half-life, or beta2 itself."""
    o = optim
    return beta2_of_half_life(o.beta2_half_life, o.batch_size) if o.beta2_half_life else o.beta2


def half_life_of_beta2(beta2: float, batch_size: int) -> float:
    """Computes the half-life, in samples, whose beta2 at a batch size is exactly this one, or the closest to it.

    Args:
      beta2: more than 0 and less than 1.
      batch_size: samples of a step.
    """
    near = -batch_size * math.log(2) / math.log(beta2)
    low = high = near
    candidates = [near]
    for _ in range(64):  # the rounding of the logarithm and of the power are a few units in the last place
        low, high = math.nextafter(low, 0), math.nextafter(high, math.inf)
        candidates += [low, high]
    return min(candidates, key=lambda h: abs(beta2_of_half_life(h, batch_size) - beta2))


def beta2_of_half_life(half_life: float, batch_size: int) -> float:
    """Computes the beta2 with which a gradient's weight in the second moment halves every `half_life` samples.

    Adam's memory, counted in samples, is then the same at every batch size.

    Args:
      half_life: in samples, more than 0.
      batch_size: samples of a step.
    """
    return 0.5 ** (batch_size / half_life)


def rate_for_batch(rate: float, rule: str, batch_size: int, of_batch_size: int) -> float:
    """Computes the learning rate at a batch size from the one that belongs to another.

    Args:
      rate: the rate at `of_batch_size` samples a step.
      rule: none leaves it as it is; sqrt and linear multiply it by the ratio of the batch sizes, or its square root.
      batch_size: samples of a step.
      of_batch_size: samples of a step to which `rate` belongs; not read by none.
    """
    if rule == "none":
        return rate
    ratio = batch_size / of_batch_size
    return rate * (math.sqrt(ratio) if rule == "sqrt" else ratio)


def rate_of(optim: Any) -> float:
    """Returns the peak learning rate of an optimizer's config at its batch size."""
    return rate_for_batch(optim.learning_rate, optim.rate_for_batch, optim.batch_size, optim.rate_batch_size)


def resolved_rate(flat: dict[str, Any]) -> float:
    """Returns the peak learning rate of a flat config at its batch size; NaN where a field is missing."""
    rate, batch_size = flat.get("optim.learning_rate", math.nan), flat.get("optim.batch_size", 0)
    return rate_for_batch(
        rate, flat.get("optim.rate_for_batch", "none"), batch_size, flat.get("optim.rate_batch_size", 0)
    )


def _rate_problems(c: Any) -> list[str]:
    rule, of = c.optim.rate_for_batch, c.optim.rate_batch_size
    if rule == "none" and of:
        return [
            f"optim.rate_batch_size={of} is read by optim.rate_for_batch alone, which is none: set that to sqrt or "
            "linear, or leave the size at 0"
        ]
    if rule != "none" and not of:
        return [
            f"optim.rate_for_batch={rule} needs the batch size to which optim.learning_rate={c.optim.learning_rate:g} "
            "belongs: set optim.rate_batch_size"
        ]
    return []


def _branch_problems(c: Any) -> list[str]:
    branch, default = c.branch, type(c.branch)()
    if not branch.step:
        unread = [k for k in vars(default) if not k.startswith("_") and getattr(branch, k) != getattr(default, k)]
        if not unread:
            return []
        named = ", ".join(f"branch.{k}={getattr(branch, k)!r}" for k in unread)
        return [
            f"branch.step=0 means that this run is not a branch, so nothing reads {named}: let mice branch set these"
        ]
    problems = []
    if not branch.batch_size or not branch.samples:
        problems.append(
            f"branch.step={branch.step} with branch.batch_size={branch.batch_size} and "
            f"branch.samples={branch.samples}: a branch needs both, as mice branch sets them"
        )
    if c.optim.max_steps:
        problems.append(
            f"optim.max_steps={c.optim.max_steps} in a branch: it ends after branch.samples={branch.samples} samples, "
            "so set it to 0"
        )
    return problems


def _lora_problems(c: Any) -> list[str]:
    lora, problems = c.model.lora, []
    if not 0 < lora.alpha < math.inf:
        problems.append(f"model.lora.alpha={lora.alpha} must be more than 0")
    default = type(lora)()
    unread = [k for k in ("alpha", "rslora", "dora", "targets") if getattr(lora, k) != getattr(default, k)]
    if not lora.rank and unread:
        named = ", ".join(f"model.lora.{k}={getattr(lora, k)}" for k in unread)
        problems.append(f"model.lora.rank=0 trains no adapters, so nothing reads {named}: set a rank too")
    if lora.rank and c.optim.frozen:
        problems.append(
            f"model.lora.rank={lora.rank} freezes all of the model's own weights, and optim.frozen={c.optim.frozen} "
            "names some of them: choose the adapters by model.lora.targets, and leave optim.frozen empty"
        )
    if lora.rank and c.model.param_dtype != "float32":
        problems.append(
            f"model.lora.rank={lora.rank} trains adapters alone, which stay in float32, and holds the other weights in "
            f"the compute dtype, so nothing reads model.param_dtype={c.model.param_dtype!r}: leave it at float32"
        )
    return problems


def _moments_problems(c: Any) -> list[str]:
    o, given = c.optim, f"optim.moments_dtype={c.optim.moments_dtype!r}"
    if o.moments_dtype == "float32":
        return []
    if o.name == "sgd" and not o.beta1:
        return [
            f"{given} with optim.name='sgd' and optim.beta1=0, which keep no moments, so nothing reads it: leave "
            "optim.moments_dtype at float32, or set optim.beta1"
        ]
    if o.name == "adafactor" and o.moments_dtype == "int8":
        return [
            f"{given} quantises moments of the shape of the parameters, and optim.name='adafactor' keeps statistics of "
            "rows and columns in their place: set optim.moments_dtype to bfloat16 or float32"
        ]
    return []


def _osft_problems(c: Any) -> list[str]:
    ratio, rank, problems = c.optim.osft_rank_ratio, c.model.lora.rank, []
    if not 0 <= ratio < 1:
        problems.append(f"optim.osft_rank_ratio={ratio} must be at least 0 and less than 1; 0 freezes no direction")
    elif ratio and rank:
        problems.append(
            f"optim.osft_rank_ratio={ratio} and model.lora.rank={rank} are both set: adapters leave all of the model's "
            "own weights as they are, so set one of the two to 0"
        )
    return problems


def _half_life_problems(c: Any) -> list[str]:
    o = c.optim
    if not o.beta2_half_life > 0 or o.batch_size < 1:  # off, or named already
        return []
    where, problems = f"optim.beta2_half_life={o.beta2_half_life:g}", []
    if o.name not in OPTIMIZERS_WITH_BETA2:
        problems.append(f"{where}: optim.name={o.name!r} has no beta2, so set it to 0")
    default = type(o)().beta2
    if o.beta2 != default:
        problems.append(
            f"{where} and optim.beta2={o.beta2} are both set: set the first to 0, or the second to {default}"
        )
    beta2 = beta2_of_half_life(o.beta2_half_life, o.batch_size)
    if beta2 > 1 - FLOAT32_ROUNDING:
        problems.append(f"{where} gives a beta2 of {beta2:.9g} at optim.batch_size={o.batch_size}: 1 in float32")
    for i, phase in enumerate(c.data.phases):
        if phase.batch_size not in (0, o.batch_size):
            problems.append(
                f"data.phases[{i}].batch_size={phase.batch_size} differs from optim.batch_size={o.batch_size}, and "
                f"{where} gives one beta2 for the run: use one batch size, or set optim.beta2 instead"
            )
    return problems


def _offload_problems(o: Any) -> list[str]:
    small = {"adafactor": "whose moments are small", "sgd": "which has no moment where optim.beta1=0"}
    if o.offload_moments and (o.name == "adafactor" or (o.name == "sgd" and not o.beta1)):
        return [f"optim.offload_moments=True with optim.name={o.name!r}, {small[o.name]}: set the first to False"]
    if o.offload_moments and o.osft_rank_ratio:
        return [
            f"optim.offload_moments=True with optim.osft_rank_ratio={o.osft_rank_ratio}: set one of them to its default"
        ]
    return []


def row_problem(max_length: int, sequence: int) -> str:
    """Returns why `sequence` devices cannot share rows of `max_length` slots, of which each has two parts; else ""."""
    parts = 2 * sequence
    if sequence == 1 or max_length % parts == 0:
        return ""
    fits = -(-max_length // parts) * parts
    return (
        f"mesh.sequence={sequence} cuts each row into {parts} equal parts, two for each device, and data.max_length="
        f"{max_length} is not a multiple of {parts}: set it to {fits}, or choose another mesh.sequence"
    )


def _mesh_problems(m: Any, max_length: int) -> list[str]:
    sizes = {"data": m.data, "fsdp": m.fsdp, "tensor": m.tensor, "sequence": m.sequence}
    problems = [
        f"mesh.{k}={v} must be at least 1, or -1 for all remaining devices"
        for k, v in sizes.items()
        if v < 1 and v != -1
    ]
    left = [f"mesh.{k}" for k, v in sizes.items() if v == -1]
    if len(left) > 1:
        problems.append(f"{' and '.join(left)} are both -1: only one axis can take the remaining devices")
    if m.sequence > 1 and max_length > 0 and (problem := row_problem(max_length, m.sequence)):
        problems.append(problem)
    return problems


def _phase_problems(d: Any) -> list[str]:
    problems = []
    if not d.phases:
        problems.append("data.phases is empty: give at least one Phase(sources=[Source(path=...)])")
    names = [p.name for p in d.phases]
    for name in sorted({n for n in names if names.count(n) > 1}):
        problems.append(f"data.phases has {names.count(name)} phases named {name!r}: give each a different name")
    for i, phase in enumerate(d.phases):
        where = f"data.phases[{i}]"
        if not (phase.num_epochs > 0 and math.isfinite(phase.num_epochs)):
            problems.append(f"{where}.num_epochs={phase.num_epochs} must be more than 0")
        if phase.num_steps < 0:
            problems.append(f"{where}.num_steps={phase.num_steps} must be at least 0")
        if phase.num_steps and phase.num_epochs != type(phase).num_epochs:
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
            if s.format not in FORMATS:
                near = did_you_mean(s.format, FORMATS, "")
                problems.append(f"{where}[{j}].format={s.format!r} is not one of {', '.join(FORMATS)}{near}")
            if s.half not in HALVES:
                problems.append(f"{where}[{j}].half={s.half!r} is not one of {', '.join(map(repr, HALVES))}")
    return problems


def _boundary_problems(where: str, phase: Any, index: int) -> list[str]:
    problems = []
    if phase.batch_size < 0:
        problems.append(f"{where}.batch_size={phase.batch_size} must be at least 1, or 0 for optim.batch_size")
    if not 0 <= phase.learning_rate < math.inf:
        problems.append(f"{where}.learning_rate={phase.learning_rate} must be more than 0, or 0 for that of optim")
    for name, choices in PHASE_CHOICES.items():
        value = getattr(phase, name)
        if value not in choices:
            near = did_you_mean(str(value), choices, "")
            problems.append(f"{where}.{name}={value!r} is not one of {', '.join(choices)}{near}")
        elif index == 0 and value != choices[0]:
            problems.append(f"{where}.{name}={value!r}: the first phase has none before it, so leave it {choices[0]!r}")
    return problems


def _replay_problems(where: str, phase: Any, earlier: list[str]) -> list[str]:
    problems = []
    if not (phase.replay >= 0 and math.isfinite(phase.replay)):
        problems.append(f"{where}.replay={phase.replay} must be at least 0")
    if phase.replay and not earlier:
        problems.append(f"{where}.replay={phase.replay}: there is no earlier phase to replay")
    elif phase.replay_from and phase.replay_from not in earlier:
        known = f"these are {', '.join(earlier)}" if earlier else "there are none"
        problems.append(f"{where}.replay_from={phase.replay_from!r} is not an earlier phase; {known}")
    if phase.replay_from and not phase.replay:
        problems.append(
            f"{where}.replay_from={phase.replay_from!r} needs a replay: set it too, to 0.01 for one sample in a hundred"
        )
    return problems


def sweep_problems(sweep: Any, names: Collection[str], range_class: type) -> list[str]:
    """Problems of a sweep's own fields.

    Args:
      sweep: a Sweep.
      names: the dotted names of all fields of a config.
      range_class: the class of a searched axis, which only random and tpe can have.

    Returns:
      A sentence for each problem.
    """
    problems = []
    for name, values in sweep.axes.items():
        if re.sub(r"\[[0-9]+\]", "[]", name) not in names:
            problems.append(f"axes has {name!r}, which is not a field of the config{nearest_field(name, names)}")
        elif isinstance(values, range_class):
            if sweep.search == "grid":
                problems.append(f"axes[{name!r}] is a Range: a grid needs a list")
            if not (values.low < values.high and (values.low > 0 or not values.log)):
                problems.append(f"axes[{name!r}]={values}: low must be below high, and above 0 where log=True")
        elif not isinstance(values, list | tuple) or not values:
            problems.append(f"axes[{name!r}]={values!r} must be a list of at least one value")
        elif len({repr(v) for v in values}) < len(values):
            problems.append(f"axes[{name!r}]={values!r} has the same value twice")
    if "seed" in sweep.axes:
        problems.append("axes has 'seed': give seeds=[...]")
    if len(set(sweep.seeds)) < len(sweep.seeds):
        problems.append(f"seeds={sweep.seeds} has the same seed twice")
    if sweep.mode not in ("min", "max"):
        problems.append(f"mode={sweep.mode!r} is not one of min, max")
    if sweep.search not in ("grid", "random", "tpe"):
        problems.append(f"search={sweep.search!r} is not one of grid, random, tpe")
    elif (sweep.search == "grid") != (sweep.trials == 0) or sweep.trials < 0:
        problems.append(
            f"trials={sweep.trials} with search={sweep.search!r}: give it to random and tpe, and only there"
        )
    return problems
