"""A worker of a sweep, which claims trials and runs them in a process of their own until all trials have ended."""

import contextlib
import os
import queue
import signal
import threading
import time
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mice_jax.config import Config
from mice_jax.errors import Paused, Preempted, UserError
from mice_jax.runtime import cpu_devices
from mice_jax.runtime.fork_server import CommandProcess
from mice_jax.storage import lock
from mice_jax.storage.json_file import read_json
from mice_jax.sweeps.process_group import Connection, Followers, ProcessSpec, connect_to_main
from mice_jax.sweeps.study import Study, has_paused, read_summary
from mice_jax.training.stop_monitor import TRIAL_VARIABLE, last_record

CACHE_VARIABLE = "JAX_COMPILATION_CACHE_DIR"
POLL_S = 0.5
UNLOCK_TIMEOUT_S = 60.0  # how long the run of a dead worker may take to release its folder
SHARED_FILE_TIMEOUT_S = 60.0  # how long a shared file system may take to show a new file
MAX_ATTEMPTS = 3  # starts of a trial's process that get no further than the starts before
# The exit codes of a trial's process that was asked to end before its signal handlers, which save, were in place.
ENDED_BY_SIGNAL = (128 + signal.SIGTERM, 128 + signal.SIGINT)


def work(study: Study, followers: Followers | None = None) -> int:
    """Runs trials until every trial of the study has ended.

    Args:
        study: the study.
        followers: the other processes of this worker, if there are any.

    Returns:
        The exit code of the worker.

    Raises:
        Preempted: the worker was asked to end, or one of its processes was lost; the trial is saved.
    """
    with contextlib.closing(CommandProcess()) as process:
        while True:
            number = study.claim()
            if number is None:
                study.end_unneeded()
                if study.num_ended() == len(study.trials()):
                    return 0
                # Other workers run the rest. Should one of them die, its trial is resumed here.
                time.sleep(POLL_S)
                continue
            with study.claim_kept(number):
                try:
                    exit_code = _run_trial(study, number, process, followers)
                except Preempted:
                    study.claims.release(number)
                    raise
                if _has_paused(study, number, exit_code):
                    study.pause(number)
                else:
                    study.end(number, exit_code)


def work_as_main_process(study: Study, process: ProcessSpec) -> int:
    """Runs trials as the main process of a worker of several processes; returns the exit code."""
    followers = Followers(process)
    exit_code = 1
    try:
        exit_code = work(study, followers)
    except Preempted as e:
        exit_code = e.exit_code
        raise
    finally:
        followers.end(exit_code)
    return exit_code


def follow_main_process(folder: Path, process: ProcessSpec) -> int:
    """Runs this process's part of each trial that the main process begins.

    Args:
        folder: the sweep's folder.
        process: which process of the worker this is.

    Returns:
        The exit code that the main process gives.
    """
    connection = connect_to_main(process)
    messages: queue.Queue[dict[str, Any]] = queue.Queue()
    threading.Thread(target=_receive_messages, args=(connection, messages), daemon=True).start()
    while "end" not in (message := messages.get()):
        run = folder / "runs" / str(message["trial"])
        config = _await_file(run / "config.py")
        arguments = [f"--config={config}", f"--workdir={run}", *process.flags()]
        connection.send(code=_run_once(arguments, run, {}, run / f"log.{process.process_id}.txt"))
    return int(message["end"])


def _receive_messages(connection: Connection, messages: queue.Queue[dict[str, Any]]) -> None:
    """Queues messages up to the last one; ends this process where the main process is lost."""
    while (message := connection.receive()) is not None:
        messages.put(message)
        if "end" in message:
            return
    print("error: the main process of this worker has ended, so this process ends too.", flush=True)
    os._exit(1)  # this closes the pipe to the run, which then ends as well


# ---------------------------------------------------------------------------------------- one trial
def _run_trial(study: Study, number: int, process: CommandProcess, followers: Followers | None) -> int:
    """Runs or resumes a trial until its command has ended for good; returns the exit code."""
    folder = study.run_folder(number)
    # A worker may have been killed after its run had ended and before it could record that.
    known_exit_code = {"completed": 0, "stopped": 3}.get((read_summary(folder) or {}).get("status", ""))
    if known_exit_code is not None:
        return known_exit_code
    config = study.begin(number)
    environment = {TRIAL_VARIABLE: study.trial_variable(number)}
    arguments, log = [f"--config={config}", f"--workdir={folder}"], folder / "log.txt"
    furthest_step, attempts = -1, 0
    while True:
        _await_unlocked(folder)
        if followers:
            followers.begin_trial(number)
            exit_code = _run_once([*arguments, *followers.process.flags()], folder, environment, log)
            followers.await_trial()
        else:
            settings = settings_of_process(study.config(number), folder)
            exit_code = process.run("mice_jax.train", arguments, folder, environment, log, settings)
        if _has_paused(study, number, exit_code):
            return exit_code
        _raise_if_preempted(number, exit_code)
        if exit_code in (0, UserError.exit_code, 3):
            return exit_code
        # The process crashed or was killed: it is started again as long as the run makes progress.
        step = last_record(folder).get("step", 0)
        attempts = 1 if step > furthest_step else attempts + 1
        furthest_step = max(furthest_step, step)
        if attempts >= MAX_ATTEMPTS:
            return exit_code


def _run_once(arguments: Sequence[str], folder: Path, environment: Mapping[str, str], log: Path) -> int:
    """Runs one process of a trial of several, which JAX joins once, so that each trial needs new ones."""
    with contextlib.closing(CommandProcess()) as process:
        return process.run("mice_jax.train", arguments, folder, environment, log)


def settings_of_process(config: Config, folder: Path) -> Hashable:
    """Returns what a run settles once for its process. Runs that differ in it cannot run in the same process.

    Args:
        config: the run's config.
        folder: the run's folder, which is empty before it has begun.
    """
    written = read_json(folder / "config.json")
    recorded = cpu_devices.recorded_count(written) if written else None
    return cpu_devices.count_of_run(config, recorded), config.train.deterministic, config.data.cache_dir


def _has_paused(study: Study, number: int, exit_code: int) -> bool:
    """Returns whether the run of a claimed trial ended with this exit code because it had come to its pause."""
    return exit_code == Paused.exit_code and study.pauses(number) and has_paused(study.run_folder(number))


def _raise_if_preempted(number: int, exit_code: int) -> None:
    if exit_code == Preempted.exit_code:
        raise Preempted(f"trial {number} has saved its state; run the same command to continue.")
    if exit_code in ENDED_BY_SIGNAL:
        raise Preempted(f"trial {number} was asked to end before its first step; run the same command to continue.")


def _await_unlocked(folder: Path) -> None:
    """Waits until no process holds a run's folder, because the run of a killed worker may live a moment longer."""
    deadline = time.monotonic() + UNLOCK_TIMEOUT_S
    while True:
        try:
            lock.FolderLock(folder).release()
            return
        except UserError:
            if time.monotonic() > deadline:
                raise
            time.sleep(POLL_S)


def _await_file(file: Path) -> Path:
    """Waits until a file that another machine has written is visible here."""
    deadline = time.monotonic() + SHARED_FILE_TIMEOUT_S
    while not file.exists():
        if time.monotonic() > deadline:
            raise UserError(f"{file} does not exist here. --workdir must be one folder that all processes share.")
        time.sleep(POLL_S)
    return file
