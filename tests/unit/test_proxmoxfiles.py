# SPDX-License-Identifier: Apache-2.0
"""Which policy a Proxmox VE machine has, and what its configuration says."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmi_libvirt.commandline import domain_of
from kvmi_libvirt.errors import PolicyError, StateError, UsageError
from kvmi_libvirt.policy.model import NAMESPACE, Mode, UnixSource
from kvmi_libvirt.proxmox import Hookscript, Phase, parse_arguments
from kvmi_libvirt.proxmoxfiles import Files, Places, parse_config
from kvmi_libvirt.state import StateDir

if TYPE_CHECKING:
    from pathlib import Path

VMID = 100


@pytest.fixture
def places(tmp_path: Path) -> Places:
    return places_in(tmp_path)


def places_in(tmp_path: Path) -> Places:
    for name in ("local/proxmox", "cluster", "run", "configs"):
        (tmp_path / name).mkdir(parents=True, mode=0o755)
    return Places(
        host_policy=(tmp_path / "local/host-policy.xml", tmp_path / "cluster/host-policy.xml"),
        elements=(tmp_path / "local/proxmox", tmp_path / "cluster"),
        run=tmp_path / "run",
        configs=tmp_path / "configs",
        nodes=tmp_path / "nodes",
        owner=os.geteuid(),
    )


def write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    path.chmod(0o640)


def element(name: str, mode: str = "required") -> str:
    return (
        f"<introspection xmlns='{NAMESPACE}' mode='{mode}'>"
        f"<source type='unix' path='/run/kvmi/{name}'/></introspection>"
    )


def assignment(match: str) -> str:
    return (
        f"<host-policy xmlns='{NAMESPACE}'><assign><match {match}/>"
        "<source type='unix' path='/run/kvmi/assigned'/></assign></host-policy>"
    )


def tool(places: Places) -> str | None:
    """Return the name of the tool's socket in the policy of the VM."""
    policy = Files(VMID, places).policy()
    if policy is None:
        return None
    assert isinstance(policy.source, UnixSource)
    return policy.source.path.removeprefix("/run/kvmi/")


def test_without_any_file_there_is_no_policy(places: Places) -> None:
    assert tool(places) is None


def test_the_nodes_files_come_before_the_clusters(places: Places) -> None:
    local, cluster = places.elements
    write(cluster / "101.xml", element("other"))
    assert tool(places) is None
    write(cluster / "100.xml", element("cluster"))
    assert tool(places) == "cluster"
    write(local / "100.xml", element("local"))
    assert tool(places) == "local"
    write(places.host_policy[1], assignment("proxmox-vmid='100'"))
    assert tool(places) == "assigned"
    write(places.host_policy[0], assignment("proxmox-vmid='101'"))
    assert tool(places) == "local"


@pytest.mark.parametrize(
    ("match", "fits"),
    [
        ("proxmox-vmid='100'", True),
        ("proxmox-vmid='1000'", False),
        ("name='100'", True),  # a machine's name is its number, not what its owner calls it
        ("name='db*'", False),
        ("uuid='567e47cd-a815-4e6d-8ab9-8c6649f7d293'", False),
    ],
)
def test_a_vm_is_selected_by_its_number_alone(places: Places, match: str, *, fits: bool) -> None:
    config = "name: db1\nsmbios1: uuid=567e47cd-a815-4e6d-8ab9-8c6649f7d293\ntags: db\n"
    write(places.configs / "100.conf", config)
    write(places.host_policy[0], assignment(match))

    assert tool(places) == ("assigned" if fits else None)


WANTED = st.sampled_from(
    ["100", "101", "db1", "kvmi", "mode=required", "567e47cd", "proxmox-vmid=100"]
)
DELEGATED = st.one_of(WANTED, st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=30))
MATCHES = st.sampled_from(
    [
        *("proxmox-vmid='100'", "proxmox-vmid='101'", "name='100'", "name='1?0'", "name='db*'"),
        *("name='*'", "uuid='567e47cd-a815-4e6d-8ab9-8c6649f7d293'", "nova-flavor='*'"),
    ]
)


