# SPDX-License-Identifier: Apache-2.0
"""The supervisor has ended, or hangs: QEMU must be able to go on, memory map and all.

What it had received and not answered is answered at once, its memory map can be changed and
vCPUs be made, and introspection is ENOSYS from then on.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from emulator_harness import (
    TIMEOUT_S,
    Emulated,
    copied_wrapper,
    end_supervisor,
    feature,
    fill,
    hook_argument,
    received,
    run_as_qemu,
    subscribed,
    wait_for_end,
    wait_until_notified,
)
from emulator_laboratory import Laboratory
from support import wait_until

from kvmi_libvirt.abi.kvmi import Ioctl
from kvmi_libvirt.abi.seccomp import SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV
from kvmi_libvirt.abi.v7 import V7
from kvmi_libvirt.abi.v12 import V12
from kvmi_libvirt.emulator.listener import Listener, unpack_call
from kvmi_libvirt.emulator.standby import OpenCalls, stand_by
from kvmi_libvirt.emulator.supervisor import Supervisor
from kvmi_libvirt.emulator.trace import Trace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvmi_libvirt.abi.kvmi import KvmiAbi

pytestmark = [pytest.mark.kvm, pytest.mark.seccomp]

COMMAND = V12.request(Ioctl.COMMAND)
SET_UP = """
import ctypes, errno, json, mmap, os, struct
libc = ctypes.CDLL(None, use_errno=True)
libc.ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)
vm = libc.ioctl(os.open("/dev/kvm", os.O_RDWR), 0xAE01, 0)
page = mmap.mmap(-1, 4096)
address = ctypes.addressof(ctypes.c_char.from_buffer(page))
answers = []
for slot in range(3):
    for request, argument in (
        (0x4020AE46, struct.pack("=IIQQQ", slot, 0, slot << 12, 4096, address)),
        (0x4008AECA, struct.pack("=Ii", 0, -2)),
        (0xAE41, None),
    ):
        result = libc.ioctl(vm, request, argument if argument else slot)
        answers.append(errno.errorcode[ctypes.get_errno()] if result < 0 else "done")
print(json.dumps(answers))
"""


def stand_bys(pid: int) -> set[int]:
    """Return who stands by for process *pid*, at either stage."""
    found = set()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            title = (entry / "cmdline").read_bytes().rstrip(b"\0").decode(errors="replace")
            if title.endswith(f"stand-by for process {pid}"):
                found.add(int(entry.name))
    return found


def who_stands_by(pid: int) -> int:
    """Return the one process that stands by for *pid*, once it is the last one's."""

    def is_settled() -> bool:
        found = stand_bys(pid)
        titles = [Path(f"/proc/{each}/cmdline").read_bytes() for each in found]
        return len(found) == 1 and b"first" not in titles[0]

    wait_until(is_settled, what="one stands by, and one only")
    (found,) = stand_bys(pid)
    return found


def goes_on(victim: Emulated, vm: int) -> None:
    """Check that all but introspection works."""
    assert victim.ioctl(Ioctl.COMMAND, vm, feature(1, 8)) == "ENOSYS"
    assert victim.check_extension(vm) == "ENOSYS"
    for slot in (3, 4):
        address = victim.do("add_memory", vm=vm, gpa=slot << 12, data="f4" * 4096, slot=slot)
        assert isinstance(address, int)
        region = {"vm": vm, "slot": slot, "gpa": slot << 12, "address": address}
        assert victim.do("set_region", fds=(), length=0, **region) == 0
    assert victim.do("create_vcpu", vm=vm, index=7) >= 0
    other = victim.make_vm()
    assert victim.do("create_vcpu", vm=other, index=0) >= 0
    assert victim.ioctl(Ioctl.HOOK, other, hook_argument(-1)) == "ENOSYS"


