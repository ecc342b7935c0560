"""Settings with which a run that does not fit would, the fastest first, each with what it costs."""

import copy
import dataclasses
import itertools
from collections.abc import Iterator, Sequence

from mice_jax.config import Config, locate
from mice_jax.planning import step_time
from mice_jax.planning.planner import RunPlan
from mice_jax.training import memory_model

LORA_RANK = 16
SHOWN = 6
SAME_SPEED = 1.05  # the ratio of two step times below which an estimate does not tell them apart


@dataclasses.dataclass(frozen=True)
class Setting:
    """Fields of a config with other values, and what they cost besides time."""

    fields: tuple[tuple[str, object], ...]
    cost: str = ""

    def apply(self, config: Config) -> None:
        """Sets the fields."""
        for name, value in self.fields:
            section, last = locate(config, name)
            setattr(section, last, value)

    def flags(self) -> str:
        """Returns the flags that set the fields."""
        return " ".join(f"--config.{name}={value}" for name, value in self.fields)


AS_IT_IS = Setting(())
MOMENTS = (
    AS_IT_IS,
    Setting((("optim.moments_dtype", "bfloat16"),), "moments are rounded to bfloat16"),
    Setting((("optim.moments_dtype", "int8"),), "moments are rounded to 8 bits"),
    Setting((("optim.offload_moments", True),), "moments cross the link to the host twice a step"),
    Setting(
        (("optim.offload_moments", True), ("optim.moments_dtype", "int8")),
        "moments are rounded to 8 bits and cross the link to the host twice a step",
    ),
)
PARAMS = (AS_IT_IS, Setting((("model.param_dtype", "bfloat16"),), "weights are rounded to bfloat16 stochastically"))
SUMS = (AS_IT_IS, Setting((("optim.accumulate_dtype", "bfloat16"),), "gradients are summed in bfloat16"))
REMATS = (
    *(Setting((("model.remat", name),)) for name in memory_model.REMAT_POLICIES),
    Setting((("model.remat", "offload"),), "the inputs of layers cross the link to the host twice a microbatch"),
)
LORA = Setting((("model.lora.rank", LORA_RANK),), "only adapters are trained")


@dataclasses.dataclass(frozen=True)
class FittingSetting:
    """A combination of settings with which a run is estimated to fit, with one row on a device.

    Attributes:
      flags: The flags that select it.
      cost: What it costs besides time; "" for nothing.
      bytes_per_device: The estimated peak of a device.
      host_bytes_per_device: What is kept in host memory.
      step_time_s: The estimated duration of a step.
      tokens_per_s: The estimated tokens a second of all devices.
    """

    flags: str
    cost: str
    bytes_per_device: int
    host_bytes_per_device: int
    step_time_s: float
    tokens_per_s: float


def fitting_settings(run: RunPlan, shown: int = SHOWN) -> list[FittingSetting]:
    """Returns combinations of settings with which a run fits on its mesh, the fastest first.

    Each has one row on a device. Of combinations with the same moments, sums and adapters, the fastest is returned. Of
    combinations that are about as fast, those that cost less come first.

    Args:
      run: The planned run.
      shown: The largest number of combinations to return.
    """
    found = [best for group in _groups(run.config) if (best := _fastest(run, group))]
    return ranked(found)[:shown]


def ranked(found: Sequence[FittingSetting]) -> list[FittingSetting]:
    """Sorts settings by step time, and by the number of things that they cost where `SAME_SPEED` does not part them."""
    bands: list[list[FittingSetting]] = []
    for setting in sorted(found, key=lambda setting: setting.step_time_s):
        if not bands or setting.step_time_s >= SAME_SPEED * bands[-1][0].step_time_s:
            bands.append([])
        bands[-1].append(setting)
    return [setting for band in bands for setting in sorted(band, key=_costs)]


def _costs(setting: FittingSetting) -> int:
    return len(setting.cost.split("; ")) if setting.cost else 0


def _groups(config: Config) -> Iterator[tuple[Setting, ...]]:
    """Yields combinations that do not change what the config has chosen about weights, moments or adapters."""
    moments = MOMENTS if config.optim.moments_dtype == "float32" and config.optim.name == "adamw" else MOMENTS[:1]
    params = PARAMS if config.model.param_dtype == "float32" and not config.model.lora.rank else PARAMS[:1]
    yield from itertools.product(params, moments, SUMS)
    if not config.model.lora.rank and not (config.optim.frozen or config.optim.osft_rank_ratio or params != PARAMS):
        yield (LORA,)


def _fastest(run: RunPlan, group: tuple[Setting, ...]) -> FittingSetting | None:
    config, chip, sizes = copy.deepcopy(run.config), run.topology.chip, run.layout.sizes
    for setting in group:
        setting.apply(config)
    inputs = run.inputs_of(config, sizes)
    fitting = []
    for remat in REMATS:
        (_, policy), *_ = remat.fields
        needed = memory_model.estimate_memory(inputs, 1, str(policy)).total
        on_host = memory_model.estimate_host_memory(inputs, 1, str(policy))
        usable = memory_model.USABLE_FRACTION
        if needed > usable * chip.memory or on_host > usable * chip.host_memory:
            continue
        time = step_time.estimate_step_time(inputs, chip, 1, str(policy), run.samples, run.mean_length, run.overlap)
        chosen = [s for s in (*group, remat) if s.fields]
        flags = " ".join([*(s.flags() for s in chosen), "--config.train.rows_per_device=1"])
        cost = "; ".join(s.cost for s in chosen if s.cost)
        fitting.append(FittingSetting(flags, cost, needed, on_host, time.seconds, time.tokens / time.seconds))
    return min(fitting, key=lambda setting: setting.step_time_s, default=None)
