# SPDX-License-Identifier: Apache-2.0
"""Who hooks a VM from another network namespace than QEMU's, and who asks about it from there."""

from __future__ import annotations

import contextlib
import ctypes
import os
from functools import partial
from typing import TYPE_CHECKING, Final

import pytest
from agent_harness import INFO, Site, host, programs, running, tool
from agent_rig import domain_xml, write_status
from support import wait_until

from kvmi_libvirt import introspect
from kvmi_libvirt.errors import SessionError, StateError
from kvmi_libvirt.introspect import calling
from kvmi_libvirt.policy.element import parse_domain
from kvmi_libvirt.qemu.network import current_network, network_of
from kvmi_libvirt.qemu.process import open_domain

if TYPE_CHECKING:
    from collections.abc import Callable

    from fleet import StandIn
    from patient_tool import PatientTool

    from kvmi_libvirt.state import VmState

__all__ = ["host", "programs", "running", "tool"]

pytestmark = [
    pytest.mark.kvm,
    pytest.mark.seccomp,
    pytest.mark.ptrace,
    pytest.mark.skipif(os.geteuid() != 0, reason="makes a network namespace"),
]

CLONE_NEWNET: Final = 0x40000000


def elsewhere(work: Callable[[], None]) -> None:
    """Do *work* in a child in a network namespace of its own; what fails there fails here."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        text = "it did not come that far"
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            assert libc.unshare(CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
            work()
            text = ""
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        finally:
            os.write(writer, text.encode())
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as answer:
        failed = answer.read().decode()
    os.waitpid(child, 0)
    assert failed == ""


def hook(host: Site, vm: StandIn) -> None:
    """Do what ``kvmi-libvirt hook`` does."""
    domain = parse_domain(domain_xml(vm, host.wanted().element()).encode(), source="test")
    assert domain.policy is not None
    with open_domain(vm.name, vm.uuid, run_dir=host.fleet.run_dir) as process:
        introspect.hook_vm(process, domain, domain.policy, state=host.state)


def record(host: Site, vm: StandIn) -> VmState:
    found = host.state.load(vm.uuid)
    assert found is not None
    return found


def new_vm(host: Site) -> StandIn:
    (vm,) = host.fleet.start(["vm"])
    return vm


def test_a_vm_hooked_from_elsewhere_has_its_channel_where_qemu_is(
    host: Site, tool: PatientTool
) -> None:
    vm = new_vm(host)
    elsewhere(partial(hook, host, vm))
    assert record(host, vm).network == current_network()
    assert introspect.channel_is_open(record(host, vm))
    assert host.allows(tool, vm) == {INFO}
    # The agent finds it as it should be, and watches it.
    write_status(host.fleet.run_dir, vm, host.wanted().element())
    host.wait_rights(vm)
    host.wait_rest()
    assert tool.connected() == [vm.uuid]


def test_who_asks_from_elsewhere_is_told_what_is_so(host: Site, tool: PatientTool) -> None:
    vm = new_vm(host)
    hook(host, vm)

    def ask(*, is_open: bool) -> None:
        before = current_network()
        assert before != record(host, vm).network
        assert introspect.channel_is_open(record(host, vm)) is is_open
        assert current_network() == before
        if is_open:
            with pytest.raises(SessionError, match="is hooked already"):
                hook(host, vm)

    elsewhere(partial(ask, is_open=True))
    tool.drop(vm.uuid)
    wait_until(lambda: not introspect.channel_is_open(record(host, vm)), what="it ends")
    elsewhere(partial(ask, is_open=False))


def test_a_channel_that_cannot_be_looked_for_is_not_taken_for_closed(
    host: Site, tool: PatientTool, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = new_vm(host)

    def not_permitted(_pid: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    def hook_without_going_there() -> None:
        monkeypatch.setattr(calling, "network_of", not_permitted)
        hook(host, vm)

    elsewhere(hook_without_going_there)
    found = record(host, vm)
    assert found.network not in (0, current_network())
    with pytest.raises(StateError, match=rf"another network namespace \(net:\[{found.network}\]\)"):
        introspect.channel_is_open(found)
    seen = introspect.look_at(found)
    assert seen is not None
    assert (seen.state, "cannot tell" in str(seen.error)) == ("hooked", True)
    # Nor does the agent take it off.
    write_status(host.fleet.run_dir, vm, host.wanted().element())
    host.wait_rights(vm)
    host.wait_rest()
    assert tool.connected() == [vm.uuid]
    assert record(host, vm).since == found.since


def test_a_thread_that_went_there_is_back_whatever_happens(host: Site) -> None:
    vm = new_vm(host)

    def go() -> None:
        before = current_network()
        with contextlib.suppress(KeyError), network_of(vm.pid):  # type: ignore[arg-type]
            assert current_network() != before
            raise KeyError
        assert current_network() == before
        with pytest.raises(FileNotFoundError), network_of(0):  # type: ignore[arg-type]
            pass
        assert current_network() == before

    elsewhere(go)
