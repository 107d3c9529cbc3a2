# SPDX-License-Identifier: Apache-2.0
"""Which VM an ioctl is about, and who owns it.

A VM is one open VM file; it belongs to the address space that created it, as in
the kernel. KVM_CREATE_VM passes by before the fd exists, so its caller is
remembered as a creator, and the file is matched to it the next time somebody
looks. Imports ``emulator.process``, ``emulator.vmfile`` and the pure modules.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvmi_libvirt import linux
from kvmi_libvirt.emulator.kernel import VmState
from kvmi_libvirt.emulator.memory import GuestMemory
from kvmi_libvirt.emulator.process import Process, thread_group
from kvmi_libvirt.emulator.vmfile import VmFile
from kvmi_libvirt.newtypes import LocalFd, Pid, Tid

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmi_libvirt.emulator.channel import Channel
    from kvmi_libvirt.newtypes import RemoteFd


@dataclass(slots=True, kw_only=True, eq=False)
class Vm:
    """One VM: its file, its owner, what the kernel keeps of it, and its channel.

    ``owner`` is None when nobody under the filter created it: then every caller
    has the wrong address space.
    """

    file: VmFile
    owner: Process | None
    state: VmState = field(default_factory=VmState)
    channel: Channel | None = None
    vcpu_ids: set[int] = field(default_factory=set)
    memory: GuestMemory = field(default_factory=GuestMemory)

    def is_owned_by(self, tid: Tid) -> bool:
        """Say whether thread *tid* runs in the address space the VM belongs to."""
        if self.owner is None:
            return False
        return self.owner.shares_memory(tid)

    def vcpu_count(self) -> int:
        """Return the number of vCPUs: those created, or those a stand-in shows."""
        if self.vcpu_ids or self.owner is None:
            return len(self.vcpu_ids)
        return self.owner.stand_in_vcpu_count()

    def vcpus_run(self) -> bool:
        """Say whether all vCPUs run the guest at this moment."""
        return self.owner is not None and self.owner.running_vcpu_count() >= self.vcpu_count()

    def read_physical(self, gpa: int, length: int) -> bytes | None:
        """Return *length* bytes of one page of the guest's memory, None if there is none."""
        address = self.memory.locate(gpa)
        if address is None or self.owner is None:
            return None
        return self.owner.read_memory(address, length)

    def write_physical(self, gpa: int, data: bytes) -> bool:
        """Write *data* inside one page of the guest's memory; say whether there is one."""
        address = self.memory.locate(gpa)
        return (
            address is not None
            and self.owner is not None
            and (self.owner.write_memory(address, data))
        )

    def max_gfn(self) -> int:
        """Return one past the highest guest frame number."""
        return self.memory.max_gfn()

    def close_channel(self) -> None:
        """Shut the tool's socket down, if there is one. Idempotent."""
        if self.channel is not None:
            self.channel.close()
            self.channel = None


class Registry:
    """All processes and VMs that are known. Use it with ``with`` or close it."""

    def __init__(self, *, stand_in: bool) -> None:
        self._stand_in = stand_in
        self._processes: dict[int, Process] = {}
        self._creators: list[Process] = []
        self.vms: list[Vm] = []

    def __enter__(self) -> Registry:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close every channel and forget everything. Idempotent."""
        for vm in self.vms:
            _drop(vm)
        self.vms.clear()
        self._creators.clear()
        for process in self._processes.values():
            process.close()
        self._processes.clear()

    def pidfds(self) -> list[LocalFd]:
        """Return the pidfds (borrowed) that become readable when a process ends."""
        return [process.pidfd for process in self._processes.values()]

    def process_of(self, tid: Tid) -> Process:
        """Return the process of thread *tid*; OSError when the thread is gone."""
        for process in self._processes.values():
            if process.has_thread(tid):
                return process
        pid = thread_group(tid)
        process = Process(pid, stand_in=self._stand_in)
        self._processes[pid] = process
        return process

    def process_ended(self, pidfd: LocalFd) -> None:
        """Forget the process behind *pidfd*, and the VMs that went with it."""
        for pid, process in list(self._processes.items()):
            if process.pidfd == pidfd:
                del self._processes[pid]
                self._creators = [each for each in self._creators if each is not process]
                for vm in self.vms:
                    if vm.owner is process:
                        vm.owner = None
                process.close()
        self.prune()

    def prune(self) -> None:
        """Forget VMs whose file is closed everywhere; the kernel unhooks them then."""
        alive = [vm for vm in self.vms if vm.file.is_open()]
        for vm in self.vms:
            if vm not in alive:
                _drop(vm)
        self.vms = alive

    def creating(self, process: Process) -> None:
        """Take note that *process* is about to create a VM."""
        # A file nobody has asked about yet can only be an older creator's.
        self._settle()
        self.prune()
        self._creators = [each for each in self._creators if each is not process]
        self._creators.append(process)

    def find(self, process: Process, tid: Tid, fd: RemoteFd) -> Vm:
        """Return the VM behind *fd* of thread *tid* of *process*.

        Raises
            OSError  the thread is gone, or the fd cannot be looked at.
        """
        with _copy(process, tid, fd) as copy:
            known = self._known(copy)
            if known is not None:
                return known
            return self._add(copy, owner=self._creator_of(copy, process, tid))

    def _settle(self) -> None:
        for creator in reversed(self._creators):
            for fd in creator.vm_fds():
                try:
                    with _copy(creator, Tid(creator.pid), fd) as copy:
                        if self._known(copy) is None:
                            self._add(copy, owner=creator)
                except OSError:  # closed meanwhile
                    continue

    def _creator_of(self, copy: LocalFd, process: Process, tid: Tid) -> Process | None:
        # The latest creator that has the file: others can only have been given it.
        for creator in reversed(self._creators):
            if _holds(creator, copy):
                return creator
        # It may have closed it, or keep it in a thread's own file table.
        for creator in reversed(self._creators):
            if creator.shares_memory(tid):
                return creator
        # No KVM_CREATE_VM makes a stand-in's VM: whoever uses it first made it.
        return process if self._stand_in else None

    def _add(self, copy: LocalFd, *, owner: Process | None) -> Vm:
        vm = Vm(file=VmFile(copy), owner=owner)
        self.vms.append(vm)
        return vm

    def _known(self, copy: LocalFd) -> Vm | None:
        return next((vm for vm in self.vms if vm.file.is_same(copy)), None)


def _drop(vm: Vm) -> None:
    vm.close_channel()
    vm.file.close()


@contextmanager
def _copy(process: Process, tid: Tid, fd: RemoteFd) -> Iterator[LocalFd]:
    # Never longer than a few system calls: it keeps the VM alive meanwhile.
    copy = process.copy_fd(tid, fd)
    try:
        yield copy
    finally:
        os.close(copy)


def _holds(process: Process, copy: LocalFd) -> bool:
    us = Pid(os.getpid())
    for fd in process.vm_fds():
        try:
            if linux.kcmp(linux.KCMP_FILE, us, process.pid, copy, fd):
                return True
        except OSError:  # closed meanwhile, or the process is gone
            continue
    return False
