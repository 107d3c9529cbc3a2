# SPDX-License-Identifier: Apache-2.0
"""Tell a terminal what is waited for, when it takes more than a second.

A line on stderr, which is gone when the work is done. It is written by a child process:
a thread would be in every worker that is forked meanwhile, and a signal does not interrupt
a call of libvirt's.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time
from typing import TYPE_CHECKING, Final

from kvmi_libvirt.quoting import printable

if TYPE_CHECKING:
    from collections.abc import Iterator

_TICK_S: Final = 1.0
_STDERR: Final = 2
_ERASE: Final = "\r\x1b[K"


@contextlib.contextmanager
def shown(what: str) -> Iterator[None]:
    """While the block goes on for more than a second, say so: *what*, and for how long.

    Nothing is said where stderr is no terminal. Nothing may be printed in the block.
    """
    if not is_wanted():
        yield
        return
    sys.stdout.flush()
    sys.stderr.flush()
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        pid = os.fork()
    except OSError:  # too many processes: then without
        os.close(reader)
        os.close(writer)
        yield
        return
    if pid == 0:
        _child(reader, writer, what)
    os.close(reader)
    try:
        yield
    finally:
        # Written, not only closed: another child may have a copy of this end.
        with contextlib.suppress(OSError):
            os.write(writer, b".")
        os.close(writer)
        with contextlib.suppress(ChildProcessError):  # whoever started us ignores SIGCHLD
            os.waitpid(pid, 0)


def is_wanted() -> bool:
    """Say whether stderr is a terminal on which a line can be taken back."""
    return os.isatty(_STDERR) and os.environ.get("TERM", "dumb") != "dumb"


def _child(reader: int, writer: int, what: str) -> None:
    # Never returns: whatever happens, no frame of the parent runs twice.
    try:
        # Ctrl-C is for the parent, which then ends this.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        os.close(writer)
        _tell(reader, printable(what))
    finally:
        os._exit(0)


def _tell(reader: int, what: str) -> None:
    poll = select.poll()
    poll.register(reader, select.POLLIN)
    began = time.monotonic()
    is_said = False
    while not poll.poll(_TICK_S * 1000):
        line = f"{what} ({time.monotonic() - began:.0f} s)"
        width = os.get_terminal_size(_STDERR).columns or 80
        os.write(_STDERR, f"{_ERASE}{line[: width - 1]}".encode())
        is_said = True
    if is_said:
        os.write(_STDERR, _ERASE.encode())
