# SPDX-License-Identifier: Apache-2.0
"""What goes wrong: switched on with --fault, or done by the tool, QEMU or a thread."""

from __future__ import annotations

import errno
import os
import signal
import socket
import struct
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from emulator_harness import (
    COMMAND_LINE,
    GET_VERSION,
    TIMEOUT_S,
    Emulated,
    asked,
    feature,
    hook_argument,
    received,
    tool_pair,
    wait_for_end,
    wait_until_notified,
)
from support import stop_process, supervisor_of, wait_for_supervisor, wait_until

from kvmi_libvirt.abi.kvmi import Ioctl, KvmiAbi
from kvmi_libvirt.abi.v7 import V7
from kvmi_libvirt.abi.v12 import V12
from kvmi_libvirt.errors import ExitCode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = [pytest.mark.kvm, pytest.mark.seccomp]


@pytest.fixture
def victim() -> Iterator[Emulated]:
    with Emulated(V12) as made:
        yield made


def try_hook(victim: Emulated, vm: int) -> int | str:
    tool, kernel_end = tool_pair()
    with tool, kernel_end:
        return victim.ioctl(Ioctl.HOOK, vm, hook_argument(victim.give(kernel_end)))


# -- --fault -------------------------------------------------------------------------------


def test_introspection_off_when_switched_on_then_eperm_for_all_and_no_capability() -> None:
    with Emulated(V12, options=["--fault", "introspection-off"]) as victim:
        vm = victim.make_vm()

        assert {
            victim.ioctl(i, vm, "" if i in (Ioctl.UNHOOK, Ioctl.PREUNHOOK) else "00" * 24)
            for i in Ioctl
        } == {"EPERM"}
        assert victim.check_extension(vm) == 0


def test_introspection_off_when_v7_then_only_hook_is_refused() -> None:
    with Emulated(V7, options=["--fault", "introspection-off"]) as victim:
        vm = victim.make_vm()

        assert try_hook(victim, vm) == "EPERM"
        assert victim.ioctl(Ioctl.COMMAND, vm, feature(1, 17)) == "EFAULT"
        assert victim.ioctl(Ioctl.UNHOOK, vm) == 0


@pytest.mark.parametrize(
    ("option", "expected"), [("enomem", ["ENOMEM"] * 3), ("enomem=2", ["ENOMEM", "ENOMEM", 0])]
)
def test_enomem_when_switched_on_then_hook_fails_and_the_vm_is_unhooked(
    option: str, expected: list[int | str]
) -> None:
    with Emulated(V12, options=["--fault", option]) as victim:
        vm = victim.make_vm()

        assert [try_hook(victim, vm) for _ in expected] == expected
        assert victim.ioctl(Ioctl.HOOK, vm, hook_argument(-1, padding=1)) == "EINVAL"


def test_eexist_after_unhook_when_counted_then_so_often() -> None:
    with Emulated(V12, options=["--fault", "eexist-after-unhook=2"]) as victim:
        vm = victim.make_vm()
        assert try_hook(victim, vm) == 0
        assert victim.ioctl(Ioctl.UNHOOK, vm) == 0

        assert [try_hook(victim, vm) for _ in range(3)] == ["EEXIST", "EEXIST", 0]
        assert victim.ioctl(Ioctl.COMMAND, vm, feature(1, 8)) == 0


def test_eexist_after_unhook_when_the_vcpu_does_not_run_then_until_it_does() -> None:
    with Emulated(V12, options=["--fault", "eexist-after-unhook"]) as victim:
        vm = victim.make_vm()
        vcpu = victim.do("create_vcpu", vm=vm, index=0)
        victim.do("add_memory", vm=vm, gpa=0xFFFFF000, data="f4" * 4096)  # hlt
        assert try_hook(victim, vm) == 0
        assert victim.ioctl(Ioctl.UNHOOK, vm) == 0
        assert try_hook(victim, vm) == "EEXIST"
        assert victim.ioctl(Ioctl.COMMAND, vm, feature(1, 8)) == "EFAULT"

        victim.do("keep_running", vcpu=vcpu)
        deadline_calls = 200
        while try_hook(victim, vm) == "EEXIST":
            deadline_calls -= 1
            assert deadline_calls
        victim.do("stop_running")


