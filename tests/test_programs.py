"""The cache of compiled programs, XLA flags and huge pages."""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from helpers.models import gap, spec_of
from mice_jax.models.transformer import make_decoder
from mice_jax.runtime import compile_cache, xla_flags

HITS, MISSES = "/jax/compilation_cache/cache_hits", "/jax/compilation_cache/cache_misses"
X = np.arange(12, dtype=np.float32).reshape(3, 4)


@pytest.fixture
def no_cache_folder() -> Iterator[None]:
    """Resets JAX to the state of a new process, which has no cache folder."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def compile_again() -> Iterator[Callable[[], tuple[np.ndarray, int, int]]]:
    """Compiles and runs one function as a new process would; returns its result, cache hits and cache misses."""
    seen: Counter[str] = Counter()

    def count(event: str, **_: object) -> None:
        seen[event] += 1

    def run() -> tuple[np.ndarray, int, int]:
        seen.clear()
        compilation_cache.reset_cache()
        out = np.asarray(jax.jit(lambda x: jnp.tanh(x) @ x.T)(X))
        return out, seen[HITS], seen[MISSES]

    jax.monitoring.register_event_listener(count)
    yield run
    jax.monitoring.unregister_event_listener(count)


def test_a_program_is_cached_for_processes_on_the_same_kind_of_machine(
    no_cache_folder: None, compile_again: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = compile_cache.enable(tmp_path)
    assert kept.is_relative_to(tmp_path / "programs")
    first, hits, misses = compile_again()
    assert (hits, misses) == (0, 1) and any(kept.iterdir())
    again, hits, misses = compile_again()
    assert (hits, misses) == (1, 0) and again.tobytes() == first.tobytes()
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setattr(compile_cache, "_machine", lambda: "another")
    assert compile_cache.enable(tmp_path) != kept
    assert compile_again()[1:] == (0, 1)


def test_a_cache_folder_given_to_jax_by_the_user_is_kept(no_cache_folder: None, tmp_path: Path) -> None:
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    assert compile_cache.enable(tmp_path) == tmp_path / "own"
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "own")


@pytest.mark.parametrize("damage", ["cut short", "emptied", "a byte changed"])
def test_a_damaged_cache_entry_is_compiled_again_with_a_warning(
    damage: str, no_cache_folder: None, compile_again: Callable, tmp_path: Path
) -> None:
    kept = compile_cache.enable(tmp_path)
    expected, *_ = compile_again()
    [entry] = [file for file in kept.iterdir() if file.name.endswith("-cache")]
    whole = entry.read_bytes()
    middle = len(whole) // 2
    changed = whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :]
    entry.write_bytes({"cut short": whole[:middle], "emptied": b"", "a byte changed": changed}[damage])
    with pytest.warns(UserWarning, match="Error reading persistent compilation cache entry"):
        out, hits, _ = compile_again()
    assert hits == 0 and out.tobytes() == expected.tobytes()


# ---------------------------------------------------------------------------------------- flags
def test_xla_flags_are_added_once_and_never_replace_the_user_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=here --xla_gpu_deterministic_ops=false")
    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
    for _ in range(2):
        xla_flags.set_flags(deterministic=True)
        assert os.environ["XLA_FLAGS"].split() == [
            "--xla_dump_to=here", "--xla_gpu_deterministic_ops=false", *xla_flags.FLAGS["gpu"][1],
        ]  # fmt: skip
    assert "LIBTPU_INIT_ARGS" not in os.environ


def test_deterministic_runs_set_one_more_xla_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "")
    xla_flags.set_flags(deterministic=False)
    assert os.environ["XLA_FLAGS"].split() == list(xla_flags.FLAGS["gpu"][1])
    xla_flags.set_flags(deterministic=True)
    assert os.environ["XLA_FLAGS"].split() == [*xla_flags.FLAGS["gpu"][1], *xla_flags.DETERMINISTIC["gpu"]]


@pytest.mark.slow  # compiles three programs as a run does
def test_quick_passes_draw_the_same_random_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "xla_backend_optimization_level"
    assert xla_flags.options_of_init("cpu") == {}  # conftest.py sets the flag
    monkeypatch.setenv("XLA_FLAGS", "")
    quick = xla_flags.options_of_init("cpu")
    assert quick == {name: 1} and xla_flags.options_of_init("tpu") == {}
    decoder, as_in_a_run = make_decoder(spec_of(num_layers=1)), {"xla_cpu_use_fusion_emitters": True}

    def drawn(options: dict[str, int]) -> Any:
        return jax.device_get(jax.jit(decoder.init, compiler_options=as_in_a_run | options)(jax.random.key(0)))

    # XLA's default level is 3. Without any passes the last bits differ, so that this would be seen.
    all_passes = drawn({name: 3})
    assert gap(drawn(quick), all_passes) == 0 < gap(drawn({name: 0}), all_passes) < 1e-6


@pytest.mark.slow  # two processes that import jax
def test_xla_accepts_every_flag_of_the_table() -> None:
    def ends(flags: str) -> int:
        command = [sys.executable, "-c", "import jax; jax.devices()"]
        return subprocess.run(command, env=os.environ | {"XLA_FLAGS": flags}, capture_output=True).returncode

    known = [f for variable, flags in xla_flags.FLAGS.values() if variable == "XLA_FLAGS" for f in flags]
    known += [f for flags in xla_flags.DETERMINISTIC.values() for f in flags]
    assert ends(" ".join(known)) == 0
    assert ends(" ".join([*known, "--xla_no_such_flag=true"])) != 0


# ---------------------------------------------------------------------------------------- huge pages
PAGES = """
import os, sys
from mice_jax.runtime import xla_flags
print(os.getpid(), os.environ.get("GLIBC_TUNABLES"), sys.argv[1:], flush=True)
xla_flags.reexec_with_huge_pages()
block = bytearray(64 * 2**20)
print(sum(int(x.split()[1]) for x in open("/proc/self/smaps") if x.startswith("AnonHugePages:")))
"""


def starts_of(environment: dict[str, str]) -> tuple[list[str], int]:
    """What the program prints at each of its starts, and how many KiB of huge pages it has at the end."""
    done = subprocess.run(
        [sys.executable, "-c", PAGES, "--flag=a b"], env=environment, capture_output=True, text=True, check=True
    )
    *starts, kib = done.stdout.splitlines()
    return starts, int(kib)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's own settings")
def test_a_command_executes_itself_again_once_for_huge_pages() -> None:
    plain = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    (first, second), _ = starts_of(plain)
    number, set_before, arguments = first.split(maxsplit=2)
    assert set_before == "None" and "--flag=a b" in arguments
    assert second == f"{number} {xla_flags.HUGE_PAGES_ENV['GLIBC_TUNABLES']} {arguments}"
    [only], _ = starts_of(plain | {"GLIBC_TUNABLES": "glibc.malloc.check=0"})
    assert only.split()[1] == "glibc.malloc.check=0", "the user's setting is kept, and the program starts once"


THP_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")  # the word in brackets is in force


@pytest.mark.skipif(
    not THP_SETTING.exists() or "[never]" in THP_SETTING.read_text(), reason="this system has no huge pages"
)
def test_large_blocks_are_allocated_in_huge_pages() -> None:
    none = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}
    assert starts_of(os.environ | xla_flags.HUGE_PAGES_ENV)[1] > 48 * 1024
    if "[madvise]" in THP_SETTING.read_text():  # with [always], every process gets them
        assert starts_of(none)[1] < 8 * 1024
