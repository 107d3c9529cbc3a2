# SPDX-License-Identifier: Apache-2.0
"""As much of QEMU's monitor protocol as it takes to resume a frozen VM, or to end one.

For machines that libvirt does not run: libvirt's own monitor is libvirt's alone. May
import ``errors`` and ``quoting``.

Source: QEMU docs/interop/qmp-spec.rst.
"""

from __future__ import annotations

import json
import select
import socket
import struct
import time
from typing import TYPE_CHECKING, Final

from kvmi_libvirt.errors import TargetUnsuitable
from kvmi_libvirt.quoting import shortened

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

_MAX_LINE_LEN: Final = 1 << 20
_CHUNK_LEN: Final = 65536


class Monitor:
    """A connection to QEMU's monitor; use it as a context manager, and briefly.

    QEMU serves one client at a time: while this is open, whoever manages the VM waits.

    Parameters
        path      of the monitor's socket
        deadline  CLOCK_MONOTONIC seconds, for all that is done with it
    Raises
        TargetUnsuitable  nobody answers there, in time, as a QEMU does
    """

    def __init__(self, path: Path, *, deadline: float) -> None:
        """Connect, and wait for our turn."""
        self._path = path
        self._deadline = deadline
        self._buffer = b""
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            # Blocking, but not for ever: a connection that cannot be queued yet (EAGAIN) is
            # nothing one could wait for with select().
            left_s = max(0.001, deadline - time.monotonic())
            limit = struct.pack("@ll", int(left_s), int(left_s % 1 * 1_000_000))
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
            try:
                self._sock.connect(str(path))
            except OSError as error:
                raise self._failed(error.strerror or str(error)) from error
            if "QMP" not in self._message():
                raise self._failed("what answers is no monitor")
            self.execute("qmp_capabilities")
        except BaseException:
            self._sock.close()
            raise

    def __enter__(self) -> Monitor:
        """Return self."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Let go of the monitor."""
        self._sock.close()

    def execute(self, command: str, **arguments: str) -> object:
        """Return what QEMU returns for *command*; events that come meanwhile are dropped.

        Raises
            TargetUnsuitable  QEMU refuses, or does not answer in time
        """
        message = {"execute": command, **({"arguments": arguments} if arguments else {})}
        request = json.dumps(message).encode() + b"\n"
        try:
            self._sock.sendall(request)
        except OSError as error:
            raise self._failed(error.strerror or str(error)) from error
        while True:
            answer = self._message()
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                problem = answer["error"]
                text = problem.get("desc") if isinstance(problem, dict) else problem
                raise self._failed(f"{command}: {shortened(str(text))}")

    def status(self) -> str:
        """Return QEMU's run state, for example "running" or "prelaunch"."""
        answer = self.execute("query-status")
        return str(answer.get("status", "")) if isinstance(answer, dict) else ""

    def _message(self) -> dict[str, object]:
        while b"\n" not in self._buffer:
            if len(self._buffer) > _MAX_LINE_LEN:
                raise self._failed("what answers is no monitor")
            remaining_s = self._deadline - time.monotonic()
            if remaining_s <= 0 or not select.select([self._sock], [], [], remaining_s)[0]:
                raise self._failed("no answer in time")
            try:
                chunk = self._sock.recv(_CHUNK_LEN)
            except OSError as error:
                raise self._failed(error.strerror or str(error)) from error
            if not chunk:
                raise self._failed("it closed the connection")
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        try:
            message = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise self._failed("what answers is no monitor") from error
        if not isinstance(message, dict):
            raise self._failed("what answers is no monitor")
        return message

    def _failed(self, reason: str) -> TargetUnsuitable:
        return TargetUnsuitable(f"QEMU's monitor {self._path}: {reason}")
