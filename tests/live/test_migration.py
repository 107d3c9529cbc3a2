# SPDX-License-Identifier: Apache-2.0
"""Live migration between two hosts: the rights go with the VM, or the VM stays.

A host that cannot give a VM its rights refuses one that requires them while the source
still runs it; one that only would like to have them moves, and the loss is reported.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import host
import pytest
from live_support import BIN, NAMESPACE, allowed, cli, element, probe, processes_with
from support import wait_until
from two_hosts import migrate, status_of

from kvmi_libvirt.abi.revisions import ALWAYS_ALLOWED
from kvmi_libvirt.kernel import running_abi
from kvmi_libvirt.policy.secret import SECRETS_DIRECTORY

if TYPE_CHECKING:
    from collections.abc import Iterator

    from live_support import Vm
    from two_hosts import SecondHost

pytestmark = [pytest.mark.kvm, pytest.mark.libvirt, pytest.mark.seccomp]

COMMANDS = ("KVMI_VM_GET_INFO", "KVMI_VM_READ_PHYSICAL")
PAGE_ACCESS = "KVMI_VM_SET_PAGE_ACCESS"  # 20 in v12, 22 in v11
NOT_IN_V7 = "KVMI_VM_CONTROL_CLEANUP"
PLAIN = "/usr/bin/qemu-system-x86_64"


def ceiling(excess: str = "refuse") -> str:
    return (
        f'<host-policy xmlns="{NAMESPACE}"><ceiling excess="{excess}">'
        '<commands><allow name="VM_GET_INFO"/></commands></ceiling></host-policy>'
    )


@contextlib.contextmanager
def operations_there(second_host: SecondHost) -> Iterator[Path]:
    """Note each hook operation that libvirt runs on the second host, after ours."""
    script = second_host.path("/etc/libvirt/hooks/qemu.d/90-marker")
    log = second_host.path("/run/operations")
    log.touch()
    script.write_text('#!/bin/sh\necho "$2" >>/run/operations\n')
    script.chmod(0o755)
    try:
        yield log
    finally:
        script.unlink()
        log.unlink()


def with_emulator(vm: Vm, emulator: str | Path, tmp_path: Path) -> tuple[str, str]:
    """Return options that make the VM run in another program on the target."""
    xml = vm.virsh("dumpxml", "--migratable", vm.name).stdout
    file = tmp_path / "target.xml"
    xml = xml.replace(str(vm.host.emulator), str(emulator))
    # A file of its own for what the guest says: libvirt begins with an empty one there.
    file.write_text(xml.replace(str(vm.serial), f"{vm.serial}.there"), encoding="utf-8")
    return ("--xml", str(file))


def stays(vm: Vm, second_host: SecondHost, before: object) -> None:
    """Check that the VM runs on where it was, as it was, and that nothing is left there."""
    assert (vm.state(), second_host.state(vm.name)) == ("running", "")
    assert status_of(cli, vm.name) == before
    assert processes_with(vm.uuid) == {vm.pid()}
    written = vm.guest_output_len()
    wait_until(lambda: vm.guest_output_len() > written, what="the guest runs on")


def test_the_rights_go_with_the_vm(migrating_vm: Vm, second_host: SecondHost) -> None:
    vm = migrating_vm
    vm.define(element(vm.socket, commands=COMMANDS))
    with probe(vm.socket) as tool, second_host.probe(vm.socket) as second_tool:
        vm.must_start()
        tool.result()

        result = migrate(vm, second_host)

        assert result.returncode == 0, result.stderr
        answers = second_tool.result()
        assert (answers["uuid"], allowed(answers["commands"])) == (
            vm.uuid,
            {*COMMANDS, *ALWAYS_ALLOWED},
        )
        assert (vm.state(), second_host.state(vm.name)) == ("shut off", "running")
        found = status_of(second_host.cli, vm.name)
        assert (found["state"], found["pid"]) == ("hooked", second_host.pid(vm.name))
        assert vm.name not in cli("status").stdout
        written = vm.guest_output_len()
        wait_until(lambda: vm.guest_output_len() > written, what="the guest runs on")


def assert_refused(vm: Vm, second_host: SecondHost, operations: Path, why: str) -> None:
    """Migrate the VM, which must end with *why* before anything is made there."""
    before = status_of(cli, vm.name)

    result = migrate(vm, second_host)

    assert result.returncode != 0
    assert why in result.stderr
    assert operations.read_text().split() == ["migrate"]  # no QEMU was prepared there
    stays(vm, second_host, before)


def test_a_ceiling_too_low_refuses_before_anything_is_made(
    migrating_vm: Vm, second_host: SecondHost
) -> None:
    vm = migrating_vm
    vm.define(element(vm.socket, commands=COMMANDS))
    with (
        second_host.host_policy(ceiling()),
        operations_there(second_host) as operations,
        probe(vm.socket) as tool,
        second_host.probe(vm.socket),
    ):
        vm.must_start()
        tool.result()
        assert_refused(
            vm, second_host, operations, "KVMI_VM_READ_PHYSICAL is above this host's ceiling"
        )


def test_a_ceiling_that_trims_lets_the_vm_in_with_less(
    migrating_vm: Vm, second_host: SecondHost
) -> None:
    vm = migrating_vm
    vm.define(element(vm.socket, commands=COMMANDS))
    with (
        second_host.host_policy(ceiling("trim")),
        probe(vm.socket) as tool,
        second_host.probe(vm.socket) as second_tool,
    ):
        vm.must_start()
        tool.result()

        result = migrate(vm, second_host)

        assert result.returncode == 0, result.stderr
        assert allowed(second_tool.result()["commands"]) == {COMMANDS[0], *ALWAYS_ALLOWED}
        assert status_of(second_host.cli, vm.name)["commands"] == [COMMANDS[0]]


def test_an_optional_policy_above_the_ceiling_is_reported(
    migrating_vm: Vm, second_host: SecondHost
) -> None:
    vm = migrating_vm
    vm.define(element(vm.socket, mode="optional", commands=COMMANDS))
    with (
        second_host.host_policy(ceiling()),
        probe(vm.socket) as tool,
        second_host.probe(vm.socket),
    ):
        vm.must_start()
        tool.result()

        result = migrate(vm, second_host)

        assert result.returncode == 0, result.stderr
        assert second_host.state(vm.name) == "running"
        found = status_of(second_host.cli, vm.name)
        assert (found["state"], found["mode"], found["commands"]) == ("failed", "optional", [])
        assert "above this host's ceiling" in found["error"]


@pytest.mark.parametrize("mode", ["required", "optional"])
def test_a_target_whose_kernel_lacks_a_right(
    migrating_vm: Vm, second_host: SecondHost, tmp_path: Path, mode: str
) -> None:
    # An emulated kernel: what it can do is known once QEMU runs on it, before any of the
    # guest's memory has come.
    vm = migrating_vm
    vm.define(element(vm.socket, mode=mode, commands=(*COMMANDS, NOT_IN_V7)))
    with probe(vm.socket) as tool, second_host.probe(vm.socket):
        vm.must_start()
        tool.result()
        before = status_of(cli, vm.name)

        options = with_emulator(vm, BIN / "kvmi-emulated-qemu-v7", tmp_path)
        result = migrate(vm, second_host, *options)

        if mode == "required":
            assert result.returncode != 0
            assert NOT_IN_V7 in result.stderr
            wait_until(lambda: len(processes_with(vm.uuid)) == 1, what="its QEMU is gone")
            stays(vm, second_host, before)
        else:
            assert result.returncode == 0, result.stderr
            found = status_of(second_host.cli, vm.name)
            assert (found["state"], found["commands"]) == ("failed", [])
            assert NOT_IN_V7 in found["error"]


def test_on_an_older_kernel_the_rights_are_the_same_by_other_numbers(
    migrating_vm: Vm, second_host: SecondHost, tmp_path: Path
) -> None:
    vm = migrating_vm
    vm.define(element(vm.socket, commands=(PAGE_ACCESS,)))
    with probe(vm.socket) as tool, second_host.probe(vm.socket) as second_tool:
        vm.must_start()
        assert allowed(tool.result()["commands"]) == {PAGE_ACCESS, *ALWAYS_ALLOWED}

        options = with_emulator(vm, BIN / "kvmi-emulated-qemu-v11", tmp_path)
        result = migrate(vm, second_host, *options)

        assert result.returncode == 0, result.stderr
        assert allowed(second_tool.result()["commands"]) == {PAGE_ACCESS, *ALWAYS_ALLOWED}
        found = status_of(second_host.cli, vm.name)
        assert (found["state"], found["abi"]) == ("hooked", "v11")


@pytest.mark.skipif(running_abi()[0] is not None, reason="this machine's own kernel has KVMI")
@pytest.mark.parametrize("mode", ["required", "optional"])
def test_a_target_whose_kernel_has_no_kvmi(
    migrating_vm: Vm, second_host: SecondHost, tmp_path: Path, mode: str
) -> None:
    # A real kernel: it was asked before there was a QEMU on the target.
    vm = migrating_vm
    vm.define(element(vm.socket, mode=mode, commands=COMMANDS))
    with (
        operations_there(second_host) as operations,
        probe(vm.socket) as tool,
        second_host.probe(vm.socket),
    ):
        vm.must_start()
        tool.result()
        before = status_of(cli, vm.name)

        result = migrate(vm, second_host, *with_emulator(vm, PLAIN, tmp_path))

        if mode == "required":
            assert result.returncode != 0
            assert "has no KVM introspection (KVMI)" in result.stderr
            assert operations.read_text().split() == ["migrate"]
            stays(vm, second_host, before)
        else:
            assert result.returncode == 0, result.stderr
            found = status_of(second_host.cli, vm.name)
            assert found["state"] == "failed"
            assert "has no KVM introspection (KVMI)" in found["error"]


def test_a_target_without_the_secret_refuses_before_anything_is_made(
    migrating_vm: Vm, second_host: SecondHost
) -> None:
    vm = migrating_vm
    secret = SECRETS_DIRECTORY / vm.name
    policy = element(vm.socket, commands=COMMANDS)
    vm.define(policy.replace("<k:handshake", f"<k:secret name='{vm.name}'/><k:handshake"))
    with (
        host.secret(vm.name, b"known here"),
        operations_there(second_host) as operations,
        probe(vm.socket, "--secret", str(secret)) as tool,
        second_host.probe(vm.socket),
    ):
        vm.must_start()
        tool.result()
        assert_refused(vm, second_host, operations, "there is no such secret")
