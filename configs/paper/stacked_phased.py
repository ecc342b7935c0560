"""Stacked against phased: all data in one phase, or phases 00, 05 and 10 one after another.

Each phase starts from the best checkpoint of the one before.
Published, Granite 7B, stacked and phased: MMLU 0.53 and 0.52; MTBench 6.77 and 6.76; GSM8K 0.39 and 0.37; the best
checkpoints at 3.7 to 4.4 million samples against 7.9 to 8.1. Llama 3.2 3B: MMLU 0.57 and 0.53; ARC 0.78 and 0.75; GSM8K
0.51 and 0.45; BBH 0.19 and 0.18; MuSR 0.22 and 0.11; MATH level 5 0.02 and 0.01; MTBench 5.00 and 4.30, where phased
needed fewer samples on four of the seven. The study chose checkpoints by MMLU and MTBench; here they are chosen by
held-out loss. Whether the study kept the optimizer's state between phases is unknown: the code of that time starts
each phase from weights only.
Cost: 8.3 million samples each.
Topology: v5p:2x2x2; v5e:4x4 for Llama 3.2 3B.
Launch: mice train --config=configs/paper/stacked_phased.py:data_in=phased --workdir=runs/phased
"""

from mice_jax.config import Config, Phase
from paper_study import BATCHES, PHASES, choice, options, published, recipe, sources

ARMS = ("stacked", "phased")
VARIANTS = [f"data_in={a},batch={b},model={m}" for a in ARMS for b in BATCHES for m in ("granite-7b", "llama-3.2-3b")]
PUBLISHED = {
    ("granite-7b", "stacked"): {"MMLU": 0.53, "MTBench": 6.77, "GSM8K": 0.39},
    ("granite-7b", "phased"): {"MMLU": 0.52, "MTBench": 6.76, "GSM8K": 0.37},
    ("llama-3.2-3b", "stacked"): {
        "MMLU": 0.57, "ARC": 0.78, "GSM8K": 0.51, "BBH": 0.19, "MuSR": 0.22, "MATH level 5": 0.02, "MTBench": 5.00
    },
    ("llama-3.2-3b", "phased"): {
        "MMLU": 0.53, "ARC": 0.75, "GSM8K": 0.45, "BBH": 0.18, "MuSR": 0.11, "MATH level 5": 0.01, "MTBench": 4.30
    },
}  # fmt: skip


def get_config(arg: str = "") -> Config:
    given = options(arg, data_in="stacked", batch="3840")
    c = recipe(given, "lab")
    c.optim.batch_size = int(choice(given, "batch", BATCHES))
    if choice(given, "data_in", ARMS) == "phased":
        c.data.phases = [Phase(name=name, num_epochs=10.0, sources=sources(given, (name,))) for name in PHASES]
        for phase in c.data.phases[1:]:
            phase.optimizer, phase.schedule, phase.seed_from = "reset", "restart", "best"
    numbers = PUBLISHED.get((given["model"], given["data_in"]), {})
    c.published = published({metric: {3840: value} for metric, value in numbers.items()}, "optim.batch_size")
    return c
