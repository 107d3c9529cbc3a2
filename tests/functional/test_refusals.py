# SPDX-License-Identifier: Apache-2.0
"""Processes that cannot be served are refused in one clear line, and not touched."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support import wait_until
from tracee_harness import NR_GETPID, VICTIMS, inject, running, traced_threads

from kvmi_libvirt import linux
from kvmi_libvirt.abi.ptrace import WALL
from kvmi_libvirt.emulator.process import STAND_IN_VM
from kvmi_libvirt.errors import (
    SessionError,
    TargetAmbiguous,
    TargetChanged,
    TargetGone,
    TargetNotFound,
    TargetUnsuitable,
)
from kvmi_libvirt.newtypes import Pid, Tid
from kvmi_libvirt.qemu import process as process_module
from kvmi_libvirt.qemu.process import Process

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tracee_harness import Victim

pytestmark = pytest.mark.ptrace

QEMU = "/usr/bin/qemu-system-x86_64"
AARCH64_HEADER = b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x02\x00\xb7\x00"


@pytest.fixture
def victim(parked: Path) -> Iterator[Victim]:
    with running(parked, "ppoll", -1) as found:
        found.sleep_until_parked()
        yield found


@pytest.fixture
def process(victim: Victim) -> Iterator[Process]:
    with Process(Pid(victim.pid)) as found:
        yield found


def goes_on(victim: Victim) -> bool:
    """Say whether the victim's call ends as if it had been left alone."""
    victim.write(b"q")
    report = victim.report()
    return (report["result"], report["errno"]) == (1, 0)


class Tracer:
    """Another process that traces the victim."""

    def __init__(self, pid: int) -> None:
        ready_reader, ready_writer = os.pipe()
        self._end_reader, self._end_writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.close(self._end_writer)
                linux.ptrace_seize(Tid(pid), 0)
                os.write(ready_writer, b"x")
                os.read(self._end_reader, 1)
            finally:
                os._exit(0)
        os.close(ready_writer)
        assert os.read(ready_reader, 1) == b"x"
        os.close(ready_reader)

    def end(self) -> None:
        os.close(self._end_writer)
        os.close(self._end_reader)
        os.waitpid(self.pid, WALL)


def test_another_tracer_is_named(victim: Victim, process: Process) -> None:
    other = Tracer(victim.pid)
    try:
        with pytest.raises(TargetUnsuitable, match=f"already traced by process {other.pid}; end"):
            process.require_traceable()
    finally:
        other.end()
    process.require_traceable()
    assert goes_on(victim)


def test_another_tracer_that_came_later_is_named(victim: Victim) -> None:
    other = Tracer(victim.pid)
    try:
        with pytest.raises(SessionError, match=f"process {other.pid} traces it already") as caught:
            inject(victim, (NR_GETPID,))
        assert caught.value.kind == "TargetUnsuitable"
    finally:
        other.end()
    assert goes_on(victim)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has a capability to lose")
@pytest.mark.parametrize("step", ["process.require_traceable()", "look(process)"])
def test_without_the_capability_it_is_named(victim: Victim, step: str) -> None:
    program = (
        "from kvmi_libvirt.qemu.process import Process\n"
        "from kvmi_libvirt.qemu.looking import look\n"
        "from kvmi_libvirt.errors import TargetUnsuitable\n"
        f"process = Process({victim.pid})\n"
        "try:\n"
        f"    {step}\n"
        "except TargetUnsuitable as error:\n"
        "    print(error)\n"
    )
    command = ["setpriv", "--bounding-set=-sys_ptrace", "--inh-caps=-sys_ptrace"]
    done = subprocess.run(
        [*command, sys.executable, "-c", program], capture_output=True, text=True, check=True
    )

    assert done.stdout.startswith("not permitted to")
    assert str(victim.pid) in done.stdout
    assert "CAP_SYS_PTRACE" in done.stdout
    assert goes_on(victim)


