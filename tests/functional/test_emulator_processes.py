# SPDX-License-Identifier: Apache-2.0
"""Whose VM it is, and what happens when somebody dies: supervisor, target, tool, VM."""

from __future__ import annotations

import os
import select
import signal
import struct
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from emulator_harness import (
    GET_INFO,
    GET_VERSION,
    Emulated,
    asked,
    feature,
    hook_argument,
    received,
    tool_pair,
    trace_lines,
    wait_for_end,
)
from support import supervisor_of, wait_until

from kvmi_libvirt.abi.kvmi import KVM_CHECK_EXTENSION, KVM_RUN, Ioctl
from kvmi_libvirt.abi.v12 import V12
from kvmi_libvirt.emulator.filter import KVM_CREATE_VCPU

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.kvm, pytest.mark.seccomp]

COMMAND_ON_HOOKED = 0
COMMAND_ON_UNHOOKED = "EFAULT"


@pytest.fixture
def victim() -> Iterator[Emulated]:
    with Emulated(V12) as made:
        yield made


def command(victim: Emulated, vm: int) -> int | str:
    return victim.ioctl(Ioctl.COMMAND, vm, feature(1, 8))


def calls_on(victim: Emulated, vm: int) -> list[dict[str, Any]]:
    return [
        victim.call(Ioctl.COMMAND, vm, feature(1, 8)),
        victim.call(Ioctl.COMMAND, vm, feature(1, 999)),
        {"op": "ioctl", "fd": vm, "request": V12.request(Ioctl.COMMAND), "argument": 0},
        victim.call(Ioctl.EVENT, vm, feature(1, 0)),
        victim.call(Ioctl.PREUNHOOK, vm),
        victim.call(Ioctl.UNHOOK, vm),
        victim.call(Ioctl.HOOK, vm, hook_argument(-1)),
        {"op": "ioctl", "fd": vm, "request": KVM_CHECK_EXTENSION, "argument": V12.capability},
    ]


def flat(results: list[Any]) -> list[Any]:
    return [result[0] if isinstance(result, list) else result for result in results]


# -- whose VM it is ------------------------------------------------------------------------


def test_thread_when_it_calls_then_the_vm_is_its_own(victim: Emulated) -> None:
    vm = victim.make_vm()
    tool = victim.hook(vm)

    assert victim.do("in_thread", call=victim.call(Ioctl.COMMAND, vm, feature(1, 8))) == [0]
    tool.close()


def test_thread_when_it_has_a_file_table_of_its_own_then_its_descriptors_count(
    victim: Emulated,
) -> None:
    vm = victim.make_vm()
    tool, kernel_end = tool_pair()
    with tool, kernel_end:
        fd = victim.give(kernel_end)
        # There the VM and the socket have numbers that are others, or nothing, in the main thread.
        moved = {"vm": 300, "socket": 301}
        calls = [
            victim.call(Ioctl.HOOK, moved["vm"], hook_argument(moved["socket"])),
            victim.call(Ioctl.COMMAND, moved["vm"], feature(1, 8)),
            victim.call(Ioctl.COMMAND, vm, feature(1, 8)),
        ]
        answers = victim.do("in_unshared_thread", vm=vm, sock=fd, moved=moved, calls=calls)
        if answers == "EINVAL":
            pytest.skip("this kernel has no pidfd of a thread")

        assert flat(answers) == [0, 0, "EBADF"]
        assert command(victim, vm) == COMMAND_ON_HOOKED
        assert command(victim, moved["vm"]) == "EBADF"
        assert asked(tool, GET_VERSION)[8:16] == bytes(8)


@pytest.mark.parametrize("is_hooked", [True, False], ids=["hooked", "never touched"])
def test_fork_child_when_it_calls_on_an_inherited_vm_then_eio_and_nothing_changes(
    victim: Emulated, is_hooked: bool
) -> None:
    vm = victim.make_vm()
    tool = victim.hook(vm) if is_hooked else None

    results = flat(victim.do("in_fork", calls=calls_on(victim, vm)))

    assert results == ["EIO"] * len(results)
    assert command(victim, vm) == (COMMAND_ON_HOOKED if is_hooked else COMMAND_ON_UNHOOKED)
    if tool is not None:
        assert asked(tool, GET_VERSION)[8:16] == bytes(8)
        tool.close()


