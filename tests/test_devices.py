"""Errors of machines without the devices that a run asks for."""

from typing import NoReturn

import jax
import pytest

from mice_jax.errors import UserError, install_command
from mice_jax.runtime.devices import find_devices

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
