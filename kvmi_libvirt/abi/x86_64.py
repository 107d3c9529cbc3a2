# SPDX-License-Identifier: Apache-2.0
"""x86-64: registers, system call numbers, restart codes.

Source: <sys/user.h>, <asm/unistd_64.h>, <linux/errno.h> (kernel-private codes).
"""

from __future__ import annotations

import ctypes
from typing import Final

AUDIT_ARCH_X86_64: Final = 0xC000003E
X32_SYSCALL_BIT: Final = 0x40000000

SYSCALL_INSTRUCTION: Final = b"\x0f\x05"
MOV_POLL_TO_EAX: Final = b"\xb8\x07\x00\x00\x00"  # mov eax, 7: how a C library calls poll(2)
RED_ZONE_LEN: Final = 128  # bytes below rsp that a leaf function may use
USER_CS: Final = 0x33  # 64-bit user code segment; 0x23 is a 32-bit task

# Kernel-private results of an interrupted call, seen in rax at a stop.
ERESTARTSYS: Final = 512
ERESTARTNOINTR: Final = 513
ERESTARTNOHAND: Final = 514
ERESTART_RESTARTBLOCK: Final = 516
RESTART_CODES: Final = frozenset(
    -code for code in (ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND, ERESTART_RESTARTBLOCK)
)

MAX_ERRNO: Final = 4095  # results -4095..-1 are errnos

NR_CLOSE: Final = 3
NR_POLL: Final = 7
NR_MMAP: Final = 9
NR_MUNMAP: Final = 11
NR_IOCTL: Final = 16
NR_RECVMSG: Final = 47
NR_SOCKETPAIR: Final = 53
NR_RESTART_SYSCALL: Final = 219
NR_EPOLL_WAIT: Final = 232
NR_PPOLL: Final = 271
NR_EPOLL_PWAIT: Final = 281
NR_EPOLL_PWAIT2: Final = 441

EPOLL_CALLS: Final = frozenset((NR_EPOLL_WAIT, NR_EPOLL_PWAIT, NR_EPOLL_PWAIT2))
PARKED_CALLS: Final = EPOLL_CALLS | {NR_POLL, NR_PPOLL}
"""Calls whose spurious early return is harmless: every event loop expects it."""

REGISTERS: Final = (
    *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8"),
    *("rax", "rcx", "rdx", "rsi", "rdi", "orig_rax", "rip", "cs", "eflags", "rsp", "ss"),
    *("fs_base", "gs_base", "ds", "es", "fs", "gs"),
)
"""Names of the registers, in the order of struct user_regs_struct."""


class user_regs_struct(ctypes.Structure):  # noqa: N801 - the kernel's name
    """General registers as PTRACE_GETREGS and PTRACE_SETREGS pass them."""

    _fields_ = tuple((name, ctypes.c_uint64) for name in REGISTERS)
