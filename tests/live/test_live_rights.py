# SPDX-License-Identifier: Apache-2.0
"""Rights of a running VM follow ``set --live``, ``apply``, ``allow``, ``deny`` and ``unset``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from live_support import allowed, cli, element, probe
from support import wait_until

from kvmi_libvirt.abi.revisions import ALWAYS_ALLOWED

if TYPE_CHECKING:
    from pathlib import Path

    from live_support import Vm

pytestmark = [pytest.mark.kvm, pytest.mark.libvirt, pytest.mark.seccomp]

INFO, READ, WRITE = "KVMI_VM_GET_INFO", "KVMI_VM_READ_PHYSICAL", "KVMI_VM_WRITE_PHYSICAL"
TRAP = "KVMI_VCPU_EVENT_TRAP"


def in_force(vm: Vm) -> tuple[str, set[str]]:
    result = cli("status", "--json", vm.name)
    assert result.returncode == 0, result.stderr
    (found,) = json.loads(result.stdout)
    return found["state"], {*found["commands"], *found["events"]}


def granted(vm: Vm) -> list[tuple[int, int]]:
    """Return every successful grant and denial so far, in order."""
    return [
        (line["args"]["allow"], line["args"]["id"])
        for line in vm.trace(vm.pid())
        if line["errno"] == 0 and line["ioctl"].endswith(("_COMMAND", "_EVENT"))
    ]


def run(*arguments: str) -> str:
    result = cli(*arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_rights_follow_what_the_operator_says(vm: Vm, tmp_path: Path) -> None:
    vm.define(element(vm.socket, commands=(INFO, WRITE)))
    file = tmp_path / "element.xml"
    with probe(vm.socket) as tool:
        vm.must_start()
        assert allowed(tool.result()["commands"]) == {INFO, WRITE, *ALWAYS_ALLOWED}

        file.write_text(element(vm.socket, commands=(INFO, READ)), encoding="utf-8")
        run("set", vm.name, str(file), "--live")
        assert in_force(vm) == ("hooked", {INFO, READ})
        wait_until(lambda: granted(vm)[-2:] == [(0, 14), (1, 12)], what="first deny, then allow")

        run("allow", vm.name, WRITE, TRAP)
        assert in_force(vm) == ("hooked", {INFO, READ, WRITE, TRAP})
        run("deny", vm.name, "memory-read")
        assert in_force(vm) == ("hooked", {INFO, WRITE, TRAP})
        run("apply", vm.name)
        assert in_force(vm) == ("hooked", {INFO, READ})
        before = len(granted(vm))
        run("apply", vm.name)
        assert len(granted(vm)) == before  # nothing to change is no ioctl

        out = run("explain", vm.name, "--json")
        assert json.loads(out)["abi"] == "v12"

        run("unset", vm.name, "--live")
        assert in_force(vm) == ("unhooked", set())
        assert cli("get", vm.name, "--live").returncode == 1
        assert cli("get", vm.name, "--config").returncode == 0
        assert cli("apply", vm.name).returncode == 3
        assert cli("allow", vm.name, READ).returncode == 5
    assert vm.state() == "running"
