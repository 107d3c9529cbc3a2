# SPDX-License-Identifier: Apache-2.0
"""The introspection protocol as the kernel speaks it: bytes in, replies out.

:class:`Decoder` cuts the tool's bytes into messages, :class:`Service` answers
one message with the permissions of one VM. Both are pure: no socket, no clock.
What a reply tells about the guest comes through :class:`Guest`.

Every message and reply begins with ``struct kvmi_msg_hdr {u16 id, u16 size, u32
seq}``; a reply's payload begins with ``struct kvmi_error_code {s32 err, u32 0}``,
followed by data only when err is 0. Little endian (the host's order).

Imports ``abi`` and the emulator's pure modules only.
"""

from __future__ import annotations

import struct
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from kvmi_libvirt.abi.kvmi import Scope
from kvmi_libvirt.emulator.memory import PAGE_LEN

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from kvmi_libvirt.abi.kvmi import KvmiAbi
    from kvmi_libvirt.emulator.kernel import VmState

KVMI_VERSION: Final = 1
MAX_PAYLOAD_LEN: Final = 8184  # two pages less the header

# Error codes of replies, sent negated. Source: <linux/kvm_para.h>.
KVM_EPERM: Final = 1
KVM_ENOENT: Final = 2
KVM_EAGAIN: Final = 11
KVM_EINVAL: Final = 22
KVM_EOPNOTSUPP: Final = 95
KVM_ENOSYS: Final = 1000

KVMI_VM_EVENT: Final = 0  # as a message: kernel to tool only
KVMI_VCPU_EVENT: Final = 1  # as a message: the tool's reply to a vCPU event
_PAUSE_EVENT: Final = "KVMI_VCPU_EVENT_PAUSE"

_HEADER: Final = struct.Struct("<HHI")  # id, payload size, seq
_ERROR: Final = struct.Struct("<iI")  # err, padding
_VERSION: Final = struct.Struct("<II8s")  # version, max_msg_size, struct kvmi_features
_INFO: Final = struct.Struct("<I12x")  # vcpu_count, padding
CHECK: Final = struct.Struct("<HHI")  # id, padding, padding
CONTROL_EVENTS: Final = struct.Struct("<HBBI")  # event_id, enable, padding, padding
_CONTROL_CLEANUP: Final = struct.Struct("<BBHI")  # enable, padding...
_PAUSE: Final = struct.Struct("<HBBI")  # vcpu, wait, padding, padding
VCPU_HEADER: Final = struct.Struct("<HHI")  # vcpu, padding, padding
_UNHOOK_EVENT: Final = struct.Struct("<HHHH")  # event id, padding...
_PHYSICAL: Final = struct.Struct("<QHHI")  # gpa, size, padding, padding
_MAX_GFN: Final = struct.Struct("<Q")

HEADER_LEN: Final = _HEADER.size


class ChannelBroken(Exception):
    """The tool did what makes the kernel shut the channel down, without a reply."""


class Message(NamedTuple):
    """One message of the tool."""

    id: int
    seq: int
    payload: bytes


class Guest(Protocol):
    """What replies need to know about the guest itself."""

    def vcpu_count(self) -> int:
        """Return the number of vCPUs the VM has now."""

    def read_physical(self, gpa: int, length: int) -> bytes | None:
        """Return *length* bytes of one page at *gpa*, None where there is no such page."""

    def write_physical(self, gpa: int, data: bytes) -> bool:
        """Write *data* inside the page at *gpa*; say whether there is such a page."""

    def max_gfn(self) -> int:
        """Return one past the highest guest frame number."""


