"""The HTML report of runs and sweeps."""
