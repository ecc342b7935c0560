"""Models: families, layers, attention backends and the Hugging Face bridge."""
