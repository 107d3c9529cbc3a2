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
from typing import TYPE_CHECKING, Final

from kvmi_libvirt import linux
from kvmi_libvirt.emulator.kernel import VmState
from kvmi_libvirt.emulator.memory import GuestMemory
from kvmi_libvirt.emulator.process import Process, thread_group
from kvmi_libvirt.emulator.vmfile import Inode, Place, VmFile, marks
from kvmi_libvirt.newtypes import LocalFd, Pid, Tid

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from kvmi_libvirt.emulator.channel import Channel
    from kvmi_libvirt.newtypes import RemoteFd

_PLACES: Final = 4  # remembered of one VM; QEMU has its fd once
_MANY: Final = 64  # VMs, or threads, that may have ended


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
    places: dict[tuple[Tid, RemoteFd], Place] = field(default_factory=dict)

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
    """All processes and VMs that are known. Use it with ``with`` or close it.

    One call costs the same however many there are.

    Parameters
        stand_in  accept the stand-in's memfds as VM and vCPU fds
        appeared  called with each new process
    """

    def __init__(self, *, stand_in: bool, appeared: Callable[[Process], None]) -> None:
        self._stand_in = stand_in
        self._appeared = appeared
        self._inode = Inode()
        self._processes: dict[int, Process] = {}
        self._threads: dict[Tid, Process] = {}
        self._vms: dict[bytes, Vm] = {}
        # By which thread and fd a VM was found last: the first place to look.
        self._last: dict[tuple[Tid, RemoteFd], Vm] = {}
        # Who has a VM made, or is about to, that has not been matched to its file.
        self._creators: dict[Process, int] = {}
        # How many there may be before those that have ended are looked for.
        self._vms_limit = self._threads_limit = _MANY

    def __enter__(self) -> Registry:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close every channel and forget everything. Idempotent."""
        for vm in self._vms.values():
            _drop(vm)
        self._vms.clear()
        self._last.clear()
        self._creators.clear()
        self._threads.clear()
        for process in self._processes.values():
            process.close()
        self._processes.clear()
        self._inode.close()

    def process_of(self, tid: Tid) -> Process:
        """Return the process of thread *tid*; OSError when the thread is gone."""
        process = self._processes.get(tid)
        if process is not None:
            return process
        process = self._threads.get(tid)
        if process is not None and process.has_thread(tid):
            return process
        pid = thread_group(tid)
        process = self._processes.get(pid)
        if process is None:
            process = self._processes[pid] = Process(pid, stand_in=self._stand_in)
            self._appeared(process)
        if int(tid) != pid:
            if len(self._threads) >= self._threads_limit:
                self._forget_threads()
            self._threads[tid] = process
        return process

    def _forget_threads(self) -> None:
        # Of those that have ended nobody tells.
        ended = [tid for tid, process in self._threads.items() if not process.has_thread(tid)]
        for tid in ended:
            del self._threads[tid]
        self._threads_limit = max(_MANY, 2 * len(self._threads))

    def process_ended(self, process: Process) -> list[Vm]:
        """Forget *process*; return the VMs that went with it, forgotten as well."""
        del self._processes[process.pid]
        self._creators.pop(process, None)
        for tid in [tid for tid, each in self._threads.items() if each is process]:
            del self._threads[tid]
        # What is nobody's may have been open in this process for the last time.
        touched = [vm for vm in self._vms.values() if vm.owner is process or vm.owner is None]
        for vm in touched:
            vm.owner = None
        process.close()
        return self.prune(touched)

    def prune(self, vms: Iterable[Vm]) -> list[Vm]:
        """Forget those of *vms* whose file is closed everywhere: the kernel unhooks them.

        Returns them; their channels are closed.
        """
        closed = [vm for vm in vms if not vm.file.is_open()]
        for vm in closed:
            self._vms.pop(vm.file.mark, None)
            for place in vm.places:
                del self._last[place]
            _drop(vm)
        return closed

    def creating(self, process: Process) -> None:
        """Take note that *process* is about to create a VM."""
        # A file nobody has asked about yet can only be an older creator's.
        for creator in list(self._creators):
            self._settle(creator)
        count = self._creators.pop(process, 0)  # the latest comes last
        self._creators[process] = count + 1

    def known(self, tid: Tid, fd: RemoteFd) -> Vm | None:
        """Return the VM behind *fd* of thread *tid*; None when that is none, or a new one.

        Raises
            OSError  the thread is gone, or the fd cannot be looked at.
        """
        vm = self._last.get((tid, fd))
        if vm is not None and vm.places[tid, fd].has(vm.file):
            return vm
        for mark in marks(tid, fd):
            vm = self._vms.get(mark)
            if vm is not None:
                self._found(vm, tid, fd)
                return vm
        return None

    def find(self, process: Process, tid: Tid, fd: RemoteFd) -> Vm:
        """Return the VM behind *fd* of thread *tid* of *process*, which is a VM fd.

        Raises
            OSError  the thread is gone, or the fd cannot be looked at.
        """
        vm = self.known(tid, fd)
        if vm is not None:
            return vm
        with _copy(process, tid, fd) as copy:
            vm = self._add(copy, owner=self._creator_of(copy, process, tid))
        self._found(vm, tid, fd)
        return vm

    def _found(self, vm: Vm, tid: Tid, fd: RemoteFd) -> None:
        # The next call is likely to come the same way. Main threads only: their number
        # is the process's, and it is they whom others let call.
        process = self._processes.get(tid)
        if process is None:
            return
        before = self._last.pop((tid, fd), None)
        if before is not None:
            before.places.pop((tid, fd)).close()
        if len(vm.places) >= _PLACES:
            return
        try:
            vm.places[tid, fd] = Place(process.pid, fd)
        except OSError:  # closed meanwhile
            return
        self._last[tid, fd] = vm

    def _settle(self, creator: Process) -> None:
        for fd in creator.vm_fds():
            tid = Tid(creator.pid)
            try:
                if self.known(tid, fd) is None:
                    with _copy(creator, tid, fd) as copy:
                        self._add(copy, owner=creator)
            except OSError:  # closed meanwhile
                continue

    def _creator_of(self, copy: LocalFd, process: Process, tid: Tid) -> Process | None:
        # The latest creator that has the file: others can only have been given it.
        creators = list(reversed(self._creators))
        for creator in creators:
            if _holds(creator, copy):
                return creator
        # It may have closed it, or keep it in a thread's own file table.
        for creator in creators:
            if creator.shares_memory(tid):
                return creator
        # No KVM_CREATE_VM makes a stand-in's VM: whoever uses it first made it.
        return process if self._stand_in else None

    def _add(self, copy: LocalFd, *, owner: Process | None) -> Vm:
        if len(self._vms) >= self._vms_limit:
            # Those that are not hooked are looked at here: nobody waits for their end.
            self.prune(list(self._vms.values()))
            self._vms_limit = max(_MANY, 2 * len(self._vms))
        vm = Vm(file=VmFile(copy, self._inode), owner=owner)
        self._vms[vm.file.mark] = vm
        if owner in self._creators:
            self._creators[owner] -= 1
            if not self._creators[owner]:
                del self._creators[owner]
        return vm


def _drop(vm: Vm) -> None:
    vm.close_channel()
    vm.file.close()
    for place in vm.places.values():
        place.close()
    vm.places.clear()


@contextmanager
def _copy(process: Process, tid: Tid, fd: RemoteFd) -> Iterator[LocalFd]:
    # Never longer than a few system calls: it keeps the VM alive meanwhile.
    copy = process.copy_fd(tid, fd)
    try:
        yield copy
    finally:
        os.close(copy)


def _holds(creator: Process, copy: LocalFd) -> bool:
    us = Pid(os.getpid())
    for fd in creator.vm_fds():
        try:
            if linux.kcmp(linux.KCMP_FILE, us, creator.pid, copy, fd):
                return True
        except OSError:  # closed meanwhile, or the process is gone
            continue
    return False
