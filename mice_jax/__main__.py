"""`python -m mice_jax <command>` is `mice <command>`."""

from mice_jax.cli.main import start

start()
