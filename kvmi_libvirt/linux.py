# SPDX-License-Identifier: Apache-2.0
"""System calls that Python's standard library does not offer.

The only module with ctypes *calls*. Each wrapper converts, calls once, checks
and converts back; EINTR is never retried here. No policy, no ownership: what
returns a new fd says so. May import ``abi``, ``errors`` and ``newtypes``.
"""

from __future__ import annotations

import ctypes
import errno
import os
from typing import TYPE_CHECKING, Final, NoReturn

from kvmi_libvirt.abi import ptrace as pt
from kvmi_libvirt.abi import seccomp as sc
from kvmi_libvirt.abi.x86_64 import user_regs_struct
from kvmi_libvirt.newtypes import LocalFd, Pid, RemoteAddr, RemoteFd, Tid

if TYPE_CHECKING:
    from collections.abc import Sequence

_libc: Final = ctypes.CDLL(None, use_errno=True)

_SYS_TGKILL: Final = 234
_SYS_SECCOMP: Final = 317
_SYS_KCMP: Final = 312
_SYS_PIDFD_GETFD: Final = 438

# One typed entry per shape; argtypes are set here and never again.
_ptrace = _libc["ptrace"]
_ptrace.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
_ptrace.restype = ctypes.c_long

_wait4 = _libc["wait4"]
_wait4.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
_wait4.restype = ctypes.c_int

_syscall6 = _libc["syscall"]
_syscall6.argtypes = (ctypes.c_long,) + (ctypes.c_ulong,) * 5
_syscall6.restype = ctypes.c_long

_prctl = _libc["prctl"]
_prctl.argtypes = (ctypes.c_int,) + (ctypes.c_ulong,) * 4
_prctl.restype = ctypes.c_int

_setns = _libc["setns"]
_setns.argtypes = (ctypes.c_int, ctypes.c_int)
_setns.restype = ctypes.c_int

_inotify_init1 = _libc["inotify_init1"]
_inotify_init1.argtypes = (ctypes.c_int,)
_inotify_init1.restype = ctypes.c_int

_inotify_add_watch = _libc["inotify_add_watch"]
_inotify_add_watch.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_uint32)
_inotify_add_watch.restype = ctypes.c_int


_process_vm_readv = _libc["process_vm_readv"]
_process_vm_writev = _libc["process_vm_writev"]
for _call in (_process_vm_readv, _process_vm_writev):
    _call.argtypes = (
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_ulong,
        ctypes.c_void_p,
        ctypes.c_ulong,
        ctypes.c_ulong,
    )
    _call.restype = ctypes.c_ssize_t

_two_iovecs = ctypes.c_size_t * 4  # local base and length, remote base and length
_IOVEC_LEN: Final = 2 * ctypes.sizeof(ctypes.c_size_t)


def raise_errno(call: str, *context: object) -> NoReturn:
    """Raise OSError for the errno the last libc call left, naming *call*."""
    code = ctypes.get_errno()
    what = f"{call}({', '.join(map(str, context))})"
    raise OSError(code, f"{what}: {os.strerror(code)}")


# -- ptrace ------------------------------------------------------------------------------


def ptrace_seize(tid: Tid, options: int) -> None:
    """Attach to *tid* without stopping it. Needs CAP_SYS_PTRACE or the same uid."""
    if _ptrace(pt.PTRACE_SEIZE, tid, None, options) == -1:
        raise_errno("PTRACE_SEIZE", tid)


def ptrace_interrupt(tid: Tid) -> None:
    """Ask a seized thread to stop; wait for the stop with :func:`wait_stop`."""
    if _ptrace(pt.PTRACE_INTERRUPT, tid, None, None) == -1:
        raise_errno("PTRACE_INTERRUPT", tid)


def ptrace_getregs(tid: Tid) -> user_regs_struct:
    """Return a copy of the stopped thread's general registers."""
    regs = user_regs_struct()
    if _ptrace(pt.PTRACE_GETREGS, tid, None, ctypes.addressof(regs)) == -1:
        raise_errno("PTRACE_GETREGS", tid)
    return regs


def ptrace_setregs(tid: Tid, regs: user_regs_struct) -> None:
    """Replace the stopped thread's general registers."""
    if _ptrace(pt.PTRACE_SETREGS, tid, None, ctypes.addressof(regs)) == -1:
        raise_errno("PTRACE_SETREGS", tid)


def ptrace_syscall(tid: Tid, signal: int = 0) -> None:
    """Let the stopped thread run to its next system call entry or exit."""
    if _ptrace(pt.PTRACE_SYSCALL, tid, None, signal) == -1:
        raise_errno("PTRACE_SYSCALL", tid)


def ptrace_cont(tid: Tid, signal: int = 0) -> None:
    """Let the stopped thread run. Never use it straight after restoring registers."""
    if _ptrace(pt.PTRACE_CONT, tid, None, signal) == -1:
        raise_errno("PTRACE_CONT", tid)


