# SPDX-License-Identifier: Apache-2.0
"""What is broken on purpose is named by the doctor in its first FAIL line."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import host
import pytest
from agent_rig import RunningAgent
from live_support import (
    NAMESPACE,
    VIRSH,
    cli,
    element,
    probe,
    processes_with,
)
from support import supervisor_of, wait_for_supervisor, wait_until

from kvmi_libvirt import daemons, installer
from kvmi_libvirt.qemu.process import LIBVIRT_QEMU_RUN_DIR
from kvmi_libvirt.state import STATE_DIR

if TYPE_CHECKING:
    from collections.abc import Iterator

    from live_support import Host, Vm

pytestmark = [pytest.mark.kvm, pytest.mark.libvirt, pytest.mark.seccomp]

COMMANDS = ("KVMI_VM_GET_INFO", "KVMI_VM_READ_PHYSICAL")
HOST_POLICY = Path("/etc/kvmi-libvirt/host-policy.xml")
PLAIN_QEMU = "/usr/bin/qemu-system-x86_64"


@dataclass
class Findings:
    """What the doctor said."""

    code: int
    lines: list[str]

    @property
    def first_fail(self) -> str:
        """Return the first FAIL line."""
        fails = [line for line in self.lines if " : FAIL" in line]
        assert fails, "\n".join(self.lines)
        return fails[0]

    def line(self, title: str) -> str:
        """Return the line about *title*."""
        (found,) = [line for line in self.lines if f"Checking {title}" in line]
        return found


def doctor(*arguments: str) -> Findings:
    result = cli("doctor", *arguments)
    assert result.stderr == ""
    return Findings(result.returncode, result.stdout.splitlines())


def optional(vm: Vm, **options: Any) -> str:
    return element(vm.socket, mode="optional", commands=COMMANDS, **options)


@contextlib.contextmanager
def hooked(vm: Vm, metadata: str | None = None, **definition: Any) -> Iterator[None]:
    """Have *vm* run, hooked by a tool, for the block."""
    vm.define(optional(vm) if metadata is None else metadata, **definition)
    with probe(vm.socket) as tool:
        vm.must_start()
        tool.result()
        yield


@pytest.fixture(autouse=True)
def _known(prepared: Host) -> None:
    # The running daemon knows of the hook, whatever other tests did to the file since.
    daemons.remember(daemons.running_daemons())


@pytest.fixture
def no_other_hooks() -> None:
    others = [file.path for file in daemons.qemu_hooks() if file.path.name != installer.HOOK_NAME]
    if others:
        pytest.skip(f"libvirt has other qemu hooks here: {others}")


@pytest.fixture
def host_policy() -> Iterator[Path]:
    """Have a place for a host policy; what is there comes back afterwards."""
    before = HOST_POLICY.read_bytes() if HOST_POLICY.exists() else None
    made = not HOST_POLICY.parent.exists()
    HOST_POLICY.parent.mkdir(exist_ok=True)
    try:
        yield HOST_POLICY
    finally:
        if before is None:
            HOST_POLICY.unlink(missing_ok=True)
        else:
            HOST_POLICY.write_bytes(before)
        if made:
            HOST_POLICY.parent.rmdir()


# -- nothing is broken -------------------------------------------------------------------


def test_a_hooked_vm_on_a_sound_host_passes(vm: Vm) -> None:
    with hooked(vm):
        about_vm = doctor(vm.name)
        about_host = doctor()

    assert about_vm.code == 0, "\n".join(about_vm.lines)
    assert "2 commands, 0 events" in about_vm.line("that it is hooked")
    assert " : PASS (" in about_vm.line("for its introspection tool")
    assert "PASS" in about_vm.line("that the running libvirt knows of the hook")
    # This kernel need not have KVMI: the VM runs on the emulated one, and that is said.
    kernel = about_host.line("for KVMI in the kernel")
    assert " : FAIL" not in kernel
    if " : WARN" in kernel:
        assert re.search("(runs|more run) on the emulated one", kernel)
    # Whatever is wrong with others' VMs on this machine.
    fails = [line for line in about_host.lines if " : FAIL" in line]
    assert not [line for line in fails if "Checking domain '" not in line], fails
    assert " : PASS (hooked)" in about_host.line(f"domain '{vm.name}'")


def test_findings_are_data_too(vm: Vm) -> None:
    with hooked(vm):
        result = cli("doctor", vm.name, "--json")

    found = json.loads(result.stdout)
    assert result.returncode == 0
    assert {check["verdict"] for check in found["checks"]} <= {"PASS", "WARN"}
    (state,) = [check for check in found["checks"] if check["check"] == "state" and check["domain"]]
    assert (state["domain"], state["verdict"]) == (vm.name, "PASS")


def test_a_vm_that_is_shut_off_is_judged_by_its_next_start(vm: Vm) -> None:
    vm.define(optional(vm))

    found = doctor(vm.name)

    assert found.code == 0
    assert "what follows is about its next start" in found.line("the domain")
    assert " : WARN (no tool listens" in found.line("for its introspection tool")

    vm.define(optional(vm).replace("optional", "required"))
    found = doctor(vm.name)
    assert found.code == 6
    assert "no tool listens" in found.first_fail


def test_a_vm_nobody_wants_introspected(vm: Vm) -> None:
    vm.define()
    vm.must_start()

    found = doctor(vm.name)

    assert found.code == 0
    assert "no introspection element" in found.line("for a policy that can be used")
    assert not [line for line in doctor().lines if f"domain '{vm.name}' " in line.split(" : ")[0]]


def test_a_domain_there_is_not() -> None:
    found = doctor("no-such-domain")

    assert found.code == 5
    assert "no domain 'no-such-domain'" in found.first_fail


# -- ten breakages, and what else can go wrong ---------------------------------------------


def test_hook_not_executable(vm: Vm) -> None:
    vm.define(optional(vm))
    vm.host.hook.chmod(0o644)
    try:
        with probe(vm.socket):
            vm.must_start()
            for found in (doctor(vm.name), doctor()):
                assert f"{vm.host.hook} is not executable" in found.first_fail
                assert f"chmod 0755 {vm.host.hook}" in found.first_fail
                assert found.code == 4
            # It is the cause: the VM runs, and is not hooked.
            assert "nothing tells that it was ever hooked" in doctor(vm.name).lines[-1]
    finally:
        vm.host.hook.chmod(0o755)


@pytest.mark.usefixtures("no_other_hooks")
def test_libvirtd_not_reloaded(vm: Vm) -> None:
    vm.define(optional(vm).replace("optional", "required"))
    installer.uninstall_hook()
    try:
        host.restart_libvirtd()
        installer.install_hook()

        for found in (doctor(vm.name), doctor()):
            assert "that the running libvirt knows of the hook" in found.first_fail
            assert "nothing tells of a reload since" in found.first_fail
            assert found.code == 4
        # It is the cause: nobody refuses a start without the tool that is required.
        vm.must_start()
        vm.virsh("destroy", vm.name)
    finally:
        installer.install_hook()
        host.reload_libvirtd()

    assert " : PASS (libvirtd" in doctor().line("that the running libvirt knows of the hook")
    assert vm.start().returncode != 0


def test_a_daemon_that_was_started_after_the_hook_knows_of_it(prepared: Host) -> None:
    host.restart_libvirtd()
    daemons.forget()  # what is left are the times
    try:
        assert " : PASS (libvirtd" in doctor().line("that the running libvirt knows of the hook")
    finally:
        daemons.remember(daemons.running_daemons())


def test_tool_absent(vm: Vm) -> None:
    vm.define(optional(vm))
    vm.must_start()

    for found in (doctor(vm.name), doctor()):
        assert f"no tool listens on {vm.socket}" in found.first_fail
        assert found.code == 6
    log = host.LOG_DIR / "hook.log"
    if log.exists():
        assert f"last lines about it in {log}:" in doctor(vm.name).lines


def test_tool_that_has_ended_and_left_its_socket(vm: Vm) -> None:
    vm.define(optional(vm))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as ended:
        ended.bind(str(vm.socket))
        ended.listen()
    try:
        vm.must_start()
        found = doctor(vm.name)
        assert "the socket was left by one that has ended" in found.first_fail
        assert found.code == 6
        assert f"nobody listens on {vm.socket}" in doctor().line("the owners of tools' sockets")
    finally:
        vm.socket.unlink()


def test_wrong_socket_owner(vm: Vm) -> None:
    with hooked(vm):
        shutil.chown(vm.socket, "nobody")

        for found in (doctor(vm.name), doctor()):
            assert f"{vm.socket} belongs to nobody" in found.first_fail
            assert "of root" in found.first_fail  # who the tool is
            assert found.code == 4


def test_a_socket_directory_anybody_can_write_to(vm: Vm) -> None:
    mode = host.SOCKET_DIR.stat().st_mode & 0o7777
    with hooked(vm):
        host.SOCKET_DIR.chmod(0o777)
        try:
            found = doctor(vm.name)
        finally:
            host.SOCKET_DIR.chmod(mode)

    assert "whoever can write there can pose as a tool" in found.first_fail


def test_kernel_without_kvmi(vm: Vm) -> None:
    vm.define(optional(vm), emulator=PLAIN_QEMU)
    with probe(vm.socket):
        vm.must_start()

        for found in (doctor(vm.name), doctor()):
            assert "has no KVM introspection (KVMI)" in found.first_fail
            assert found.code == 4
        assert " : WARN" in doctor("--emulated").line("for KVMI in the kernel")


def test_policy_typo(vm: Vm) -> None:
    typo = optional(vm).replace("KVMI_VM_GET_INFO", "KVMI_VM_GET_INFOS")
    with probe(vm.socket):
        vm.define(typo)
        vm.must_start()

        for found in (doctor(vm.name), doctor()):
            assert "KVMI_VM_GET_INFOS" in found.first_fail
            assert found.code == 3


def test_host_policy_typo(vm: Vm, host_policy: Path) -> None:
    host_policy.write_text(f"<host-policy xmlns='{NAMESPACE}'><ceilings/></host-policy>")
    vm.define(optional(vm))

    for found in (doctor(vm.name), doctor()):
        assert f"{host_policy}:1: " in found.first_fail
        assert "ceilings" in found.first_fail
        assert found.code == 3


def test_ceiling_too_low(vm: Vm, host_policy: Path) -> None:
    host_policy.write_text(
        f"<host-policy xmlns='{NAMESPACE}'><ceiling><commands>"
        "<allow name='KVMI_VM_GET_INFO'/></commands></ceiling></host-policy>"
    )
    vm.define(optional(vm))
    with probe(vm.socket):
        vm.must_start()

        for found in (doctor(vm.name), doctor()):
            assert "KVMI_VM_READ_PHYSICAL is above this host's ceiling" in found.first_fail
            assert f"{host_policy}:1" in found.first_fail
            assert found.code == 3


def test_stale_pidfile(vm: Vm) -> None:
    with hooked(vm):
        pidfile = Path(f"/run/libvirt/qemu/{vm.name}.pid")
        pid = vm.pid()
        before = pidfile.read_bytes()
        pidfile.write_text(f"{os.getpid()}\n")
        try:
            for found in (doctor(vm.name), doctor()):
                assert f"the pidfile is stale: process {os.getpid()} is not" in found.first_fail
                assert found.code == 5
            assert f"its QEMU is process {pid}: echo {pid} >{pidfile}" in doctor(vm.name).first_fail
        finally:
            pidfile.write_bytes(before)
        assert doctor(vm.name).code == 0


def test_pidfile_left_by_a_vm_that_has_ended(vm: Vm) -> None:
    vm.define(optional(vm))
    pidfile = Path(f"/run/libvirt/qemu/{vm.name}.pid")
    pidfile.write_text("4194304\n")  # above what the kernel gives out
    try:
        found = doctor(vm.name)
    finally:
        pidfile.unlink()

    assert "the pidfile is stale" in found.first_fail
    assert "which does not exist" in found.first_fail
    assert f"rm {pidfile}" in found.first_fail


def calling_again(vm: Vm) -> str:
    """Return an element whose tool is called again when it goes: that takes an agent."""
    source = f"path='{vm.socket}'/>"
    wanted = f"path='{vm.socket}'><k:reconnect enabled='yes'/></k:source>"
    return optional(vm).replace(source, wanted)


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_agent_down(vm: Vm, tmp_path: Path, end: str) -> None:
    with RunningAgent(
        tmp_path,
        domains="qemu:///system",
        run_dir=LIBVIRT_QEMU_RUN_DIR,
        state_dir=STATE_DIR,
        host_policy=HOST_POLICY,
    ) as agent:
        with hooked(vm, calling_again(vm)):
            found = doctor(vm.name)
            assert found.code == 0, "\n".join(found.lines)
            assert f" : PASS (process {agent.pid})" in found.line("that the agent answers")

            getattr(agent, end)()

            for found in (doctor(vm.name), doctor()):
                assert "agent" in found.first_fail.partition(" : ")[0]
                assert "kvmi-libvirt-agent" in found.first_fail
                assert found.code == 4
            if end == "kill":
                assert "nobody listens: it has ended" in found.first_fail
        agent.start()  # and forgets the VM with its end
        vm.virsh("destroy", vm.name)


def test_emulator_gone_while_the_vm_runs(vm: Vm) -> None:
    with hooked(vm):
        supervisor = wait_for_supervisor(vm.pid())
        os.kill(supervisor, signal.SIGKILL)
        wait_until(lambda: supervisor_of(vm.pid()) is None, what="the supervisor has ended")

        for found in (doctor(vm.name), doctor()):
            assert "the KVMI emulator it runs on has ended" in found.first_fail
            assert found.code == 4
        assert vm.qmp("query-status")["status"] == "running"


def test_emulator_gone_before_the_start(vm: Vm) -> None:
    copy = vm.host.directory / f"{vm.name}-qemu"
    copy.symlink_to(vm.host.emulator)
    vm.define(optional(vm), emulator=copy)
    copy.unlink()
    with probe(vm.socket):
        for found in (doctor(vm.name), doctor("--emulated")):
            assert f"{copy} is not there" in found.first_fail
            assert found.code == 4


def test_an_emulator_out_of_reach_of_qemus_user(vm: Vm) -> None:
    private = vm.host.directory / f"{vm.name}-private"
    private.mkdir(mode=0o700)
    (private / "kvmi-emulated-qemu").symlink_to(vm.host.emulator)
    vm.define(optional(vm), emulator=private / "kvmi-emulated-qemu")

    found = doctor(vm.name)

    assert f"may not enter {private}" in found.first_fail


def test_libvirtd_that_hangs_does_not_hang_the_doctor(vm: Vm) -> None:
    with hooked(vm):
        daemon = int(host.LIBVIRTD_PIDFILE.read_text())
        os.kill(daemon, signal.SIGSTOP)
        try:
            found = doctor(vm.name, "--timeout", "1")
        finally:
            os.kill(daemon, signal.SIGCONT)

    assert "that libvirt answers" in found.first_fail
    assert "no answer within 1 s" in found.first_fail
    assert f"ps --ppid {daemon}" in found.first_fail
    # The VM is found all the same, in libvirt's own files.
    assert f"it runs, says /run/libvirt/qemu/{vm.name}.xml" in found.line("the domain")
    assert " : PASS (2 commands" in found.line("that it is hooked")


def test_a_hook_that_hangs_is_named(vm: Vm) -> None:
    hangs = vm.host.hook.with_name("80-hangs")
    # Not by "exec", so that the script's name stays.
    hangs.write_text('#!/bin/sh\n[ "$2" != prepare ] || { sleep 600; :; }\n')
    hangs.chmod(0o755)
    vm.define(optional(vm))
    with subprocess.Popen(
        [*VIRSH, "start", vm.name], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as start:
        try:
            wait_until(lambda: bool(what_it_waits_for(hangs)), what="the hook hangs")
            found = doctor("--timeout", "1")
        finally:
            hangs.unlink()
            for pid in what_it_waits_for(hangs):
                os.kill(pid, signal.SIGKILL)
            start.wait(timeout=60)

    assert f"it waits for hook {hangs} {vm.name} prepare begin" in found.first_fail


def what_it_waits_for(script: Path) -> set[int]:
    """Return the children of the hook *script* that libvirtd runs."""
    daemon = int(host.LIBVIRTD_PIDFILE.read_text())
    hooks = children_of(daemon) & processes_with(str(script))
    return {child for hook in hooks for child in children_of(hook)}


def children_of(pid: int) -> set[int]:
    files = Path("/proc", str(pid), "task").glob("*/children")
    return {int(child) for file in files for child in file.read_text().split()}


def test_leftovers_libvirt_would_run(vm: Vm) -> None:
    leftover = vm.host.hook.with_name(f"{vm.host.hook.name}.dpkg-old")
    shutil.copy(vm.host.hook, leftover)
    try:
        found = doctor().line("for leftovers that libvirt would run")
        assert " : WARN" in found
        assert str(leftover) in found

        leftover.write_text("#!/nonexistent/python3\n")
        found = doctor().line("for leftovers that libvirt would run")
        assert " : FAIL" in found
        assert "its interpreter /nonexistent/python3 is not there" in found
        # It is true: no VM starts.
        vm.define()
        assert vm.start().returncode != 0
    finally:
        leftover.unlink()


def test_a_hook_whose_interpreter_lost_the_package(vm: Vm) -> None:
    good = vm.host.hook.read_bytes()
    vm.host.hook.write_bytes(installer.hook_text("/usr/bin/false"))
    try:
        found = doctor()
    finally:
        vm.host.hook.write_bytes(good)

    assert "the hook runs /usr/bin/false, which cannot load kvmi_libvirt" in found.first_fail


def test_vcpus_added_after_the_hook(vm: Vm) -> None:
    with hooked(vm, max_vcpus=3):
        assert " : PASS" in doctor(vm.name).line("that it is hooked")
        added = vm.virsh("setvcpus", vm.name, "3", "--live")
        assert added.returncode == 0, added.stderr

        found = doctor(vm.name)

        assert found.code == 0
        assert " : WARN (1 of its vCPUs were added" in found.line("that it is hooked")


def test_a_changed_configuration_is_told(vm: Vm) -> None:
    with hooked(vm):
        vm.define(element(vm.socket, mode="optional", commands=COMMANDS[:1]))

        found = doctor(vm.name)

    assert found.code == 0
    assert "its next start has another policy" in found.line("that its configuration is what runs")
