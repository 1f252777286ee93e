"""What a parent and a worker say to each other: JSON objects, one per line, over a socket."""

from __future__ import annotations

import json
import os
import socket
import struct
from contextlib import suppress

from dpresnet.bench.workload import Facts

GONE = (BrokenPipeError, ConnectionResetError)


class Channel:
    """One end of a connection. Reading blocks, so whoever waits for the other end sleeps."""

    def __init__(self, connection: socket.socket):
        self._socket = connection
        self._lines = connection.makefile("r", encoding="utf-8")

    def fileno(self) -> int:
        """For `multiprocessing.connection.wait`."""
        return self._socket.fileno()

    def send(self, message: Facts) -> None:
        """To an end that may be gone: whoever reads next will find that out."""
        with suppress(*GONE):
            self._socket.sendall((json.dumps(message) + "\n").encode())

    def receive(self) -> Facts | None:
        """The next message; None if the other end is gone."""
        with suppress(*GONE):
            line = self._lines.readline()
            return json.loads(line) if line.endswith("\n") else None

    def close(self) -> None:
        """The other end reads None from now on."""
        self._lines.close()
        self._socket.close()

    def peer(self) -> int:
        """A file descriptor that stands for the process at the other end, even when its number belongs to another one."""
        pid, _, _ = struct.unpack("3i", self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
        return os.pidfd_open(pid)


def dial(address: str) -> Channel:
    """The channel to whoever listens there."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    return Channel(connection)
