"""Connects the processes of one sweep worker, of which the main process tells the others which trial to run.

The processes exchange one JSON message per line over TCP, on the port after the coordinator's, because the trials use
the coordinator's own port. A connection that breaks means that the other process has ended.
"""

import contextlib
import dataclasses
import json
import socket
import time
from typing import Any

from mice_jax.errors import Preempted, UserError

JOIN_TIMEOUT_S = 100.0  # for all processes to connect
RETRY_S = 0.2  # between two attempts to connect


@dataclasses.dataclass(frozen=True)
class ProcessSpec:
    """The number of this process of a worker, the number of all its processes, and the coordinator's address."""

    coordinator_address: str
    num_processes: int
    process_id: int
    expect_devices: int | None = None

    def flags(self) -> list[str]:
        """Returns the flags of the trial's process that this process starts."""
        return [f"--{name}={value}" for name, value in dataclasses.asdict(self).items() if value is not None]

    def control_address(self) -> tuple[str, int]:
        """Returns the host and port at which the main process accepts the others."""
        host, _, port = self.coordinator_address.rpartition(":")
        if not host or not port.isdigit():
            raise UserError(f"--coordinator_address={self.coordinator_address} must be host:port.")
        return host.strip("[]"), int(port) + 1


class Connection:
    """One end of a TCP connection that carries messages."""

    def __init__(self, connection: socket.socket):
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._connection, self._file = connection, connection.makefile("rb")

    def send(self, **message: int) -> None:
        """Sends a message; a broken connection is noticed by `receive` only."""
        with contextlib.suppress(OSError):
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> dict[str, Any] | None:
        """Waits for the next message; returns None if the other process has ended."""
        try:
            line = self._file.readline()
            return json.loads(line) if line.endswith(b"\n") else None
        except (OSError, ValueError):
            return None

    def close(self) -> None:
        """Closes the connection."""
        self._file.close()
        self._connection.close()


class Followers:
    """The main process's connections to the other processes of a worker.

    Args:
        process: the main process.

    Raises:
        UserError: the port is in use, or a process did not connect in time.
    """

    def __init__(self, process: ProcessSpec):
        self.process = process
        self._connections: dict[int, Connection] = {}
        _, port = process.control_address()
        try:
            server = socket.create_server(("", port))
        except OSError as e:
            raise UserError(
                f"port {port}, on which the processes of this worker connect, cannot be opened: {e.strerror}. Give a "
                "--coordinator_address whose next port is free."
            ) from None
        deadline = time.monotonic() + JOIN_TIMEOUT_S
        with server:
            while len(self._connections) < process.num_processes - 1:
                server.settimeout(max(0.01, deadline - time.monotonic()))
                try:
                    accepted, _ = server.accept()
                except TimeoutError:
                    raise self._missing() from None
                self._register(Connection(accepted))

    def _register(self, connection: Connection) -> None:
        """Keeps the connection of a process of this worker; closes any other."""
        number = (connection.receive() or {}).get("process_id")
        if isinstance(number, int) and 0 < number < self.process.num_processes and number not in self._connections:
            self._connections[number] = connection
        else:
            connection.close()

    def _missing(self) -> UserError:
        missing = sorted(set(range(1, self.process.num_processes)) - set(self._connections))
        return UserError(
            f"of this worker's {self.process.num_processes} processes, {missing} did not connect within "
            f"{JOIN_TIMEOUT_S:.0f} s. Start the same command once in each, with its own --process_id."
        )

    def begin_trial(self, number: int) -> None:
        """Tells every other process to run its part of a trial."""
        for connection in self._connections.values():
            connection.send(trial=number)

    def await_trial(self) -> None:
        """Waits until every other process has ended its part of the trial; raises Preempted where one is lost."""
        lost = [number for number, connection in self._connections.items() if connection.receive() is None]
        if lost:
            raise Preempted(
                f"of this worker's processes, {lost} have ended. Run the same command in every process to continue."
            )

    def end(self, exit_code: int) -> None:
        """Tells every other process to end with this exit code."""
        for connection in self._connections.values():
            connection.send(end=exit_code)
            connection.close()


def connect_to_main(process: ProcessSpec) -> Connection:
    """Connects a process to the main process of its worker; raises UserError where that takes too long."""
    host, port = process.control_address()
    deadline = time.monotonic() + JOIN_TIMEOUT_S
    while True:
        try:
            connection = Connection(socket.create_connection((host, port), timeout=JOIN_TIMEOUT_S))
            connection.send(process_id=process.process_id)
            return connection
        except OSError as e:
            if time.monotonic() > deadline:
                raise UserError(
                    f"the main process of this worker could not be reached at {host}:{port} within "
                    f"{JOIN_TIMEOUT_S:.0f} s: {e.strerror or e}. Start the same command there with --process_id=0."
                ) from None
            time.sleep(RETRY_S)
