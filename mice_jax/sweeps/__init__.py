"""Sweeps: many runs that differ in a few fields of their config."""
