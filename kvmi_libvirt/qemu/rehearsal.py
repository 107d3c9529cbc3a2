# SPDX-License-Identifier: Apache-2.0
"""Do in this process what is about to be done in QEMU, so that it goes quickly there.

What a freshly forked process runs for the first time runs slowly: every page of
Python's that it touches is still shared and has to be copied, and no cache is warm.
While QEMU waits there is no time for that. May import ``abi``, ``errors``, ``linux``,
``newtypes``, and of ``qemu`` ``looking``, ``parked``, ``process``, ``remote`` and
``tracee``.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import time
from typing import TYPE_CHECKING, Final

from kvmi_libvirt import linux
from kvmi_libvirt.abi import ptrace as pt
from kvmi_libvirt.abi import x86_64 as x86
from kvmi_libvirt.errors import KvmiLibvirtError
from kvmi_libvirt.newtypes import Pid, RemoteFd
from kvmi_libvirt.qemu import parked
from kvmi_libvirt.qemu.looking import Sight
from kvmi_libvirt.qemu.process import Process
from kvmi_libvirt.qemu.remote import SCRATCH_LEN, Remote
from kvmi_libvirt.qemu.tracee import Tracee

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmi_libvirt.newtypes import Tid

logger = logging.getLogger(__name__)

NO_VM: Final = RemoteFd(-1)
_STACK_LEN: Final = 2 * SCRATCH_LEN
_REHEARSAL_S: Final = 1.0
_STOPPED: Final = 0x7F  # of a wait status; see WIFSTOPPED in wait(2)
_EVENT_STOP: Final = pt.PTRACE_EVENT_STOP << 16 | signal.SIGTRAP << 8 | _STOPPED
_SYSCALL_STOP: Final = (signal.SIGTRAP | pt.SYSCALL_STOP_BIT) << 8 | _STOPPED
_PARKED_AT: Final = 0x1000  # no code of ours is ever run there


class _OwnThread:
    """Stands in for the kernel that holds QEMU's thread, parked in ppoll(2).

    The system calls that the thread is told to make are made here, all but an ioctl,
    which succeeds.
    """

    def __init__(self) -> None:
        self._stack = ctypes.create_string_buffer(_STACK_LEN)
        self._regs = x86.user_regs_struct(
            cs=x86.USER_CS,
            orig_rax=x86.NR_PPOLL,
            rax=(1 << 64) - x86.ERESTARTNOHAND,
            rip=_PARKED_AT,
            rsp=ctypes.addressof(self._stack) + _STACK_LEN,
        )
        self._info = pt.ptrace_syscall_info(instruction_pointer=_PARKED_AT)
        self._status = _EVENT_STOP

    def sight(self) -> Sight:
        """Return the wait that the thread is in."""
        return Sight(parked.wait_of(self._regs), x86.SYSCALL_INSTRUCTION)

    def ptrace_seize(self, tid: Tid, options: int) -> None:
        """Do nothing."""

    def ptrace_interrupt(self, tid: Tid) -> None:
        """Do nothing."""

    def ptrace_getregs(self, _tid: Tid) -> x86.user_regs_struct:
        """Return a copy of the registers."""
        return x86.user_regs_struct.from_buffer_copy(self._regs)

    def ptrace_setregs(self, _tid: Tid, regs: x86.user_regs_struct) -> None:
        """Take a copy of the registers."""
        ctypes.pointer(self._regs)[0] = regs

    def ptrace_syscall(self, _tid: Tid, _signal: int = 0) -> None:
        """Enter a system call, or make the one that was entered."""
        self._status = _SYSCALL_STOP
        if self._info.op != pt.PTRACE_SYSCALL_INFO_ENTRY:
            self._info.op = pt.PTRACE_SYSCALL_INFO_ENTRY
            return
        self._info.op = pt.PTRACE_SYSCALL_INFO_EXIT
        regs = self._regs
        args = (regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8)
        is_ioctl = regs.rax == x86.NR_IOCTL
        self._info.exit.rval = 0 if is_ioctl else linux.own_syscall(regs.rax, *args)

    def ptrace_cont(self, tid: Tid, signal: int = 0) -> None:
        """Do nothing."""

    def ptrace_detach(self, tid: Tid, signal: int = 0) -> None:
        """Do nothing."""

    def ptrace_syscall_info(self, _tid: Tid) -> pt.ptrace_syscall_info:
        """Return what kind of stop this is."""
        return self._info

    def wait_stop(self, _tid: Tid) -> int:
        """Return the wait status of the stop that was asked for last."""
        return self._status


def rehearse(work: Callable[[Remote], None]) -> None:
    """Let *work* do to this process what it will do to QEMU.

    It must use :data:`NO_VM` for the VM, and close what it opened. That it fails means
    nothing: what matters will be tried again.
    """
    thread = _OwnThread()
    try:
        with Process(Pid(os.getpid())) as ourselves:
            deadline = time.monotonic() + _REHEARSAL_S
            tracee = Tracee(ourselves, deadline=deadline, kernel=thread)
            tracee.take(thread.sight())
            try:
                work(Remote(ourselves, tracee))
            finally:
                tracee.release()
    except (KvmiLibvirtError, OSError) as error:
        logger.debug("the rehearsal failed: %s", error)
