# SPDX-License-Identifier: Apache-2.0
"""Where the hook's log goes: libvirt drops a hook's stderr unless the hook fails.

To syslog (and so to the journal) when something listens on /dev/log, else to
/var/log/kvmi-libvirt/hook.log. Never to stdout or stderr. No package imports.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import stat
from pathlib import Path
from typing import Final

LOG_DIR: Final = Path("/var/log/kvmi-libvirt")
SYSLOG_SOCKET: Final = "/dev/log"

_FACILITY_DAEMON: Final = 3  # <syslog.h>
_FORMAT: Final = "kvmi-libvirt[%(process)d]: %(levelname)s: %(message)s"


def start(*, log_dir: Path = LOG_DIR, syslog_socket: str = SYSLOG_SOCKET) -> None:
    """Send the root logger's messages, INFO and above, to the first place that works.

    Never raises: a log that cannot be written must not keep a VM from starting.
    """
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    logging.raiseExceptions = False
    root.addHandler(_syslog(syslog_socket) or _file(log_dir) or logging.NullHandler())


def stop() -> None:
    """Send nothing anywhere any more, and close what was opened for it."""
    root = logging.getLogger()
    for handler in tuple(root.handlers):
        root.removeHandler(handler)
        handler.close()
        if isinstance(handler, logging.StreamHandler):
            handler.stream.close()


class _Syslog(logging.Handler):
    # The standard library's handler blocks while the daemon does not read, and
    # libvirt waits for us: a message that does not fit now is dropped.
    def __init__(self, sock: socket.socket) -> None:
        super().__init__()
        self._sock = sock

    def emit(self, record: logging.LogRecord) -> None:
        priority = _FACILITY_DAEMON << 3 | _severity(record.levelno)
        text = f"<{priority}>{self.format(record)}"
        with contextlib.suppress(OSError):
            self._sock.send(text.encode("utf-8", "backslashreplace"))

    def close(self) -> None:
        self._sock.close()
        super().close()


def _severity(level: int) -> int:
    for limit, severity in ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4)):
        if level >= limit:
            return severity
    return 6


def _syslog(address: str) -> logging.Handler | None:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.setblocking(False)
    try:
        sock.connect(address)
    except OSError:  # nobody listens
        sock.close()
        return None
    handler = _Syslog(sock)
    handler.setFormatter(logging.Formatter(_FORMAT))
    return handler


def _file(log_dir: Path) -> logging.Handler | None:
    # The directory may be writable by QEMU's user (the emulator's traces lie there):
    # never follow a link, never write to a file of somebody else's making.
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        fd = os.open(log_dir / "hook.log", flags, 0o600)
    except OSError:
        return None
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_nlink != 1:
        os.close(fd)
        return None
    handler = logging.StreamHandler(os.fdopen(fd, "a", encoding="utf-8"))
    handler.setFormatter(logging.Formatter(f"%(asctime)s {_FORMAT}"))
    return handler
