"""Which devices a run has: errors where there are none, and how many a CPU is split into."""

from pathlib import Path
from typing import NoReturn

import jax
import pytest

from mice_jax.config import Config
from mice_jax.errors import UserError, install_command
from mice_jax.runtime import cpu_devices
from mice_jax.runtime.cpu_devices import choose, default_count, usable_cores
from mice_jax.runtime.devices import find_devices, split_cpu

pytestmark = pytest.mark.smoke


@pytest.mark.parametrize(
    ("platforms", "raised", "parts"),
    [
        # What JAX raises where the plugin is missing, and where the name is not known.
        ("cuda", AssertionError(), ["JAX_PLATFORMS=cuda is set", install_command("cuda"), "JAX_PLATFORMS=cpu"]),
        ("tpu,cpu", RuntimeError("no TPU\nhere."), ["on this machine: no TPU here. ", install_command("tpu")]),
        ("metal", RuntimeError("unknown"), ["JAX_PLATFORMS=metal is set", "unset it"]),
        ("", RuntimeError("The TPU is in use."), ["JAX cannot use the devices of this machine: The TPU is in use."]),
    ],
)
def test_missing_devices_are_an_error_with_what_to_install(
    platforms: str, raised: Exception, parts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_devices() -> NoReturn:
        raise raised

    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setattr(jax, "devices", no_devices)
    with pytest.raises(UserError) as error:
        find_devices()
    assert all(part in str(error.value) for part in parts), error.value
    assert ("pip install" in str(error.value)) == (platforms in ("cuda", "tpu,cpu"))


@pytest.mark.parametrize(
    ("limit", "sizes", "count"),
    [
        (1, (1, -1, 1), 1),
        (6, (1, -1, 1), 6),
        (6, (1, -1, 4), 4),  # the largest multiple of what is given
        (7, (-1, 2, 1), 6),
        (6, (1, 1, 1), 1),  # sizes without -1 say how many
        (6, (2, 2, 1), 4),
        (2, (1, 8, 1), 1),  # the mesh then reports the sizes that do not fit
        (2, (1, -1, 4), 1),
    ],
)
def test_number_of_cpu_devices_fits_the_mesh(limit: int, sizes: tuple[int, int, int], count: int) -> None:
    assert choose(limit, sizes) == count


@pytest.mark.parametrize(
    ("environment", "recorded", "cores", "batch_size", "count"),
    [
        ({}, None, 2, 64, 2),
        ({"JAX_PLATFORMS": "cpu"}, None, 4, 64, 4),
        ({}, None, 96, 64, cpu_devices.MOST),
        ({}, None, 4, 3, 3),  # no device without a sample
        ({}, 2, 4, 64, 2),  # a resumed run keeps its number, on which its bits depend
        ({}, 4, 2, 64, 4),
        ({"JAX_NUM_CPU_DEVICES": "1"}, 4, 4, 64, None),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=3"}, None, 4, 64, None),
        ({"JAX_PLATFORMS": "tpu"}, None, 4, 64, None),
    ],
)
def test_cpu_is_split_unless_the_user_says_how(
    environment: dict[str, str], recorded: int | None, cores: int, batch_size: int, count: int | None
) -> None:
    assert default_count((1, -1, 1), batch_size, recorded, cores=cores, environment=environment) == count


CPU = {"JAX_PLATFORMS": "cpu"}


@pytest.mark.parametrize(
    ("environment", "recorded", "batch_size", "sizes", "words"),
    [
        (CPU, None, 64, (1, -1, 1), []),
        (CPU, None, 64, (1, 2, 1), []),
        (CPU, None, 64, (1, 1, 1), []),
        (CPU, None, 64, (1, 8, 1), ["mesh.fsdp=8", "needs 8 devices", "counts as 4", "JAX_NUM_CPU_DEVICES=8,"]),
        (CPU, None, 64, (3, -1, 2), ["needs a multiple of 6 devices", "counts as 4"]),
        (CPU, None, 2, (1, 4, 1), ["needs 4 devices", "counts as 2", "each sample of a step"]),
        (CPU, 2, 64, (1, 4, 1), ["this run has had 2 so far"]),
        (CPU | {"JAX_NUM_CPU_DEVICES": "8"}, None, 64, (1, 8, 1), []),
        (CPU | {"JAX_NUM_CPU_DEVICES": "8"}, None, 64, (1, 2, 1), ["needs 2 devices", "JAX_NUM_CPU_DEVICES=8 is set"]),
        (CPU | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}, None, 64, (1, 8, 1), []),
        ({"JAX_PLATFORMS": "cuda,cpu"}, None, 64, (1, 8, 1), []),  # There may be 8 GPUs.
    ],
)
def test_mesh_beyond_the_devices_of_a_cpu_is_an_error(
    environment: dict[str, str], recorded: int | None, batch_size: int, sizes: tuple[int, int, int], words: list[str]
) -> None:
    config = Config()
    config.optim.batch_size = batch_size
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = sizes
    if not words:
        return cpu_devices.check_mesh(config, recorded, cores=4, environment=environment)
    with pytest.raises(UserError) as error:
        cpu_devices.check_mesh(config, recorded, cores=4, environment=environment)
    assert all(word in str(error.value) for word in words), error.value


def test_cores_are_those_of_the_affinity_and_the_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(6)), raising=False)
    assert usable_cores(tmp_path) == 6  # no quota
    (tmp_path / "cpu").mkdir()
    for quota, cores in [("-1", 6), ("250000", 2), ("50000", 1)]:
        (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
        assert usable_cores(tmp_path) == cores
    for quota, cores in [("max", 6), ("400000", 4), ("900000", 6)]:
        (tmp_path / "cpu.max").write_text(f"{quota} 100000\n")
        assert usable_cores(tmp_path) == cores


def test_number_of_devices_that_is_set_in_jax_is_kept() -> None:
    assert not split_cpu(3) and jax.config.jax_num_cpu_devices == 8  # that of conftest.py
    assert not split_cpu(None)
