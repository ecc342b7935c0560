"""The processes of a sweep's worker that is one multi-host launch: the first tells the others which trial they run.

They speak over TCP, a line of JSON each, on the port above the coordinator's (that one is the trials' own). Nothing is
kept: a line that breaks is a process that is gone, and ends the rest.
"""

import contextlib
import dataclasses
import json
import os
import queue
import socket
import threading
import time
from pathlib import Path
from typing import Any

from mice_jax.errors import Preempted, UserError
from mice_jax.runtime import watchdog

JOIN_S = 100.0  # for all processes to come together
LOOK_S = 0.2
SEEN_S = 60.0  # how long a shared file system may take to show a trial's config


@dataclasses.dataclass(frozen=True)
class Place:
    """Which process this is, of how many, and where they meet."""

    coordinator_address: str
    num_processes: int
    process_id: int
    expect_devices: int | None = None

    def flags(self) -> list[str]:
        """Of a trial's process here."""
        return [f"--{name}={value}" for name, value in dataclasses.asdict(self).items() if value is not None]

    def meeting(self) -> tuple[str, int]:
        """Host and port of the first process's line to the others."""
        host, _, port = self.coordinator_address.rpartition(":")
        if not host or not port.isdigit():
            raise UserError(f"--coordinator_address={self.coordinator_address} must be host:port.")
        return host.strip("[]"), int(port) + 1


class _Line:
    """One end of a connection, by messages."""

    def __init__(self, connection: socket.socket):
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._connection, self._file = connection, connection.makefile("rb")

    def say(self, **message: int) -> None:
        with contextlib.suppress(OSError):  # who is gone is noticed where it is listened to
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    def hear(self) -> dict[str, Any] | None:
        """The next message; None where the other end is gone."""
        try:
            said = self._file.readline()
            return json.loads(said) if said.endswith(b"\n") else None
        except (OSError, ValueError):
            return None

    def close(self) -> None:
        self._file.close()
        self._connection.close()


class Lead:
    """Of the first process: its lines to the others."""

    def __init__(self, place: Place):
        self.place = place
        self._lines: dict[int, _Line] = {}
        _, port = place.meeting()
        try:
            server = socket.create_server(("", port))
        except OSError as e:
            raise UserError(f"port {port}, on which this worker's processes meet, is taken: {e.strerror}.") from None
        until = time.monotonic() + JOIN_S
        with server:
            while len(self._lines) < place.num_processes - 1:
                server.settimeout(max(0.01, until - time.monotonic()))
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    missing = sorted(set(range(1, place.num_processes)) - set(self._lines))
                    raise UserError(
                        f"of this worker's {place.num_processes} processes, {missing} did not come within {JOIN_S:.0f} "
                        "s. Start the same command once in each, with its own --process_id."
                    ) from None
                line = _Line(connection)
                number = (line.hear() or {}).get("process_id")
                if isinstance(number, int) and 0 < number < place.num_processes and number not in self._lines:
                    self._lines[number] = line
                else:
                    line.close()

    def begin(self, trial: int) -> None:
        for line in self._lines.values():
            line.say(trial=trial)

    def await_all(self) -> None:
        """Returns once every other process has ended its part of a trial; Preempted where one is gone."""
        lost = [number for number, line in self._lines.items() if line.hear() is None]
        if lost:
            raise Preempted(
                f"of this worker's processes, {lost} have ended. Run the same command in every process to go on."
            )

    def end(self, code: int) -> None:
        for line in self._lines.values():
            line.say(end=code)
            line.close()


def follow(folder: Path, place: Place) -> int:
    """Runs this process's part of each trial that the first process begins; returns the exit code it ends with."""
    line = _Line(_connect(place))
    line.say(process_id=place.process_id)
    said: queue.Queue[dict[str, Any]] = queue.Queue()

    def listen() -> None:
        while (message := line.hear()) is not None:
            said.put(message)
            if "end" in message:
                return
        print("error: the first process of this worker has ended, so this one ended too.", flush=True)
        os._exit(1)  # the pipe that its run lives by closes with it

    threading.Thread(target=listen, daemon=True).start()
    while "end" not in (message := said.get()):
        run = folder / "runs" / str(message["trial"])
        config = _shown(run / "config.py")
        environment = programs_of(folder)
        with (run / f"log.{place.process_id}.txt").open("a") as log:
            arguments = [f"--config={config}", f"--workdir={run}", *place.flags()]
            line.say(code=watchdog.run_child("mice_jax.train", arguments, run, environment, log))
    return int(message["end"])


def programs_of(folder: Path) -> dict[str, str]:
    """The environment by which the trials of a sweep share compiled programs."""
    programs = {"JAX_COMPILATION_CACHE_DIR": str(folder.resolve() / "programs")}
    return {k: v for k, v in programs.items() if k not in os.environ}


def _connect(place: Place) -> socket.socket:
    until = time.monotonic() + JOIN_S
    while True:
        try:
            return socket.create_connection(place.meeting(), timeout=JOIN_S)
        except OSError as e:
            if time.monotonic() > until:
                host, port = place.meeting()
                raise UserError(
                    f"the first process of this worker was not reached at {host}:{port} within {JOIN_S:.0f} s: "
                    f"{e.strerror or e}."
                ) from None
            time.sleep(LOOK_S)


def _shown(file: Path) -> Path:
    until = time.monotonic() + SEEN_S
    while not file.exists():
        if time.monotonic() > until:
            raise UserError(f"{file} is not here: --workdir must be one folder that all processes share.")
        time.sleep(LOOK_S)
    return file
