# SPDX-License-Identifier: Apache-2.0
"""The supervisor when a notification goes wrong half-way.

Here the supervisor runs in the test's own process, and the victim puts the filter
on itself: so a moment inside an iteration can be chosen.
"""

from __future__ import annotations

import errno
import os
import signal
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from emulator_harness import (
    GET_VERSION,
    feature,
    hook_argument,
    received,
    tool_pair,
    trace_lines,
)
from emulator_laboratory import Laboratory
from support import wait_until

from kvmi_libvirt import linux
from kvmi_libvirt.abi.kvmi import Ioctl
from kvmi_libvirt.abi.seccomp import SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV
from kvmi_libvirt.abi.v12 import V12
from kvmi_libvirt.emulator import calls as calls_module
from kvmi_libvirt.emulator.calls import Calls
from kvmi_libvirt.emulator.kernel import Answer, Kernel, VmState
from kvmi_libvirt.emulator.listener import Call, Listener
from kvmi_libvirt.emulator.process import read_argument
from kvmi_libvirt.emulator.registry import Registry
from kvmi_libvirt.newtypes import Pid

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvmi_libvirt.newtypes import RemoteAddr, Tid

pytestmark = [pytest.mark.kvm, pytest.mark.seccomp]

HOOK, COMMAND = V12.request(Ioctl.HOOK), V12.request(Ioctl.COMMAND)


@pytest.fixture
def make_laboratory(tmp_path: Path) -> Iterator[Callable[[int], Laboratory]]:
    made: list[Laboratory] = []

    def make(flags: int) -> Laboratory:
        made.append(Laboratory(tmp_path / "trace.jsonl", flags))
        return made[-1]

    yield make
    for laboratory in made:
        laboratory.close()


@pytest.fixture
def laboratory(make_laboratory: Callable[[int], Laboratory]) -> Laboratory:
    return make_laboratory(SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV)


def interrupt_first_decision(
    monkeypatch: pytest.MonkeyPatch, laboratory: Laboratory, *, must_die: bool
) -> list[Answer | None]:
    """Send the victim a signal after the first decision, before it is answered."""
    decide, receive = Calls._decide, Listener.receive
    calls: list[Call | None] = []
    answers: list[Answer | None] = []

    def receiving(self: Listener) -> Call | None:
        calls.append(receive(self))
        return calls[-1]

    def deciding(self: Calls, *args: Any, **kwargs: Any) -> Answer | None:
        answers.append(decide(self, *args, **kwargs))
        if len(answers) == 1:
            call = calls[-1]
            assert call is not None
            listener = Listener(laboratory.listener)
            os.kill(laboratory.process.pid, signal.SIGUSR1)
            if must_die:
                wait_until(lambda: not listener.is_waiting(call), what="the call is interrupted")
        return answers[-1]

    monkeypatch.setattr(Listener, "receive", receiving)
    monkeypatch.setattr(Calls, "_decide", deciding)
    return answers


def test_hook_when_its_caller_is_interrupted_and_restarts_it_then_it_is_done_once(
    make_laboratory: Callable[[int], Laboratory], monkeypatch: pytest.MonkeyPatch
) -> None:
    laboratory = make_laboratory(0)
    laboratory.do("handle_signal", restart=True)
    vm = laboratory.make_vm()
    tool, kernel_end = tool_pair()
    with tool, kernel_end:
        fd = laboratory.give(kernel_end)
        answers = interrupt_first_decision(monkeypatch, laboratory, must_die=True)

        assert laboratory.ioctl(vm, HOOK, hook_argument(fd)) == 0
        assert answers == [Answer(), Answer()]
        tool.sendall(GET_VERSION)
        laboratory.supervisor.serve_once()
        assert len(received(tool, 32)) == 32


