# SPDX-License-Identifier: Apache-2.0
"""A supervisor in the test's own process, stepped by the test."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from emulator_harness import TIMEOUT_S, VICTIM, trace_lines

from kvmi_libvirt.abi.v12 import V12
from kvmi_libvirt.emulator.supervisor import Supervisor
from kvmi_libvirt.emulator.trace import Trace
from kvmi_libvirt.newtypes import LocalFd

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


class Laboratory:
    """A victim with a filter, and its supervisor, stepped by the test."""

    def __init__(self, trace_path: Path, flags: int) -> None:
        self.trace_path = trace_path
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.settimeout(TIMEOUT_S)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, str(VICTIM), str(theirs.fileno())], pass_fds=[theirs.fileno()]
            )
        self._ask("install_filter", abi="v12", flags=flags)
        _, fds, _, _ = socket.recv_fds(self._control, 4096, 1)
        self.listener = LocalFd(fds[0])
        self._trace = Trace(trace_path)
        self.supervisor = Supervisor(self.listener, V12, self._trace, stand_in=False)

    def close(self) -> None:
        self._control.close()
        self.process.kill()
        self.process.wait()
        with self.supervisor:
            pass
        self._trace.close()
        os.close(self.listener)

    def _ask(self, op: str, *, fds: Sequence[int] = (), **arguments: Any) -> None:
        socket.send_fds(self._control, [json.dumps({"op": op, **arguments}).encode()], list(fds))

    def answer(self) -> Any:
        """Return the victim's answer to what it was asked, its notifications being served."""
        return json.loads(self._control.recv(1 << 17))["result"]

    def do(self, op: str, *, fds: Sequence[int] = (), **arguments: Any) -> Any:
        """Let the victim do *op*, serving its notifications until it answers."""
        self._ask(op, fds=fds, **arguments)
        poll = select.poll()
        poll.register(self.listener, select.POLLIN)
        poll.register(self._control, select.POLLIN)
        while True:
            ready = dict(poll.poll(TIMEOUT_S * 1000))
            assert ready, "neither an answer nor a notification"
            if ready.get(self._control.fileno()):
                return json.loads(self._control.recv(1 << 17))["result"]
            self.supervisor.serve_once()

    def ioctl(self, vm: int, request: int, argument: str) -> int | str:
        result: int | str = self.do("ioctls", fd=vm, request=request, arguments=[argument])[0]
        return result

    def make_vm(self) -> int:
        return int(self.do("create_vm", kvm=self.do("open_kvm")))

    def give(self, sock: socket.socket) -> int:
        return int(self.do("received", fds=[sock.fileno()])[0])

    def errors(self) -> list[str]:
        self._trace.flush()
        return [line["error"] for line in trace_lines(self.trace_path) if "error" in line]
