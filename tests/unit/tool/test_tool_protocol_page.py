# SPDX-License-Identifier: Apache-2.0
"""docs/protocol.md: its examples are what this package sends and understands."""

from __future__ import annotations

import re
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvmi_libvirt.abi.v7 import V7
from kvmi_libvirt.abi.v11 import V11
from kvmi_libvirt.abi.v12 import V12
from kvmi_libvirt.emulator import protocol
from kvmi_libvirt.emulator.kernel import VmState
from kvmi_libvirt.emulator.revisions import service_for
from kvmi_libvirt.tool import wire
from kvmi_libvirt.tool.handshake import (
    Hello,
    cookie_hash,
    pack_answer,
    pack_hello,
    unpack_hello,
)
from kvmi_libvirt.tool.wire import KvmError, MessageReader, Reply

if TYPE_CHECKING:
    from kvmi_libvirt.abi.kvmi import KvmiAbi

PAGE = (Path(__file__).parents[3] / "docs" / "protocol.md").read_text(encoding="utf-8")
EXAMPLES = {
    name: bytes.fromhex(text)
    for name, text in re.findall(r"^```hex ([\w-]+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
}
HELLO = Hello(
    uuid=uuid.UUID("c7a5fdbd-edaf-9455-926a-d65c16db1809"),
    start_time_s=1_600_000_000,
    name="db1",
    max_gpa=1 << 30,
)


class Guest:
    """The guest of the page's examples."""

    def vcpu_count(self) -> int:
        return 1

    def read_physical(self, gpa: int, length: int) -> bytes | None:
        return bytes.fromhex("f4ebfd00")[:length] if gpa == 0x7C00 else None

    def write_physical(self, gpa: int, data: bytes) -> bool:
        return (gpa, data) == (0x100, b"xyz")

    def max_gfn(self) -> int:
        return 1


KERNEL_EXAMPLES = (
    "read-physical",
    "read-physical-reply",
    "read-physical-denied",
    "write-physical",
    "write-physical-reply",
    "control-events",
    "v7-unhook-head",
    "v7-read-physical",
)


def answered(abi: KvmiAbi, name: str, *, allowed: bool = True) -> bytes:
    """Return what the emulator's kernel answers to the example."""
    rights = (1 << 64) - 1 if allowed else 0
    vm = VmState(hooked=True, connected=True, commands=rights, events=rights)
    sent = message(name)
    service = service_for(abi, vm, Guest())
    return service.reply(protocol.Message(sent.id, sent.seq, sent.payload))


def test_memory_examples_when_sent_then_the_emulator_answers_as_the_page_says() -> None:
    assert answered(V12, "read-physical") == EXAMPLES["read-physical-reply"]
    denied = answered(V12, "read-physical", allowed=False)
    assert denied == EXAMPLES["read-physical-denied"]
    assert answered(V12, "write-physical") == EXAMPLES["write-physical-reply"]
    assert answered(V12, "control-events")[8:] == bytes(8)
    assert answered(V7, "v7-read-physical")[16:].hex() == "f4ebfd00"


def test_v7_unhook_example_when_compared_then_the_emulator_s_begins_so() -> None:
    service = service_for(V7, VmState(), Guest())

    assert service.unhook_event(1)[:16] == EXAMPLES["v7-unhook-head"]


def message(name: str) -> wire.Message:
    """Return the one message the example is."""
    reader = MessageReader()
    reader.feed(EXAMPLES[name])
    found = reader.take()
    assert found is not None
    assert reader.pending == 0
    return found


@pytest.mark.parametrize(
    ("name", "packed"),
    [
        ("hello", pack_hello(V12, HELLO)),
        ("answer", pack_answer()),
        ("get-version", wire.pack_message(2, 1)),
        ("check-command", wire.pack_message(4, 2, wire.pack_check(12))),
    ],
)
def test_example_when_we_send_it_then_it_is_the_same(name: str, packed: bytes) -> None:
    assert EXAMPLES[name].hex() == packed.hex()


def test_hello_example_when_read_then_it_is_the_vm_described() -> None:
    assert unpack_hello(EXAMPLES["hello"]) == HELLO


def test_version_example_when_decoded_then_version_1() -> None:
    reply = wire.decode_reply(message("get-version-reply"), id=2, seq=1)

    assert wire.decode_version(reply.data) == wire.Version(
        version=1, max_payload=8184, features=bytes(8)
    )


def test_denied_example_when_decoded_then_eperm() -> None:
    reply = wire.decode_reply(message("check-command-denied"), id=4, seq=2)

    assert reply == Reply(error=KvmError.KVM_EPERM, data=b"")


def test_unhook_example_when_decoded_then_unhook() -> None:
    assert wire.decode_event(V12, message("unhook")) == wire.UNHOOK_EVENT


def test_page_when_read_then_every_example_is_tested() -> None:
    assert set(EXAMPLES) == {
        "hello",
        "answer",
        "get-version",
        "get-version-reply",
        "check-command",
        "check-command-denied",
        "unhook",
        *KERNEL_EXAMPLES,
    }


@pytest.mark.parametrize("error", KvmError)
def test_page_when_read_then_it_names_every_error(error: KvmError) -> None:
    assert f"| {error.value} | `{error.name}` |" in PAGE


@pytest.mark.parametrize("abi", [V12, V11, V7], ids=lambda abi: abi.name)
@pytest.mark.parametrize("kind", ["command", "event"])
def test_ids_when_compared_with_the_tables_then_they_are_all_there(abi: KvmiAbi, kind: str) -> None:
    table = PAGE[PAGE.index(f"| {kind} | v12 | v11 | v7 |") :].partition("\n\n")[0]
    column = ("v12", "v11", "v7").index(abi.name) + 1
    rows = [[cell.strip(" `") for cell in row.split("|")[1:-1]] for row in table.splitlines()[2:]]
    found = {f"KVMI_{row[0]}": int(row[column]) for row in rows if row[column]}

    entries = abi.commands if kind == "command" else abi.events
    assert found == {entry.name: entry.id for entry in entries}


# -- the tables of commands, mechanically ---------------------------------------------------

SIZES = {"u8": 1, "u16": 2, "u32": 4, "u64": 8, "s32": 4, "s64": 8, "char": 1}
NAMES = {
    "CHECK_COMMAND": "KVMI_VM_CHECK_COMMAND",
    "CHECK_EVENT": "KVMI_VM_CHECK_EVENT",
    "GET_VERSION": "KVMI_GET_VERSION",
}
TABLES = {
    "v12": PAGE[PAGE.index("## Other VM commands") : PAGE.index("## Events")],
    "v7": PAGE[PAGE.index("Its VM commands;") : PAGE.index("Its VM events")],
}


def rows_of(revision: str) -> list[tuple[str, int, str, str, str]]:
    """Return (command, id, payload, data, errors) of each command in a revision's table."""
    found = []
    for line in TABLES[revision].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) != 5 or not cells[0].startswith("`"):
            continue
        names = re.findall(r"`(\w+)`", cells[0])
        ids = [int(number) for number in re.findall(r"\b\d+\b", cells[1])]
        for name, command_id in zip(names, ids, strict=True):
            found.append((name, command_id, *cells[2:]))
    return found