@given(data=st.data())
def test_nothing_that_others_were_given_rights_on_ever_decides(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    # VM.Config.Options and the like: name, description, tags, SMBIOS; not the number.
    here = places_in(tmp_path_factory.mktemp("node"))
    write(here.host_policy[0], assignment(data.draw(MATCHES)))
    if data.draw(st.booleans()):
        write(here.elements[1] / f"{VMID}.xml", element("own"))
    before = tool(here)
    name, tags, description, uuid = (data.draw(DELEGATED) for _ in range(4))
    config = f"#{description}\nname: {name}\ntags: {tags}\nsmbios1: uuid={uuid}\n"
    write(here.configs / f"{VMID}.conf", config)

    assert tool(here) == before
    line = [
        "kvm",
        "-id",
        str(VMID),
        "-name",
        f"{name},debug-threads=on",
        "-smbios",
        f"type=1,{uuid}",
    ]
    known = domain_of(VMID, line)
    assert (known.name, known.vmid) == (str(VMID), VMID)


def test_the_ceiling_of_the_node_holds_for_the_clusters_file(places: Places) -> None:
    write(places.elements[1] / "100.xml", element("cluster").replace("'><", "' profile='full'><"))
    write(places.host_policy[0], f"<host-policy xmlns='{NAMESPACE}'><ceiling/></host-policy>")

    with pytest.raises(PolicyError, match="above this host's ceiling"):
        tool(places)


@pytest.mark.parametrize(
    ("text", "mode"),
    [
        (element("x", "required"), Mode.REQUIRED),
        (element("x", "Optional"), Mode.REQUIRED),  # nobody writes a mode to have the default
        (element("x", "optional"), Mode.OPTIONAL),
        (f"<introspection xmlns='{NAMESPACE}'/>", Mode.OPTIONAL),
        ("<introspection", None),
        (None, None),
    ],
)
def test_what_a_wrong_policy_demands_all_the_same(
    places: Places, text: str | None, mode: Mode | None
) -> None:
    if text is not None:
        write(places.elements[1] / "100.xml", text)

    assert Files(VMID, places).demand() is mode


def test_a_host_policy_that_is_wrong_stops_a_vm_that_has_the_hookscript(
    places: Places, tmp_path: Path
) -> None:
    write(places.host_policy[0], "<host-policy")
    script = Hookscript(VMID, places=places, state=StateDir(tmp_path / "state"))

    with pytest.raises(PolicyError):
        script.run(Phase.PRE_START)
    write(places.elements[0] / "100.xml", element("x", "optional"))
    assert script.run(Phase.PRE_START).startswith("warning: ")


def test_the_smbios_uuid_is_found_in_any_place_of_its_setting(places: Places) -> None:
    uuid = "567E47CD-a815-4e6d-8ab9-8c6649f7d293"
    for setting in (f"uuid={uuid}", f"base64=1,uuid={uuid},serial=eA=="):
        write(places.configs / "100.conf", f"smbios1: {setting}\n")
        assert Files(VMID, places).smbios_uuid() == uuid.lower()
    for setting in ("", "uuid=x", f"serial=uuid={uuid}", f"uuid={uuid}0"):
        write(places.configs / "100.conf", f"smbios1: {setting}\n")
        assert Files(VMID, places).smbios_uuid() is None


def test_configuration_is_read_up_to_its_first_section(places: Places) -> None:
    text = "#freeze%3A 1\nname: web: 1\nfreeze: 1\n\n[PENDING]\nlock: backup\n[snap]\nfreeze: 0\n"
    write(places.configs / "100.conf", text)

    assert Files(VMID, places).config() == {"name": "web: 1", "freeze": "1"}
    assert Files(101, places).config() == {}


def test_a_vm_that_arrives_is_configured_on_another_node_still(places: Places) -> None:
    files = Files(VMID, places)
    with pytest.raises(StateError, match="does pve-cluster run"):
        files.require_config()
    there = places.nodes / "first" / "qemu-server"
    there.mkdir(parents=True)
    write(there / "100.conf", "freeze: 1\n")
    files.require_config()
    assert files.config() == {"freeze": "1"}
    write(places.configs / "100.conf", "freeze: 0\n")
    assert files.config() == {"freeze": "0"}


@given(st.text())
def test_any_configuration_can_be_read(text: str) -> None:
    assert all(not key.startswith("#") for key in parse_config(text))


@pytest.mark.parametrize("argv", [[], ["100"], ["x", "pre-start"], ["100", "start"], ["²", "x"]])
def test_wrong_arguments_are_usage_errors(argv: list[str]) -> None:
    with pytest.raises(UsageError):
        parse_arguments(argv)
    assert parse_arguments(["100", "post-stop"]) == (100, Phase.POST_STOP)
