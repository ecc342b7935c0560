"""What XLA is asked for before it starts: one table of flags by backend.

Nothing here imports jax: a device's flags are read when it is first touched.
"""

import os

# By backend: the variable that it reads, and what is put there beside what the user has; a flag that the user sets is
# the user's. An unknown flag ends the process, so each has to be known to every jax that we run on.
FLAGS: dict[str, tuple[str, tuple[str, ...]]] = {
    # Tried, and no faster: BUILD_NOTES.md.
    "cpu": ("XLA_FLAGS", ()),
    # Collectives run beside what does not wait for them, as JAX's page on GPU performance advises.
    "gpu": ("XLA_FLAGS", ("--xla_gpu_enable_latency_hiding_scheduler=true",)),
    # libtpu overlaps collectives by itself.
    "tpu": ("LIBTPU_INIT_ARGS", ()),
}
DETERMINISTIC = {"gpu": ("--xla_gpu_deterministic_ops=true",)}  # CPU and TPU repeat themselves anyway


def set_flags(deterministic: bool) -> None:
    """Sets the table's flags, and those of bit-equal reruns where asked; before anything touches a device."""
    for backend, (variable, flags) in FLAGS.items():
        mine = os.environ.get(variable, "").split()
        names = {flag.partition("=")[0] for flag in mine}
        wanted = (*flags, *(DETERMINISTIC.get(backend, ()) if deterministic else ()))
        added = [flag for flag in wanted if flag.partition("=")[0] not in names]
        if added:
            os.environ[variable] = " ".join([*mine, *added])