def test_hook_when_its_caller_gets_eintr_then_the_vm_is_not_hooked_and_the_socket_lives(
    make_laboratory: Callable[[int], Laboratory], monkeypatch: pytest.MonkeyPatch
) -> None:
    laboratory = make_laboratory(0)
    laboratory.do("handle_signal", restart=False)
    vm = laboratory.make_vm()
    tool, kernel_end = tool_pair()
    with tool, kernel_end:
        fd = laboratory.give(kernel_end)
        interrupt_first_decision(monkeypatch, laboratory, must_die=True)

        assert laboratory.ioctl(vm, HOOK, hook_argument(fd)) == "EINTR"
        assert laboratory.ioctl(vm, COMMAND, feature(1, 8)) == "EFAULT"
        assert laboratory.ioctl(vm, HOOK, hook_argument(fd)) == 0


def test_hook_when_a_signal_comes_under_wait_killable_then_it_is_completed(
    laboratory: Laboratory, monkeypatch: pytest.MonkeyPatch
) -> None:
    laboratory.do("handle_signal", restart=False)
    vm = laboratory.make_vm()
    tool, kernel_end = tool_pair()
    with tool, kernel_end:
        fd = laboratory.give(kernel_end)
        answers = interrupt_first_decision(monkeypatch, laboratory, must_die=False)

        assert laboratory.ioctl(vm, HOOK, hook_argument(fd)) == 0
        assert answers == [Answer()]
        assert laboratory.ioctl(vm, COMMAND, feature(1, 8)) == 0


