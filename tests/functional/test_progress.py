# SPDX-License-Identifier: Apache-2.0
"""What takes more than a second is told, on a terminal only, and is gone afterwards."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Final

import pytest

from kvmi_libvirt.cli import progress

if TYPE_CHECKING:
    from collections.abc import Iterator

TIMEOUT_S: Final = 60.0
ERASE: Final = b"\r\x1b[K"
WORK: Final = """\
import os, sys
from kvmi_libvirt.cli import progress
with progress.shown("hooking a\\x1b[2Jb"):
    sys.stdin.readline()
print("done", file=sys.stderr)
"""
QUICK: Final = """\
import sys
from kvmi_libvirt.cli import progress
with progress.shown("hooking web1"):
    pass
print("done", file=sys.stderr)
"""
RAISES: Final = """\
import sys
from kvmi_libvirt.cli import progress
try:
    with progress.shown("hooking web1"):
        sys.stdin.readline()
        raise OSError("no tool")
except OSError as error:
    print(f"it ended: {error}", file=sys.stderr)
"""
COPIES: Final = """\
import os, sys, time
from kvmi_libvirt.cli import progress
with progress.shown("hooking web1"):
    if os.fork() == 0:
        time.sleep(600)
    sys.stdin.readline()
print("done", file=sys.stderr)
"""


class Terminal:
    """A program whose stderr is a terminal, and whose stdin and stdout are pipes."""

    def __init__(self, program: str, **environment: str) -> None:
        self._end, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=slave,
            env={**os.environ, "TERM": "xterm", **environment},
            start_new_session=True,
        )
        os.close(slave)
        self.shown = b""

    def wait_for(self, text: bytes) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while text not in self.shown:
            left = max(0.0, deadline - time.monotonic())
            assert select.select([self._end], [], [], left)[0], self.shown
            self.shown += os.read(self._end, 4096)

    def goes_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with self.process:
            pass
        os.close(self._end)


@contextlib.contextmanager
def on_a_terminal(program: str, **environment: str) -> Iterator[Terminal]:
    terminal = Terminal(program, **environment)
    try:
        yield terminal
    finally:
        terminal.close()


@pytest.mark.parametrize(("program", "last"), [(WORK, b"done"), (RAISES, b"it ended: no tool")])
def test_what_goes_on_is_told_with_its_time_and_taken_back(program: str, last: bytes) -> None:
    with on_a_terminal(program) as terminal:
        terminal.wait_for(b"s)")
        assert terminal.shown.startswith(ERASE + b"hooking ")
        assert re.search(rb" \(\d+ s\)", terminal.shown)
        terminal.goes_on()
        terminal.wait_for(last)

        # Whatever follows begins on an empty line.
        assert terminal.shown.partition(last)[0].endswith(ERASE)
        assert b"\x1b[2J" not in terminal.shown


def test_what_is_quick_is_not_told() -> None:
    with on_a_terminal(QUICK) as terminal:
        terminal.wait_for(b"done")

        assert b"hooking" not in terminal.shown


def test_a_terminal_that_cannot_take_a_line_back_gets_none() -> None:
    with on_a_terminal(WORK, TERM="dumb") as terminal:
        terminal.goes_on()
        terminal.wait_for(b"done\r\n")

        assert terminal.shown == b"done\r\n"


def test_a_child_that_is_left_behind_does_not_keep_it() -> None:
    # A worker that waits for QEMU may outlive its parent, with copies of all descriptors.
    with on_a_terminal(COPIES) as terminal:
        terminal.wait_for(b"hooking web1 (")
        terminal.goes_on()
        terminal.wait_for(b"done")


def test_one_who_is_killed_leaves_no_teller_behind() -> None:
    with on_a_terminal(WORK) as terminal:
        terminal.wait_for(b"hooking ")
        terminal.process.kill()
        terminal.process.wait()
        # The terminal is closed when nobody has it open any more.
        with contextlib.suppress(OSError):
            while True:
                terminal.wait_for(b"never said")


@pytest.mark.parametrize(
    "module",
    [
        *("hook", "unhook", "live", "rights", "start", "target"),
        *("set", "unset", "get", "explain", "status", "doctor", "install", "uninstall"),
    ],
)
def test_every_verb_that_may_wait_tells_what_for(module: str) -> None:
    source = inspect.getsource(importlib.import_module(f"kvmi_libvirt.cli.{module}"))

    assert "progress.shown(" in source


def test_without_a_terminal_there_is_no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fork", None)

    assert not progress.is_wanted()
    with progress.shown("hooking web1"):
        pass
