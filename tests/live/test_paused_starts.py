# SPDX-License-Identifier: Apache-2.0
"""Starts that libvirt itself makes with the vCPUs stopped: in force before they run.

A start with ``--paused`` (nova's ``pause=True``), restore, managed save, a snapshot that is
reverted to, and a migration that comes in. QEMU's trace also tells when the guest's memory
was there. All with ``early``, which changes nothing here: so without it as well.
"""

from __future__ import annotations

import json
import subprocess
import time
from typing import TYPE_CHECKING

import host
import pytest
from early_support import (
    define,
    early_element,
    first,
    grants_s,
    hooker,
    last_grant_s,
    make_trace,
    ran_s,
    steady_clock,
    trace,
    traced,
)
from live_support import cli
from patient_tool import PatientTool
from two_hosts import migrate, status_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from live_support import Vm
    from support import Tell
    from two_hosts import SecondHost

__all__ = ["hooker", "traced"]

pytestmark = [pytest.mark.kvm, pytest.mark.libvirt, pytest.mark.seccomp]

EVENTS = (
    "runstate_set",
    "process_incoming_migration_co_end",
    "loadvm_state_cleanup",
    "handle_qmp_command",
)
SLOW_S = 3.0


@pytest.fixture(params=[True, False], ids=["early", "not-early"])
def early(request: pytest.FixtureRequest) -> bool:
    """Say whether the element asks for it."""
    return bool(request.param)


@pytest.fixture
def tool(vm: Vm) -> Iterator[PatientTool]:
    """Have a tool that takes every VM that comes."""
    with PatientTool(vm.socket) as found:
        yield found


def must(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stderr


def assert_in_force_between(vm: Vm, memory: str) -> None:
    """Check that it was hooked once, after *memory* was there, before a vCPU ran."""
    ran = ran_s(trace(vm))
    granted = last_grant_s(vm)
    assert first(trace(vm), memory) < granted < ran


@pytest.mark.usefixtures("hooker", "tool")
def test_a_start_that_stays_paused(traced: Vm, early: bool) -> None:
    define(traced, early=early)
    with steady_clock():
        traced.must_start("--paused")
        assert traced.state() == "paused"
        granted = last_grant_s(traced)
        assert status_of(cli, traced.name)["state"] == "hooked"
        must(traced.virsh("resume", traced.name))
        assert granted < ran_s(trace(traced))
        assert granted == last_grant_s(traced)  # and not once more


@pytest.mark.usefixtures("hooker", "tool")
def test_restore(vm: Vm, early: bool) -> None:
    define(vm, early=early, events=EVENTS)
    make_trace(trace(vm))
    vm.must_start()
    saved = vm.host.directory / f"{vm.name}.saved"
    must(vm.virsh("save", vm.name, str(saved)))
    trace(vm).write_text("", encoding="utf-8")
    with steady_clock():
        must(vm.virsh("restore", str(saved)))
        assert_in_force_between(vm, "process_incoming_migration_co_end")
    saved.unlink()


@pytest.mark.usefixtures("hooker", "tool")
def test_managed_save(vm: Vm, early: bool) -> None:
    define(vm, early=early, events=EVENTS)
    make_trace(trace(vm))
    vm.must_start()
    must(vm.virsh("managedsave", vm.name))
    trace(vm).write_text("", encoding="utf-8")
    with steady_clock():
        vm.must_start()
        assert_in_force_between(vm, "process_incoming_migration_co_end")


@pytest.mark.usefixtures("hooker", "tool")
def test_a_snapshot_is_reverted_to(vm: Vm, early: bool) -> None:
    disk = vm.host.directory / f"{vm.name}.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", disk, "16M"], check=True)
    disk.chmod(0o666)
    device = (
        "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/>"
        f"<source file='{disk}'/><target dev='hda' bus='ide'/></disk>"
    )
    define(vm, early=early, events=EVENTS, devices=device)
    make_trace(trace(vm))
    vm.must_start()
    must(vm.virsh("snapshot-create-as", vm.name, "before"))
    must(vm.virsh("destroy", vm.name))
    trace(vm).write_text("", encoding="utf-8")
    try:
        with steady_clock():
            must(vm.virsh("snapshot-revert", vm.name, "before"))
            assert vm.state() == "running"
            assert_in_force_between(vm, "loadvm_state_cleanup")
    finally:
        vm.virsh("destroy", vm.name)
        vm.virsh("snapshot-delete", vm.name, "before")


