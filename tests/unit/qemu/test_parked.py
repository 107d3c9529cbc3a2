# SPDX-License-Identifier: Apache-2.0
"""Which waits may be interrupted, and with which registers they go on."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmi_libvirt.abi import x86_64 as x86
from kvmi_libvirt.qemu import parked
from kvmi_libvirt.qemu.parked import Wait

SP, PC = 0x7FFC_8410_DD10, 0x7FF9_0F91_BF9C
SYSCALL = b"\x48\x8b\x44\x24\x08\x0f\x05"
POLL = x86.MOV_POLL_TO_EAX + x86.SYSCALL_INSTRUCTION
FOR_EVER = 0xFFFF_FFFF_FFFF_FFFF  # -1, however wide
NO_POINTER = 0


def wait(number: int, timeout: int = 0) -> Wait:
    return Wait(number, (1, 2, 3, timeout, 5, 6), SP, PC)


def registers(number: int, result: int, timeout: int = 0) -> x86.user_regs_struct:
    return x86.user_regs_struct(
        orig_rax=number, rax=result & FOR_EVER, rip=PC, rsp=SP, r10=timeout, rbx=77
    )


def test_what_proc_shows_of_a_waiting_thread_is_understood() -> None:
    text = b"271 0x55d4 0x6 0x0 0x0 0x8 0x7ffc 0x7ffc8410dd10 0x7ff90f91bf9c\n"

    assert parked.parse_wait(text) == Wait(271, (0x55D4, 6, 0, 0, 8, 0x7FFC), SP, PC)


@pytest.mark.parametrize("text", [b"running\n", b"-1 0x7ffc 0x7ff9\n", b"", b"271 x 0 0 0 0 0 0 0"])
def test_a_thread_in_no_call_waits_in_none(text: bytes) -> None:
    assert parked.parse_wait(text) is None


@given(st.binary(max_size=80))
def test_no_text_of_proc_is_an_error(text: bytes) -> None:
    found = parked.parse_wait(text)

    assert found is None or len(found.args) == 6


@pytest.mark.parametrize(
    "found",
    [
        wait(x86.NR_POLL),
        wait(x86.NR_PPOLL),
        wait(x86.NR_EPOLL_WAIT, FOR_EVER),
        wait(x86.NR_EPOLL_WAIT, 0xFFFF_FFFF),
        wait(x86.NR_EPOLL_PWAIT, FOR_EVER),
        wait(x86.NR_EPOLL_PWAIT2, NO_POINTER),
    ],
)
def test_a_wait_for_events_may_be_interrupted(found: Wait) -> None:
    assert parked.objection(found, SYSCALL) is None


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (wait(0), "system call 0"),
        (wait(202), "system call 202"),
        (wait(x86.NR_IOCTL), "system call 16"),
        (wait(x86.NR_RESTART_SYSCALL), "system call 219"),  # a sleep's, as far as can be known
        (wait(x86.NR_EPOLL_WAIT, 100), "timeout"),
        (wait(x86.NR_EPOLL_WAIT, 0), "timeout"),
        (wait(x86.NR_EPOLL_PWAIT2, 0x7FFC_0000_0000), "timeout"),
    ],
)
def test_any_other_wait_is_left_alone(found: Wait, why: str) -> None:
    assert why in str(parked.objection(found, SYSCALL))


@pytest.mark.parametrize("code", [b"", b"\xcd\x80", b"\x90" * 7, SYSCALL[:-1]])
def test_a_call_made_in_another_way_is_left_alone(code: bytes) -> None:
    assert "unknown way" in str(parked.objection(wait(x86.NR_PPOLL), code))


def test_a_poll_that_was_restarted_is_known_by_its_code() -> None:
    assert parked.objection(wait(x86.NR_RESTART_SYSCALL), POLL) is None


def test_registers_show_the_same_wait_as_proc() -> None:
    regs = x86.user_regs_struct(
        orig_rax=271, rdi=1, rsi=2, rdx=3, r10=4, r8=5, r9=6, rsp=SP, rip=PC
    )

    assert parked.wait_of(regs) == Wait(271, (1, 2, 3, 4, 5, 6), SP, PC)


@pytest.mark.parametrize("result", sorted(x86.RESTART_CODES))
def test_a_call_with_a_restart_code_has_done_nothing_yet(result: int) -> None:
    assert parked.is_interrupted(registers(x86.NR_PPOLL, result))


@pytest.mark.parametrize("result", [0, 1, -errno.EINTR, -511, -515, -517])
def test_a_call_with_a_result_is_over(result: int) -> None:
    assert not parked.is_interrupted(registers(x86.NR_PPOLL, result))


def test_an_epoll_wait_that_was_stopped_is_interrupted_and_made_again() -> None:
    regs = registers(x86.NR_EPOLL_WAIT, -errno.EINTR, FOR_EVER)

    again = parked.made_again(regs)

    assert parked.is_interrupted(regs)
    assert not parked.is_restarted_by_the_kernel(regs)
    assert (again.rip, again.rax) == (PC - 2, x86.NR_EPOLL_WAIT)
    assert again.orig_rax == FOR_EVER  # else the kernel may step back once more
    assert (again.rsp, again.rbx, again.r10) == (SP, 77, FOR_EVER)


def test_an_epoll_wait_with_an_event_has_its_result_kept() -> None:
    regs = registers(x86.NR_EPOLL_WAIT, 1, FOR_EVER)

    assert not parked.is_interrupted(regs)
    assert parked.is_restarted_by_the_kernel(regs)


def test_a_timed_epoll_wait_is_not_made_again() -> None:
    # It would wait for its whole timeout once more.
    assert parked.is_restarted_by_the_kernel(registers(x86.NR_EPOLL_WAIT, -errno.EINTR, 1000))


def test_our_calls_use_the_threads_own_instruction_and_change_nothing_else() -> None:
    saved = registers(x86.NR_PPOLL, -x86.ERESTARTNOHAND)

    ours = parked.call_registers(saved)

    assert ours.rip == PC - 2
    ours.rip = PC
    assert bytes(ours) == bytes(saved)


@given(st.integers(min_value=-(1 << 63), max_value=(1 << 63) - 1))
def test_a_word_is_read_as_a_signed_number(value: int) -> None:
    assert parked.signed(value & FOR_EVER) == value
