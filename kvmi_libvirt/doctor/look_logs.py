# SPDX-License-Identifier: Apache-2.0
"""Find what was logged: by the hook, the agent and the kernel, wherever the host keeps it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Final, NamedTuple

from kvmi_libvirt.hooklog import LOG_DIR

HOOK_LOG: Final = LOG_DIR / "hook.log"

_KERNEL_LOGS: Final = ("/var/log/audit/audit.log", "/var/log/kern.log", "/var/log/syslog")
_REFUSED: Final = re.compile(r'apparmor="DENIED"|avc:\s+denied')
_ABOUT_US: Final = re.compile(r"kvmi|hooks/qemu\.d")
_SYSLOGS: Final = ("/var/log/syslog", "/var/log/messages", "/var/log/daemon.log")
_JOURNALS: Final = (Path("/run/log/journal"), Path("/var/log/journal"))
_JOURNAL_LINES: Final = 2000
_JOURNAL_TIMEOUT_S: Final = 5.0
_TAIL_LEN: Final = 1 << 20
_MARK: Final = "kvmi-libvirt"
_SHOWN: Final = 3


class Lines(NamedTuple):
    """Log lines, oldest first, and where they are from."""

    lines: tuple[str, ...]
    place: str


def lines_about(name: str, uuid: str, *, hook_log: Path = HOOK_LOG) -> Lines:
    """Return the last lines of ours that name a domain, from the first log that has any."""
    pattern = re.compile(rf"domain '?{re.escape(name)}'?(?![\w.-])|{re.escape(uuid)}")
    for place, lines in (
        (str(hook_log), _tail(hook_log)),
        *((path, _ours(_tail(Path(path)))) for path in _SYSLOGS),
    ):
        if found := _matching(lines, pattern):
            return Lines(found, place)
    return Lines(_matching(_journal(), pattern), "the journal")


def refusals() -> tuple[str, ...]:
    """Return the last lines in which AppArmor or SELinux refused something about us.

    From the first log that has any. They may be old, and settled since.
    """
    for lines in (
        *(_tail(Path(path)) for path in _KERNEL_LOGS),
        _journalctl("-k", "--output=short-iso", "-n", str(_JOURNAL_LINES)),
    ):
        refused = [line for line in lines if _REFUSED.search(line)]
        if found := _matching(refused, _ABOUT_US):
            return found
    return ()


def hook_ran_at(*, hook_log: Path = HOOK_LOG) -> float | None:
    """Return when a run of the hook was logged last, in seconds since the epoch, or None.

    Only the hook writes to its file, and to the journal through syslog.
    """
    try:
        found = hook_log.stat()
        if found.st_size:  # else it was rotated
            return found.st_mtime
    except OSError:
        pass
    hook = ("-t", _MARK, "_TRANSPORT=syslog")
    newest = _journalctl("--output=short-unix", "-n", "1", *hook)
    try:
        return float(newest[-1].split(None, 1)[0]) if newest else None
    except ValueError:
        return None


def _matching(lines: list[str], pattern: re.Pattern[str]) -> tuple[str, ...]:
    return tuple(line for line in lines if pattern.search(line))[-_SHOWN:]


def _ours(lines: list[str]) -> list[str]:
    return [line for line in lines if _MARK in line]


def _tail(path: Path) -> list[str]:
    try:
        # What lies there may be anything: do not wait for it.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return []
    try:
        size = os.fstat(fd).st_size
        text = os.pread(fd, _TAIL_LEN, max(size - _TAIL_LEN, 0))
    except OSError:
        return []
    finally:
        os.close(fd)
    return text.decode("utf-8", "replace").splitlines()


def _journal() -> list[str]:
    ours = ("-t", _MARK, "-t", f"{_MARK}-agent")
    return _journalctl("--output=short-iso", "-n", str(_JOURNAL_LINES), *ours)


def _journalctl(*arguments: str) -> list[str]:
    program = shutil.which("journalctl")
    if program is None or not any(path.is_dir() for path in _JOURNALS):
        return []
    command = [program, "-q", "--no-pager", *arguments]
    try:
        told = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_JOURNAL_TIMEOUT_S,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return told.splitlines()
