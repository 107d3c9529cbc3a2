# SPDX-License-Identifier: Apache-2.0
"""The two messages a device manager and an introspection tool exchange before HOOK.

The device manager sends a hello, the tool sends an answer, and from the next byte
on the stream belongs to the kernel. Bytes only: no socket, no clock. Whether an
answer proves anything is not judged here. May import ``abi`` and ``errors``.

Byte order is the host's; the package is for x86-64, so it is written as little
endian, the same on every machine that runs the tests.

Source: ``struct qemu_vmi_to_introspector`` and ``struct qemu_vmi_from_introspector``
of the KVM-VMI QEMU branches kvmi-v7 and kvmi-v12; libkvmi for what a tool tolerates.
"""

from __future__ import annotations

import hashlib
import struct
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from kvmi_libvirt.errors import HandshakeProtocolError

if TYPE_CHECKING:
    from kvmi_libvirt.abi.kvmi import KvmiAbi

# u32 struct_size, u8 uuid[16], u32 padding, s64 start_time, char name[64]
_HELLO: Final = struct.Struct("<I16sIq64s")
# u64 max_gpa, the one field v12 added
_MAX_GPA: Final = struct.Struct("<Q")
# u32 struct_size, u8 cookie_hash[20]
_ANSWER: Final = struct.Struct("<I20s")
_SIZE: Final = struct.Struct("<I")

HELLO_SIZE_V7: Final = _HELLO.size
HELLO_SIZE_V12: Final = _HELLO.size + _MAX_GPA.size
HELLO_MIN: Final = 32
"""A hello must reach to the name; libkvmi draws the line here."""

ANSWER_SIZE: Final = _ANSWER.size
STRUCT_MAX: Final = 65536
"""Upper limit for either message. The sender chooses the length, so there must be one."""

NAME_MAX: Final = 63
"""Bytes of the name, without the NUL that ends it."""

