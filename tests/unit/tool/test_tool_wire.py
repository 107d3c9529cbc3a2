# SPDX-License-Identifier: Apache-2.0
"""KVMI messages; the hex strings are those a real kernel took and gave."""

from __future__ import annotations

import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmi_libvirt.abi.kvmi import KvmiAbi
from kvmi_libvirt.abi.revisions import BY_NAME
from kvmi_libvirt.abi.v7 import V7
from kvmi_libvirt.abi.v12 import V12
from kvmi_libvirt.errors import KvmiLibvirtError
from kvmi_libvirt.tool import wire
from kvmi_libvirt.tool.wire import KvmError, Message, MessageReader, Reply, WireError

GET_VERSION_SENT = bytes.fromhex("0200000001100000")
GET_VERSION_GOT = bytes.fromhex("0200180001100000000000000000000001000000f81f00000000000000000000")
CHECK_SENT = bytes.fromhex("04000800b21000000200000000000000")
DENIED_GOT = bytes.fromhex("080008009c140000ffffffff00000000")
ENOSYS_GOT = bytes.fromhex("18000800a016000018fcffff00000000")
INFO_GOT = bytes.fromhex("080018009d140000000000000000000000000000000000000000000000000000")
UNHOOK_GOT = bytes.fromhex("00000800010000000000000000000000")


def one(data: bytes) -> Message:
    """Return the one message that *data* is."""
    reader = MessageReader()
    reader.feed(data)
    message = reader.take()
    assert message is not None
    assert (reader.take(), reader.pending) == (None, 0)
    return message


def test_pack_message_when_get_version_then_as_recorded() -> None:
    assert wire.pack_message(2, 0x1001) == GET_VERSION_SENT


def test_pack_message_when_check_command_then_as_recorded() -> None:
    assert wire.pack_message(4, 0x10B2, wire.pack_check(2)) == CHECK_SENT


def test_pack_message_when_payload_is_greatest_then_accepted() -> None:
    packed = wire.pack_message(2, 1, bytes(8184))

    assert (len(packed), struct.unpack_from("<H", packed, 2)[0]) == (8192, 8184)


@pytest.mark.parametrize(
    ("id_", "seq", "payload"),
    [(2, 1, bytes(8185)), (-1, 1, b""), (65536, 1, b""), (2, -1, b""), (2, 1 << 32, b"")],
)
def test_pack_message_when_out_of_range_then_value_error(
    id_: int, seq: int, payload: bytes
) -> None:
    with pytest.raises(ValueError, match=r"payload|no message"):
        wire.pack_message(id_, seq, payload)


@pytest.mark.parametrize("id_", [-1, 65536])
def test_pack_check_when_id_is_impossible_then_value_error(id_: int) -> None:
    with pytest.raises(ValueError, match="can have the id"):
        wire.pack_check(id_)


def test_decode_reply_when_version_then_as_recorded() -> None:
    reply = wire.decode_reply(one(GET_VERSION_GOT), id=2, seq=0x1001)
    version = wire.decode_version(reply.data)

    assert (0, 1, 8184, bytes(8)) == (
        reply.error,
        version.version,
        version.max_payload,
        version.features,
    )


def test_decode_version_when_v7_then_the_limit_is_that_of_later_ones() -> None:
    version = wire.decode_version(struct.pack("<II8s", 1, 0, b"\x01\x01"))

    assert (1, 8184, b"\x01\x01" + bytes(6)) == (
        version.version,
        version.max_payload,
        version.features,
    )


def test_decode_version_when_early_v10_then_no_features() -> None:
    assert wire.decode_version(struct.pack("<II", 1, 8184)).features == b""


def test_decode_reply_when_denied_then_eperm() -> None:
    assert Reply(error=KvmError.KVM_EPERM, data=b"") == wire.decode_reply(
        one(DENIED_GOT), id=8, seq=0x149C
    )


def test_decode_reply_when_unknown_command_then_enosys() -> None:
    reply = wire.decode_reply(one(ENOSYS_GOT), id=24, seq=0x16A0)

    assert wire.error_name(reply.error) == "KVM_ENOSYS"


def test_error_name_when_unknown_then_the_number() -> None:
    assert wire.error_name(4711) == "4711"


def test_decode_info_when_vm_without_vcpus_then_zero_as_recorded() -> None:
    assert wire.decode_info(wire.decode_reply(one(INFO_GOT), id=8, seq=0x149D).data) == 0


def test_decode_info_when_two_vcpus_then_two() -> None:
    assert wire.decode_info(struct.pack("<I12x", 2)) == 2


@pytest.mark.parametrize(("id_", "seq"), [(4, 0x1001), (2, 0x1002)])
def test_decode_reply_when_to_something_else_then_wire_error(id_: int, seq: int) -> None:
    with pytest.raises(WireError, match="replied to command 2 "):
        wire.decode_reply(one(GET_VERSION_GOT), id=id_, seq=seq)


@pytest.mark.parametrize("payload", [b"", bytes(7)])
def test_decode_reply_when_too_short_for_an_error_code_then_wire_error(payload: bytes) -> None:
    with pytest.raises(WireError, match="too few"):
        wire.decode_reply(Message(id=2, seq=1, payload=payload), id=2, seq=1)


