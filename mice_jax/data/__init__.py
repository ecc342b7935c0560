"""Data of a run: readers, tokenization, token stores, mixtures, packing and loading."""
