"""All data in one phase against the three phases one after another, with batches of 12 and 96 samples.

Tests the paper's claim that stacked data ends at least as well as phased data, whatever the batch size. As in the
paper, a phase starts from the best checkpoint of the phase before, here by held-out loss, with a new optimizer; both
arms see each sample equally often.
Found (README.md): stacked data ends far lower, and is also lower at the best checkpoints, by 0.80 and 0.89. What the
model learns in one phase is lost in the next.
Cost: 12 runs, about 25 minutes on two busy CPU cores.
Launch: mice sweep --config=studies/mouse/mouse_phases.py --workdir=studies/mouse/runs/phases --workers=2
"""

from mice_jax.config import Phase, Sweep
from mouse import FOLDER, LARGE, NUM_EPOCHS, PHASES, SEEDS, SMALL, recipe, sources


def phased(folder: str) -> list[Phase]:
    each = zip(PHASES, sources(folder), strict=True)
    phases = [Phase(name=name, num_epochs=NUM_EPOCHS, sources=[source]) for name, source in each]
    for phase in phases[1:]:
        phase.optimizer, phase.schedule, phase.seed_from = "reset", "restart", "best"
    return phases


def get_sweep(arg: str = FOLDER) -> Sweep:
    folder = arg or FOLDER
    base = recipe(folder)
    axes = {"data.phases": [base.data.phases, phased(folder)], "optim.batch_size": [SMALL, LARGE]}
    return Sweep(base=base, axes=axes, seeds=SEEDS, metric="eval/loss", stop=None)