@pytest.mark.parametrize(
    "name", ["", "what", "enomem=", "enomem=0", "enomem=x", "introspection-off=1"]
)
def test_fault_when_there_is_none_of_that_name_then_one_line_and_nothing_runs(name: str) -> None:
    result = subprocess.run(
        [str(COMMAND_LINE), "emulate", "--fault", name, "--", "echo", "executed"],
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_S,
    )

    assert (result.returncode, result.stdout) == (ExitCode.UNSUPPORTED, "")
    assert result.stderr.count("\n") == 1


# -- the tool ------------------------------------------------------------------------------


def test_tool_when_it_sends_a_mebibyte_of_garbage_then_its_channel_ends_and_no_other(
    victim: Emulated,
) -> None:
    vm, other = victim.make_vm(), victim.make_vm()
    with victim.hook(vm) as tool, victim.hook(other) as polite:
        with pytest.raises(ConnectionError):
            tool.sendall(b"\xff" * (1 << 20))

        assert asked(polite, GET_VERSION)[8:16] == bytes(8)
        assert victim.ioctl(Ioctl.COMMAND, vm, feature(1, 8)) == 0
        assert victim.ioctl(Ioctl.HOOK, vm, hook_argument(-1)) == "EEXIST"
        assert victim.ioctl(Ioctl.UNHOOK, vm) == 0


def test_tool_when_it_stalls_in_the_middle_of_a_message_then_nobody_waits(
    victim: Emulated,
) -> None:
    vm, other = victim.make_vm(), victim.make_vm()
    with victim.hook(vm) as tool, victim.hook(other) as polite:
        tool.sendall(GET_VERSION[:5])

        assert asked(polite, GET_VERSION)[8:16] == bytes(8)
        assert victim.ioctl(Ioctl.COMMAND, vm, feature(1, 8)) == 0
        tool.sendall(GET_VERSION[5:])
        assert len(received(tool, 32)) == 32


def test_tool_when_it_closes_in_the_middle_of_a_message_then_the_hook_stays(
    victim: Emulated,
) -> None:
    vm = victim.make_vm()
    with victim.hook(vm) as tool:
        tool.sendall(GET_VERSION[:5])

    assert try_hook(victim, vm) == "EEXIST"
    assert victim.ioctl(Ioctl.UNHOOK, vm) == 0


def test_two_vms_when_hooked_on_one_socket_then_unhooking_one_ends_it_for_both(
    victim: Emulated,
) -> None:
    first, second = victim.make_vm(), victim.make_vm()
    tool, kernel_end = tool_pair()
    with tool, kernel_end:
        argument = hook_argument(victim.give(kernel_end))
        assert victim.ioctl(Ioctl.HOOK, first, argument) == 0
        assert victim.ioctl(Ioctl.HOOK, second, argument) == 0
        assert victim.ioctl(Ioctl.UNHOOK, second) == 0

        assert received(tool, 1) == b""
        assert victim.ioctl(Ioctl.COMMAND, first, feature(1, 8)) == 0
        assert victim.ioctl(Ioctl.UNHOOK, first) == 0


# -- threads and processes -----------------------------------------------------------------


def test_fork_child_when_killed_while_notified_then_the_next_call_is_served(
    victim: Emulated,
) -> None:
    vm = victim.make_vm()
    victim.stop_supervisor()
    # A child that shares nothing but the filter is killed in the middle of its call.
    child = victim.do("start_call_in_fork", call=victim.call(Ioctl.COMMAND, vm, feature(1, 8)))
    victim.wait_until_blocked(child)
    os.kill(child, signal.SIGKILL)
    victim.do("wait_child", pid=child)
    os.kill(victim.supervisor, signal.SIGCONT)

    assert victim.ioctl(Ioctl.COMMAND, vm, feature(1, 8)) == "EFAULT"


