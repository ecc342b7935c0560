"""Stacked data against phases, without and with replay, at two rates: what is learned, and what is kept.

Tests H4 (phases.toml): stacked (index 0) against phases with 5 % replay (index 2), each at its better rate. Phases are
scored at their end on all that was to be learned.
Launch: mice sweep --config=studies/recall/phases.py --workdir=studies/recall/runs/phases --workers=2
"""

from mice_jax.config import Phase, Sweep
from recall import FOLDER, METRIC, NUM_EPOCHS, PHASES, best_rates, claims_of, recipe, scale_of, sources


def get_sweep(arg: str = FOLDER) -> Sweep:
    folder = arg or FOLDER
    scale, best = scale_of(folder), best_rates(arg or FOLDER)
    rate = best.get(32, best[scale.batch_sizes[0]])
    base = recipe(folder)
    axes = {
        "data.phases": [base.data.phases, *(phased(folder, replay) for replay in (0.0, 0.05))],
        "optim.learning_rate": [rate / 3, rate],
    }
    claims = claims_of(folder, "phases")
    return Sweep(base=base, axes=axes, seeds=scale.seeds, metric=METRIC, stop=None, claims=claims)


def phased(folder: str, replay: float) -> list[Phase]:
    """Returns a phase for each source, of which the later ones replay a share of those before."""
    return [
        Phase(name=name, num_epochs=NUM_EPOCHS, sources=[source], replay=replay if i else 0.0)
        for i, (name, source) in enumerate(zip(PHASES, sources(folder), strict=True))
    ]
