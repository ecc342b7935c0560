"""What mixes the tokens of a row in layers without attention; a file for each kind, and what they share.

A mixer is a Flax NNX module of the layer. Besides its parameters it has, as `ShortConvMixer` shows: its computation for
packed rows and its continuation of rows from a state, the state before the first token, and what it costs.
"""

from mice_jax.models.mixers.short_conv import ShortConvMixer
from mice_jax.models.spec import Mixer, ShortConv

MIXERS: dict[type[Mixer], type[ShortConvMixer]] = {ShortConv: ShortConvMixer}
