# SPDX-License-Identifier: Apache-2.0
"""Look at the QEMU of a VM, without stopping or touching it."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kvmi_libvirt.doctor.facts import ProcessFacts
from kvmi_libvirt.errors import KvmiLibvirtError, TargetError
from kvmi_libvirt.newtypes import Pid
from kvmi_libvirt.qemu.process import LIBVIRT_QEMU_RUN_DIR, Process, open_domain, read_pidfile

if TYPE_CHECKING:
    from collections.abc import Iterator

_MAX_CMDLINE_LEN: Final = 1 << 20
_SUPERVISOR: Final = re.compile(rb"kvmi-emulator for process (\d+)")


class Processes:
    """The command lines of this moment, read once for any number of VMs."""

    def __init__(self) -> None:
        """Read them."""
        self._lines = dict(_command_lines())

    def qemu_of(self, uuid: str) -> Pid | None:
        """Return the one process that was started with ``-uuid`` *uuid*, if there is one."""
        wanted = f"\0-uuid\0{uuid.lower()}\0".encode()
        found = [pid for pid, line in self._lines.items() if wanted in line.lower()]
        return Pid(found[0]) if len(found) == 1 else None

    def supervisor_of(self, pid: int) -> int | None:
        """Return the process of the KVMI emulator that serves *pid*, if there is one."""
        for supervisor, line in self._lines.items():
            match = _SUPERVISOR.match(line)
            if match is not None and int(match[1]) == pid:
                return supervisor
        return None

    def look_at(
        self, name: str, uuid: str, *, is_active: bool, run_dir: Path = LIBVIRT_QEMU_RUN_DIR
    ) -> ProcessFacts:
        """Find out about the QEMU of a domain."""
        pidfile = str(run_dir / f"{name}.pid")
        if not is_active:
            return ProcessFacts(
                pidfile=pidfile, pidfile_problem=self._leftover(name, uuid, pidfile, run_dir)
            )
        problem = None
        try:
            process = open_domain(name, uuid, run_dir=run_dir)
        except TargetError as error:
            problem = str(error)
            pid = self.qemu_of(uuid)
            if pid is None:
                return ProcessFacts(pidfile=pidfile, pidfile_problem=problem)
            try:
                process = Process(pid)
            except TargetError:
                return ProcessFacts(pidfile=pidfile, pidfile_problem=problem)
        with process:
            return self._facts(process, pidfile, problem)

    def _leftover(self, name: str, uuid: str, pidfile: str, run_dir: Path) -> str | None:
        if not os.path.lexists(pidfile):
            return None
        try:
            pid = read_pidfile(name, run_dir=run_dir)
        except TargetError as error:
            return str(error)
        if pid == self.qemu_of(uuid):
            return f"{pidfile} names QEMU process {pid}, which libvirt has lost sight of"
        if pid not in self._lines:
            return f"{pidfile} names process {pid}, which does not exist"
        return f"{pidfile} names process {pid}, which is not the domain's QEMU"

    def _facts(self, process: Process, pidfile: str, pidfile_problem: str | None) -> ProcessFacts:
        vcpus, problem = None, None
        try:
            vcpus = process.vm_fds(allow_standin=True).vcpu_count
            process.require_traceable()
        except (KvmiLibvirtError, OSError) as error:
            problem = str(error)
        return ProcessFacts(
            pid=process.pid,
            pidfile=pidfile,
            pidfile_problem=pidfile_problem,
            problem=problem,
            vcpus=vcpus,
            supervisor=self.supervisor_of(process.pid),
        )


def _command_lines() -> Iterator[tuple[int, bytes]]:
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/cmdline", "rb") as file:
                yield int(name), file.read(_MAX_CMDLINE_LEN)