def test_tracing_switched_off_by_yama_is_told(
    victim: Victim, process: Process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scope = tmp_path / "ptrace_scope"
    monkeypatch.setattr(process_module, "YAMA_SCOPE", scope)
    for harmless in ("0\n", "1\n", "2\n"):
        scope.write_text(harmless)
        process.require_traceable()
    scope.write_text("3\n")

    with pytest.raises(TargetUnsuitable, match=r"until the next boot .*ptrace_scope = 3"):
        process.require_traceable()

    assert goes_on(victim)


def test_a_32_bit_process_is_refused_before_it_is_touched(tmp_path: Path) -> None:
    program = tmp_path / "thirty_two"
    source = VICTIMS / "thirty_two.S"
    subprocess.run(["cc", "-m32", "-nostdlib", "-static", "-o", program, source], check=True)
    with subprocess.Popen([program]) as running_victim:
        try:
            with (
                Process(Pid(running_victim.pid)) as process,
                pytest.raises(TargetUnsuitable, match="no 64-bit x86 program"),
            ):
                process.require_traceable()
        finally:
            running_victim.kill()


def test_a_program_for_another_processor_is_refused(
    process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Such as one that binfmt_misc runs in an emulator of user space.
    monkeypatch.setattr(Process, "_executable_header", lambda _self: AARCH64_HEADER)

    with pytest.raises(TargetUnsuitable, match="no 64-bit x86 program"):
        process.require_traceable()


def test_a_process_without_its_main_thread_is_refused(parked: Path) -> None:
    with running(parked, "exit-leader", 0) as victim:
        assert victim.line() == "ready"
        wait_until(lambda: victim.state() == "Z", what="the main thread has exited")
        with (
            Process(Pid(victim.pid)) as process,
            pytest.raises(TargetUnsuitable, match=r"main thread .* has exited"),
        ):
            process.require_traceable()
        with pytest.raises(SessionError, match=r"main thread .* has exited"):
            inject(victim, (NR_GETPID,))


def test_a_process_that_ended_is_not_found() -> None:
    with subprocess.Popen(["true"]) as ended:
        ended.wait()

    with pytest.raises(TargetNotFound):
        Process(Pid(ended.pid))


def test_a_process_without_a_vm_fd_is_refused(process: Process) -> None:
    with pytest.raises(TargetUnsuitable, match="no KVM VM fd"):
        process.vm_fds()


def test_a_process_with_several_vm_fds_is_refused() -> None:
    fds = [os.memfd_create(STAND_IN_VM) for _ in range(2)]
    try:
        with (
            Process(Pid(os.getpid())) as process,
            pytest.raises(TargetAmbiguous, match="has 2 KVM VM fds; refusing to guess"),
        ):
            process.vm_fds(allow_standin=True)
    finally:
        for fd in fds:
            os.close(fd)


@pytest.mark.kvm
def test_a_qemu_that_runs_without_kvm_is_refused() -> None:
    command = [QEMU, "-accel", "tcg", "-machine", "none", "-nodefaults", "-display", "none"]
    with subprocess.Popen(
        [*command, "-S", "-qmp", "stdio"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as qemu:
        try:
            assert qemu.stdout is not None
            assert b"QMP" in qemu.stdout.readline()  # its main loop runs: all it has is there
            with Process(Pid(qemu.pid)) as process:
                process.require_traceable()
                with pytest.raises(TargetUnsuitable, match=r"runs without KVM \(TCG\)"):
                    process.vm_fds()
        finally:
            qemu.kill()


def test_a_process_of_another_domain_is_refused(process: Process) -> None:
    with pytest.raises(TargetChanged, match="is not the QEMU of domain"):
        process.require_uuid("5a4a2b4e-0000-4000-8000-000000000000")


def test_a_process_that_ends_is_gone_whatever_is_asked(victim: Victim, process: Process) -> None:
    victim.popen.kill()
    victim.popen.wait()

    for ask in (
        process.require_traceable,
        process.vm_fds,
        process.command_line,
        process.fd_links,
        process.require_main_thread,
        lambda: process.require_uuid("5a4a2b4e-0000-4000-8000-000000000000"),
        process.tracer,
        process.cpu,
    ):
        with pytest.raises(TargetGone):
            ask()


def test_a_process_that_ends_but_is_not_yet_reaped_is_gone(
    victim: Victim, process: Process
) -> None:
    # What /proc shows of it is empty by then, which must not be taken for what it had.
    victim.popen.kill()
    wait_until(lambda: victim.state() == "Z", what="the victim has ended")

    for ask in (
        process.require_traceable,
        process.vm_fds,
        process.require_main_thread,
        process.command_line,
        lambda: process.require_uuid("5a4a2b4e-0000-4000-8000-000000000000"),
    ):
        with pytest.raises(TargetGone):
            ask()
    assert not traced_threads(victim.pid)


def test_a_process_that_executes_another_program_is_never_without_arguments(
    victim: Victim, process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An emulator's wrapper becomes QEMU so; taken for a QEMU without "-incoming" meanwhile, one
    # that restores a VM was hooked before its memory was there.
    read = Process.read
    empty = [b"", b""]  # as /proc has it between the old program and the new one

    def read_in_execve(self: Process, name: str) -> bytes:
        return empty.pop() if name == "cmdline" and empty else read(self, name)

    monkeypatch.setattr(Process, "read", read_in_execve)
    assert process.command_line() == victim.popen.args
    assert not empty
