# SPDX-License-Identifier: Apache-2.0
"""Many VMs below one supervisor, all hooked: the rig that measurements of scale stand on."""

from __future__ import annotations

import contextlib
import os
import signal
import traceback
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from emulator_harness import TIMEOUT_S, wait_for_end
from fleet import Fleet, StandIn, raise_fd_limit
from patient_tool import PatientTool

from kvmi_libvirt import introspect
from kvmi_libvirt.errors import ExitCode, SessionError
from kvmi_libvirt.policy.model import Mode, Policy, Rights, UnixSource
from kvmi_libvirt.qemu.process import open_domain
from kvmi_libvirt.state import StateDir

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = [pytest.mark.kvm, pytest.mark.seccomp, pytest.mark.ptrace]

MANY = 1000 if os.environ.get("KVMI_SOAK") else 100
EPERM = 1
GET_INFO, READ_PHYSICAL, WRITE_PHYSICAL = 8, 12, 14
UNHOOK, PAUSE = 0, 1


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    # A VM needs three descriptors of its supervisor, and the tool's process one.
    raise_fd_limit()
    return tmp_path


@pytest.fixture
def fleet(directory: Path) -> Iterator[Fleet]:
    with Fleet(directory, run_dir=directory / "run") as made:
        yield made


@pytest.fixture
def tool(directory: Path) -> Iterator[PatientTool]:
    with PatientTool(directory / "tool.sock") as made:
        yield made


def hook(fleet: Fleet, vm: StandIn, *commands: str) -> None:
    directory = fleet.run_dir.parent
    policy = Policy(
        mode=Mode.REQUIRED,
        source=UnixSource(path=str(directory / "tool.sock")),
        commands=Rights(allowed=frozenset(commands)),
        events=Rights(allowed=frozenset({"KVMI_VM_EVENT_UNHOOK"})),
    )
    with open_domain(vm.name, vm.uuid, run_dir=fleet.run_dir) as process:
        introspect.hook_vm(process, vm.domain(), policy, state=StateDir(directory / "state"))


@pytest.mark.timeout(600)
def test_many_vms_when_hooked_below_one_supervisor_then_each_has_its_own_rights(
    fleet: Fleet, tool: PatientTool
) -> None:
    vms = fleet.start([f"vm{number}" for number in range(MANY)], vcpus=2)
    for number, vm in enumerate(vms):
        hook(fleet, vm, "KVMI_VM_GET_INFO", *(["KVMI_VM_READ_PHYSICAL"] if number % 2 else []))

    assert len(fleet.supervisors()) == 1
    assert tool.wait(at_least=MANY, timeout_s=TIMEOUT_S) == MANY
    assert sorted(tool.connected()) == sorted(vm.uuid for vm in vms)
    for number, vm in enumerate(vms):
        asked = {"commands": (GET_INFO, READ_PHYSICAL, WRITE_PHYSICAL), "events": (UNHOOK, PAUSE)}
        may_read = 0 if number % 2 else EPERM
        assert tool.check(vm.uuid, **asked) == [0, may_read, EPERM, 0, EPERM]


def test_one_of_many_when_it_ends_then_its_tool_knows_and_no_other_does(
    fleet: Fleet, tool: PatientTool
) -> None:
    vms = fleet.start(["first", "second", "third"])
    for vm in vms:
        hook(fleet, vm, "KVMI_VM_GET_INFO")
    gone = fleet.vms["second"]
    fleet.stop(gone)

    assert tool.wait(at_most=2, timeout_s=TIMEOUT_S) == 2
    assert gone.uuid not in tool.connected()
    assert tool.check(gone.uuid, commands=[GET_INFO]) == [None]
    assert tool.check(fleet.vms["third"].uuid, commands=[GET_INFO]) == [0]
    assert sorted(path.name for path in fleet.run_dir.iterdir()) == ["first.pid", "third.pid"]
    (late,) = fleet.start(["second"])
    hook(fleet, late, "KVMI_VM_GET_INFO")
    assert tool.check(late.uuid, commands=[GET_INFO]) == [0]


def test_tool_when_it_drops_all_then_every_channel_ends_and_every_vm_lives(
    fleet: Fleet, tool: PatientTool
) -> None:
    vms = fleet.start(["first", "second"])
    for vm in vms:
        hook(fleet, vm, "KVMI_VM_GET_INFO")

    assert tool.drop() == 2
    assert tool.wait(at_most=0, timeout_s=TIMEOUT_S) == 0
    # Hooked anew: the dead hook is taken off first.
    hook(fleet, vms[0], "KVMI_VM_GET_INFO")
    assert tool.connected() == [vms[0].uuid]


@pytest.mark.parametrize("supervisors", [1, 3])
def test_fleet_when_it_ends_then_no_vm_no_supervisor_and_no_pidfile_is_left(
    directory: Path, supervisors: int
) -> None:
    with contextlib.ExitStack() as pidfds:
        with Fleet(directory, run_dir=directory / "run", supervisors=supervisors) as fleet:
            vms = fleet.start([f"vm{number}" for number in range(7)])
            found = fleet.supervisors()
            fds = [os.pidfd_open(pid) for pid in [*found, *(vm.pid for vm in vms)]]
            for fd in fds:
                pidfds.callback(os.close, fd)
            uuids = {vm.name: vm.uuid for vm in vms}
            for name, uuid in uuids.items():
                with open_domain(name, uuid, run_dir=fleet.run_dir) as process:
                    assert process.vm_fds().vcpu_count == 1

        assert len(found) == supervisors
        for fd in fds:
            wait_for_end(fd, what="a process of the fleet")
    assert list((directory / "run").iterdir()) == []


def test_64_vms_when_each_has_its_supervisor_and_all_are_hooked_at_once_then_all_are(
    directory: Path, tool: PatientTool
) -> None:
    count = 64
    with Fleet(directory, run_dir=directory / "run", supervisors=count) as fleet:
        vms = fleet.start([f"vm{number}" for number in range(count)])
        hooking = [in_child(partial(hook, fleet, vm, "KVMI_VM_GET_INFO")) for vm in vms]
        assert {os.waitpid(child, 0)[1] for child in hooking} == {0}

        assert tool.wait(at_least=count, timeout_s=TIMEOUT_S) == count
        for vm in vms:
            assert tool.check(vm.uuid, commands=[GET_INFO, READ_PHYSICAL]) == [0, EPERM]


def in_child(work: Callable[[], None]) -> int:
    """Do *work* in a forked child, whose exit code tells whether it went well."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def test_supervisor_when_killed_then_hooking_says_so_and_every_vm_lives(
    fleet: Fleet, tool: PatientTool
) -> None:
    hooked, other = fleet.start(["hooked", "other"])
    hook(fleet, hooked, "KVMI_VM_GET_INFO")
    (supervisor,) = fleet.supervisors()
    os.kill(supervisor, signal.SIGKILL)

    assert tool.wait(at_most=0, timeout_s=TIMEOUT_S) == 0
    with pytest.raises(SessionError, match="emulator of this VM has ended") as raised:
        hook(fleet, other, "KVMI_VM_GET_INFO")
    assert raised.value.exit_code is ExitCode.UNSUPPORTED
    for vm in (hooked, other):
        with open_domain(vm.name, vm.uuid, run_dir=fleet.run_dir) as process:
            assert process.is_alive()