@pytest.mark.parametrize("abi", [V12, V7], ids=lambda abi: abi.name)
@pytest.mark.parametrize("is_wrapper", [False, True], ids=["emulate", "wrapper"])
def test_supervisor_when_killed_then_all_but_introspection_goes_on_and_nothing_is_left(
    abi: KvmiAbi, is_wrapper: bool
) -> None:
    with Emulated(abi, wrapper=is_wrapper) as victim:
        vm = victim.make_vm()
        with victim.hook(vm) as tool:
            waiting = who_stands_by(victim.pid)
            links = [os.readlink(fd) for fd in Path(f"/proc/{waiting}/fd").iterdir()]
            assert sorted(set(links)) == [
                "/dev/null",
                "anon_inode:[pidfd]",
                "anon_inode:seccomp notify",
            ]
            assert os.readlink(f"/proc/{waiting}/cwd") == "/"
            pidfd = os.pidfd_open(waiting)
            end_supervisor(victim.supervisor)
            # Nobody else has the tool's socket.
            assert received(tool, 1) == b""
        goes_on(victim, vm)
        victim.process.kill()
        victim.process.wait()
        wait_for_end(pidfd, what="who stood by")
        os.close(pidfd)


def test_stand_by_when_killed_then_no_zombie_and_the_supervisor_serves_on() -> None:
    with Emulated(V12) as victim:
        vm = victim.make_vm()
        waiting = who_stands_by(victim.pid)
        end_supervisor(waiting)
        wait_until(lambda: not Path(f"/proc/{waiting}").exists(), what="it leaves no zombie")

        assert victim.ioctl(Ioctl.COMMAND, vm, feature(1, 8)) == "EFAULT"
        victim.hook(vm).close()


def test_calls_when_they_wait_behind_a_preunhook_and_the_supervisor_is_killed_then_all_enosys() -> (
    None
):
    with Emulated(V12) as victim:
        vm = victim.make_vm()
        tool, kernel_end = subscribed(victim, vm)
        fill(victim, vm)
        with victim.second(vm) as second:
            waiting = second.ask_many([(Ioctl.COMMAND, feature(1, 8))])
            assert not second.has_answer(within_s=0.2)
            end_supervisor(victim.supervisor)

            assert victim.answer() == "ENOSYS"
            assert second.answers(waiting) == ["ENOSYS"]
        goes_on(victim, vm)
        tool.close()
        kernel_end.close()


def test_calls_when_they_waited_and_were_answered_then_their_places_are_free_again() -> None:
    calls, kept = OpenCalls(), []
    for number in range(1, 20_001):
        call = unpack_call(number.to_bytes(8, "little").ljust(80, b"\0"))
        calls.keep(call)
        calls.keep(call)
        kept.append(call)
        if len(kept) > 3:
            first = kept.pop(0)
            calls.drop(first)
            calls.drop(first)

    assert sorted(calls.kept_ids()) == [call.id for call in kept]


# -- what it had received ------------------------------------------------------------------


@pytest.fixture
def laboratory(tmp_path: Path) -> Iterator[Laboratory]:
    made = Laboratory(tmp_path / "trace.jsonl", SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV)
    yield made
    made.close()


def serving_child(laboratory: Laboratory, serve: Callable[[Listener, OpenCalls], None]) -> int:
    """Have a process that serves the laboratory's calls instead of it, with one standing by."""
    child = os.fork()
    if child == 0:
        try:
            calls = OpenCalls()
            stand_by(laboratory.listener, calls, title="stands by")
            serve(Listener(laboratory.listener, calls.received), calls)
            os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    return child


@pytest.mark.parametrize("what", ["observed", "introspection"])
def test_call_when_received_by_who_is_killed_then_answered_at_once(
    laboratory: Laboratory, what: str
) -> None:
    vm = laboratory.make_vm()
    child = serving_child(laboratory, lambda listener, _: assert_(listener.receive()))
    if what == "observed":
        laboratory._ask("create_vcpu", vm=vm, index=0)
    else:
        laboratory._ask("ioctls", fd=vm, request=COMMAND, arguments=[feature(1, 8)])
    assert os.waitpid(child, 0)[1] == signal.SIGKILL

    answer = laboratory.answer()
    assert answer == ["ENOSYS"] if what == "introspection" else answer > vm


def assert_(received_call: object) -> None:
    assert received_call is not None


