# SPDX-License-Identifier: Apache-2.0
"""Many VM processes without guests, on the emulated kernel: for tests and measurements of scale.

Each is a process of its own with QEMU's command line, a real VM and vCPU of /dev/kvm, and its
main thread in ppoll(2); some 50 KiB of memory, no libvirt. All that one nursery starts share
its seccomp filter, and so one supervisor. Needs a C compiler.

    with Fleet(directory, run_dir=directory / "run") as fleet:
        vms = fleet.start([f"vm{n}" for n in range(1000)])
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from host import HostError

from kvmi_libvirt.policy.element import Domain

if TYPE_CHECKING:
    from collections.abc import Iterator

SOURCE: Final = Path(__file__).with_name("fleet_vm.c")
COMMAND_LINE: Final = Path(sys.executable).with_name("kvmi-libvirt")
PAGE_LEN: Final = 4096
_START_S: Final = 30.0
_PER_VM_S: Final = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class StandIn:
    """One VM process that is ready to be hooked."""

    name: str
    uuid: str
    pid: int
    vcpus: int

    def domain(self) -> Domain:
        """Return what a domain XML of this VM would say; it carries no element."""
        return Domain(
            name=self.name,
            uuid=self.uuid,
            vcpus=self.vcpus,
            memory_bytes=PAGE_LEN,
            machine="pc",
            policy=None,
            origin="the fleet",
        )


class _Nursery:
    # The parent of some VMs, below one emulator; they end with it.

    def __init__(self, program: Path, options: Sequence[str]) -> None:
        command = [str(COMMAND_LINE), "emulate", *options, "--", str(program)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.requests = self.process.stdin
        self.answers = self.process.stdout
        self._rest = b""

    def ask(self, lines: Sequence[str]) -> None:
        self.requests.write("".join(f"{line}\n" for line in lines).encode())
        self.requests.flush()

    def ready(self, count: int, *, deadline: float) -> dict[str, int]:
        # Process ids by name, of so many VMs.
        found: dict[str, int] = {}
        poll = select.poll()
        poll.register(self.answers, select.POLLIN)
        while len(found) < count:
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise HostError(f"only {len(found)} of {count} VM processes are ready in time")
            data = os.read(self.answers.fileno(), 1 << 16)
            if not data:
                raise HostError("the parent of the VM processes has ended")
            *lines, self._rest = (self._rest + data).split(b"\n")
            for line in lines:
                name, pid = line.split()
                found[name.decode()] = int(pid)
        return found

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.requests.close()
        self.answers.close()
        self.process.wait()


class Fleet:
    """VM processes, and the supervisors that serve them. Use it with ``with``.

    At the end of the block every process is killed and its pidfile removed.

    Parameters
        directory    where the program is compiled
        run_dir      where the pidfiles go, as libvirt's do: NAME.pid; made if need be
        abi          the KVMI revision
        supervisors  how many processes serve the ioctls; VMs are dealt out in turn
        options      more options for ``kvmi-libvirt emulate``, --fault for example
    Raises
        HostError  there is no C compiler, or a process does not start
    """

    def __init__(
        self,
        directory: Path,
        *,
        run_dir: Path,
        abi: str = "v12",
        supervisors: int = 1,
        options: Sequence[str] = (),
    ) -> None:
        program = _compiled(directory)
        run_dir.mkdir(parents=True, exist_ok=True)
        self.run_dir = run_dir
        self.vms: dict[str, StandIn] = {}
        self._nurseries: list[_Nursery] = []
        self._next = 0
        self._options = ["--abi", abi, *options]
        try:
            for _ in range(supervisors):
                self._nurseries.append(_Nursery(program, self._options))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self, names: Sequence[str], *, vcpus: int = 1) -> list[StandIn]:
        """Start a VM process of each name, all at once; return them when all are ready.

        Raises
            HostError  they are not in time
        """
        wanted: list[dict[str, str]] = [{} for _ in self._nurseries]
        for name in names:
            wanted[self._next % len(wanted)][name] = str(uuid.uuid4())
            self._next += 1
        for nursery, uuids in zip(self._nurseries, wanted, strict=True):
            nursery.ask([f"{name} {domain_uuid} {vcpus}" for name, domain_uuid in uuids.items()])
        deadline = time.monotonic() + _START_S + _PER_VM_S * len(names)
        for nursery, uuids in zip(self._nurseries, wanted, strict=True):
            for name, pid in nursery.ready(len(uuids), deadline=deadline).items():
                (self.run_dir / f"{name}.pid").write_text(f"{pid}\n", encoding="ascii")
                self.vms[name] = StandIn(name=name, uuid=uuids[name], pid=pid, vcpus=vcpus)
        return [self.vms[name] for name in names]

    def stop(self, vm: StandIn) -> None:
        """Kill one VM process, wait for its end and remove its pidfile."""
        with contextlib.suppress(ProcessLookupError):
            pidfd = os.pidfd_open(vm.pid)
            try:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                _wait_readable(pidfd)
            finally:
                os.close(pidfd)
        (self.run_dir / f"{vm.name}.pid").unlink(missing_ok=True)
        self.vms.pop(vm.name, None)

    def supervisors(self) -> list[int]:
        """Return the process ids of the supervisors."""
        titles = {f"kvmi-emulator for process {n.process.pid}".encode() for n in self._nurseries}
        return [pid for pid, title in _titles() if title in titles]

    def close(self) -> None:
        """End everything. Idempotent."""
        for nursery in self._nurseries:
            nursery.close()
        self._nurseries.clear()
        for name in self.vms:
            (self.run_dir / f"{name}.pid").unlink(missing_ok=True)
        self.vms.clear()


def raise_fd_limit() -> None:
    """Allow this process and its children as many descriptors as the hard limit says."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _wait_readable(fd: int) -> None:
    # Not select(): a process with many VMs has descriptors beyond its reach.
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    poll.poll()


def _titles() -> Iterator[tuple[int, bytes]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                yield int(entry.name), (entry / "cmdline").read_bytes().rstrip(b"\0")


def _compiled(directory: Path) -> Path:
    program = directory / SOURCE.stem
    if not program.exists():
        # Static: a dynamic loader's work in each of a thousand would be most of their memory.
        command = ["cc", "-Os", "-static", "-o", str(program), str(SOURCE)]
        try:
            subprocess.run(command, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise HostError("no C compiler with a static C library (gcc, libc6-dev)") from error
    return program