class Decoder:
    """Cuts a byte stream into messages, however it is chopped up."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> None:
        """Append what came from the tool."""
        self._buffer += data

    def wanted(self) -> int:
        """Return how many bytes the message at the front still lacks; 0 when complete.

        This is what the kernel asks its socket for: the header, then the payload.
        """
        have = len(self._buffer)
        if have < HEADER_LEN:
            return HEADER_LEN - have
        return max(0, HEADER_LEN + self._payload_len() - have)

    def take(self) -> Message | None:
        """Return the next whole message, or None until more is fed.

        Raises
            ChannelBroken  it announces more than MAX_PAYLOAD_LEN bytes; said as
                           soon as the header is there.
        """
        if len(self._buffer) < HEADER_LEN or self.wanted():
            return None
        message_id, size, seq = _HEADER.unpack_from(self._buffer)
        end = HEADER_LEN + size
        payload = bytes(self._buffer[HEADER_LEN:end])
        del self._buffer[:end]
        return Message(message_id, seq, payload)

    def _payload_len(self) -> int:
        _, size, _ = _HEADER.unpack_from(self._buffer)
        if size > MAX_PAYLOAD_LEN:
            raise ChannelBroken(f"message of {size} bytes, at most {MAX_PAYLOAD_LEN} are allowed")
        return int(size)


class Refused(Exception):
    """Ends a handler: the reply carries this error and no data."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Service:
    """Answers messages with the rights of one VM, as v11 and v12 do.

    Parameters
        abi    the revision's table
        vm     its masks are read at every message: a change applies to the next one
        guest  what GET_INFO and the vCPU checks ask
    """

    vcpu_event_id = KVMI_VCPU_EVENT
    physical = _PHYSICAL

    def __init__(self, abi: KvmiAbi, vm: VmState, guest: Guest) -> None:
        self._abi = abi
        self._vm = vm
        self._guest = guest
        self._commands = {command.id: command for command in abi.commands}
        self._events = {event.id: event for event in abi.events}
        self._pause_event_id = abi.events_by_name[_PAUSE_EVENT].id

    def reply(self, message: Message) -> bytes:
        """Return the reply to *message*.

        The order of checks is the kernel's: unknown id, then permission, and only
        then the payload. A payload that is too short reads as zeros.

        Raises
            ChannelBroken  there is no reply; the channel must be shut down.
        """
        try:
            error, data = 0, self._run(message)
        except Refused as refused:
            error, data = -refused.code, b""
        size = _ERROR.size + len(data)
        return _HEADER.pack(message.id, size, message.seq) + _ERROR.pack(error, 0) + data

    def unhook_event(self, seq: int) -> bytes:
        """Return the event by which PREUNHOOK asks the tool to let go."""
        payload = _UNHOOK_EVENT.pack(0, 0, 0, 0)
        return _HEADER.pack(KVMI_VM_EVENT, len(payload), seq) + payload

    def _run(self, message: Message) -> bytes:
        if message.id == self.vcpu_event_id:
            self._check_vcpu(message.payload)
            # No event was sent, so none can be answered.
            raise ChannelBroken("reply to a vCPU event that was never sent")
        command = self._commands.get(message.id)
        if command is None:
            raise Refused(self._code_of_unknown(message.id))
        if not self._vm.allows_command(command.id):
            raise Refused(KVM_EPERM)
        handler = _HANDLERS.get(command.name)
        if handler is not None:
            run: Callable[[bytes], bytes] = getattr(self, handler)
            return run(message.payload)
        if command.scope is Scope.VCPU:
            self._check_vcpu(message.payload)
        raise Refused(KVM_EOPNOTSUPP)

    def _code_of_unknown(self, _message_id: int) -> int:
        return KVM_ENOSYS

    def _check_vcpu(self, payload: bytes) -> None:
        index, *padding = unpack(VCPU_HEADER, payload)
        if any(padding):
            raise Refused(KVM_EINVAL)
        self._require_vcpu(index)

    def _require_vcpu(self, index: int) -> None:
        if index >= self._guest.vcpu_count():
            raise Refused(KVM_EINVAL)
        if index >= self._vm.introspected_vcpus:
            raise Refused(KVM_EAGAIN)

    def _get_version(self, _payload: bytes) -> bytes:
        # No feature of struct kvmi_features is there: singlestep is the only one.
        return _VERSION.pack(KVMI_VERSION, MAX_PAYLOAD_LEN, bytes(8))

    def _check_command(self, payload: bytes) -> bytes:
        command_id, *padding = unpack(CHECK, payload)
        known = command_id in self._commands
        return _checked(padding, known=known, allowed=self._vm.allows_command(command_id))

    def _check_event(self, payload: bytes) -> bytes:
        event_id, *padding = unpack(CHECK, payload)
        known = event_id in self._events
        return _checked(padding, known=known, allowed=self._vm.allows_event(event_id))

    def _get_info(self, _payload: bytes) -> bytes:
        return _INFO.pack(self._guest.vcpu_count())

    def _control_events(self, payload: bytes) -> bytes:
        event_id, enable, *padding = unpack(CONTROL_EVENTS, payload)
        event = self._events.get(event_id)
        if any(padding) or enable > 1 or event is None or event.scope is not Scope.VM:
            raise Refused(KVM_EINVAL)
        if not self._vm.allows_event(event_id):
            raise Refused(KVM_EPERM)
        return self._subscribe(event_id, enable=bool(enable))

    def _subscribe(self, event_id: int, *, enable: bool) -> bytes:
        bit = 1 << event_id
        subscribed = self._vm.subscribed
        self._vm.subscribed = subscribed | bit if enable else subscribed & ~bit
        return b""

    def _read_physical(self, payload: bytes) -> bytes:
        gpa, size, *padding = unpack(self.physical, payload)
        if not is_in_one_page(gpa, size) or any(padding):
            raise Refused(KVM_EINVAL)
        data = self._guest.read_physical(gpa, size)
        if data is None:
            raise Refused(KVM_ENOENT)
        return data

    def _write_physical(self, payload: bytes) -> bytes:
        layout = self.physical
        gpa, size, *padding = unpack(layout, payload)
        if len(payload) < layout.size + size:
            raise ChannelBroken("less data than announced")
        if not is_in_one_page(gpa, size) or any(padding):
            raise Refused(KVM_EINVAL)
        if not self._guest.write_physical(gpa, payload[layout.size : layout.size + size]):
            raise Refused(KVM_ENOENT)
        return b""

    def _get_max_gfn(self, _payload: bytes) -> bytes:
        return _MAX_GFN.pack(self._guest.max_gfn())

    def _control_cleanup(self, payload: bytes) -> bytes:
        enable, *padding = unpack(_CONTROL_CLEANUP, payload)
        if any(padding) or enable > 1:
            raise Refused(KVM_EINVAL)
        self._vm.cleanup_on_unhook = enable == 1
        return b""

    def _pause_vcpu(self, payload: bytes) -> bytes:
        index, wait, *padding = unpack(_PAUSE, payload)
        if any(padding) or wait > 1:
            raise Refused(KVM_EINVAL)
        if not self._vm.allows_event(self._pause_event_id):
            raise Refused(KVM_EPERM)
        if index >= self._guest.vcpu_count():
            raise Refused(KVM_EINVAL)
        raise Refused(KVM_EOPNOTSUPP)


