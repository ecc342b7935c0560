"""What the fork server imports before its first fork (fork_server.py): all that a trial needs."""

import importlib

from mice_jax.runtime import slow_imports

slow_imports.begin()
importlib.import_module("mice_jax.train")
slow_imports.end()
