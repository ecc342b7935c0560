"""mice_jax: full supervised fine-tuning of small language models with exact large batches, in JAX."""

import os

# Transformers is here for tokenizers; that it misses PyTorch is no news to anyone.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

__version__ = "0.1.0"
