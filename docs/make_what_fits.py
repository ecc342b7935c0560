"""Writes docs/what_fits.md: for models and devices, the fastest settings that fit by the arithmetic of `mice plan`.

python docs/make_what_fits.py
"""

import dataclasses
import json
import tempfile
from pathlib import Path

from mice_jax.config import Config
from mice_jax.hardware import CHIPS
from mice_jax.model_source import resolve_source
from mice_jax.planning.ahead_of_time import Topology
from mice_jax.planning.planner import RunPlan
from mice_jax.planning.settings import LORA_RANK, FittingSetting, fitting_settings

PAGE = Path(__file__).with_name("what_fits.md")
SHAPES = Path(__file__).parents[1] / "configs" / "paper" / "shapes"
MODELS = {  # what differs from the shape of Llama 3.2 3B in the published config.json
    "Llama 3.2 1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
                     "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64},
    "SmolLM3 3B": {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
                   "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128},
    "Llama 3.2 3B": {},
    "Llama 3.1 8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                     "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
                     "tie_word_embeddings": False},
}  # fmt: skip
DEVICES = {
    "one GPU of 24 GB": ("rtx4090:1", 1),
    "one GPU of 80 GB": ("h100:1", 1),
    "one GPU of 141 GB": ("h200:1", 1),
    "`v5e:2x4`": ("v5e:2x4", 8),
    "`v6e:2x4`": ("v6e:2x4", 8),
    "`v5p:2x2x2`": ("v5p:2x2x2", 8),
}
GPU_SHARE = 0.95  # of a GPU's memory, XLA_PYTHON_CLIENT_MEM_FRACTION
SAMPLES, MEAN_LENGTH = 128, 2048
HEAD = f"""# What fits where

Full fine-tuning, with AdamW and rows of 4,096 tokens, of models in four sizes: for each kind of device the fastest
settings with which the run fits; of settings within 5 % of each other, those that cost less. **Planned, not measured**:
memory and time are the estimates of `mice plan` ([Planning a run](plan.md)), for steps of {SAMPLES} samples of
{MEAN_LENGTH:,} tokens. GPUs are an RTX 4090, an H100 and an H200, with `XLA_PYTHON_CLIENT_MEM_FRACTION={GPU_SHARE}`;
TPUs are split along `mesh.fsdp`. A device has one row in a microbatch, so that more are possible, and faster, where
memory is left.

| model | devices | settings | memory of a device | of the host, for it | tokens/s | what it costs |
|---|---|---|---|---|---|---|
"""
TAIL = f"""
The settings are `model.param_dtype`, `optim.moments_dtype`, `optim.offload_moments`, `optim.accumulate_dtype` and
`model.remat`. Where full fine-tuning does not fit with any of them, adapters of rank {LORA_RANK} (`model.lora.rank`)
are named if these fit. `mice plan` prints such a list for any run that does not fit.

The page is made by `docs/make_what_fits.py`.
"""


def plan_of(shape: Path, topology: str, count: int) -> RunPlan:
    """Plans a model on some devices, by the arithmetic alone."""
    config = Config()
    config.model.init_from = f"random:{shape}"
    source, chip = resolve_source(config.model.init_from), CHIPS[topology.partition(":")[0]]
    if chip.platform == "gpu":
        chip = dataclasses.replace(chip, memory=chip.memory * GPU_SHARE / 0.75)
    target = Topology(topology, chip, count, None)
    return RunPlan(
        config, source.spec, source.architecture, target, samples=SAMPLES, mean_length=MEAN_LENGTH, deadline=0
    )


def line(model: str, devices: str, found: list[FittingSetting]) -> str:
    """Returns the table's line of a model on some devices."""
    full = [setting for setting in found if "lora" not in setting.flags]
    if not found:
        return f"| {model} | {devices} | - | | | | |"
    best = (full or found)[0]
    flags = [flag.removeprefix("--config.") for flag in best.flags.split() if "rows_per_device" not in flag]
    memory = [f"{size / 1e9:.1f} GB" for size in (best.bytes_per_device, best.host_bytes_per_device)]
    settings = ", ".join(f"`{flag}`" for flag in flags)
    return f"| {model} | {devices} | {settings} | {memory[0]} | {memory[1]} | {best.tokens_per_s:,.0f} | {best.cost} |"


def planned_line(model: str, devices: str) -> str:
    """Plans a model on some devices, by their names in the table; returns the table's line."""
    base = json.loads((SHAPES / "llama-3.2-3b" / "config.json").read_text())
    with tempfile.TemporaryDirectory() as folder:
        shape = Path(folder) / "config.json"
        shape.write_text(json.dumps(base | MODELS[model]))
        return line(model, devices, fitting_settings(plan_of(shape, *DEVICES[devices]), shown=100))


def main() -> None:
    """Writes the page."""
    lines = [planned_line(model, devices) for model in MODELS for devices in DEVICES]
    PAGE.write_text(HEAD + "\n".join(lines) + "\n" + TAIL)


if __name__ == "__main__":
    main()
