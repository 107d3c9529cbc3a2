# SPDX-License-Identifier: Apache-2.0
"""PREUNHOOK and a tool that does not read: who waits, behind what, and how it ends."""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
from typing import TYPE_CHECKING

import pytest
from emulator_harness import (
    GET_VERSION,
    Emulated,
    asked,
    feature,
    fill,
    received,
    subscribed,
    wait_for_end,
)

from kvmi_libvirt.abi.kvmi import Ioctl, KvmiAbi
from kvmi_libvirt.abi.v7 import V7
from kvmi_libvirt.abi.v12 import V12

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.kvm, pytest.mark.seccomp]

EVENT_V12 = struct.pack("<HHIQ", 0, 8, 1, 0)


@pytest.fixture
def victim() -> Iterator[Emulated]:
    with Emulated(V12) as made:
        yield made


@pytest.mark.parametrize("abi", [V12, V7], ids=lambda abi: abi.name)
def test_preunhook_when_the_tool_does_not_read_then_it_returns_once_it_does(abi: KvmiAbi) -> None:
    with Emulated(abi) as victim:
        tool, kernel_end = subscribed(victim, victim.make_vm())
        event_len = 16 if abi is V12 else 552
        done = fill(victim, victim.vm)
        events = received(tool, event_len * (done + 1))

        assert victim.answer() == 0
        assert [
            struct.unpack_from("<I", events, i + 4)[0] for i in range(0, len(events), event_len)
        ] == [*range(1, done + 2)]
        tool.close()
        kernel_end.close()


@pytest.mark.parametrize("end", ["reads", "closes", "shuts down"])
def test_calls_when_preunhook_waits_then_they_wait_behind_it(victim: Emulated, end: str) -> None:
    vm = victim.make_vm()
    tool, kernel_end = subscribed(victim, vm)
    done = fill(victim, vm)
    # Other threads: the main one waits in PREUNHOOK.
    with victim.second(vm) as second:
        refused = second.ask_many([(Ioctl.COMMAND, feature(1, 999))])
        assert second.answers(refused) == ["EINVAL"]
        waiting = second.ask_many([(Ioctl.COMMAND, feature(1, 8)), (Ioctl.UNHOOK, "")])
        assert not second.has_answer(within_s=0.2)
        other = victim.abi
        assert other is V12
        if end == "reads":
            received(tool, 16 * (done + 1))
        elif end == "closes":
            tool.close()
        else:
            tool.shutdown(socket.SHUT_RDWR)

        assert victim.answer() == (0 if end == "reads" else "ENOENT")
        assert second.answers(waiting) == [0, 0]
    if end == "reads":
        assert received(tool, 1) == b""
    tool.close()
    kernel_end.close()


def test_other_vm_when_preunhook_waits_then_it_is_served(victim: Emulated) -> None:
    vm, other = victim.make_vm(), victim.make_vm()
    with victim.hook(other) as polite:
        tool, kernel_end = subscribed(victim, vm)
        fill(victim, vm)

        assert asked(polite, GET_VERSION)[8:16] == bytes(8)
        tool.close()
        assert victim.answer() == "ENOENT"
        kernel_end.close()


def test_preunhook_when_the_send_timeout_passes_then_enoent_and_the_channel_lives(
    victim: Emulated,
) -> None:
    vm = victim.make_vm()
    tool, kernel_end = subscribed(victim, vm, send_timeout_us=900_000)
    done = fill(victim, vm)

    assert victim.answer() == "ENOENT"
    received(tool, 16 * done)
    assert asked(tool, GET_VERSION)[8:16] == bytes(8)
    tool.close()
    kernel_end.close()


def test_target_when_killed_in_a_waiting_preunhook_then_nothing_is_left(victim: Emulated) -> None:
    vm = victim.make_vm()
    tool, kernel_end = subscribed(victim, vm)
    fill(victim, vm)
    kernel_end.close()
    victim.process.kill()
    victim.process.wait()

    wait_for_end(victim.supervisor_pidfd, what="the supervisor")
    tool.close()


def test_supervisor_when_killed_while_preunhook_waits_then_enosys_at_once(
    victim: Emulated,
) -> None:
    vm = victim.make_vm()
    tool, kernel_end = subscribed(victim, vm)
    fill(victim, vm)
    os.kill(victim.supervisor, signal.SIGKILL)

    assert victim.answer() == "ENOSYS"
    tool.close()
    kernel_end.close()


@pytest.mark.parametrize("is_ignored", [True, False], ids=["ignored", "default"])
def test_preunhook_when_the_tool_is_gone_then_the_caller_gets_sigpipe(is_ignored: bool) -> None:
    with Emulated(V12) as victim:
        vm = victim.make_vm()
        tool, kernel_end = subscribed(victim, vm)
        tool.close()
        kernel_end.close()
        victim.do("sigpipe", is_ignored=is_ignored)
        victim.ask(**victim.call(Ioctl.PREUNHOOK, vm))
        if is_ignored:
            assert victim.answer() == "ENOENT"
            return
        pidfd = os.pidfd_open(victim.pid)
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        assert poll.poll(20_000)
        os.close(pidfd)

        assert victim.process.wait() == -signal.SIGPIPE
