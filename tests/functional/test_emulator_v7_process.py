# SPDX-License-Identifier: Apache-2.0
"""The rules of the downstream v7 through a real process, a real VM and a real socket.

The rules are tests/emulator_v7_rules.py, a line each; every errno and every reply is compared.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest
from emulator_harness import (
    TIMEOUT_S,
    Emulated,
    asked,
    feature,
    hook_argument,
    received,
    tool_pair,
    wait_until_read,
)
from emulator_v7_rules import (
    ALL_RIGHTS,
    ALWAYS,
    BROKEN,
    CAPABILITY,
    COMMAND_MASKS,
    EVENT_MASKS,
    IOCTLS,
    MEMORY_LEN,
    MESSAGES,
    NO_EVENTS,
    NO_RIGHTS,
    REQUESTS,
    SOCKET_FD,
    VCPUS,
    check,
    control,
    physical,
)

from kvmi_libvirt.abi.kvmi import Ioctl
from kvmi_libvirt.abi.v7 import V7
from kvmi_libvirt.abi.v12 import V12
from kvmi_libvirt.errors import errno_name

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

    from support import Tell

pytestmark = [pytest.mark.kvm, pytest.mark.seccomp]

VERSION = struct.pack("<HHI", 2, 0, 77)
VERSION_REPLY = struct.pack("<HHIiIII8x", 2, 24, 77, 0, 0, 1, 0)
EVENT = struct.pack("<HHI", 1, 544, 1) + struct.pack("<HHB3x", 544, 0, 0) + bytes(536)


class Guest:
    """A victim with the guest of the rules: two vCPUs and two pages."""

    def __init__(self, victim: Emulated) -> None:
        self.victim = victim
        self.vm = victim.make_vm()
        for index in range(VCPUS):
            victim.do("create_vcpu", vm=self.vm, index=index)
        self.memory = victim.do("add_memory", vm=self.vm, gpa=0, data=(b"m" * MEMORY_LEN).hex())

    def hook(self, rights: tuple[int, int] = NO_RIGHTS) -> socket.socket:
        """Hook the VM anew, with these rights; return the tool's end."""
        assert self.victim.ioctl(Ioctl.UNHOOK, self.vm) == 0
        tool = self.victim.hook(self.vm)
        if rights != NO_RIGHTS:
            assert self.feature(Ioctl.COMMAND, 1, -1) == 0
        if rights not in (NO_RIGHTS, NO_EVENTS):
            assert self.feature(Ioctl.EVENT, 1, -1) == 0
        return tool

    def feature(self, ioctl: Ioctl, allow: int, id_: int) -> int | str:
        return self.victim.ioctl(ioctl, self.vm, feature(allow, id_))

    def make(self, ioctl: Ioctl, argument: bytes | None) -> str:
        """Make an ioctl of the rules; return the name of the errno, or "0"."""
        request = REQUESTS[ioctl]
        if not argument:  # an address that cannot be read, or no argument
            return str(self.victim.do("ioctl", fd=self.vm, request=request, argument=0))
        fd = -1
        if ioctl is Ioctl.HOOK and struct.unpack_from("=i", argument) == (SOCKET_FD,):
            tool, kernel_end = tool_pair()
            with tool, kernel_end:
                fd = self.victim.give(kernel_end)
            argument = struct.pack("=i", fd) + argument[4:]
        arguments = [argument.hex()]
        (answer,) = self.victim.do("ioctls", fd=self.vm, request=request, arguments=arguments)
        if fd >= 0:
            self.victim.do("close", fd=fd)
        return str(answer)


@pytest.fixture(scope="module", params=["kvmi-libvirt emulate", "the wrapper"])
def guest(request: pytest.FixtureRequest) -> Iterator[Guest]:
    with Emulated(V7, wrapper=request.param == "the wrapper") as victim:
        yield Guest(victim)


def test_every_rule_of_an_ioctl_when_it_is_made_then_the_errno_is_the_rule_s(
    guest: Guest, tell: Tell
) -> None:
    differing = []
    for name, ioctl, argument, is_hooked, expected in IOCTLS:
        assert guest.victim.ioctl(Ioctl.UNHOOK, guest.vm) == 0
        tool = guest.hook() if is_hooked else None
        answer = guest.make(ioctl, argument)
        if tool is not None:
            tool.close()
        if answer != (errno_name(expected) if expected else "0"):
            differing.append((name, answer))

    assert differing == []
    tell(f"{len(IOCTLS)} rules of ioctls compared, KVMI v7")


