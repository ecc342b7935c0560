"""What the fork server imports before its first fork (fork_server.py): all that a trial needs."""

import gc
import importlib

from mice_jax.runtime import unused_packages

unused_packages.hide()
importlib.import_module("mice_jax.train")
unused_packages.show()
gc.freeze()  # The garbage collector of a forked process then neither visits nor copies what was imported.
