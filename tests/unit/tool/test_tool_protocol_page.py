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


def test_hash_of_the_secret_is_as_the_page_says() -> None:
    assert cookie_hash(b"some").hex() in PAGE