def test_decode_reply_when_error_is_positive_then_wire_error() -> None:
    with pytest.raises(WireError, match="positive error code 1"):
        wire.decode_reply(Message(id=2, seq=1, payload=struct.pack("<iI", 1, 0)), id=2, seq=1)


def test_decode_reply_when_padding_is_set_then_it_is_ignored() -> None:
    message = Message(id=2, seq=1, payload=struct.pack("<iI", -1, 0xFFFFFFFF))

    assert Reply(error=1, data=b"") == wire.decode_reply(message, id=2, seq=1)


@pytest.mark.parametrize("data", [b"", bytes(7)])
def test_decode_version_when_short_then_wire_error(data: bytes) -> None:
    with pytest.raises(WireError, match="KVMI_GET_VERSION"):
        wire.decode_version(data)


def test_decode_info_when_short_then_wire_error() -> None:
    with pytest.raises(WireError, match="KVMI_VM_GET_INFO"):
        wire.decode_info(bytes(15))


@pytest.mark.parametrize("name", ["v12", "v11", "v11-or-v12"])
def test_decode_event_when_unhook_recorded_then_unhook(name: str) -> None:
    assert wire.decode_event(BY_NAME[name], one(UNHOOK_GOT)) == wire.UNHOOK_EVENT


def test_decode_event_when_vcpu_event_then_its_id() -> None:
    payload = struct.pack("<H6xHHI", 5, 16, 1, 0)

    assert wire.decode_event(V12, Message(id=1, seq=1, payload=payload)) == 5


def test_decode_event_when_v7_unhook_then_unhook() -> None:
    payload = struct.pack("<HHB", 544, 0, 0).ljust(544, b"\0")

    assert wire.decode_event(V7, Message(id=1, seq=1, payload=payload)) == wire.UNHOOK_EVENT


def test_decode_event_when_v7_breakpoint_then_its_id() -> None:
    payload = struct.pack("<HHB", 544, 1, 4).ljust(544, b"\0")

    assert wire.decode_event(V7, Message(id=1, seq=1, payload=payload)) == 4


@pytest.mark.parametrize(("abi", "id_"), [(V12, 2), (V12, 8), (V7, 0), (V7, 2)])
def test_decode_event_when_message_is_none_then_none(abi: KvmiAbi, id_: int) -> None:
    assert wire.decode_event(abi, Message(id=id_, seq=1, payload=b"")) is None


def test_decode_event_when_too_short_then_wire_error() -> None:
    with pytest.raises(WireError, match="too short"):
        wire.decode_event(V12, Message(id=0, seq=1, payload=bytes(7)))


def test_wire_error_when_caught_then_it_is_ours_and_a_value_error() -> None:
    assert issubclass(WireError, KvmiLibvirtError)
    assert issubclass(WireError, ValueError)


def test_message_reader_when_size_is_beyond_the_limit_then_wire_error_for_ever() -> None:
    reader = MessageReader()
    reader.feed(struct.pack("<HHI", 2, 8185, 1))

    for _ in range(2):
        with pytest.raises(WireError, match="8185 bytes"):
            reader.take()


def taken(data: bytes, *, step: int) -> list[object]:
    """Return every message in *data* fed in pieces, and the error that ended it, if any."""
    reader = MessageReader()
    found: list[object] = []
    try:
        for start in range(0, len(data), step):
            reader.feed(data[start : start + step])
            while (message := reader.take()) is not None:
                found.append(message)
    except WireError as error:
        found.append(str(error))
    return found


messages = st.lists(
    st.builds(
        Message,
        id=st.integers(0, 65535),
        seq=st.integers(0, (1 << 32) - 1),
        payload=st.binary(max_size=40),
    ),
    max_size=5,
)


@given(messages, st.binary(max_size=7), st.integers(1, 30))
def test_message_reader_when_fed_in_pieces_then_every_message_comes_out(
    sent: list[Message], rest: bytes, step: int
) -> None:
    stream = b"".join(wire.pack_message(m.id, m.seq, m.payload) for m in sent)

    assert sent == taken(stream + rest, step=step)


@given(st.binary(max_size=300), st.integers(1, 30))
def test_message_reader_when_bytes_are_arbitrary_then_pieces_do_not_matter(
    data: bytes, step: int
) -> None:
    assert taken(data, step=1000) == taken(data, step=1) == taken(data, step=step)


@given(st.sampled_from(sorted(BY_NAME)), st.integers(0, 3), st.binary(max_size=20))
def test_decoders_when_payload_is_arbitrary_then_only_wire_errors(
    name: str, id_: int, payload: bytes
) -> None:
    message = Message(id=id_, seq=1, payload=payload)
    for decode in (
        lambda: wire.decode_event(BY_NAME[name], message),
        lambda: wire.decode_reply(message, id=id_, seq=1),
        lambda: wire.decode_version(payload),
        lambda: wire.decode_info(payload),
    ):
        with contextlib.suppress(WireError):
            decode()
