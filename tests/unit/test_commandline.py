# SPDX-License-Identifier: Apache-2.0
"""What is read from the command lines that Proxmox VE starts QEMU with."""

from __future__ import annotations

import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmi_libvirt.commandline import domain_of, is_incoming, is_started_paused

UUID = "567e47cd-a815-4e6d-8ab9-8c6649f7d293"


def test_everything_is_read_from_one_command_line() -> None:
    domain = domain_of(
        100,
        [
            *("/usr/bin/kvm", "-id", "100", "-name", "db1,debug-threads=on", "-daemonize"),
            *("-smbios", f"type=1,manufacturer=Me,,Myself,uuid={UUID.upper()}"),
            *("-smp", "4,sockets=1,cores=4,maxcpus=8", "-m", "size=2048,slots=255,maxmem=4194304M"),
            *("-machine", "hpet=off,type=pc-q35-9.2+pve1"),
        ],
    )

    assert (domain.name, domain.uuid, domain.vmid) == ("100", UUID, 100)
    assert (domain.vcpus, domain.memory_bytes) == (4, 2048 << 20)
    assert domain.machine == "pc-q35-9.2+pve1"
    assert domain.policy is None


@pytest.mark.parametrize(
    ("arguments", "vcpus"),
    [(["-smp", "2"], 2), (["-smp", "cpus=3,maxcpus=4"], 3), (["-smp", "x"], 1), ([], 1)],
)
def test_vcpus_are_those_of_the_start(arguments: list[str], vcpus: int) -> None:
    assert domain_of(100, arguments).vcpus == vcpus


@pytest.mark.parametrize(
    ("text", "memory_bytes"),
    [("64", 64 << 20), ("1G", 1 << 30), ("size=512M", 512 << 20), ("many", 0), ("", 0)],
)
def test_memory_is_mib_unless_a_unit_says_otherwise(text: str, memory_bytes: int) -> None:
    assert domain_of(100, ["-m", text]).memory_bytes == memory_bytes


@pytest.mark.parametrize("arguments", [[], ["-smbios", "type=1,uuid=none"], ["-smbios", "type=0"]])
def test_a_vm_without_uuid_has_one_of_its_own_that_stays(arguments: list[str]) -> None:
    found = domain_of(100, arguments).uuid

    assert uuid.UUID(found)
    assert found == domain_of(100, []).uuid
    assert found != domain_of(101, arguments).uuid


@pytest.mark.parametrize(
    ("arguments", "paused", "incoming"),
    [
        ([], False, False),
        (["-S"], True, False),
        (["-S", "-incoming", "tcp:0:1"], True, True),
        (["-loadstate", "/x", "-S"], True, True),
    ],
)
def test_how_it_was_started(arguments: list[str], *, paused: bool, incoming: bool) -> None:
    assert (is_started_paused(arguments), is_incoming(arguments)) == (paused, incoming)


@given(st.lists(st.one_of(st.sampled_from(["-smbios", "-smp", "-m", "-machine"]), st.text())))
def test_arbitrary_arguments_give_a_domain(arguments: list[str]) -> None:
    domain = domain_of(100, arguments)

    assert domain.vcpus >= 0
    assert domain.memory_bytes >= 0
    assert uuid.UUID(domain.uuid)
