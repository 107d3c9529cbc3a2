# SPDX-License-Identifier: Apache-2.0
"""Which wait of a thread may be interrupted, and how it is made to go on. Pure.

Decided twice: from what /proc shows of a thread nobody has touched, so that a thread
doing anything else is never stopped, and from its registers once it is stopped.
Imports ``abi`` only.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Final

from kvmi_libvirt.abi import x86_64 as x86

_CALL_CODE: Final = x86.MOV_POLL_TO_EAX + x86.SYSCALL_INSTRUCTION
CODE_LEN: Final = len(_CALL_CODE)
"""How many bytes before the program counter :func:`objection` wants to see."""

_FIELDS: Final = 9  # of /proc/PID/syscall for a thread that waits in a call
_WORD: Final = 0xFFFF_FFFF_FFFF_FFFF


@dataclass(frozen=True, slots=True)
class Wait:
    """A system call that a thread waits in."""

    number: int
    args: tuple[int, ...]
    stack_pointer: int
    program_counter: int


def parse_wait(text: bytes) -> Wait | None:
    """Return what /proc/PID/syscall shows; None for a thread that is in no call.

    Source: proc(5).
    """
    fields = text.split()
    if len(fields) != _FIELDS:
        return None
    try:
        number, *words = int(fields[0]), *(int(field, 16) for field in fields[1:])
    except ValueError:
        return None
    return Wait(number, tuple(words[:6]), *words[6:])


def objection(wait: Wait, code: bytes) -> str | None:
    """Return why a thread in this wait must be left alone, None if it may be stopped.

    Parameters
        code  the :data:`CODE_LEN` bytes before its program counter
    """
    # The thread must stand behind a syscall instruction, which is used again. A
    # poll(2) interrupted for the second time is in restart_syscall(2), like a
    # sleep would be: the code that made the call tells which it is.
    if not code.endswith(x86.SYSCALL_INSTRUCTION):
        return "its system call was made in an unknown way"
    if wait.number == x86.NR_RESTART_SYSCALL and code == _CALL_CODE:
        return None
    if wait.number not in x86.PARKED_CALLS:
        return f"it is in system call {wait.number}"
    if wait.number in x86.EPOLL_CALLS and not waits_for_ever(wait.number, wait.args[3]):
        # signal(7): epoll_wait(2) ends when it is merely stopped, and how much of its
        # timeout was left cannot be known.
        return "it waits in epoll_wait(2) with a timeout, which a stop would cut short"
    return None


def waits_for_ever(number: int, timeout: int) -> bool:
    """Say whether an epoll call with this fourth argument has no timeout."""
    if number == x86.NR_EPOLL_PWAIT2:  # a pointer
        return timeout == 0
    return bool(timeout & 0x8000_0000)  # an int, -1 as a rule


def wait_of(regs: x86.user_regs_struct) -> Wait:
    """Return the wait that the registers of a stopped thread show."""
    args = (regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9)
    return Wait(regs.orig_rax, args, regs.rsp, regs.rip)


def is_interrupted(regs: x86.user_regs_struct) -> bool:
    """Say whether the call of a stopped thread has done nothing yet."""
    result = signed(regs.rax)
    if regs.orig_rax in x86.EPOLL_CALLS:
        return result == -errno.EINTR
    return result in x86.RESTART_CODES


def call_registers(saved: x86.user_regs_struct) -> x86.user_regs_struct:
    """Return registers that make the thread use its syscall instruction again."""
    regs = x86.user_regs_struct.from_buffer_copy(saved)
    regs.rip -= len(x86.SYSCALL_INSTRUCTION)
    return regs


def is_restarted_by_the_kernel(saved: x86.user_regs_struct) -> bool:
    """Say whether the kernel makes the interrupted call again by itself.

    It does for poll(2) and ppoll(2), but makes EINTR of an epoll_wait(2) that was
    merely stopped. Where that one waits for ever, it can be made again.
    """
    return not (
        saved.orig_rax in x86.EPOLL_CALLS
        and signed(saved.rax) == -errno.EINTR
        and waits_for_ever(saved.orig_rax, saved.r10)
    )


def made_again(saved: x86.user_regs_struct) -> x86.user_regs_struct:
    """Return registers with which the thread makes its own call once more."""
    regs = call_registers(saved)
    regs.rax = saved.orig_rax
    regs.orig_rax = _WORD
    return regs


def signed(word: int) -> int:
    """Return a 64-bit register's value as a signed number."""
    return word - (1 << 64) if word >> 63 else word
