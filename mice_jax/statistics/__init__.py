"""Statistics of a few seeds: comparisons, equivalence, several tests at once, power, and rank correlations.

Everything is a function of plain arrays and needs numpy alone. Each procedure is simulated in tests/test_statistics.py:
how often it errs where there is nothing to find, and how often its interval covers the truth.
"""