def test_thread_when_it_exits_while_notified_then_its_process_is_served_on(
    compile_victim: Callable[[Path], Path],
) -> None:
    program = compile_victim(Path(__file__).parent / "victims" / "emulator_thread.c")
    request = hex(V12.request(Ioctl.COMMAND))
    with subprocess.Popen(
        [str(COMMAND_LINE), "emulate", "--", str(program), request],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    ) as process:

        def ask(line: str) -> str:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(f"{line}\n")
            return process.stdout.readline()

        not_hooked = f"-1 {errno.EFAULT}\n"
        assert ask("call") == not_hooked
        supervisor = wait_for_supervisor(process.pid)
        for _ in range(3):
            stop_process(supervisor)
            try:
                tid = int(ask("thread"))
                wait_until_notified(tid)
                assert ask("end") == "ended 0\n"
            finally:
                os.kill(supervisor, signal.SIGCONT)
            assert not Path(f"/proc/{process.pid}/task/{tid}").exists()

            assert ask("call") == not_hooked


def test_thread_when_exec_ends_it_in_a_received_call_then_the_new_program_is_served(
    victim: Emulated,
) -> None:
    vm = victim.make_vm()
    tool, kernel_end = socket.socketpair()
    with tool, kernel_end:
        tool.settimeout(TIMEOUT_S)
        kernel_end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        fd = victim.give(kernel_end)
        assert victim.ioctl(Ioctl.HOOK, vm, hook_argument(fd)) == 0
        victim.do("close", fd=fd)
        for ioctl, feature_id in ((Ioctl.COMMAND, 10), (Ioctl.EVENT, 0)):
            assert victim.ioctl(ioctl, vm, feature(1, feature_id)) == 0
        assert asked(tool, struct.pack("<HHIHBBI", 10, 8, 5, 0, 1, 0, 0))[8:12] == bytes(4)
        with victim.second(vm) as second:
            # A PREUNHOOK whose tool does not read has been received and is not answered.
            while second.ask_many([(Ioctl.PREUNHOOK, "")]) and second.has_answer(within_s=0.3):
                assert second.answers(1) == [0]
            victim.ask("exec_again")
            victim.do("status")
        # The VM went with the program, and its channel with the VM.
        while tool.recv(1 << 16):
            pass

        vm = victim.make_vm()
        victim.hook(vm).close()
        assert victim.ioctl(Ioctl.COMMAND, vm, feature(1, 8)) == 0


@pytest.mark.parametrize("abi", [V12], ids=lambda abi: abi.name)
def test_64_processes_when_emulated_at_once_then_each_has_its_supervisor_and_none_is_left(
    abi: KvmiAbi,
) -> None:
    command = [str(COMMAND_LINE), "emulate", "--abi", abi.name, "--", "cat"]
    running = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(64)
    ]
    pidfds = []
    for process in running:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"up\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"up\n"
        supervisor = supervisor_of(process.pid)
        assert supervisor is not None
        pidfds.append(os.pidfd_open(supervisor))
    for process in running:
        process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == 0
    for pidfd in pidfds:
        wait_for_end(pidfd, what="a supervisor")
        os.close(pidfd)


def test_supervisor_when_its_target_ends_then_no_zombie_is_left(victim: Emulated) -> None:
    victim.hook(victim.make_vm()).close()
    victim.process.kill()
    victim.process.wait()
    wait_for_end(victim.supervisor_pidfd, what="the supervisor")

    assert supervisor_of(victim.pid) is None
    # Its parent is whoever adopts orphans; a child of the victim's would stay one.
    gone = Path(f"/proc/{victim.supervisor}")
    wait_until(lambda: not gone.exists(), what="it leaves no zombie")
