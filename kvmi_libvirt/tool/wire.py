# SPDX-License-Identifier: Apache-2.0
"""KVMI messages, from the tool's end of the socket: bytes only.

As far as permissions go: every message's frame, the questions a tool may always
ask, and the head of an event. Payloads of other commands are the business of
introspection libraries. May import ``abi`` and ``errors``.

A tool sends a command, the kernel repeats its id and seq in the reply, and the
reply's payload begins with an error code; data follows only when that is 0. An
event carries an id of its own and a seq counted by the kernel from 1.

Source: ``include/uapi/linux/kvmi.h`` of the series v12, v11 and the downstream v7;
the messages of a running kernel with the v11 layer.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from kvmi_libvirt.errors import KvmiLibvirtError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvmi_libvirt.abi.kvmi import KvmiAbi

# u16 id, u16 size (of the payload), u32 seq
_HEADER: Final = struct.Struct("<HHI")
# s32 err, u32 padding
_ERROR_CODE: Final = struct.Struct("<iI")
# u16 id, u16 padding, u32 padding
_CHECK: Final = struct.Struct("<HHI")
# u32 version, u32 max_msg_size (v7: padding)
_VERSION: Final = struct.Struct("<II")
# u32 vcpu_count, u32 padding[3]
_INFO: Final = struct.Struct("<I12x")

HEADER_SIZE: Final = _HEADER.size
MAX_PAYLOAD: Final = 8184
"""Two pages less a header: the kernel ends the channel at a longer message."""

PROTOCOL_VERSION: Final = 1
"""KVMI_VERSION of every revision so far, so it tells nothing about the revision."""

UNHOOK_EVENT: Final = 0
"""Event id, in every revision, by which a tool is asked to undo its changes and leave."""


class KvmError(enum.IntEnum):
    """Error numbers of the protocol; a reply carries them negated."""

    KVM_EPERM = 1
    KVM_ENOENT = 2
    KVM_E2BIG = 7
    KVM_EAGAIN = 11
    KVM_ENOMEM = 12
    KVM_EFAULT = 14
    KVM_EBUSY = 16
    KVM_EINVAL = 22
    KVM_EOPNOTSUPP = 95
    KVM_ENOSYS = 1000


class WireError(KvmiLibvirtError, ValueError):
    """The other end of a KVMI socket sent what is no KVMI message, or not the expected one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One message in either direction."""

    id: int
    seq: int
    payload: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """The kernel's reply to a command.

    ``error`` is positive, 0 for success; ``data`` is what follows the error code.
    """

    error: int
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """Reply to GET_VERSION; ``features`` is raw, its bytes differ between revisions."""

    version: int
    max_payload: int
    features: bytes


def error_name(error: int) -> str:
    """Return the protocol's name of the positive *error*, or its number when it has none."""
    try:
        return KvmError(error).name
    except ValueError:
        return str(error)


def pack_message(id: int, seq: int, payload: bytes = b"") -> bytes:  # noqa: A002 - the kernel's name
    """Return a whole message; ValueError when a part is out of range."""
    if len(payload) > MAX_PAYLOAD:
        raise ValueError(f"a payload has at most {MAX_PAYLOAD} bytes, not {len(payload)}")
    try:
        return _HEADER.pack(id, len(payload), seq) + payload
    except struct.error as error:
        raise ValueError(f"no message has id {id} and seq {seq}: {error}") from error


def pack_check(id: int) -> bytes:  # noqa: A002 - the kernel's name
    """Return the payload of CHECK_COMMAND or CHECK_EVENT for *id*; the same in all revisions."""
    try:
        return _CHECK.pack(id, 0, 0)
    except struct.error as error:
        raise ValueError(f"no command or event can have the id {id}") from error


