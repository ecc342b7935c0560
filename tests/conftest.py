"""Settings of every test: eight CPU devices, one cache of compiled programs, and no skipped tests in CI.

Most tests run the same few tiny programs, and compiling one takes ten times as long as running it. All processes of a
test run, and the commands that they start, therefore share a cache. $MICE_TEST_PROGRAMS keeps it for further test runs.
"""

import atexit
import functools
import gc
import itertools
import os
import shutil
import sys
import tempfile
import threading

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["MICE_JAX_TRANSFER_GUARD"] = "disallow"  # no implicit transfer between host and devices within a step
# Most of a test's time goes into compiling programs that run for milliseconds: LLVM need not optimise them, and the
# older code generation for fused operations takes half as long to compile.
QUICK_COMPILATION = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK_COMPILATION}".strip()
if "MICE_TEST_PROGRAMS" not in os.environ:  # the first process sets it for the workers that it starts
    os.environ["MICE_TEST_PROGRAMS"] = tempfile.mkdtemp(prefix="mice_jax_programs_")
    atexit.register(shutil.rmtree, os.environ["MICE_TEST_PROGRAMS"], ignore_errors=True)
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ["MICE_TEST_PROGRAMS"]
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# Programs without the lines of Python that made them are lowered a tenth faster.
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"

import jax
import pytest
from jax._src import compilation_cache, lru_cache

jax.config.update("jax_num_cpu_devices", 8)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the quick files last, so that no process is left alone with a long one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("smoke") is not None)


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Makes garbage collection rare, and keeps it from visiting what is imported: it took a tenth of all time."""
    gc.disable()
    yield
    gc.freeze()
    gc.set_threshold(20_000, 20, 100)
    gc.enable()


SHARED = {
    "mice_jax.training.build": ("shared_step_functions", "shared_model_functions"),
    "mice_jax.model_source": ("_random_init",),
    "mice_jax.inference.sampler": ("shared_functions",),
    "mice_jax.evals.loglikelihood": ("shared_score",),
}


@pytest.fixture(scope="session", autouse=True)
def shared_functions() -> None:
    """Keeps the compiled functions of many runs, so that all tests of a process share those of the same tiny models."""
    for name, functions in SHARED.items():
        module = sys.modules.get(name)
        for function in functions if module else ():
            setattr(module, function, functools.lru_cache(maxsize=64)(getattr(module, function).__wrapped__))


class AtomicCache(lru_cache.LRUCache):
    """JAX's cache of compiled programs, whose entries appear whole: JAX itself writes them in place."""

    def put(self, key: str, value: bytes) -> None:
        entry = os.path.join(os.fspath(self.path), f"{key}-cache")
        if not os.path.exists(entry):
            partial = f"{entry}.{os.getpid()}.{threading.get_ident()}"
            with open(partial, "wb") as file:
                file.write(value)
            os.replace(partial, entry)


compilation_cache.get_file_cache = lambda path: (AtomicCache(path, max_size=-1), path)


@pytest.fixture
def strict_dtypes():
    """Our own model, loss and data code never promotes dtypes; optax's update does, so this is not the default."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="module")
def one_thread():
    """Limits torch to one thread: with models as small as those of tests, more threads cost more than they bring."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


NUMBERS = itertools.count()


@pytest.fixture(autouse=True)
def cache_dir(tmp_path_factory, monkeypatch):
    """Each test has its own folder for token stores; pytest would list all folders to number the next one."""
    monkeypatch.setenv("MICE_JAX_CACHE", str(tmp_path_factory.mktemp(f"cache{next(NUMBERS)}", numbered=False)))


MAY_SKIP = ("gpu", "postgres", "chromium")  # tests that need what a CI machine may lack


# In CI only tests with these markers may be skipped; any other skip is a failure.
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
