# SPDX-License-Identifier: Apache-2.0
"""What a process, or one of its threads, has used; as proc(5) tells."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

_TICK_S: Final = 1 / os.sysconf("SC_CLK_TCK")


def cpu_s(pid: int, tid: int | None = None) -> float:
    """Return the CPU time of process *pid*, or of its thread *tid*, in seconds."""
    directory = Path(f"/proc/{pid}" if tid is None else f"/proc/{pid}/task/{tid}")
    fields = (directory / "stat").read_bytes().rpartition(b")")[2].split()
    return (int(fields[11]) + int(fields[12])) * _TICK_S


def rss_kib(pid: int) -> int:
    """Return the memory of process *pid* that is there, in KiB; 0 when it is ending."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    return 0
