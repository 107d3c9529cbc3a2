# SPDX-License-Identifier: Apache-2.0
"""What several test modules use; found on the path because conftest.py lies beside it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeAlias

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Tell: TypeAlias = "Callable[[str], None]"
"""What the fixture ``tell`` gives."""


def wait_until(condition: Callable[[], bool], *, what: str, timeout_s: float = 10.0) -> None:
    """Wait for *condition* where the kernel offers no event for it; fail after *timeout_s*."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"not within {timeout_s} s: {what}")
        time.sleep(0.002)


def stop_process(pid: int) -> None:
    """Send SIGSTOP, and wait until the process has stopped."""
    os.kill(pid, signal.SIGSTOP)
    stat = Path(f"/proc/{pid}/stat")
    wait_until(
        lambda: stat.read_text(encoding="ascii").rpartition(")")[2].split()[0] == "T",
        what=f"process {pid} stops",
    )


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Keep process *pid* stopped for the block."""
    stop_process(pid)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def start_ticks(pid: int) -> int:
    """Return when process *pid* started, in clock ticks after boot."""
    return int(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])


def require_tool(name: str, package: str) -> str:
    """Return the path of the distribution's *name*; skip the test without it, in CI fail it."""
    found = shutil.which(name, path="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
    if found is None:
        skip_unless_ci(f"no {name} (apt-get install {package})")
    return found


def skip_unless_ci(reason: str) -> NoReturn:
    """Skip the test for what the machine lacks; in CI fail it."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{reason}, and CI=true", pytrace=False)
    pytest.skip(f"{reason}; CI=true makes this a failure")


def supervisor_of(pid: int) -> int | None:
    """Return the process id of the supervisor that serves *pid*, if there is one."""
    wanted = f"kvmi-emulator for process {pid}".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                found = (entry / "cmdline").read_bytes().rstrip(b"\0")
            except OSError:
                continue
            if found == wanted:
                return int(entry.name)
    return None


def wait_for_supervisor(pid: int) -> int:
    """Return the process id of the supervisor of *pid*, once it shows itself."""
    found: list[int | None] = []

    def is_there() -> bool:
        found.append(supervisor_of(pid))
        return found[-1] is not None

    wait_until(is_there, what=f"the supervisor of {pid}")
    assert found[-1] is not None
    return found[-1]
