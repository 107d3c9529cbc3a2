# SPDX-License-Identifier: Apache-2.0
"""Live migration between two hosts: the rights go with the VM, or the VM stays."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from live_support import allowed, cli, element, probe
from support import wait_until
from two_hosts import migrate, status_of

from kvmi_libvirt.abi.revisions import ALWAYS_ALLOWED

if TYPE_CHECKING:
    from live_support import Vm
    from two_hosts import SecondHost

pytestmark = [pytest.mark.kvm, pytest.mark.libvirt, pytest.mark.seccomp]

COMMANDS = ("KVMI_VM_GET_INFO", "KVMI_VM_READ_PHYSICAL")


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
