# SPDX-License-Identifier: Apache-2.0
"""OpenStack: domains as nova defines and starts them, hooked as the host's policy says.

The XML in tests/data/nova was made by nova's own code; what it cannot know of this
machine (firmware, serial file, the emulated kernel) is filled in here.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import host
import pytest
from live_support import NAMESPACE, allowed, cli, probe, processes_with
from support import wait_until
from two_hosts import migrate, status_of

from kvmi_libvirt.abi.revisions import ALWAYS_ALLOWED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from live_support import Vm
    from two_hosts import SecondHost

pytestmark = [pytest.mark.kvm, pytest.mark.libvirt, pytest.mark.seccomp]

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "data" / "nova"
OLD, NEW = "27.5.1", "32.2.1"  # without and with extra specs in the XML
COMMANDS = {"KVMI_VM_GET_INFO", "KVMI_VM_READ_PHYSICAL"}
FLAVOR = 'nova-flavor="guarded.*"'
EXTRA_SPEC = 'nova-extra-spec="kvmi:profile=protect"'
PROJECT = 'nova-project="b1d2c3e4-f5a6-47b8-a9c0-d1e2f3a4b5c6"'
FAULT_MAX_BYTES = 255  # instance_faults.message, cut by nova.compute.utils.exception_to_dict


def policy(vm: Vm, selector: str, *, attributes: str = "", inner: str = "") -> str:
    return f"""<host-policy xmlns="{NAMESPACE}">
  <assign mode="required" {attributes}><match {selector}/>
    <source type="unix" path="{vm.socket}"/>{inner}
    <commands><allow name="VM_GET_INFO"/><allow name="VM_READ_PHYSICAL"/></commands>
  </assign>
</host-policy>"""


def nova_xml(vm: Vm, release: str, kind: str) -> str:
    text = (DATA / f"{release}-{kind}.xml").read_text(encoding="utf-8")
    uuid = "8d1f7a5e-3c46-4b9b-9a55-5f0c2f7d1a01"
    emulator = f"<devices><emulator>{vm.host.emulator}</emulator>"
    return (
        text.replace(uuid, vm.uuid)
        .replace("instance-0000000a", vm.name)
        .replace("/ROM", str(vm.host.rom))
        .replace("/SERIAL", str(vm.serial))
        .replace("<devices>", emulator)
    )


class Nova:
    """What nova's libvirt driver does with an instance, call by call."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection

    def spawn(self, xml: str, before_resume: Callable[[], None] = lambda: None) -> Any:
        """Guest.create, launch(pause=True), and resume once the network is plugged."""
        import libvirt

        domain = self.connection.defineXML(xml)
        domain.createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED)
        assert domain.state()[0] == libvirt.VIR_DOMAIN_PAUSED
        before_resume()
        domain.resume()
        return domain

    def start(self, xml: str) -> Any:
        """Guest.create, launch(pause=False): where neutron's events are not waited for."""
        domain = self.connection.defineXML(xml)
        domain.createWithFlags(0)
        return domain

    def refusal(self, xml: str) -> str:
        """Return the text of the exception with which spawn ends."""
        import libvirt

        try:
            self.spawn(xml)
        except libvirt.libvirtError as error:
            return str(error)
        pytest.fail("the instance started")

    def hard_reboot(self, domain: Any, xml: str) -> Any:
        """_hard_reboot, and finish_migration: all of it again, from the database, not paused."""
        import libvirt

        domain.destroy()
        domain.undefineFlags(
            libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE | libvirt.VIR_DOMAIN_UNDEFINE_NVRAM
        )
        return self.start(xml)


@pytest.fixture
def nova(prepared: object) -> Iterator[Nova]:
    import libvirt

    libvirt.registerErrorHandler(lambda _context, _error: None, None)
    with contextlib.closing(libvirt.open("qemu:///system")) as connection:
        yield Nova(connection)