# -- migration ---------------------------------------------------------------------------


def with_own_trace(vm: Vm, tmp_path: Path) -> tuple[Path, tuple[str, str]]:
    """Return where QEMU on the target writes its trace, and the options that make it so."""
    there = vm.host.directory / f"{vm.name}.there.trace"
    make_trace(there)
    xml = vm.virsh("dumpxml", "--migratable", vm.name).stdout
    xml = xml.replace(str(trace(vm)), str(there))
    file = tmp_path / "target.xml"
    file.write_text(xml.replace(str(vm.serial), f"{vm.serial}.there"), encoding="utf-8")
    return there, ("--xml", str(file))


def grants_there_s(vm: Vm, second_host: SecondHost) -> tuple[float, float]:
    path = second_host.path(host.LOG_DIR / f"emulator-{second_host.pid(vm.name)}.jsonl")
    return grants_s([json.loads(line) for line in path.read_text().splitlines()])


def test_a_migration_that_comes_in(
    migrating_vm: Vm,
    second_host: SecondHost,
    tmp_path: Path,
    tool: PatientTool,
    early: bool,
    tell: Tell,
) -> None:
    assert tool
    vm = migrating_vm
    define(vm, early=early, events=EVENTS)
    make_trace(trace(vm))
    with second_host.probe(vm.socket) as there:
        vm.must_start()
        path, options = with_own_trace(vm, tmp_path)
        with steady_clock():
            began = time.time()
            must(migrate(vm, second_host, *options))
            ended = time.time()
            there.result()
            hooked, granted = grants_there_s(vm, second_host)
            listened = first(path, "handle_qmp_command", "migrate-incoming")
            complete = first(path, "process_incoming_migration_co_end")
            stopped = first(trace(vm), "runstate_set", "(finish-migrate)")
            ran = ran_s(path)
    tell(
        f"migration of {_ms(began, ended)}: QEMU listens, {_ms(listened, hooked)} until HOOK,"
        f" {_ms(hooked, granted)} until the last grant, {_ms(granted, stopped)} until the "
        f"source stops, {_ms(stopped, complete)} until the memory is complete, "
        f"{_ms(complete, ran)} until the vCPUs run"
    )
    # Hooked by 'started', which libvirt runs before any memory comes.
    assert listened < hooked < granted < stopped < complete < ran


def _ms(began: float, ended: float) -> str:
    return f"{1e3 * (ended - began):.1f} ms"


@pytest.mark.parametrize("mode", ["required", "optional"])
def test_a_migration_to_where_no_tool_listens(
    migrating_vm: Vm, second_host: SecondHost, tool: PatientTool, mode: str
) -> None:
    vm = migrating_vm
    vm.define(early_element(vm, mode=mode))
    vm.must_start()
    result = migrate(vm, second_host)
    if mode == "required":
        assert result.returncode != 0
        assert "no tool listens" in result.stderr
        assert (vm.state(), second_host.state(vm.name)) == ("running", "")
        assert tool.connected() == [vm.uuid]
    else:
        must(result)
        assert second_host.state(vm.name) == "running"
        assert "no tool listens" in status_of(second_host.cli, vm.name)["error"]


def test_a_slow_tool_makes_a_migration_longer_and_the_guests_pause_not(
    migrating_vm: Vm, second_host: SecondHost, tmp_path: Path, tool: PatientTool
) -> None:
    assert tool
    vm = migrating_vm
    define(vm, events=EVENTS, handshake_s=30)
    make_trace(trace(vm))
    vm.must_start()
    path, options = with_own_trace(vm, tmp_path)
    with PatientTool(second_host.path(vm.socket), answer_after_s=SLOW_S), steady_clock():
        must(migrate(vm, second_host, *options))
        hooked, granted = grants_there_s(vm, second_host)
        listened = first(path, "handle_qmp_command", "migrate-incoming")
        stopped = first(trace(vm), "runstate_set", "(finish-migrate)")
    # The guest ran where it was for as long as the tool took.
    assert hooked - listened > SLOW_S
    assert granted < stopped < ran_s(path)
