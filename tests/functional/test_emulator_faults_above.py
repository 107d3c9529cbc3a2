# SPDX-License-Identifier: Apache-2.0
"""What hooking and unhooking make of a kernel that refuses, as --fault has it do."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest
from agent_harness import INFO, READ, programs
from fleet import Fleet, StandIn
from patient_tool import PatientTool

from kvmi_libvirt import introspect
from kvmi_libvirt import state as st
from kvmi_libvirt.errors import ExitCode, SessionError
from kvmi_libvirt.policy.model import Mode, Policy, Rights, UnixSource
from kvmi_libvirt.qemu.process import open_domain
from kvmi_libvirt.state import StateDir

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["programs"]

pytestmark = [pytest.mark.kvm, pytest.mark.seccomp, pytest.mark.ptrace]

REVISIONS = pytest.mark.parametrize("abi", ["v12", "v11", "v7"])
OFF = "KVM introspection is switched off in this kernel"


class Host:
    """One VM on a kernel with a fault, and a tool."""

    def __init__(self, directory: Path, fleet: Fleet, vm: StandIn) -> None:
        self.vm = vm
        self.state = StateDir(directory / "state")
        self._fleet = fleet
        self._policy = Policy(
            mode=Mode.OPTIONAL,
            source=UnixSource(path=str(directory / "tool.sock")),
            commands=Rights(allowed=frozenset({INFO, READ})),
        )

    def hook(self) -> st.VmState:
        with open_domain(self.vm.name, self.vm.uuid, run_dir=self._fleet.run_dir) as process:
            return introspect.hook_vm(process, self.vm.domain(), self._policy, state=self.state)

    def unhook(self) -> st.VmState:
        record = self.record()
        with open_domain(self.vm.name, self.vm.uuid, run_dir=self._fleet.run_dir) as process:
            return introspect.unhook_vm(process, record, state=self.state)

    def refused(self) -> SessionError:
        """Hook, which must fail; nothing of it may be left. Return the error."""
        with pytest.raises(SessionError) as raised:
            self.hook()
        assert raised.value.left == ()
        record = self.record()
        assert (record.state, record.error) == (st.FAILED, str(raised.value))
        assert (record.commands, record.events) == ((), ())
        assert self.state.load_journal(self.vm.uuid) is None
        with open_domain(self.vm.name, self.vm.uuid, run_dir=self._fleet.run_dir) as process:
            links = process.fd_links().values()
            assert [link for link in links if link.startswith("socket:")] == []
            assert process.is_alive()
        return raised.value

    def record(self) -> st.VmState:
        record = self.state.load(self.vm.uuid)
        assert record is not None
        return record


@contextlib.contextmanager
def a_host(directory: Path, programs: Path, abi: str, fault: str) -> Iterator[Host]:
    options = ["--fault", fault]
    with (
        Fleet(programs, run_dir=directory / "run", abi=abi, options=options) as fleet,
        PatientTool(directory / "tool.sock"),
    ):
        (vm,) = fleet.start(["vm"])
        yield Host(directory, fleet, vm)


@REVISIONS
def test_hook_when_introspection_is_off_then_that_is_said_and_what_to_do(
    tmp_path: Path, programs: Path, abi: str
) -> None:
    with a_host(tmp_path, programs, abi, "introspection-off") as host:
        error = host.refused()

    assert OFF in str(error)
    assert "introspection=" in str(error)
    # v7 tells it at HOOK only, when the tool has been called already.
    if abi == "v7":
        assert "KVM_INTROSPECTION_HOOK" in str(error)
    else:
        assert (error.kind, error.exit_code) == ("UnsupportedByKernel", ExitCode.UNSUPPORTED)


@REVISIONS
def test_hook_when_the_kernel_is_out_of_memory_then_nothing_is_left_and_the_next_one_works(
    tmp_path: Path, programs: Path, abi: str
) -> None:
    with a_host(tmp_path, programs, abi, "enomem=2") as host:
        for _ in range(2):
            error = host.refused()
            assert "ENOMEM: the kernel is out of memory" in str(error)
        record = host.hook()

        assert (record.state, record.abi) == (st.HOOKED, abi)
        assert set(record.commands) == {INFO, READ}


@REVISIONS
def test_hook_when_the_vcpus_have_not_run_since_the_unhook_then_told_and_later_it_works(
    tmp_path: Path, programs: Path, abi: str
) -> None:
    with a_host(tmp_path, programs, abi, "eexist-after-unhook=2") as host:
        host.hook()
        assert host.unhook().state == st.UNHOOKED
        for _ in range(2):
            error = host.refused()
            assert "or its vCPUs have not run since it was unhooked" in str(error)
        assert host.hook().state == st.HOOKED
        assert host.unhook().state == st.UNHOOKED