def test_fork_child_when_it_makes_its_own_vm_then_that_is_its_own(victim: Emulated) -> None:
    vm = victim.make_vm()
    tool = victim.hook(vm)

    results = victim.do("fork_that_makes_a_vm", calls=calls_on(victim, -1))

    assert flat(results)[0] == COMMAND_ON_UNHOOKED
    assert flat(results)[-1] == 1
    assert command(victim, vm) == COMMAND_ON_HOOKED
    tool.close()


def test_other_process_when_it_has_the_vm_fd_then_eio_however_it_got_it(
    victim: Emulated,
) -> None:
    vm = victim.make_vm()
    tool = victim.hook(vm)

    stolen = flat(victim.do("in_fork_with_pidfd", calls=calls_on(victim, vm)))
    passed = flat(victim.do("in_fork_with_scm_rights", calls=calls_on(victim, vm)))

    assert stolen == passed == ["EIO"] * 8
    assert command(victim, vm) == COMMAND_ON_HOOKED
    assert asked(tool, GET_VERSION)[8:16] == bytes(8)
    tool.close()


def test_dup_when_used_then_it_is_the_same_vm_also_after_the_first_fd_is_closed(
    victim: Emulated,
) -> None:
    vm = victim.make_vm()
    tool = victim.hook(vm)
    other = victim.do("dup", fd=vm)
    victim.do("close", fd=vm)

    assert command(victim, other) == COMMAND_ON_HOOKED
    assert victim.ioctl(Ioctl.HOOK, other, hook_argument(0)) == "EEXIST"
    assert asked(tool, GET_VERSION)[8:16] == bytes(8)
    tool.close()


def test_fd_number_when_another_vm_gets_it_then_that_is_not_hooked(victim: Emulated) -> None:
    vm = victim.make_vm()
    tool = victim.hook(vm)
    victim.do("close", fd=vm)
    again = victim.make_vm()
    victim.do("dup2", fd=again, to=vm)

    assert command(victim, vm) == COMMAND_ON_UNHOOKED
    assert received(tool, 1) == b""
    tool.close()


def test_two_vms_when_in_one_process_then_each_has_its_own_rights_and_tool(
    victim: Emulated,
) -> None:
    first, second = victim.make_vm(), victim.make_vm()
    for index in range(3):
        victim.do("create_vcpu", vm=first, index=index)
    victim.do("create_vcpu", vm=second, index=0)
    with victim.hook(first) as first_tool, victim.hook(second) as second_tool:
        assert command(victim, first) == 0
        assert asked(second_tool, GET_INFO)[8:12] == struct.pack("<i", -1)
        assert command(victim, second) == 0

        assert asked(first_tool, GET_INFO)[16:20] == struct.pack("<I", 3)
        assert asked(second_tool, GET_INFO)[16:20] == struct.pack("<I", 1)
        assert victim.ioctl(Ioctl.UNHOOK, first) == 0
        assert received(first_tool, 1) == b""
        assert asked(second_tool, GET_VERSION)[8:16] == bytes(8)


def test_vcpu_when_another_process_wants_to_create_it_then_it_does_not_count(
    victim: Emulated,
) -> None:
    vm = victim.make_vm()
    victim.do("create_vcpu", vm=vm, index=0)
    with victim.hook(vm) as tool:
        assert command(victim, vm) == 0
        create = {"op": "ioctl", "fd": vm, "request": KVM_CREATE_VCPU, "argument": 1}
        assert victim.do("in_fork", calls=[create]) == ["EIO"]

        assert asked(tool, GET_INFO)[16:20] == struct.pack("<I", 1)


