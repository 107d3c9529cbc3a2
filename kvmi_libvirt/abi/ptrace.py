# SPDX-License-Identifier: Apache-2.0
"""Numbers and structures of ptrace(2) and wait(2).

Source: <linux/ptrace.h>, <linux/wait.h>; ptrace(2).
"""

from __future__ import annotations

import ctypes
from typing import Final

PTRACE_CONT: Final = 7
PTRACE_GETREGS: Final = 12
PTRACE_SETREGS: Final = 13
PTRACE_DETACH: Final = 17
PTRACE_SYSCALL: Final = 24
PTRACE_SEIZE: Final = 0x4206
PTRACE_INTERRUPT: Final = 0x4207
PTRACE_GETSIGINFO: Final = 0x4202
PTRACE_SETSIGINFO: Final = 0x4203
PTRACE_GET_SYSCALL_INFO: Final = 0x420E

PTRACE_O_TRACESYSGOOD: Final = 0x00000001

PTRACE_EVENT_STOP: Final = 128
SYSCALL_STOP_BIT: Final = 0x80  # in the stop signal, with PTRACE_O_TRACESYSGOOD
SIGINFO_LEN: Final = 128  # bytes of siginfo_t

PTRACE_SYSCALL_INFO_NONE: Final = 0
PTRACE_SYSCALL_INFO_ENTRY: Final = 1
PTRACE_SYSCALL_INFO_EXIT: Final = 2
PTRACE_SYSCALL_INFO_SECCOMP: Final = 3

WALL: Final = 0x40000000  # __WALL: wait for any kind of child or tracee

PF_EXITING: Final = 0x00000004
"""Task flag in /proc/PID/stat: the thread is on its way out."""
PF_USER_WORKER: Final = 0x00004000
"""Task flag in /proc/PID/stat: a kernel worker in the process's thread group."""


class _entry(ctypes.Structure):  # noqa: N801
    _fields_ = (("nr", ctypes.c_uint64), ("args", ctypes.c_uint64 * 6))


class _exit(ctypes.Structure):  # noqa: N801
    _fields_ = (("rval", ctypes.c_int64), ("is_error", ctypes.c_uint8))


class _u(ctypes.Union):  # noqa: N801
    _fields_ = (("entry", _entry), ("exit", _exit), ("raw", ctypes.c_uint8 * 64))


class ptrace_syscall_info(ctypes.Structure):  # noqa: N801 - the kernel's name
    """What PTRACE_GET_SYSCALL_INFO fills in (since Linux 5.3)."""

    _anonymous_ = ("u",)
    _fields_ = (
        ("op", ctypes.c_uint8),  # PTRACE_SYSCALL_INFO_*
        ("pad", ctypes.c_uint8 * 3),
        ("arch", ctypes.c_uint32),  # AUDIT_ARCH_*
        ("instruction_pointer", ctypes.c_uint64),
        ("stack_pointer", ctypes.c_uint64),
        ("u", _u),
    )
