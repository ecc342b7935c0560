"""Signals that end a run: in a process of its own, and in a Python program of the user's."""

import signal
import threading
from collections.abc import Iterator

import pytest

from mice_jax.runtime import signals
from mice_jax.runtime.signals import STOP_SIGNALS, PreemptionHandler

pytestmark = pytest.mark.smoke


class Exited(Exception):
    """Stands for the end of the process."""


@pytest.fixture(autouse=True)
def exits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def exit_at_once(code: int, message: str) -> None:
        raise Exited(code)

    monkeypatch.setattr(signals, "_exit_at_once", exit_at_once)
    of_pytest = signal.signal(signal.SIGINT, signal.default_int_handler)  # A shell's background jobs ignore SIGINT.
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    yield
    after = [signal.getsignal(number) for number in STOP_SIGNALS]
    signal.signal(signal.SIGINT, of_pytest)
    assert after == before


@pytest.mark.parametrize(("owns_process", "raised"), [(True, Exited), (False, KeyboardInterrupt)])
def test_early_ctrl_c_ends_only_a_process_of_the_run_s_own(owns_process: bool, raised: type[BaseException]) -> None:
    handler = PreemptionHandler(owns_process)
    try:
        with pytest.raises(raised):
            signal.raise_signal(signal.SIGINT)
    finally:
        handler.restore_handlers()


@pytest.mark.parametrize(("owns_process", "raised"), [(True, Exited), (False, KeyboardInterrupt)])
def test_second_ctrl_c_of_a_run_does_not_wait_for_the_step(owns_process: bool, raised: type[BaseException]) -> None:
    handler = PreemptionHandler(owns_process)
    try:
        handler.enable_saving()
        signal.raise_signal(signal.SIGINT)
        assert handler.signal == "SIGINT", "the first one only asks the run to stop"
        with pytest.raises(raised):
            signal.raise_signal(signal.SIGINT)
    finally:
        handler.restore_handlers()


def test_run_in_another_thread_leaves_the_handlers_alone() -> None:
    made: list[PreemptionHandler] = []

    def work() -> None:
        handler = PreemptionHandler(owns_process=False)
        handler.enable_saving()
        handler.restore_handlers()
        made.append(handler)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert made and made[0].signal is None