def test_vcpu_when_it_comes_after_the_hook_then_counted_and_without_introspection_until_the_next(
    victim: Emulated,
) -> None:
    vm = victim.make_vm()
    victim.do("create_vcpu", vm=vm, index=0)
    for vcpus in (1, 2):
        with victim.hook(vm) as tool:
            assert victim.ioctl(Ioctl.COMMAND, vm, feature(1, -1)) == 0
            if vcpus == 1:
                victim.do("create_vcpu", vm=vm, index=1)

            assert asked(tool, GET_INFO)[16:20] == struct.pack("<I", 2)
            answers = [
                struct.unpack_from("<i", asked(tool, struct.pack("<HHIHHI", 3, 8, 1, i, 0, 0)), 8)
                for i in range(3)
            ]
            assert answers == [(-95,), (-11 if vcpus == 1 else -95,), (-22,)]
            assert victim.ioctl(Ioctl.UNHOOK, vm) == 0


def test_64_vms_when_hooked_at_once_then_every_tool_is_served(victim: Emulated) -> None:
    tools = [victim.hook(victim.make_vm()) for _ in range(64)]

    assert {asked(tool, GET_VERSION)[8:16] for tool in tools} == {bytes(8)}
    for tool in tools:
        tool.close()


def test_vm_fd_when_closed_while_hooked_then_the_tool_gets_eof(victim: Emulated) -> None:
    vm = victim.make_vm()
    tool = victim.hook(vm)
    victim.do("close", fd=vm)

    assert received(tool, 1) == b""
    tool.close()


def test_supervisor_when_a_vm_is_hooked_then_it_holds_no_copy_of_the_vm(victim: Emulated) -> None:
    tool = victim.hook(victim.make_vm())
    links = [os.readlink(fd) for fd in Path(f"/proc/{victim.supervisor}/fd").iterdir()]

    assert [link for link in links if "kvm" in link] == []
    tool.close()


# -- the tool ------------------------------------------------------------------------------


def test_tool_when_it_closes_then_the_vm_stays_hooked_until_unhook(victim: Emulated) -> None:
    vm = victim.make_vm()
    victim.hook(vm).close()

    assert command(victim, vm) == COMMAND_ON_HOOKED
    assert victim.ioctl(Ioctl.PREUNHOOK, vm) == "ENOENT"
    assert victim.ioctl(Ioctl.HOOK, vm, hook_argument(0)) == "EEXIST"
    assert victim.ioctl(Ioctl.UNHOOK, vm) == 0
    victim.hook(vm).close()


def test_tool_when_it_floods_and_never_reads_then_others_are_served_all_the_same(
    victim: Emulated,
) -> None:
    vm, other = victim.make_vm(), victim.make_vm()
    with victim.hook(vm) as flooding, victim.hook(other) as polite:
        flooding.setblocking(False)
        deadline = time.monotonic() + 0.5
        answered = 0
        while time.monotonic() < deadline:
            try:
                flooding.send(GET_VERSION * 4096)
            except BlockingIOError:
                pass
            assert command(victim, vm) == COMMAND_ON_HOOKED
            assert asked(polite, GET_VERSION)[8:16] == bytes(8)
            answered += 1

        assert answered > 20
        assert victim.ioctl(Ioctl.UNHOOK, vm) == 0


# -- deaths --------------------------------------------------------------------------------


def test_supervisor_when_killed_then_enosys_at_once_and_the_target_lives(
    victim: Emulated,
) -> None:
    vm = victim.make_vm()
    tool = victim.hook(vm)
    os.kill(victim.supervisor, signal.SIGKILL)
    wait_for_end(victim.supervisor_pidfd, what="the supervisor")

    assert command(victim, vm) == "ENOSYS"
    assert victim.check_extension(vm) == "ENOSYS"
    assert victim.check_extension(vm, 0x7FFFFFFF) == 0
    assert received(tool, 1) == b""
    tool.close()


def test_supervisor_when_killed_during_a_call_then_enosys_and_the_target_lives(
    victim: Emulated,
) -> None:
    vm = victim.make_vm()
    victim.stop_supervisor()
    victim.ask(**victim.call(Ioctl.COMMAND, vm, feature(1, 8)))
    victim.wait_until_blocked()
    os.kill(victim.supervisor, signal.SIGKILL)

    assert victim.answer() == ["ENOSYS"]
    assert victim.do("status")["State"].startswith("R")


