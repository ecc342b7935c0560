"""Eight CPU devices, strict dtype promotion where it can be had, and no skipped test in CI but for what is missing."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture
def strict_dtypes():
    """Our own model, loss and data code promotes no dtype unasked; optax's update does, so this is no default."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="module")
def one_thread():
    """Of torch, whose threads cost more than they bring in models as small as those of tests."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def cache_dir(tmp_path_factory, monkeypatch):
    """Token stores of tests lie beside them."""
    monkeypatch.setenv("MICE_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))


MAY_SKIP = ("gpu", "postgres", "chromium")  # what a machine of CI may lack


# In CI nothing but these may be skipped: there a skip is a failure that says so.
@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    skipped = report.skipped and not hasattr(report, "wasxfail")
    if os.environ.get("MICE_CI") and skipped and not any(map(item.get_closest_marker, MAY_SKIP)):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped in CI: {call.excinfo.value}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    if os.environ.get("MICE_CI") and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"{collector.nodeid} was skipped in CI: {report.longrepr[2]}"
    return report
