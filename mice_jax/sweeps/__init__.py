"""Sweeps: many runs that differ in a few fields, and the rules that decide which of them are worth finishing."""

from mice_jax.sweeps.bracket_rule import BracketRule
from mice_jax.sweeps.grid_replay import Replay, replay

__all__ = ["BracketRule", "Replay", "replay"]
