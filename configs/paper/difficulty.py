"""Phases by difficulty: first the samples with the shorter answers, then those with the longer answers.

The second phase replays 1 % of the first.
Published, Granite 7B, batch about 4,000, learning rate 2e-5: there is no significant difference from stacked, which is
slightly ahead on all benchmarks; the numbers were not recovered. The same halves of the mathematics, reasoning and
code data, Llama 3.2 3B (best of LAB stacked and phased; replay is not mentioned there): GSM8K 0.69 and 0.67; ARC 0.75
and 0.71; MuSR 0.08 and 0.08; MATH level 5 0.04 and 0.03. Here each source is halved; the study halved the whole data.
Cost: 8.3 million samples each.
Topology: v5p:2x2x2; v5e:4x4 for Llama 3.2 3B.
Launch: mice train --config=configs/paper/difficulty.py:data_in=phased --workdir=runs/difficulty
"""

from mice_jax.config import Config, Phase
from paper_study import PHASES, choice, options, published, recipe, sources

ARMS = ("stacked", "phased")
VARIANTS = [f"data_in={a},model={m}" for a in ARMS for m in ("granite-7b", "llama-3.2-3b")]
PUBLISHED = {
    "stacked": {"GSM8K": 0.69, "ARC": 0.75, "MuSR": 0.08, "MATH level 5": 0.04},
    "phased": {"GSM8K": 0.67, "ARC": 0.71, "MuSR": 0.08, "MATH level 5": 0.03},
}


def get_config(arg: str = "") -> Config:
    given = options(arg, data_in="phased")
    c = recipe(given, "lab")
    if choice(given, "data_in", ARMS) == "phased":
        short = Phase(name="short", num_epochs=10.0, sources=sources(given, PHASES, "short"))
        long = Phase(
            name="long", num_epochs=10.0, sources=sources(given, PHASES, "long"), replay=0.01, seed_from="best"
        )
        c.data.phases = [short, long]
    if given["model"] == "llama-3.2-3b":
        c.published = published(PUBLISHED[given["data_in"]])
    return c
