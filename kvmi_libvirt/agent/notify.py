# SPDX-License-Identifier: Apache-2.0
"""Tell the service manager how we are, and let it keep our channels over a restart.

No package imports. Source: sd_notify(3), sd_listen_fds(3), sd_pid_notify_with_fds(3).
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import struct
import time
from typing import Final

_FIRST_FD: Final = 3
_MAX_FDS: Final = 8192
_PATIENCE_S: Final = 1


class Notifier:
    """The service manager's socket, if we were started by one.

    Parameters
        environment  normally os.environ, from which its variables are taken
    """

    def __init__(self, environment: dict[str, str] | None = None) -> None:
        """Nothing is said yet."""
        variables: dict[str, str] = dict(os.environ) if environment is None else environment
        address = variables.get("NOTIFY_SOCKET", "")
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        self._variables = variables
        self._sock: socket.socket | None = None  # made with the first message: nobody's to inherit

    @property
    def watchdog_s(self) -> float | None:
        """Return how often to say that we live, in seconds; None for never."""
        try:
            if self._variables.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
                return None
            return int(self._variables["WATCHDOG_USEC"]) / 2e6
        except (KeyError, ValueError):
            return None

    def _send(self, text: str, fd: int | None = None, *, may_wait: bool = False) -> None:
        if not self._address:
            return
        control = []
        if fd is not None:
            control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
        # A service manager that does not listen must not stop us, nor, where it can do
        # without a message, keep us waiting.
        flags = socket.MSG_NOSIGNAL | (0 if may_wait else socket.MSG_DONTWAIT)
        with contextlib.suppress(OSError):
            self._connection().sendmsg([text.encode()], control, flags, self._address)

    def _connection(self) -> socket.socket:
        if self._sock is None:
            self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            # Not settimeout(): with a receiver's queue full, that would be polled for.
            patience = struct.pack("@ll", _PATIENCE_S, 0)
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, patience)
        return self._sock

    def ready(self, status: str) -> None:
        """Say that we serve."""
        self._send(f"READY=1\nSTATUS={status}", may_wait=True)

    def reloading(self) -> None:
        """Say that we read our configuration again; :meth:`ready` ends it."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}", may_wait=True)

    def status(self, status: str) -> None:
        """Say in one line what we are doing."""
        self._send(f"STATUS={status}")

    def stopping(self) -> None:
        """Say that we are about to end."""
        self._send("STOPPING=1", may_wait=True)

    def alive(self) -> None:
        """Say that we live."""
        self._send("WATCHDOG=1")

    def keep(self, name: str, fd: int) -> None:
        """Let the service manager keep a copy of *fd* for our next start, as *name*."""
        self._send(f"FDSTORE=1\nFDNAME={name}", fd)

    def drop(self, name: str) -> None:
        """Let the service manager close its copies called *name*."""
        self._send(f"FDSTOREREMOVE=1\nFDNAME={name}")

    def passed(self) -> range:
        """Return the descriptors that were passed to this process, without taking them."""
        try:
            count = int(self._variables.get("LISTEN_FDS", "0"))
            is_ours = int(self._variables.get("LISTEN_PID", "0")) == os.getpid()
        except ValueError:
            return range(0)
        return range(_FIRST_FD, _FIRST_FD + count if is_ours and 0 < count <= _MAX_FDS else 0)

    def close(self) -> None:
        """Say nothing any more. Idempotent."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None
        self._address = ""

    def kept(self) -> dict[str, int]:
        """Return the descriptors that were kept, by name; the caller owns them.

        Of several with one name only the last is returned, the others are closed.
        """
        names = self._variables.get("LISTEN_FDNAMES", "").split(":")
        fds = self.passed()
        if len(names) != len(fds):
            return {}
        found: dict[str, int] = {}
        for fd, name in zip(fds, names, strict=True):
            with contextlib.suppress(OSError):
                os.set_inheritable(fd, False)
                if name in found:
                    os.close(found[name])
                found[name] = fd
        return found
