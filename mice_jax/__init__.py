"""mice_jax: full supervised fine-tuning of small language models with exact large batches, in JAX."""

__version__ = "0.1.0"
