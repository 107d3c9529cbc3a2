# SPDX-License-Identifier: Apache-2.0
"""One process that makes KVM ioctls, seen from the supervisor through /proc.

Nothing read here may be believed before the notification was found valid
*afterwards*: until then the thread id may already be another thread's.
Imports ``abi``, ``linux`` and ``newtypes``.
"""

from __future__ import annotations

import enum
import errno
import os
from typing import TYPE_CHECKING, Final

from kvmi_libvirt import linux
from kvmi_libvirt.abi.kvmi import KVM_RUN
from kvmi_libvirt.abi.x86_64 import NR_IOCTL
from kvmi_libvirt.newtypes import LocalFd, Pid, RemoteAddr, RemoteFd, Tid

if TYPE_CHECKING:
    from collections.abc import Iterator

STAND_IN_VM: Final = "kvmi-emulated-kvm-vm"
STAND_IN_VCPU: Final = "kvmi-emulated-kvm-vcpu"
"""Names of the memfds by which the stand-in process shows its VM and vCPUs."""

_STAND_IN_VM_LINK: Final = f"/memfd:{STAND_IN_VM} (deleted)"
_STAND_IN_VCPU_LINK: Final = f"/memfd:{STAND_IN_VCPU}:"

_NR_IOCTL: Final = str(NR_IOCTL)  # as /proc/PID/syscall shows it
_PIDFD_THREAD: Final = os.O_EXCL  # since Linux 6.9


class FdKind(enum.Enum):
    """What a file descriptor of the process is to KVM."""

    VM = "vm"
    VCPU = "vcpu"
    SYSTEM = "/dev/kvm"
    OTHER = "other"


def fd_kind(link: str, *, stand_in: bool) -> FdKind:
    """Tell from the target of a /proc/PID/fd link what the fd is."""
    if link == "anon_inode:kvm-vm" or (stand_in and link == _STAND_IN_VM_LINK):
        return FdKind.VM
    if link.startswith("anon_inode:kvm-vcpu:") or (
        stand_in and link.startswith(_STAND_IN_VCPU_LINK)
    ):
        return FdKind.VCPU
    return FdKind.SYSTEM if link == "/dev/kvm" else FdKind.OTHER


class Process:
    """A thread group, held by a pidfd. Use it with ``with`` or close it.

    Raises
        OSError  ESRCH when there is no such process (any more).
    """

    def __init__(self, pid: Pid, *, stand_in: bool) -> None:
        self.pid = pid
        self._stand_in = stand_in
        self.pidfd = LocalFd(os.pidfd_open(pid))

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the process. Idempotent."""
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = LocalFd(-1)

    def has_thread(self, tid: Tid) -> bool:
        """Say whether *tid* is a thread of this process now."""
        return int(tid) == self.pid or os.path.exists(f"/proc/{self.pid}/task/{tid}")

    def shares_memory(self, tid: Tid) -> bool:
        """Say whether thread *tid*, of whatever process, has this one's address space."""
        try:
            return self.has_thread(tid) or linux.kcmp(linux.KCMP_VM, self.pid, tid)
        except ProcessLookupError:  # either is gone, and its memory with it
            return False

    def kind_of(self, tid: Tid, fd: RemoteFd) -> FdKind:
        """Say what *fd* is in the file table of thread *tid*; OTHER when it is not open."""
        try:
            link = os.readlink(f"/proc/{tid}/fd/{fd}")
        except FileNotFoundError:
            return FdKind.OTHER
        return fd_kind(link, stand_in=self._stand_in)

    def copy_fd(self, tid: Tid, fd: RemoteFd) -> LocalFd:
        """Return a new duplicate of *fd* of thread *tid*; close a VM's at once.

        Raises
            OSError  EBADF no such fd; ESRCH the thread is gone; EPERM not permitted.
        """
        if int(tid) == self.pid:
            return linux.pidfd_getfd(self.pidfd, fd)
        # A thread may have a file table of its own. Older kernels offer the
        # leader's only, which is the same one in every program we know of.
        try:
            pidfd = LocalFd(os.pidfd_open(tid, _PIDFD_THREAD))
        except OSError:
            return linux.pidfd_getfd(self.pidfd, fd)
        try:
            return linux.pidfd_getfd(pidfd, fd)
        finally:
            os.close(pidfd)

    def vm_fds(self) -> Iterator[RemoteFd]:
        """Yield the numbers of the process's VM fds."""
        for fd, link in self._fds():
            if fd_kind(link, stand_in=self._stand_in) is FdKind.VM:
                yield fd

    def stand_in_vcpu_count(self) -> int:
        """Return how many vCPUs a stand-in shows, each counted once; 0 for any other."""
        if not self._stand_in:
            return 0
        return len({link for _, link in self._fds() if link.startswith(_STAND_IN_VCPU_LINK)})

    def running_vcpu_count(self) -> int:
        """Return how many threads are in KVM_RUN now, or on a CPU and so may be."""
        count = 0
        for tid in _listed(f"/proc/{self.pid}/task"):
            try:
                with open(f"/proc/{self.pid}/task/{tid}/syscall", encoding="ascii") as syscall:
                    fields = syscall.read().split()
            except OSError:  # the thread is gone
                continue
            is_in_kvm_run = fields[:1] == [_NR_IOCTL] and fields[2:3] == [hex(KVM_RUN)]
            count += is_in_kvm_run or fields == ["running"]
        return count

    def read_memory(self, address: int, length: int) -> bytes | None:
        """Return *length* bytes at *address*; None where nothing can be read."""
        try:
            return linux.process_vm_readv(self.pid, RemoteAddr(address), length)
        except OSError:
            return None

    def write_memory(self, address: int, data: bytes) -> bool:
        """Write *data* at *address*; say whether that could be done."""
        try:
            linux.process_vm_writev(self.pid, RemoteAddr(address), data)
        except OSError:
            return False
        return True

    def _fds(self) -> Iterator[tuple[RemoteFd, str]]:
        directory = f"/proc/{self.pid}/fd"
        for name in _listed(directory):
            try:
                link = os.readlink(f"{directory}/{name}")
            except OSError:  # closed meanwhile
                continue
            yield RemoteFd(int(name)), link


def _listed(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:  # the process is gone: it has none
        return []


def allow_many_fds() -> None:
    """Allow this process as many descriptors as its hard limit says. Idempotent."""
    import resource  # here: who serves one VM has no need of it

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def thread_group(tid: Tid) -> Pid:
    """Return the process thread *tid* belongs to; OSError when it is gone."""
    with open(f"/proc/{tid}/status", encoding="ascii", errors="replace") as status:
        for line in status:
            if line.startswith("Tgid:"):
                return Pid(int(line.split()[1]))
    raise ProcessLookupError(errno.ESRCH, f"no Tgid in /proc/{tid}/status")


# One for each length there is; a supervisor has one thread.
_readers: Final[dict[int, linux.RemoteReader]] = {}


def read_argument(tid: Tid, address: RemoteAddr, length: int) -> bytes | None:
    """Return the *length* bytes an ioctl points to, or None where the kernel says EFAULT.

    Raises
        OSError  anything else: the thread is gone (ESRCH), or may not be read (EPERM).
    """
    if not length:
        return b""
    reader = _readers.get(length)
    if reader is None:
        reader = _readers[length] = linux.RemoteReader(length)
    try:
        return reader.read(Pid(tid), address)
    except OSError as error:
        if error.errno == errno.EFAULT:
            return None
        raise