def limited_child(laboratory: Laboratory, limit_s: float) -> int:
    """Have a process that serves the laboratory's calls instead of it, each within the limit."""

    def serve(listener: Listener, calls: OpenCalls) -> None:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # pytest has a use of its own for it
        with (
            Trace(None) as trace,
            Supervisor(listener.fd, V12, trace, stand_in=False, open_calls=calls) as supervisor,
        ):
            supervisor.run(limit_s=limit_s)

    return serving_child(laboratory, serve)


def voluntary_switches(pid: int) -> str:
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return status.partition("\nvoluntary_ctxt_switches:")[2].split()[0]


@pytest.mark.parametrize("calls_before", [0, 3])
def test_supervisor_when_it_hangs_then_it_ends_itself_and_qemu_goes_on(
    laboratory: Laboratory, calls_before: int
) -> None:
    vm = laboratory.make_vm()
    child = limited_child(laboratory, 0.2)
    for _ in range(calls_before):
        laboratory._ask("ioctls", fd=vm, request=COMMAND, arguments=[feature(1, 8)])
        assert laboratory.answer() == ["EIO"]  # it does not know who made the VM
    # Its argument lies in a page that nobody brings: who reads it, sleeps.
    laboratory._ask("ioctl_at_missing_page", fd=vm, request=COMMAND)

    assert os.waitpid(child, 0)[1] == signal.SIGALRM
    assert laboratory.answer() == "ENOSYS"


def test_supervisor_when_it_is_busy_or_idle_for_longer_than_a_turn_may_take_then_it_lives(
    laboratory: Laboratory,
) -> None:
    vm = laboratory.make_vm()
    limit_s = 1.0
    child = limited_child(laboratory, limit_s)
    busy_until = time.monotonic() + 2 * limit_s
    while time.monotonic() < busy_until:
        laboratory._ask("ioctls", fd=vm, request=COMMAND, arguments=[feature(1, 8)])
        assert laboratory.answer() == ["EIO"]  # it does not know who made the VM

    pidfd = os.pidfd_open(child)
    try:
        assert not select.select([pidfd], [], [], limit_s)[0]
        switches = voluntary_switches(child)
        assert not select.select([pidfd], [], [], limit_s)[0]
        assert voluntary_switches(child) == switches  # it sleeps
        laboratory._ask("ioctls", fd=vm, request=COMMAND, arguments=[feature(1, 8)])
        assert laboratory.answer() == ["EIO"]  # it does not know who made the VM
    finally:
        os.close(pidfd)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


# -- before Python serves ------------------------------------------------------------------


@pytest.mark.parametrize("python", ["/bin/false", "/usr/bin/python3 -S", "/nonexistent/python3"])
def test_wrapper_when_python_cannot_serve_then_qemu_sets_its_vm_up_all_the_same(
    tmp_path: Path, python: str
) -> None:
    result = run_as_qemu(tmp_path, SET_UP, python=python)

    assert result.returncode == 0
    assert result.stdout == str(["done", "ENOSYS", "done"] * 3).replace("'", '"') + "\n"


def test_python_when_killed_before_it_serves_then_the_call_it_was_given_is_answered(
    tmp_path: Path,
) -> None:
    stopped = tmp_path / "stopped"
    wrapper = copied_wrapper(tmp_path, python=f"/bin/sh -c 'echo $$ >{stopped}; kill -STOP $$'")
    program = tmp_path / "qemu"
    program.write_text(f"#!{sys.executable} -IS\n{SET_UP}\n")
    program.chmod(0o755)
    with subprocess.Popen(
        [str(wrapper)],
        env={**os.environ, "KVMI_QEMU": str(program)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        wait_until(lambda: stopped.exists() and stopped.read_text() != "", what="Python begins")
        wait_until_notified(process.pid)
        assert process.poll() is None
        os.kill(int(stopped.read_text()), signal.SIGKILL)
        answers = process.communicate(timeout=TIMEOUT_S)[0]

    assert answers == str(["done", "ENOSYS", "done"] * 3).replace("'", '"') + "\n"
    assert stand_bys(process.pid) == set()