def assert_hooked_unrun(vm: Vm, run: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    """Check that it is hooked, as *run* the command tells there, and that its guest has not run."""
    assert status_of(run, vm.name)["state"] == "hooked"
    assert vm.guest_output_len() == 0


@pytest.mark.parametrize(
    ("release", "kind", "selector"),
    [
        ("22.4.0", "flavor", FLAVOR),
        (OLD, "flavor", FLAVOR),
        (NEW, "flavor", FLAVOR),
        (NEW, "extra-spec", EXTRA_SPEC),
        (OLD, "project", PROJECT),
        (NEW, "project", PROJECT),
    ],
)
def test_an_instance_is_hooked_before_it_is_resumed(
    vm: Vm, nova: Nova, release: str, kind: str, selector: str
) -> None:
    with host.host_policy(policy(vm, selector)), probe(vm.socket) as tool:
        domain = nova.spawn(nova_xml(vm, release, kind), partial(assert_hooked_unrun, vm, cli))

        answers = tool.result()
        assert (answers["name"], answers["uuid"]) == (vm.name, vm.uuid)
        assert allowed(answers["commands"]) == {*COMMANDS, *ALWAYS_ALLOWED}
        assert allowed(answers["events"]) == set()
        assert status_of(cli, vm.name)["mode"] == "required"
        wait_until(lambda: vm.guest_output_len() > 0, what="the guest runs")
        domain.destroy()


@pytest.mark.parametrize("kind", ["plain", "tenant"])
def test_no_instance_that_the_operator_did_not_choose_is_hooked(
    vm: Vm, nova: Nova, kind: str
) -> None:
    selectors = f'{FLAVOR}/><match {EXTRA_SPEC}/><match {PROJECT}/><match name="guarded*"'
    with host.host_policy(policy(vm, selectors)), probe(vm.socket):
        nova.spawn(nova_xml(vm, NEW, kind))

        assert cli("status", vm.name).returncode == 5  # nothing is recorded
        assert vm.trace(vm.pid()) == []


def as_shown(vm: Vm, error: str) -> str:
    """Return libvirt's *error* as where libvirtd is systemd's, for nova's shortest name."""
    told = re.sub(r"PATH=\S+", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin", error)
    return re.sub(rf" {vm.name} (\w+) begin", r" instance-0000000a \1 begin", told)


def fault(error: str) -> str:
    """Return what nova keeps of *error* for the tenant."""
    return error.encode()[:FAULT_MAX_BYTES].decode()


def test_a_veto_tells_the_tenant_why(vm: Vm, nova: Nova) -> None:
    with host.host_policy(policy(vm, FLAVOR)):
        told = as_shown(vm, nova.refusal(nova_xml(vm, NEW, "flavor")))

    assert fault(told).endswith(": no tool listens on unix:/ru")
    assert "\n" not in told.rstrip("\n")
    assert f"domain '{vm.name}' requires introspection" in told
    assert vm.state() == "shut off"  # nova undefines it itself
    wait_until(lambda: not processes_with(vm.uuid), what="QEMU is gone")

    python = ROOT / ".venv-nova" / NEW / "bin" / "python"
    if python.exists():  # what nova itself makes of it
        done = subprocess.run(
            [python, ROOT / "tools" / "nova_xml.py", "--fault"],
            input=told,
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        messages = json.loads(done.stdout)
        assert messages["build"] == fault(told)
        assert "Hook script execution failed" in messages["build-retried"]
        assert messages["action"] == "libvirtError"


CEILING = "<ceiling><commands><allow name='VM_GET_INFO'/></commands></ceiling>"
V7_LACKS = "<commands><allow name='VM_CONTROL_CLEANUP'/></commands>"


@pytest.mark.parametrize(
    ("why", "change", "tool"),
    [
        ("the tool did not answer ", ("", ""), host.Tool.SILENT),
        ("the tool closed the ", ("", ""), host.Tool.CLOSES),
        ("there is no such secret; ", ("<commands>", "<secret name='x'/><commands>"), None),
        ("KVMI_VM_READ_PHYSICAL is a", ("<assign", f"{CEILING}<assign"), None),
        ('path="/tmp/x.sock" is not ', ("/run/kvmi/.*sock", "/tmp/x.sock"), None),
        ('unknown command "VM_GET_INF', ("VM_GET_INFO", "VM_GET_INFOS"), None),
    ],
)
def test_the_reason_is_within_what_a_fault_message_shows(
    vm: Vm, nova: Nova, why: str, change: tuple[str, str], tool: host.Tool | None
) -> None:
    text = re.sub(*change, policy(vm, FLAVOR))
    with contextlib.ExitStack() as stack:
        stack.enter_context(host.host_policy(text))
        if tool is not None:
            stack.enter_context(host.bad_tool(vm.socket, tool))
        told = as_shown(vm, nova.refusal(nova_xml(vm, NEW, "flavor")))

    assert why in fault(told)


@pytest.mark.parametrize("attributes", ["", 'early="yes"'])
def test_a_hard_reboot_hooks_again_though_a_hand_edit_is_lost(
    vm: Vm, nova: Nova, attributes: str
) -> None:
    text = policy(vm, FLAVOR, attributes=attributes)
    with host.host_policy(text), probe(vm.socket) as tool:
        domain = nova.spawn(nova_xml(vm, OLD, "flavor"))
        tool.result()
        first = vm.pid()
        mark = "<mark by='hand'/>"
        set_by_hand = vm.virsh(
            *("metadata", vm.name, "urn:example:mark", "--key", "m", "--set", mark),
            *("--live", "--config"),
        )
        assert set_by_hand.returncode == 0, set_by_hand.stderr

        # The host was upgraded meanwhile: the XML is a newer nova's.
        nova.hard_reboot(domain, nova_xml(vm, NEW, "flavor"))

        assert allowed(tool.result()["commands"]) == {*COMMANDS, *ALWAYS_ALLOWED}
        found = status_of(cli, vm.name)
        assert (found["state"], found["pid"]) == ("hooked", vm.pid())
        assert first != vm.pid()
        assert "urn:example:mark" not in vm.virsh("dumpxml", vm.name).stdout


def test_the_flavor_decides_at_each_start(vm: Vm, nova: Nova) -> None:
    # A resize confirmed on this host: the same instance, another flavor.
    with host.host_policy(policy(vm, FLAVOR)), probe(vm.socket) as tool:
        domain = nova.spawn(nova_xml(vm, NEW, "plain"))
        assert cli("status", vm.name).returncode == 5

        domain = nova.hard_reboot(domain, nova_xml(vm, NEW, "flavor"))
        tool.result()
        assert status_of(cli, vm.name)["state"] == "hooked"

        nova.hard_reboot(domain, nova_xml(vm, NEW, "plain"))
        assert cli("status", vm.name).returncode == 5


def test_novas_own_change_of_metadata_leaves_the_rights_alone(vm: Vm, nova: Nova) -> None:
    # An interface is attached: nova writes its own element anew (guest.set_metadata).
    import libvirt

    with host.host_policy(policy(vm, FLAVOR)), probe(vm.socket) as tool:
        domain = nova.spawn(nova_xml(vm, NEW, "flavor"))
        tool.result()
        before, trace = status_of(cli, vm.name), vm.trace(vm.pid())
        flags = libvirt.VIR_DOMAIN_AFFECT_LIVE | libvirt.VIR_DOMAIN_AFFECT_CONFIG
        domain.setMetadata(
            libvirt.VIR_DOMAIN_METADATA_ELEMENT,
            '<instance><flavor name="guarded.large"/></instance>',
            "instance",
            "http://openstack.org/xmlns/libvirt/nova/1.1",
            flags,
        )

        assert status_of(cli, vm.name) == before
        assert vm.trace(vm.pid()) == trace
        assert cli("apply", vm.name).returncode == 0  # and it is still found by its flavor


@pytest.mark.parametrize("fits_there", [True, False])
def test_live_migration_follows_the_target_hosts_policy(
    migrating_vm: Vm, second_host: SecondHost, nova: Nova, fits_there: bool
) -> None:
    vm = migrating_vm
    there = policy(vm, FLAVOR if fits_there else PROJECT)
    with (
        host.host_policy(policy(vm, FLAVOR)),
        second_host.host_policy(there),
        probe(vm.socket) as tool,
        second_host.probe(vm.socket) as second_tool,
    ):
        nova.spawn(nova_xml(vm, NEW, "flavor"))
        tool.result()

        result = migrate(vm, second_host)

        assert result.returncode == 0, result.stderr
        assert second_host.state(vm.name) == "running"
        if fits_there:
            assert allowed(second_tool.result()["commands"]) == {*COMMANDS, *ALWAYS_ALLOWED}
            assert status_of(second_host.cli, vm.name)["state"] == "hooked"
        else:
            assert second_host.cli("status", vm.name).returncode == 5
        written = vm.guest_output_len()
        wait_until(lambda: vm.guest_output_len() > written, what="the guest runs on")


def test_an_evacuated_instance_is_hooked_as_its_new_host_says(
    migrating_vm: Vm, second_host: SecondHost
) -> None:
    # Its host is gone, and with it all that was recorded there: nova makes it anew elsewhere.
    import libvirt

    vm = migrating_vm

    with (
        second_host.host_policy(policy(vm, FLAVOR)),
        second_host.probe(vm.socket) as tool,
        contextlib.closing(libvirt.open(second_host.uri)) as connection,
    ):
        before_resume = partial(assert_hooked_unrun, vm, second_host.cli)
        domain = Nova(connection).spawn(nova_xml(vm, NEW, "flavor"), before_resume)
        try:
            assert allowed(tool.result()["commands"]) == {*COMMANDS, *ALWAYS_ALLOWED}
            wait_until(lambda: vm.guest_output_len() > 0, what="the guest runs")
            assert cli("status", vm.name).returncode == 5  # nothing of it here
        finally:
            domain.destroy()
            domain.undefine()


def test_a_target_without_its_tool_keeps_the_instance_at_home(
    migrating_vm: Vm, second_host: SecondHost, nova: Nova
) -> None:
    vm = migrating_vm
    with (
        host.host_policy(policy(vm, FLAVOR)),
        second_host.host_policy(policy(vm, FLAVOR)),
        probe(vm.socket) as tool,
    ):
        nova.spawn(nova_xml(vm, NEW, "flavor"))
        tool.result()

        result = migrate(vm, second_host)

        assert result.returncode != 0
        assert "no tool listens on" in result.stderr
        assert (vm.state(), second_host.state(vm.name)) == ("running", "")
        assert status_of(cli, vm.name)["state"] == "hooked"