def ptrace_detach(tid: Tid, signal: int = 0) -> None:
    """Release the stopped thread, delivering *signal* if it is not 0."""
    if _ptrace(pt.PTRACE_DETACH, tid, None, signal) == -1:
        raise_errno("PTRACE_DETACH", tid)


def ptrace_syscall_info(tid: Tid) -> pt.ptrace_syscall_info:
    """Return what the kernel says this stop is (entry, exit or neither)."""
    info = pt.ptrace_syscall_info()
    size = ctypes.sizeof(info)
    if _ptrace(pt.PTRACE_GET_SYSCALL_INFO, tid, size, ctypes.addressof(info)) == -1:
        raise_errno("PTRACE_GET_SYSCALL_INFO", tid)
    return info


def ptrace_getsiginfo(tid: Tid) -> bytes:
    """Return the siginfo_t of the signal a thread in signal-delivery-stop is about to take."""
    buffer = ctypes.create_string_buffer(pt.SIGINFO_LEN)
    if _ptrace(pt.PTRACE_GETSIGINFO, tid, None, ctypes.addressof(buffer)) == -1:
        raise_errno("PTRACE_GETSIGINFO", tid)
    return buffer.raw


def ptrace_setsiginfo(tid: Tid, siginfo: bytes) -> None:
    """Replace the siginfo_t of a thread in signal-delivery-stop."""
    buffer = ctypes.create_string_buffer(siginfo, pt.SIGINFO_LEN)
    if _ptrace(pt.PTRACE_SETSIGINFO, tid, None, ctypes.addressof(buffer)) == -1:
        raise_errno("PTRACE_SETSIGINFO", tid)


def tgkill(pid: Pid, tid: Tid, signal: int) -> None:
    """Send *signal* to one thread. Source: tgkill(2)."""
    if _syscall6(_SYS_TGKILL, pid, tid, signal, 0, 0) == -1:
        raise_errno("tgkill", pid, tid, signal)


def wait_stop(tid: Tid) -> int | None:
    """Wait for the next state change of tracee *tid*; return its wait status.

    Blocks until there is one, or until a signal handler ran: then it returns
    None, which is how a timer bounds the wait. ChildProcessError when *tid* is
    no tracee (any more).
    """
    status = ctypes.c_int()
    result = _wait4(tid, ctypes.addressof(status), pt.WALL, None)
    if result == tid:
        return status.value
    if ctypes.get_errno() == errno.EINTR:
        return None
    raise_errno("wait4", tid)


# -- another process's memory and fds ----------------------------------------------------


def process_vm_readv(pid: Pid, address: RemoteAddr, length: int) -> bytes:
    """Return *length* bytes at *address* of process *pid*; OSError EFAULT if unmapped."""
    return RemoteReader(length).read(pid, address)


class RemoteReader:
    """Reads the same number of bytes of other processes again and again, quicker than once.

    Not for several threads at a time.
    """

    def __init__(self, length: int) -> None:
        """Take a buffer of *length* bytes."""
        self._length = length
        self._buffer = ctypes.create_string_buffer(length)
        self._iovecs = _two_iovecs(ctypes.addressof(self._buffer), length, 0, length)
        self._local = ctypes.addressof(self._iovecs)

    def read(self, pid: Pid, address: RemoteAddr) -> bytes:
        """Return the bytes at *address* of process *pid*; OSError EFAULT if unmapped."""
        self._iovecs[2] = address
        local = self._local
        count = _process_vm_readv(pid, local, 1, local + _IOVEC_LEN, 1, 0)
        if count == self._length:
            return self._buffer.raw
        if count == -1:
            raise_errno("process_vm_readv", pid, hex(address), self._length)
        raise OSError(errno.EFAULT, f"process_vm_readv({pid}, {address:#x}): short read")


def process_vm_writev(pid: Pid, address: RemoteAddr, data: bytes) -> None:
    """Write *data* at *address* of process *pid*; OSError EFAULT if unmapped."""
    buffer = ctypes.create_string_buffer(data, len(data))
    iovecs = _two_iovecs(ctypes.addressof(buffer), len(data), address, len(data))
    local = ctypes.addressof(iovecs)
    count = _process_vm_writev(pid, local, 1, local + _IOVEC_LEN, 1, 0)
    if count == -1:
        raise_errno("process_vm_writev", pid, hex(address), len(data))
    if count != len(data):
        raise OSError(errno.EFAULT, f"process_vm_writev({pid}, {address:#x}): short write")


def pidfd_getfd(pidfd: LocalFd, remote_fd: RemoteFd) -> LocalFd:
    """Return a new close-on-exec duplicate of *remote_fd* of the process behind *pidfd*.

    Needs PTRACE_MODE_ATTACH_REALCREDS. ESRCH when the process is gone, EBADF
    when it has no such fd. Source: pidfd_getfd(2), since Linux 5.6.
    """
    fd = _syscall6(_SYS_PIDFD_GETFD, pidfd, remote_fd, 0, 0, 0)
    if fd == -1:
        raise_errno("pidfd_getfd", pidfd, remote_fd)
    return LocalFd(fd)


