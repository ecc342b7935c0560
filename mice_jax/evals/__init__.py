"""Evaluation of models: benchmarks of lm-evaluation-harness, and MT-Bench with a judge."""