def test_target_when_killed_then_the_supervisor_ends_and_the_tool_gets_eof(
    victim: Emulated,
) -> None:
    tool = victim.hook(victim.make_vm())
    victim.process.kill()
    victim.process.wait()

    wait_for_end(victim.supervisor_pidfd, what="the supervisor")
    assert received(tool, 1) == b""
    assert supervisor_of(victim.pid) is None
    tool.close()


def test_target_when_killed_during_a_call_then_the_supervisor_ends(victim: Emulated) -> None:
    vm = victim.make_vm()
    victim.stop_supervisor()
    victim.ask(**victim.call(Ioctl.COMMAND, vm, feature(1, 8)))
    victim.wait_until_blocked()
    victim.process.kill()
    victim.process.wait()
    os.kill(victim.supervisor, signal.SIGCONT)

    wait_for_end(victim.supervisor_pidfd, what="the supervisor")


def test_target_when_killed_in_the_middle_of_many_calls_then_nothing_is_left() -> None:
    for round_ms in range(5):
        with Emulated(V12) as target:
            vm = target.make_vm()
            tool = target.hook(vm)
            tool.setblocking(False)
            target.ask(
                "ioctls",
                fd=vm,
                request=V12.request(Ioctl.COMMAND),
                arguments=[feature(1, 8)] * 5000,
            )
            try:
                tool.send(GET_VERSION * 10_000)
            except BlockingIOError:
                pass
            select.poll().poll(round_ms)  # a different moment each round
            target.process.kill()
            target.process.wait()
            wait_for_end(target.supervisor_pidfd, what="the supervisor")
            tool.close()


# -- what is not notified, and what is traced ----------------------------------------------


def test_kvm_run_when_the_supervisor_is_stopped_then_it_runs_all_the_same(
    victim: Emulated,
) -> None:
    vm = victim.make_vm()
    vcpu = victim.do("create_vcpu", vm=vm, index=0)
    victim.stop_supervisor()

    # This VM has nothing to run; that there is an answer at all is what counts.
    assert victim.do("ioctl", fd=vcpu, request=KVM_RUN, argument=0) != "ENOSYS"


def test_trace_when_a_vm_is_hooked_then_every_answered_ioctl_is_a_line(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    with Emulated(V12, path) as target:
        vm = target.make_vm()
        target.check_extension(vm)
        target.ioctl(Ioctl.COMMAND, vm, feature(0, -2))
        tool = target.hook(vm)
        target.ioctl(Ioctl.COMMAND, vm, feature(1, 12))
        target.do("ioctl", fd=vm, request=V12.request(Ioctl.EVENT), argument=0x10)
        target.ioctl(Ioctl.UNHOOK, vm)
        tool.close()
        pid = target.pid
    wait_until(lambda: len(trace_lines(path)) == 6, what="six lines")
    lines = trace_lines(path)
    hook = lines[2]["args"]

    assert {line["tid"] for line in lines} == {pid}
    assert [(x["ioctl"], x["request"], x["args"], x["errno"]) for x in lines] == [
        ("KVM_CHECK_EXTENSION", "0xae03", {"extension": 206}, 0),
        ("KVM_INTROSPECTION_COMMAND", "0x4008aeca", {"allow": 0, "id": -2}, 22),
        ("KVM_INTROSPECTION_HOOK", "0x4018aec8", hook, 0),
        ("KVM_INTROSPECTION_COMMAND", "0x4008aeca", {"allow": 1, "id": 12}, 0),
        ("KVM_INTROSPECTION_EVENT", "0x4008aecb", {"pointer": "0x10"}, 14),
        ("KVM_INTROSPECTION_UNHOOK", "0xaec9", {}, 0),
    ]
    assert lines[0]["ret"] == 1
    assert hook["padding"] == 0
    assert hook["uuid"] == "00000000-0000-0000-0000-000000000000"
