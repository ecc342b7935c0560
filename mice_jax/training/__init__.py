"""Training runs: how they are built, started, evaluated, saved, stopped and summarised."""