def length_of(layout: str, **counts: int) -> int:
    """Return how long a structure is that is written as on the page: u16 `id`, u32[3] 0, ..."""
    total = 0
    for kind, count in re.findall(r"\b([us]\d+|char)(?:\[`?(\w+)`?\])?", layout):
        total += SIZES[kind] * (int(count) if count.isdigit() else counts.get(count, 1))
    return total


def test_layout_when_read_then_its_length_is_what_it_says() -> None:
    assert length_of("u16 `event_id`, u8 `enable` (0, 1), u8 0, u32 0") == 8
    assert length_of("u64 `gpa`, u16 `size`, u16 0, u32 0, u8[`size`]", size=3) == 19
    assert length_of("u32 `vcpu_count`, u32[3] 0") == 16
    assert length_of("none") == 0


@pytest.mark.parametrize("abi", [V12, V11, V7], ids=lambda abi: abi.name)
def test_tables_of_commands_when_compared_then_ids_and_lengths_are_the_emulator_s(
    abi: KvmiAbi,
) -> None:
    rows = rows_of("v7" if abi is V7 else "v12")
    emulated = {
        name
        for name in protocol._HANDLERS  # what replies with more than "not emulated"
        if name in abi.commands_by_name
    }
    told = {NAMES.get(name, f"KVMI_VM_{name}") for name, *_ in rows}
    if abi is not V7:  # a section of their own
        told |= {*NAMES.values()}
    assert told - {"KVMI_VM_GET_MAX_GFN"} == emulated - {"KVMI_VM_GET_MAX_GFN"}
    for name, command_id, payload, data, _ in rows:
        if name == "GET_MAX_GFN" and abi is V12:
            assert "v11 only" in TABLES["v12"]
            continue
        full_name = NAMES.get(name, f"KVMI_VM_{name}")
        assert abi.commands_by_name[full_name].id == command_id, name
        size = 4
        sent = bytearray(length_of(payload, size=size))
        assert len(sent) == taken_by(abi, name, size), name
        if name.endswith("PHYSICAL"):
            sent[8] = size
        reply = reply_to(abi, command_id, bytes(sent))
        if name != "PAUSE_VCPU":
            assert reply[8:12] == bytes(4), name
            expected = 0 if data == "error only" else length_of(data)
            assert len(reply) == 16 + (size if name == "READ_PHYSICAL" else expected), name
        if name == "WRITE_PHYSICAL":
            with pytest.raises(protocol.ChannelBroken):
                reply_to(abi, command_id, bytes(sent[:-1]))