class MessageReader:
    """Cut a stream of bytes into messages.

    ``feed()`` bytes as they come, in pieces of any size, and ``take()`` messages
    until it returns None. Holds at most what was fed and not yet taken.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> None:
        """Append the next bytes of the stream."""
        self._buffer += data

    def take(self) -> Message | None:
        """Return the next whole message, None when it is not complete yet.

        Raises
            WireError  the next header announces more than 8184 bytes; the stream cannot
                       be read any further, and every later call raises it again.
        """
        if len(self._buffer) < HEADER_SIZE:
            return None
        id_, size, seq = _HEADER.unpack_from(self._buffer)
        if size > MAX_PAYLOAD:
            raise WireError(f"a KVMI message announces {size} bytes, more than {MAX_PAYLOAD}")
        end = HEADER_SIZE + size
        if len(self._buffer) < end:
            return None
        payload = bytes(self._buffer[HEADER_SIZE:end])
        del self._buffer[:end]
        return Message(id=id_, seq=seq, payload=payload)

    @property
    def pending(self) -> int:
        """Return how many bytes of an incomplete message are held."""
        return len(self._buffer)


def decode_reply(message: Message, *, id: int, seq: int) -> Reply:  # noqa: A002 - the kernel's name
    """Return what *message* replies to the command sent with *id* and *seq*.

    Raises
        WireError  it is the reply to something else, or no reply at all.
    """
    if (message.id, message.seq) != (id, seq):
        raise WireError(
            f"the kernel replied to command {message.id} (seq {message.seq}), "
            f"not to command {id} (seq {seq})"
        )
    if len(message.payload) < _ERROR_CODE.size:
        raise WireError(
            f"the reply to command {id} has {len(message.payload)} bytes, too few for an error code"
        )
    error, _ = _ERROR_CODE.unpack_from(message.payload)
    if error > 0:
        raise WireError(f"the reply to command {id} has the positive error code {error}")
    return Reply(error=-error, data=message.payload[_ERROR_CODE.size :])


def decode_version(data: bytes) -> Version:
    """Return the data of a GET_VERSION reply; WireError when it is too short.

    The first kernels of the v10 series sent no features; v7 sent no payload limit,
    and has that of the later ones.
    """
    if len(data) < _VERSION.size:
        raise WireError(f"the reply to KVMI_GET_VERSION has only {len(data)} bytes of data")
    version, max_payload = _VERSION.unpack_from(data)
    return Version(
        version=version,
        max_payload=max_payload or MAX_PAYLOAD,
        features=data[_VERSION.size : _VERSION.size + 8],
    )


def decode_info(data: bytes) -> int:
    """Return the number of vCPUs in a GET_INFO reply; WireError when it is too short."""
    if len(data) < _INFO.size:
        raise WireError(f"the reply to KVMI_VM_GET_INFO has only {len(data)} bytes of data")
    return int(_INFO.unpack_from(data)[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class _EventLayout:
    # Which message ids carry events, and where the event's id is in the payload.
    message_ids: frozenset[int]
    id_struct: struct.Struct


# v10 and later: struct { u16 event; u16 padding[3]; }, and for a vCPU's more behind it.
_EVENTS_V12: Final = _EventLayout(message_ids=frozenset({0, 1}), id_struct=struct.Struct("<H6x"))
# v7: struct { u16 size; u16 vcpu; u8 event; u8 padding[3]; .. } for all.
_EVENTS_V7: Final = _EventLayout(message_ids=frozenset({1}), id_struct=struct.Struct("<4xB3x"))

_EVENT_LAYOUTS: Final[Mapping[str, _EventLayout]] = MappingProxyType(
    {"v12": _EVENTS_V12, "v11": _EVENTS_V12, "v11-or-v12": _EVENTS_V12, "v7": _EVENTS_V7}
)


def decode_event(abi: KvmiAbi, message: Message) -> int | None:
    """Return the id of the event *message* carries, None when it carries none.

    Raises
        WireError  the message has an event's id, but is too short to name the event.
    """
    layout = _EVENT_LAYOUTS[abi.name]
    if message.id not in layout.message_ids:
        return None
    if len(message.payload) < layout.id_struct.size:
        raise WireError(f"an event of {len(message.payload)} bytes is too short to be one")
    return int(layout.id_struct.unpack_from(message.payload)[0])