def test_call_when_the_handler_fails_then_eio_and_a_line_and_the_next_call_works(
    laboratory: Laboratory, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = laboratory.make_vm()

    def failing(*_: Any) -> None:
        raise RuntimeError("made to fail")

    with monkeypatch.context() as patch:
        patch.setattr(Registry, "find", failing)
        assert laboratory.ioctl(vm, COMMAND, feature(1, 8)) == "EIO"
    assert laboratory.ioctl(vm, COMMAND, feature(1, 8)) == "EFAULT"
    (error,) = laboratory.errors()
    assert "0x4008aeca" in error
    assert "made to fail" in error


def test_create_vm_when_the_handler_fails_then_the_kernel_makes_the_vm_all_the_same(
    laboratory: Laboratory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> None:
        raise RuntimeError("made to fail")

    with monkeypatch.context() as patch:
        patch.setattr(Registry, "creating", failing)
        vm = laboratory.make_vm()

    assert vm >= 0
    assert len(laboratory.errors()) == 1
    # Nobody is known to have made it: no call on it can be trusted.
    assert laboratory.ioctl(vm, COMMAND, feature(1, 8)) == "EIO"


def test_argument_when_another_thread_changes_it_then_what_was_read_first_counts(
    laboratory: Laboratory, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = laboratory.make_vm()
    tool, kernel_end = tool_pair()
    reads = []

    def reading(tid: Tid, address: RemoteAddr, length: int) -> bytes | None:
        argument = read_argument(tid, address, length)
        reads.append(argument)
        linux.process_vm_writev(Pid(tid), address, bytes.fromhex(feature(1, -1)))
        return argument

    with tool, kernel_end:
        assert laboratory.ioctl(vm, HOOK, hook_argument(laboratory.give(kernel_end))) == 0
        monkeypatch.setattr(calls_module, "read_argument", reading)
        assert laboratory.ioctl(vm, COMMAND, feature(1, 8)) == 0

        asking = [struct.pack("<HHIHHI", 4, 8, i, i, 0, 0) for i in (8, 12)]
        tool.sendall(b"".join(asking))
        laboratory.supervisor.serve_once()
        replies = received(tool, 32)
    assert reads == [bytes.fromhex(feature(1, 8))]
    assert [error for *_, error, _ in struct.iter_unpack("<HHIiI", replies)] == [0, -1]
    laboratory.errors()  # writes the trace
    assert trace_lines(laboratory.trace_path)[-1]["args"] == {"allow": 1, "id": 8}


def test_caller_when_killed_after_its_memory_was_read_then_nothing_is_decided_or_answered(
    laboratory: Laboratory, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = laboratory.make_vm()

    def reading(*args: Any) -> bytes | None:
        argument = read_argument(*args)
        laboratory.process.kill()
        laboratory.process.wait()
        return argument

    decided: list[Any] = []
    monkeypatch.setattr(calls_module, "read_argument", reading)
    monkeypatch.setattr(Calls, "_decide", lambda *args, **_: decided.append(args))
    laboratory._ask("ioctls", fd=vm, request=HOOK, arguments=[hook_argument(0)])
    laboratory.supervisor.run()

    assert decided == []
    assert laboratory.errors() == []
    assert HOOK not in [int(line["request"], 16) for line in trace_lines(laboratory.trace_path)]


@pytest.mark.parametrize("how", ["answers", "fails to"])
def test_grant_when_its_caller_is_interrupted_then_it_was_not_made(
    make_laboratory: Callable[[int], Laboratory], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    laboratory = make_laboratory(0)
    laboratory.do("handle_signal", restart=False)
    vm = laboratory.make_vm()
    tool, kernel_end = tool_pair()
    states: list[VmState] = []
    handle, answer = Kernel.handle, Listener.answer

    def handling(self: Kernel, state: VmState, *args: Any, **kwargs: Any) -> Any:
        states.append(state)
        outcome = handle(self, state, *args, **kwargs)
        assert outcome == Answer()
        assert state.allows_command(8)
        return outcome

    def answering(self: Listener, call: Call, **kwargs: Any) -> bool:
        os.kill(laboratory.process.pid, signal.SIGUSR1)
        wait_until(lambda: not self.is_waiting(call), what="the call is interrupted")
        if how == "fails to":
            raise OSError(errno.EINPROGRESS, "made to fail")
        return answer(self, call, **kwargs)

    with tool, kernel_end:
        assert laboratory.ioctl(vm, HOOK, hook_argument(laboratory.give(kernel_end))) == 0
        with monkeypatch.context() as patch:
            patch.setattr(Kernel, "handle", handling)
            patch.setattr(Listener, "answer", answering)
            assert laboratory.ioctl(vm, COMMAND, feature(1, 8)) == "EINTR"
        (state,) = states
        assert not state.allows_command(8)
        assert laboratory.ioctl(vm, COMMAND, feature(1, 8)) == 0
        assert state.allows_command(8)


def test_vms_and_threads_when_they_come_and_go_then_they_are_forgotten(
    laboratory: Laboratory,
) -> None:
    held = laboratory.make_vm()
    tool, kernel_end = tool_pair()
    with tool, kernel_end:
        assert laboratory.ioctl(held, HOOK, hook_argument(laboratory.give(kernel_end))) == 0
        registry = laboratory.supervisor._registry
        for _ in range(200):
            vm = laboratory.make_vm()
            assert laboratory.do("create_vcpu", vm=vm, index=0) >= 0  # by which it is known
            request = {"fd": vm, "request": COMMAND, "arguments": [feature(1, 8)]}
            call = {"op": "ioctls", **request}
            assert laboratory.do("in_thread", call=call) == ["EFAULT"]
            laboratory.do("close_all", keep=[held])

        assert len(registry._vms) < 100
        assert len(registry._threads) < 100
        assert laboratory.ioctl(held, COMMAND, feature(1, 8)) == 0


def test_trace_when_calls_come_without_a_pause_then_its_lines_are_written_all_the_same(
    laboratory: Laboratory,
) -> None:
    vm = laboratory.make_vm()
    arguments = [feature(1, 8)] * 2500
    answers = laboratory.do("ioctls", fd=vm, request=COMMAND, arguments=arguments)
    assert answers == ["EFAULT"] * 2500

    assert len(trace_lines(laboratory.trace_path)) >= 1000
