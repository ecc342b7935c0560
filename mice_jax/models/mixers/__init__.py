"""What mixes the tokens of a row in layers without attention; a file for each kind, and what they share.

A mixer is a Flax NNX module of the layer. Besides its parameters it has, as `ShortConvMixer` shows: its computation for
packed rows and its continuation of rows from a state, the state before the first token, and what it costs.
"""

from typing import Any

from mice_jax.models.mixers.gated_delta_mixer import GatedDeltaMixer
from mice_jax.models.mixers.mamba2_mixer import Mamba2Mixer
from mice_jax.models.mixers.short_conv import ShortConvMixer
from mice_jax.models.spec import GatedDelta, Mamba2, Mixer, ShortConv

MIXERS: dict[type[Mixer], Any] = {ShortConv: ShortConvMixer, Mamba2: Mamba2Mixer, GatedDelta: GatedDeltaMixer}
