# SPDX-License-Identifier: Apache-2.0
"""Replays what a real kernel answered against anything that can make the calls.

tests/data/emulator-kernel-replay.jsonl holds the ioctl results and messages that a
kernel with the v11 layer was seen to give, one step a line; "record" is the number
of the step in the recording. What takes more than one VM and one tool is in
emulator-kernel-replay-processes.jsonl and -qemu.jsonl, as it was recorded. Where the
emulator is known to answer otherwise, and what of the recording is no step at all, is in
emulator-known-differences.json.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypedDict

from kvmi_libvirt.abi.kvmi import Ioctl, KvmiAbi
from kvmi_libvirt.abi.v11 import V11
from kvmi_libvirt.abi.v12 import V12

if TYPE_CHECKING:
    from collections.abc import Callable

DATA = Path(__file__).parent / "data" / "emulator-kernel-replay.jsonl"

DIFFERENCES = Path(__file__).parent / "data" / "emulator-known-differences.json"

ONLY_IN_V11 = 22
"""SET_PAGE_ACCESS of v11; no command in v12."""

OTHER_IN_V12 = 20
"""GET_MAX_GFN of v11; SET_PAGE_ACCESS in v12."""

GUEST_MEMORY = bytes(range(16)).ljust(0xFF8, b"\0") + b"A" * 8 + bytes(3 * 4096)
"""What the recorded guest had at physical address 0: four pages."""


class Args(TypedDict, total=False):
    """What was passed to an ioctl."""

    allow: int
    id: int
    fd: str
    padding: int
    uuid: str
    pointer: str
    arg: str


class Step(TypedDict, total=False):
    """One line of the data."""

    record: int
    section: str
    op: str
    args: Args
    errno: str | None
    errnos: dict[str, list[int]]
    sent: str
    got: str
    split_at: int
    byte_by_byte: bool
    note: str
    ends: str
    state: str
    at: int
    count: int
    commands: dict[str, list[int]]
    events: dict[str, list[int]]


class Machine(Protocol):
    """A VM and its tool. Every ioctl returns the name of its errno, or None."""

    def fresh_vm(self, vcpus: int) -> None:
        """Go on with a new VM."""

    def add_vcpus(self, count: int) -> None:
        """Give the VM this many vCPUs in all."""

    def close_tool(self) -> None:
        """Let the channel die."""

    def features(self, ioctl: Ioctl, arguments: list[tuple[int, int]]) -> list[str | None]:
        """Make COMMAND or EVENT with each (allow, id)."""

    def bad_pointer(self, ioctl: Ioctl, pointer: str) -> str | None:
        """Make *ioctl* with an address that cannot be read."""

    def add_memory(self, data: bytes) -> None:
        """Give the VM *data* at guest physical address 0."""

    def guest_memory(self, gpa: int, length: int) -> bytes:
        """Return what the guest has at *gpa*, looked at without the protocol."""

    def tool_end(self, *, is_patient: bool) -> str | None:
        """Say whether the tool's end is at "eof", "open", or has "data" to read.

        None when it cannot be told. Patient is who would rather wait for an end.
        """

    def send_into_the_end(self, data: bytes, *, is_patient: bool) -> str | None:
        """Send *data*, to which no reply comes; return "eof", "EPIPE" or "silence".

        None when it cannot be told. Patient is who would rather wait for an end.
        """

    def hook(self, *, padding: int, uuid: bytes, is_socket: bool, kind: str) -> str | None:
        """Make HOOK with a new socket of *kind*, or with what is no socket."""

    def simple(self, ioctl: Ioctl, argument: int) -> str | None:
        """Make UNHOOK or PREUNHOOK."""

    def exchange(self, pieces: list[bytes], length: int) -> bytes:
        """Let the tool send *pieces* one by one; return the *length* bytes it then gets.

        A piece is sent when the one before was read; a packet comes whole.
        """


def steps(abi: KvmiAbi, *, introspection: bool = True) -> list[Step]:
    """Return the steps recorded with the module parameter on, or off, as *abi* has them."""
    lines = [json.loads(line) for line in DATA.read_text(encoding="ascii").splitlines()]
    switched_off = next(i for i, s in enumerate(lines) if s.get("section", "").startswith("off"))
    chosen = lines[:switched_off] if introspection else lines[switched_off:]
    return [as_revision(step, abi) for step in chosen if "section" not in step]


def as_revision(step: Step, abi: KvmiAbi) -> Step:
    """Return a step of the recorded kernel, which has v11, as *abi* must answer it."""
    return _as_v12(step) if abi is V12 else step


def replay(machine: Machine, chosen: list[Step]) -> tuple[int, list[tuple[Step, object]]]:
    """Run the steps; return how many were compared, and each that differed with the answer."""
    compared, differing = 0, list[tuple[Step, object]]()
    for step in chosen:
        if step["op"] == "vcpus":
            if step["count"]:
                machine.add_vcpus(step["count"])
            else:
                machine.fresh_vm(0)
        elif step["op"] == "fresh VM":
            machine.fresh_vm(0)
        elif step["op"] == "channel dies":
            machine.close_tool()
        elif step["op"] == "memory":
            machine.add_memory(GUEST_MEMORY)
        else:
            recorded, answered = _play(machine, step)
            if answered is None and recorded in _ENDS:
                continue  # this machine has no socket to look at
            compared += 1
            if recorded != answered:
                differing.append((step, answered))
    return compared, differing


_ENDS = ("eof", "open", "EPIPE", "silence")
_IOCTLS = {"COMMAND": Ioctl.COMMAND, "EVENT": Ioctl.EVENT}


def _play(machine: Machine, step: Step) -> tuple[object, object]:
    # (what the kernel answered, what the machine answers)
    op, args = step["op"], step.get("args", Args())
    if "pointer" in args:
        return step["errno"], machine.bad_pointer(Ioctl[op], args["pointer"])
    if op in _IOCTLS:
        return step["errno"], machine.features(_IOCTLS[op], [(args["allow"], args["id"])])[0]
    if op.endswith("by errno"):
        ioctl = _IOCTLS[op.split()[0]]
        ids = sorted(i for ids in step["errnos"].values() for i in ids)
        answers = machine.features(ioctl, [(args["allow"], i) for i in ids])
        return step["errnos"], _grouped(answers, ids)
    if op.endswith("ids not refused"):
        answers = machine.features(_IOCTLS[op.split()[0]], [(1, i) for i in range(4096)])
        accepted = [i for i, answer in enumerate(answers) if answer != "EINVAL"]
        return list(range(step["count"])), accepted
    if op == "HOOK":
        uuid = bytes.fromhex(args.get("uuid", "00" * 16))
        is_socket = args["fd"] == "socket"
        kind = step.get("note", "")
        answer = machine.hook(padding=args["padding"], uuid=uuid, is_socket=is_socket, kind=kind)
        return step["errno"], answer
    if op in ("UNHOOK", "PREUNHOOK"):
        return step["errno"], machine.simple(Ioctl[op], int(args.get("arg", "0"), 16))
    if op == "TOOL END":
        return step["state"], machine.tool_end(is_patient=step["state"] == "eof")
    if op == "GUEST MEMORY":
        return step["got"], machine.guest_memory(step["at"], len(step["got"]) // 2).hex()
    if "ends" in step:
        is_patient = step["ends"] != "silence"
        sent = bytes.fromhex(step["sent"])
        return step["ends"], machine.send_into_the_end(sent, is_patient=is_patient)
    if op == "EVENT MSG":
        return step["got"], machine.exchange([], len(step["got"]) // 2).hex()
    if op == "MSG":
        sent, cut = bytes.fromhex(step["sent"]), step.get("split_at", 0)
        pieces = [sent[:cut], sent[cut:]] if cut else [sent]
        if step.get("byte_by_byte"):
            pieces = [sent[i : i + 1] for i in range(len(sent))]
        return step["got"], machine.exchange(pieces, len(step["got"]) // 2).hex()
    assert op == "MASKS", op
    recorded = {"commands": step["commands"], "events": step["events"]}
    check_ids = {"commands": 4, "events": 6}

    def exchange(sent: bytes, length: int) -> bytes:
        return machine.exchange([sent], length)

    return recorded, {
        kind: masks_of(exchange, check_ids[kind], groups) for kind, groups in recorded.items()
    }


def masks_of(
    exchange: Callable[[bytes, int], bytes], check_id: int, groups: dict[str, list[int]]
) -> dict[str, list[int]]:
    """Ask about each id of *groups*; return the ids by the error that was answered.

    Parameters
        exchange  sends bytes as the tool, and returns so many that come back
        check_id  of CHECK_COMMAND or CHECK_EVENT
    """
    ids = sorted(i for ids in groups.values() for i in ids)
    asked = [struct.pack("<HHIHHI", check_id, 8, 0, i, 0, 0) for i in ids]
    replies = exchange(b"".join(asked), 16 * len(ids))
    errors = [error for _, _, _, error, _ in struct.iter_unpack("<HHIiI", replies)]
    return _grouped(errors, ids)


def _grouped(answers: list[str | None] | list[int], ids: list[int]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for answer, i in zip(answers, ids, strict=True):
        found.setdefault(str(answer), []).append(i)
    return found


def _as_v12(step: Step) -> Step:
    # In v12 the id is in the bitmaps as before, but no command.
    if "commands" in step:
        ids = {key: [i for i in ids if i != ONLY_IN_V11] for key, ids in step["commands"].items()}
        ids["-2"] = sorted([*ids["-2"], ONLY_IN_V11])
        return {**step, "commands": ids}
    if step.get("op") != "MSG" or "got" not in step:
        return step
    message_id, head = int(step["sent"][:2], 16), step["got"][:16]
    if message_id == ONLY_IN_V11:
        return {**step, "got": head + struct.pack("<iI", -1000, 0).hex()}
    if message_id == OTHER_IN_V12 and step["got"][4:6] != "08":
        return {**step, "got": f"{head[:4]}0800{head[8:]}" + struct.pack("<iI", -95, 0).hex()}
    return step


def replayed_records(run: str) -> set[int]:
    """Return which records of *run* are steps, here or in the data of the other replays."""
    found = set()
    if run != "qemu":
        found = {step["record"] for step in steps(V11, introspection=run == "main")}
    for path in DATA.parent.glob("emulator-kernel-replay-*.jsonl"):
        records = map(json.loads, path.read_text(encoding="ascii").splitlines())
        found |= {record["record"] for record in records if record["run"] == run}
    return found


def excused_records(run: str) -> dict[int, str]:
    """Return why a record of *run* ("main", "off", "qemu") differs, or is no step: by number."""
    entries = json.loads(DIFFERENCES.read_text(encoding="ascii"))
    return {
        number: entry["reason"]
        for part in ("differences", "nothing_to_replay")
        for entry in entries[part]
        for number in entry.get(run, [])
    }