def test_every_rule_of_a_message_when_it_is_sent_then_the_reply_is_the_rule_s(
    guest: Guest, tell: Tell
) -> None:
    differing = []
    for name, message_id, payload, rights, expected in MESSAGES:
        with guest.hook(rights) as tool:
            # What follows tells where this message ended, and whether the channel lives.
            tool.sendall(struct.pack("<HHI", message_id, len(payload), 7) + payload + VERSION)
            header = received(tool, 8)
            if not header:
                answer: object = BROKEN
            else:
                body = received(tool, struct.unpack_from("<H", header, 2)[0])
                answer = struct.unpack_from("<i", body)[0]
                assert header == struct.pack("<HHI", message_id, len(body), 7), name
                assert body[4:8] == bytes(4), name
                assert answer == 0 or len(body) == 8, name
                assert received(tool, len(VERSION_REPLY)) == VERSION_REPLY, name
            if answer != expected:
                differing.append((name, answer))

    assert differing == []
    tell(f"{len(MESSAGES)} rules of messages compared, KVMI v7")


def test_every_rule_of_the_masks_when_asked_by_the_tool_then_it_is_the_rule_s(
    guest: Guest, tell: Tell
) -> None:
    cases = [(Ioctl.COMMAND, 3, range(64), rule) for rule in COMMAND_MASKS]
    cases += [(Ioctl.EVENT, 4, range(14), rule) for rule in EVENT_MASKS]
    for ioctl, check_id, ids, (calls, expected) in cases:
        with guest.hook() as tool:
            for call in calls:
                assert guest.feature(ioctl, *call) == 0
            asking = [struct.pack("<HHI", check_id, 8, i) + check(i) for i in ids]
            tool.sendall(b"".join(asking))
            replies = received(tool, 16 * len(ids))
        errors = {seq: error for _, _, seq, error, _ in struct.iter_unpack("<HHIiI", replies)}

        assert {i for i, error in errors.items() if error == 0} == expected, calls
        assert set(errors.values()) <= {0, -1}
    tell(f"{len(cases)} rules of masks compared, KVMI v7")


