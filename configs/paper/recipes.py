"""The recipes LAB, TULU and TULU++ on four models.

Published, Llama 3.2 3B (best over checkpoints; base, LAB, TULU): MMLU 0.56, 0.57, 0.55; ARC 0.78, 0.78, 0.74; GSM8K
0.27, 0.51, 0.49; BBH 0.14, 0.19, 0.17; MuSR 0.05, 0.22, 0.15; MATH level 5 0.01, 0.02, 0.01; MTBench -, 5.00, 4.97.
TULU's best checkpoints are at 2.5 million samples at most, LAB's at up to 11 million, so TULU saw fewer samples. For
TULU++ and the other models, only the numbers in the other files of this folder were recovered.
Cost: 8.3 million samples for LAB (2,150 steps of 3,840), 1.7 for TULU, 3.3 for TULU++.
Topology: v5p:2x2x2 for Granite 7B and Mistral 7B, v5p:2x2x1 for Granite 3B, v5e:4x4 for Llama 3.2 3B.
Launch: mice train --config=configs/paper/recipes.py:recipe=tulu,model=llama-3.2-3b --workdir=runs/tulu
"""

from mice_jax.config import Config
from paper_study import MODELS, RECIPES, choice, options, published, recipe

VARIANTS = [f"recipe={r},model={m}" for r in RECIPES for m in MODELS]
PUBLISHED = {
    "lab": {
        "MMLU": 0.57, "ARC": 0.78, "GSM8K": 0.51, "BBH": 0.19, "MuSR": 0.22, "MATH level 5": 0.02, "MTBench": 5.00
    },
    "tulu": {
        "MMLU": 0.55, "ARC": 0.74, "GSM8K": 0.49, "BBH": 0.17, "MuSR": 0.15, "MATH level 5": 0.01, "MTBench": 4.97
    },
}  # fmt: skip


def get_config(arg: str = "") -> Config:
    given = options(arg, recipe="lab")
    c = recipe(given, choice(given, "recipe", RECIPES))
    if given["model"] == "llama-3.2-3b" and given["recipe"] in PUBLISHED:
        c.published = published(PUBLISHED[given["recipe"]])
    return c