def taken_by(abi: KvmiAbi, name: str, size: int) -> int:
    """Return how long the structure is that the emulator takes for a command."""
    physical = service_for(abi, VmState(), Guest()).physical.size
    vcpu = protocol.VCPU_HEADER.size
    lengths = {
        **{"READ_PHYSICAL": physical, "WRITE_PHYSICAL": physical + size},
        **{"CHECK_COMMAND": protocol.CHECK.size, "CHECK_EVENT": protocol.CHECK.size},
        "CONTROL_EVENTS": protocol.CONTROL_EVENTS.size,
        "CONTROL_CLEANUP": protocol._CONTROL_CLEANUP.size,
        "PAUSE_VCPU": vcpu + 8 if abi is V7 else protocol._PAUSE.size,
    }
    return lengths.get(name, 0)


@pytest.mark.parametrize("abi", [V12, V7], ids=lambda abi: abi.name)
def test_errors_of_commands_when_provoked_then_they_are_in_the_table(abi: KvmiAbi) -> None:
    names = {
        protocol.KVM_EPERM: "EPERM",
        protocol.KVM_ENOENT: "ENOENT",
        protocol.KVM_EINVAL: "EINVAL",
    }
    for name, command_id, payload, _, errors in rows_of(abi.name):
        if name == "GET_MAX_GFN" and abi is V12:
            continue
        length = length_of(payload, size=4)
        for position in range(length):
            for byte in (1, 4, 0x80, 0xFF):
                sent = bytearray(length)
                sent[position] = byte
                for events in (0, (1 << 64) - 1):
                    try:
                        reply = reply_to(abi, command_id, bytes(sent), events=events)
                    except protocol.ChannelBroken:
                        assert "the channel ends" in errors, name
                        continue
                    error = -int.from_bytes(reply[8:12], "little", signed=True)
                    assert error in (0, protocol.KVM_EOPNOTSUPP) or names[error] in errors, name


def reply_to(
    abi: KvmiAbi, command_id: int, payload: bytes, *, events: int = (1 << 64) - 1
) -> bytes:
    """Return the emulator's reply to a tool that may send everything."""
    vm = VmState(hooked=True, connected=True, commands=(1 << 64) - 1, events=events)
    service = service_for(abi, vm, AllMemory())
    return service.reply(protocol.Message(command_id, 1, payload))


class AllMemory(Guest):
    """A guest with memory at every address."""

    def read_physical(self, gpa: int, length: int) -> bytes | None:
        return bytes(length) if gpa < 1 << 40 else None

    def write_physical(self, gpa: int, data: bytes) -> bool:
        return gpa < 1 << 40


def test_hash_of_the_secret_is_as_the_page_says() -> None:
    assert cookie_hash(b"some").hex() in PAGE