def test_data_when_read_and_written_then_it_is_the_guest_s(guest: Guest) -> None:
    with guest.hook(ALL_RIGHTS) as tool:
        info = asked(tool, struct.pack("<HHI", 5, 0, 1))
        assert info[16:] == struct.pack("<I12x", VCPUS)
        gfn = asked(tool, struct.pack("<HHI", 29, 0, 1))
        assert gfn[16:] == struct.pack("<Q", MEMORY_LEN // 4096)
        payload = physical(0x1FFE, 2, b"ab")
        assert asked(tool, struct.pack("<HHI", 18, len(payload), 1) + payload)[8:] == bytes(8)
        payload = physical(0x1FFD, 3)
        assert asked(tool, struct.pack("<HHI", 17, len(payload), 1) + payload)[16:] == b"mab"
    shown = guest.victim.do("memory", address=guest.memory + 0x1FFD, length=3)
    assert bytes.fromhex(shown) == b"mab"


def test_event_when_preunhook_sends_it_then_of_v7_s_layout_and_the_subscription_stays(
    guest: Guest,
) -> None:
    ioctl, vm = guest.victim.ioctl, guest.vm
    subscribe = struct.pack("<HHI", 8, 8, 5) + control(0, 0x80)
    with guest.hook(ALL_RIGHTS) as tool:
        assert ioctl(Ioctl.PREUNHOOK, vm) == "ENOENT"
        assert asked(tool, subscribe)[8:] == bytes(8)
        assert ioctl(Ioctl.PREUNHOOK, vm) == 0
        assert received(tool, 552) == EVENT
        # The event is denied, and what was subscribed to stays.
        assert guest.feature(Ioctl.EVENT, 0, 0) == 0
        assert asked(tool, subscribe)[8:12] == struct.pack("<i", -1)
        assert ioctl(Ioctl.PREUNHOOK, vm) == 0
        assert received(tool, 552) == EVENT[:4] + struct.pack("<I", 2) + EVENT[8:]
        # An answer to it is one to an event that no vCPU waits for.
        tool.sendall(struct.pack("<HHI", 0, 16, 2) + check(0) + bytes(8))
        assert received(tool, 1) == b""
    # The channel is dead, the hook stays.
    assert guest.feature(Ioctl.COMMAND, 1, 17) == 0
    assert guest.make(Ioctl.HOOK, struct.pack("=iI16x", -1, 0)) == "EEXIST"
    assert ioctl(Ioctl.PREUNHOOK, vm) == "ENOENT"
    with guest.hook() as tool:
        assert ioctl(Ioctl.PREUNHOOK, vm) == "ENOENT"
        assert asked(tool, VERSION) == VERSION_REPLY


def test_messages_when_cut_and_joined_anyhow_then_the_replies_are_the_same(guest: Guest) -> None:
    message = struct.pack("<HHI", 3, 8, 9) + check(2)
    reply = struct.pack("<HHIiI", 3, 8, 9, 0, 0)
    with guest.hook() as tool:
        for cut in range(1, len(message)):
            tool.sendall(message[:cut])
            wait_until_read(tool)
            tool.sendall(message[cut:])
            assert received(tool, len(reply)) == reply
        for byte in message:
            tool.sendall(bytes([byte]))
            wait_until_read(tool)
        assert received(tool, len(reply)) == reply
        tool.sendall(message * 100)
        assert received(tool, len(reply) * 100) == reply * 100


def test_payload_when_8184_bytes_long_then_taken_and_when_longer_then_the_channel_ends(
    guest: Guest,
) -> None:
    with guest.hook() as tool:
        # Also of an id that is none: what comes next begins behind it.
        for message_id, answer in ((2, 0), (12, -1000)):
            tool.sendall(struct.pack("<HHI", message_id, 8184, 1) + b"\xff" * 8184)
            header = received(tool, 8)
            body = received(tool, struct.unpack_from("<H", header, 2)[0])
            assert struct.unpack_from("<i", body)[0] == answer
        # The header is enough.
        tool.sendall(struct.pack("<HHI", 2, 8185, 1))
        assert received(tool, 1) == b""


def test_revisions_when_the_other_s_requests_are_made_then_enotty(guest: Guest) -> None:
    with Emulated(V12) as of_v12:
        v12_vm = of_v12.make_vm()
        for victim, vm, requests in (
            (guest.victim, guest.vm, [V12.request(ioctl) for ioctl in Ioctl]),
            (of_v12, v12_vm, list(REQUESTS.values())),
        ):
            for request in requests:
                assert victim.do("ioctl", fd=vm, request=request, argument=0) == "ENOTTY"
    assert guest.victim.check_extension(guest.vm, CAPABILITY) == 1
    assert guest.victim.check_extension(guest.victim.do("open_kvm"), CAPABILITY) == 1


def test_vm_when_reached_from_another_process_then_eio_before_all(guest: Guest) -> None:
    with guest.hook() as tool:
        calls = [
            {"op": "ioctl", "fd": guest.vm, "request": request, "argument": 0}
            for request in REQUESTS.values()
        ]
        assert guest.victim.do("in_fork", calls=calls) == ["EIO"] * len(REQUESTS)
        assert asked(tool, VERSION) == VERSION_REPLY


@pytest.mark.parametrize("fault", ["enomem=1", "eexist-after-unhook=1"])
def test_hook_when_a_fault_is_switched_on_then_v7_has_it_too(fault: str) -> None:
    with Emulated(V7, options=["--fault", fault]) as victim:
        vm = victim.make_vm()
        if fault.startswith("eexist"):
            victim.hook(vm).close()
            assert victim.ioctl(Ioctl.UNHOOK, vm) == 0
        expected = "ENOMEM" if fault.startswith("enomem") else "EEXIST"
        # Before it is known what the fd is.
        assert victim.ioctl(Ioctl.HOOK, vm, hook_argument(-1)) == expected
        assert victim.ioctl(Ioctl.HOOK, vm, hook_argument(-1)) == "EINVAL"
        with victim.hook(vm) as tool:
            tool.settimeout(TIMEOUT_S)
            granted = {i for i in range(64) if may(tool, i)}
        assert granted == ALWAYS


def may(tool: socket.socket, command_id: int) -> bool:
    """Ask whether a command is allowed."""
    reply = asked(tool, struct.pack("<HHI", 3, 8, 1) + check(command_id))
    return reply[8:12] == bytes(4)
