# SPDX-License-Identifier: Apache-2.0
"""A stand-in VM process below the emulated kernel, and a tool that is told its rights."""

from __future__ import annotations

import contextlib
import json
import select
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Final

import pytest

from kvmi_libvirt.newtypes import Pid
from kvmi_libvirt.qemu.process import Process

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

UUID: Final = "5a4a2b4e-7c1d-4e0f-9a52-0d6f6f1b0a77"
PATIENCE_S: Final = 30.0
_MAIN: Final = "import sys; from kvmi_libvirt.cli import main; sys.exit(main())"


class Tool:
    """``kvmi-libvirt probe --watch`` with the secret, and what it was told."""

    def __init__(self, directory: Path, secret: bytes) -> None:
        self.path = directory / "tool.sock"
        (directory / "known").write_bytes(secret)
        listen = ["--listen", f"unix:{self.path}", "--secret", str(directory / "known")]
        self._popen = subprocess.Popen(
            [sys.executable, "-c", _MAIN, "probe", *listen, "--watch", "--json", "--settle", "0.1"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,  # what has come must be seen by select()
        )
        assert self._popen.stderr is not None
        assert b"listening" in self._popen.stderr.readline()

    def told(self, *allowed: str) -> None:
        """Wait until the tool is told that exactly *allowed* is allowed."""
        assert self._popen.stdout is not None
        always = {"KVMI_GET_VERSION", "KVMI_VM_CHECK_COMMAND", "KVMI_VM_CHECK_EVENT"}
        deadline = time.monotonic() + PATIENCE_S
        found: set[str] = set()
        while time.monotonic() < deadline:
            if not select.select([self._popen.stdout], [], [], deadline - time.monotonic())[0]:
                break
            result = json.loads(self._popen.stdout.readline())
            verdicts = {**result["commands"], **result["events"]}
            found = {name for name, verdict in verdicts.items() if verdict == "allowed"} - always
            if found == set(allowed):
                return
        pytest.fail(f"the tool was last told {sorted(found)}")

    def end(self) -> None:
        """End it."""
        self._popen.terminate()
        self._popen.communicate()


@contextlib.contextmanager
def running_tool(directory: Path, secret: bytes = b"-") -> Iterator[Tool]:
    """Run a tool that listens in *directory* and knows *secret*; it ends with the block."""
    tool = Tool(directory, secret)
    try:
        yield tool
    finally:
        tool.end()


@contextlib.contextmanager
def stand_in() -> Iterator[Process]:
    """Run the stand-in; it ends with the block."""
    command = [sys.executable, "-c", _MAIN, "emulate", "--stand-in", "--"]
    victim = [sys.executable, "-m", "kvmi_libvirt.emulator.standin", "--uuid", UUID]
    with subprocess.Popen(
        [*command, *victim], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as popen:
        assert popen.stdin is not None
        assert popen.stdout is not None
        try:
            pid = int(popen.stdout.readline().split()[1])
            with Process(Pid(pid)) as found:
                yield found
        finally:
            popen.stdin.close()
            popen.wait(PATIENCE_S)