def own_syscall(number: int, *args: int) -> int:
    """Make any system call of up to five arguments here; return what the kernel does.

    That is the result, or a negative errno, as an injected call's. Source: syscall(2).
    """
    padded = (*args, 0, 0, 0, 0, 0)[:5]
    result: int = _syscall6(number, *padded)
    return -ctypes.get_errno() if result == -1 else result


KCMP_FILE: Final = 0
KCMP_VM: Final = 1


def kcmp(kind: int, pid1: Pid | Tid, pid2: Pid | Tid, fd1: int = 0, fd2: int = 0) -> bool:
    """Say whether two tasks share a resource (KCMP_VM) or two fds a file (KCMP_FILE).

    Source: kcmp(2).
    """
    result = _syscall6(_SYS_KCMP, pid1, pid2, kind, fd1, fd2)
    if result == -1:
        raise_errno("kcmp", pid1, pid2, kind, fd1, fd2)
    return bool(result == 0)


# -- seccomp -----------------------------------------------------------------------------


def set_no_new_privs() -> None:
    """Give up gaining privileges by execve(2), for ever; seccomp needs it when not root."""
    if _prctl(sc.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == -1:
        raise_errno("prctl", "PR_SET_NO_NEW_PRIVS")


def set_ptracer(pid: Pid) -> None:
    """Allow *pid* to trace this process under Yama; EINVAL where there is no Yama."""
    if _prctl(sc.PR_SET_PTRACER, pid, 0, 0, 0) == -1:
        raise_errno("prctl", "PR_SET_PTRACER")


def seccomp_new_listener(program: Sequence[sc.sock_filter], flags: int = 0) -> LocalFd:
    """Install *program* on this thread for ever; return a new close-on-exec listener fd.

    EBUSY when a listener is installed already, EACCES without no_new_privs or
    CAP_SYS_ADMIN, EINVAL for a bad program or an unknown flag.
    """
    array = (sc.sock_filter * len(program))(*program)
    fprog = sc.sock_fprog(len(program), array)
    fd = _syscall6(
        _SYS_SECCOMP,
        sc.SECCOMP_SET_MODE_FILTER,
        sc.SECCOMP_FILTER_FLAG_NEW_LISTENER | flags,
        ctypes.addressof(fprog),
        0,
        0,
    )
    if fd == -1:
        raise_errno("seccomp", "SECCOMP_SET_MODE_FILTER")
    return LocalFd(fd)


def seccomp_notif_sizes() -> sc.seccomp_notif_sizes:
    """Return the sizes of the notification structures of the running kernel."""
    sizes = sc.seccomp_notif_sizes()
    if _syscall6(_SYS_SECCOMP, sc.SECCOMP_GET_NOTIF_SIZES, 0, ctypes.addressof(sizes), 0, 0) == -1:
        raise_errno("seccomp", "SECCOMP_GET_NOTIF_SIZES")
    return sizes


# -- inotify -----------------------------------------------------------------------------

IN_MODIFY: Final = 0x2
IN_CREATE: Final = 0x100
IN_DELETE: Final = 0x200
IN_MOVED_TO: Final = 0x80
IN_CLOSE_WRITE: Final = 0x8
IN_Q_OVERFLOW: Final = 0x4000
IN_IGNORED: Final = 0x8000
IN_ONLYDIR: Final = 0x01000000


def inotify_new() -> LocalFd:
    """Return a new non-blocking inotify descriptor, owned by the caller. Source: inotify(7)."""
    fd = _inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    if fd < 0:
        raise_errno("inotify_init1")
    return LocalFd(fd)


def inotify_add_watch(fd: LocalFd, path: str, mask: int) -> int:
    """Watch *path*; return the watch's number, the old one if it is watched already.

    ENOENT when there is no such path, ENOSPC when the user has too many watches.
    """
    number = int(_inotify_add_watch(fd, os.fsencode(path), mask))
    if number < 0:
        raise_errno("inotify_add_watch", path)
    return number


CLONE_NEWNET: Final = 0x40000000
"""<linux/sched.h>"""


def setns(fd: LocalFd, kind: int) -> None:
    """Move this thread into the namespace *fd*, which must be of that *kind*.

    EPERM without CAP_SYS_ADMIN. Source: setns(2).
    """
    if _setns(fd, kind) == -1:
        raise_errno("setns", fd)


def set_process_title(title: str) -> None:
    """Replace this process's command line, as ps shows it; cut to the length it had.

    A forked child that runs on as something else must not be taken for its parent.
    Source: arg_start and arg_end in proc_pid_stat(5).
    """
    with open("/proc/self/stat", "rb") as stat:
        # The command name, in parentheses, may hold anything: count from its end.
        fields = stat.read().rpartition(b")")[2].split()
    start, end = int(fields[45]), int(fields[46])
    length = end - start
    ctypes.memmove(start, title.encode()[: length - 1].ljust(length, b"\0"), length)