COOKIE_HASH_LEN: Final = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """What the device manager tells the tool about a VM.

    ``start_time_s`` is seconds since the epoch. ``max_gpa`` is the end of guest
    RAM in bytes, None in a revision that has no such field.
    """

    uuid: uuid.UUID
    start_time_s: int
    name: str
    max_gpa: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the tool answers: 20 bytes, all zero when it has no secret to prove."""

    cookie_hash: bytes


def pack_hello(abi: KvmiAbi, hello: Hello) -> bytes:
    """Return the hello in the layout of *abi*, ``abi.handshake_size`` bytes long.

    The name ends at a NUL or after 63 bytes of UTF-8, before a character that
    would not fit whole. A ``max_gpa`` of None is sent as 0 where there is the field.

    Raises
        ValueError  start_time_s or max_gpa does not fit into 64 bits.
    """
    name = _cut(hello.name.partition("\0")[0])
    size = abi.handshake_size
    try:
        fixed = _HELLO.pack(size, hello.uuid.bytes, 0, hello.start_time_s, name)
        packed = fixed + _MAX_GPA.pack(hello.max_gpa or 0)
    except struct.error as error:
        raise ValueError(f"{hello} does not fit into a hello: {error}") from error
    return packed.ljust(size, b"\0")[:size]


def _cut(name: str) -> bytes:
    # Bytes that were no UTF-8 when the name was read come as surrogates: send them
    # back as they were.
    try:
        encoded = name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        encoded = name.encode("utf-8", "backslashreplace")
    if len(encoded) <= NAME_MAX:
        return encoded
    end = NAME_MAX
    # At most three steps: a character has at most three continuation bytes. More of
    # them in a row are no UTF-8 anyway.
    while end > NAME_MAX - 3 and encoded[end] & 0xC0 == 0x80:
        end -= 1
    return encoded[:end]


def unpack_hello(data: bytes) -> Hello:
    """Return what the hello *data* says, as tolerant as libkvmi.

    Any size from 32 to 65536 bytes will do; fields beyond the end are empty, bytes
    beyond the known fields are ignored, and so is the padding. Bytes of the name
    that are no UTF-8 become ``\\xNN``.

    Parameters
        data  the whole message, its size field included; may be followed by more.
    Raises
        HandshakeProtocolError  the size is out of range, or *data* is shorter.
    """
    if len(data) < _SIZE.size:
        raise HandshakeProtocolError(f"the hello ends after {len(data)} bytes")
    (size,) = _SIZE.unpack_from(data)
    _check_size(size, what="hello", minimum=HELLO_MIN)
    if len(data) < size:
        raise HandshakeProtocolError(f"the hello has {len(data)} of the {size} bytes it announces")
    padded = data[:size].ljust(_HELLO.size, b"\0")
    _, uuid_bytes, _, start_time_s, name = _HELLO.unpack_from(padded)
    max_gpa = _MAX_GPA.unpack_from(data, HELLO_SIZE_V7)[0] if size >= HELLO_SIZE_V12 else None
    return Hello(
        uuid=uuid.UUID(bytes=uuid_bytes),
        start_time_s=start_time_s,
        name=name.partition(b"\0")[0].decode("utf-8", "backslashreplace"),
        max_gpa=max_gpa,
    )


def cookie_hash(secret: bytes) -> bytes:
    """Return what proves the knowledge of *secret*: SHA-1 over its raw bytes.

    The protocol has nothing stronger. It keeps strangers out of a socket they can
    reach; it does not protect against one who can read along.

    Source
        QEMU's introspection object in KVM-VMI, which hashes the secret's raw data.
    """
    return hashlib.sha1(secret, usedforsecurity=False).digest()


def pack_answer(proof: bytes = bytes(COOKIE_HASH_LEN)) -> bytes:
    """Return the 24 bytes of an answer; ValueError unless *proof* has 20 bytes."""
    if len(proof) != COOKIE_HASH_LEN:
        raise ValueError(f"a cookie hash has {COOKIE_HASH_LEN} bytes, not {len(proof)}")
    return _ANSWER.pack(ANSWER_SIZE, proof)


def _check_size(size: int, *, what: str, minimum: int) -> None:
    if not minimum <= size <= STRUCT_MAX:
        raise HandshakeProtocolError(
            f"the {what} announces {size} bytes, not between {minimum} and {STRUCT_MAX}"
        )


class _SizedReader:
    # Collects one message that begins with its own length. The sender chooses that
    # length: it is checked before a byte of the rest is wanted, and no more than
    # *kept* bytes are stored.

    def __init__(self, *, what: str, minimum: int, kept: int) -> None:
        self._what = what
        self._minimum = minimum
        self._kept = kept
        self._data = bytearray()
        self._received = 0
        self._size: int | None = None

    @property
    def received(self) -> int:
        """Return the number of bytes fed so far."""
        return self._received

    def wanted(self) -> int:
        """Return how many bytes to read next at most: 0 when the message is complete.

        Never counts a byte beyond the message, so whoever reads no more than this
        leaves the following bytes in the socket.
        """
        if self._size is None:
            return _SIZE.size - self._received
        return self._size - self._received

    def _take(self, data: bytes) -> bytes | None:
        if len(data) > self.wanted():
            raise ValueError(f"{len(data)} bytes fed, only {self.wanted()} wanted")
        self._received += len(data)
        self._data += data[: max(0, self._kept - len(self._data))]
        if self._size is None:
            if self._received < _SIZE.size:
                return None
            (size,) = _SIZE.unpack_from(self._data)
            _check_size(size, what=self._what, minimum=self._minimum)
            self._size = size
        return bytes(self._data) if self._received == self._size else None


class AnswerReader(_SizedReader):
    """Read a tool's answer piece by piece, and not one byte more than it.

    Read at most ``wanted()`` bytes, give them to ``feed()``, until it returns the
    answer. Not to be used again after that, nor after an error.
    """

    def __init__(self) -> None:
        super().__init__(what="tool's answer", minimum=ANSWER_SIZE, kept=ANSWER_SIZE)

    def feed(self, data: bytes) -> Answer | None:
        """Take the next bytes; return the answer once all of it is there.

        An answer longer than 24 bytes is accepted and its tail swallowed, as QEMU does.

        Raises
            HandshakeProtocolError  the announced size is below 24 or above 65536.
            ValueError              more bytes than wanted: the caller read too much.
        """
        message = self._take(data)
        return None if message is None else Answer(cookie_hash=_ANSWER.unpack(message)[1])


class HelloReader(_SizedReader):
    """Read a device manager's hello piece by piece, and not one byte more than it.

    Used as :class:`AnswerReader` is.
    """

    def __init__(self) -> None:
        # Only what unpack_hello() knows is stored.
        super().__init__(what="hello", minimum=HELLO_MIN, kept=HELLO_SIZE_V12)

    @property
    def size(self) -> int | None:
        """Return the announced size in bytes, None before it arrived."""
        return self._size

    def feed(self, data: bytes) -> Hello | None:
        """Take the next bytes; return the hello once all of it is there.

        Raises
            HandshakeProtocolError  the announced size is below 32 or above 65536.
            ValueError              more bytes than wanted: the caller read too much.
        """
        message = self._take(data)
        if message is None:
            return None
        # The tail was not stored: state the size of what was.
        return unpack_hello(_SIZE.pack(len(message)) + message[_SIZE.size :])