_HANDLERS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "KVMI_GET_VERSION": "_get_version",
        "KVMI_VM_CHECK_COMMAND": "_check_command",
        "KVMI_VM_CHECK_EVENT": "_check_event",
        "KVMI_VM_GET_INFO": "_get_info",
        "KVMI_VM_CONTROL_EVENTS": "_control_events",
        "KVMI_VM_CONTROL_CLEANUP": "_control_cleanup",
        "KVMI_VM_READ_PHYSICAL": "_read_physical",
        "KVMI_VM_WRITE_PHYSICAL": "_write_physical",
        "KVMI_VM_GET_MAX_GFN": "_get_max_gfn",
        "KVMI_VM_PAUSE_VCPU": "_pause_vcpu",
    }
)


def unpack(layout: struct.Struct, payload: bytes) -> tuple[int, ...]:
    """Return the fields of *layout*: bytes beyond it are ignored, missing ones are zero."""
    return layout.unpack(payload[: layout.size].ljust(layout.size, b"\0"))


def is_in_one_page(gpa: int, size: int) -> bool:
    """Say whether *size* bytes at *gpa* are some, and lie in one page."""
    return 0 < size <= PAGE_LEN - gpa % PAGE_LEN


def _checked(padding: list[int], *, known: bool, allowed: bool) -> bytes:
    if any(padding):
        raise Refused(KVM_EINVAL)
    if not known:
        raise Refused(KVM_ENOENT)
    if not allowed:
        raise Refused(KVM_EPERM)
    return b""
