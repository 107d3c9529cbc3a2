# SPDX-License-Identifier: Apache-2.0
"""The two handshake messages, byte by byte."""

from __future__ import annotations

import struct
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmi_libvirt.abi.revisions import REVISIONS
from kvmi_libvirt.abi.v7 import V7
from kvmi_libvirt.abi.v11 import V11, V11_OR_V12
from kvmi_libvirt.abi.v12 import V12
from kvmi_libvirt.errors import HandshakeProtocolError
from kvmi_libvirt.tool.handshake import (
    Answer,
    AnswerReader,
    Hello,
    HelloReader,
    pack_answer,
    pack_hello,
    unpack_hello,
)

UUID = uuid.UUID("00112233-4455-6677-8899-aabbccddeeff")
HELLO = Hello(uuid=UUID, start_time_s=0x0102030405060708, name="db1", max_gpa=0x1122334455667788)

# As a C compiler lays struct qemu_vmi_to_introspector out: offset, length, bytes.
HELLO_FIELDS = {
    "struct_size": (0, 4, struct.pack("<I", 104)),
    "uuid": (4, 16, UUID.bytes),
    "padding": (20, 4, bytes(4)),
    "start_time": (24, 8, bytes.fromhex("0807060504030201")),
    "name": (32, 64, b"db1".ljust(64, b"\0")),
    "max_gpa": (96, 8, bytes.fromhex("8877665544332211")),
}


@pytest.mark.parametrize("field", HELLO_FIELDS)
def test_pack_hello_when_v12_then_field_is_where_c_puts_it(field: str) -> None:
    offset, length, expected = HELLO_FIELDS[field]

    assert expected == pack_hello(V12, HELLO)[offset : offset + length]


def test_hello_fields_when_joined_then_they_are_the_whole_struct() -> None:
    joined = b"".join(data for _, _, data in HELLO_FIELDS.values())

    assert joined == pack_hello(V12, HELLO)


@pytest.mark.parametrize(("abi", "size"), [(V12, 104), (V11, 104), (V11_OR_V12, 104), (V7, 96)])
def test_pack_hello_when_revision_differs_then_so_does_the_size(abi: object, size: int) -> None:
    packed = pack_hello(abi, HELLO)  # type: ignore[arg-type] # parametrize loses the type

    assert (size, size) == (len(packed), struct.unpack_from("<I", packed)[0])


def test_pack_hello_when_v7_then_it_is_v12_without_the_last_field() -> None:
    assert pack_hello(V12, HELLO)[4:96] == pack_hello(V7, HELLO)[4:]


def test_pack_hello_when_max_gpa_is_unknown_then_zero_is_sent() -> None:
    hello = Hello(uuid=UUID, start_time_s=1, name="", max_gpa=None)

    assert bytes(8) == pack_hello(V12, hello)[96:]


@pytest.mark.parametrize(
    ("name", "sent"),
    [
        ("x" * 63, b"x" * 63),
        ("x" * 64, b"x" * 63),
        ("x" * 62 + "é", b"x" * 62),
        ("x" * 61 + "é", b"x" * 61 + "é".encode()),
        ("x" * 61 + "€", b"x" * 61),
        ("x" * 60 + "€", b"x" * 60 + "€".encode()),
        ("x" * 60 + "🦀", b"x" * 60),
        ("x" * 59 + "🦀", b"x" * 59 + "🦀".encode()),
        ("🦀" * 16, "🦀".encode() * 15),
        ("one\0two", b"one"),
        ("raw-\udcff", b"raw-\xff"),
        ("odd-\ud800", b"odd-\\ud800"),
        ("\udc80" * 64, b"\x80" * 60),
    ],
)
def test_pack_hello_when_name_is_awkward_then_whole_characters_are_sent(
    name: str, sent: bytes
) -> None:
    hello = Hello(uuid=UUID, start_time_s=1, name=name, max_gpa=0)

    assert sent.ljust(64, b"\0") == pack_hello(V12, hello)[32:96]


@pytest.mark.parametrize(("start_time_s", "max_gpa"), [(1 << 63, 0), (0, 1 << 64), (0, -1)])
def test_pack_hello_when_number_does_not_fit_then_value_error(
    start_time_s: int, max_gpa: int
) -> None:
    hello = Hello(uuid=UUID, start_time_s=start_time_s, name="", max_gpa=max_gpa)

    with pytest.raises(ValueError, match="does not fit"):
        pack_hello(V12, hello)


hellos = st.builds(
    Hello,
    uuid=st.uuids(),
    start_time_s=st.integers(-(1 << 63), (1 << 63) - 1),
    # By the names that hypothesis had in Debian 12, and has still.
    name=st.text(
        st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), max_size=15
    ),
    max_gpa=st.integers(0, (1 << 64) - 1),
)


@given(hellos)
def test_unpack_hello_when_packed_for_v12_then_it_is_the_same(hello: Hello) -> None:
    assert hello == unpack_hello(pack_hello(V12, hello))


@given(hellos)
def test_unpack_hello_when_packed_for_v7_then_only_max_gpa_is_lost(hello: Hello) -> None:
    expected = Hello(
        uuid=hello.uuid, start_time_s=hello.start_time_s, name=hello.name, max_gpa=None
    )

    assert expected == unpack_hello(pack_hello(V7, hello))


@given(st.text(max_size=80))
def test_pack_hello_when_name_is_any_text_then_it_ends_with_a_nul(name: str) -> None:
    packed = pack_hello(V12, Hello(uuid=UUID, start_time_s=0, name=name, max_gpa=0))

    assert (len(packed), packed[95]) == (104, 0)


def test_unpack_hello_when_name_is_no_utf8_then_bytes_are_escaped() -> None:
    packed = pack_hello(V12, Hello(uuid=UUID, start_time_s=0, name="a\udcff", max_gpa=0))

    assert unpack_hello(packed).name == "a\\xff"


def test_unpack_hello_when_name_fills_its_field_then_all_of_it_is_read() -> None:
    packed = bytearray(pack_hello(V12, HELLO))
    packed[32:96] = b"y" * 64

    assert unpack_hello(bytes(packed)).name == "y" * 64


def test_unpack_hello_when_shortest_then_the_rest_is_empty() -> None:
    data = struct.pack("<I", 32) + pack_hello(V12, HELLO)[4:32]

    assert Hello(uuid=UUID, start_time_s=HELLO.start_time_s, name="", max_gpa=None) == unpack_hello(
        data
    )


@pytest.mark.parametrize("size", [103, 97, 96])
def test_unpack_hello_when_max_gpa_is_not_whole_then_it_is_none(size: int) -> None:
    data = struct.pack("<I", size) + pack_hello(V12, HELLO)[4:size]

    assert unpack_hello(data).max_gpa is None


def test_unpack_hello_when_longer_than_known_then_the_tail_is_ignored() -> None:
    data = struct.pack("<I", 65536) + pack_hello(V12, HELLO)[4:] + b"\xff" * (65536 - 104)

    assert unpack_hello(data) == HELLO


@pytest.mark.parametrize("size", [0, 4, 31, 65537, 0xFFFFFFFF])
def test_unpack_hello_when_size_is_out_of_range_then_protocol_error(size: int) -> None:
    with pytest.raises(HandshakeProtocolError, match=f"announces {size} bytes"):
        unpack_hello(struct.pack("<I", size) + bytes(200))


@pytest.mark.parametrize("data", [b"", b"\x68\0\0", struct.pack("<I", 104) + bytes(99)])
def test_unpack_hello_when_it_ends_early_then_protocol_error(data: bytes) -> None:
    with pytest.raises(HandshakeProtocolError, match="bytes"):
        unpack_hello(data)


@given(st.binary(max_size=200))
def test_unpack_hello_when_bytes_are_arbitrary_then_hello_or_protocol_error(data: bytes) -> None:
    try:
        hello = unpack_hello(data)
    except HandshakeProtocolError:
        return
    assert hello.name.encode() is not None  # no surrogates, so it can be printed as JSON


def test_pack_answer_when_no_secret_then_24_bytes_of_size_and_zeros() -> None:
    assert bytes.fromhex("18000000") + bytes(20) == pack_answer()


def test_pack_answer_when_hash_given_then_it_follows_the_size() -> None:
    cookie_hash = bytes.fromhex("eb875812858d27b22cb2b75f992dffadc1b05c66")

    assert b"\x18\0\0\0" + cookie_hash == pack_answer(cookie_hash)


@pytest.mark.parametrize("length", [0, 19, 21])
def test_pack_answer_when_hash_has_another_length_then_value_error(length: int) -> None:
    with pytest.raises(ValueError, match="20 bytes"):
        pack_answer(bytes(length))


def read_answer(data: bytes, *, step: int) -> tuple[Answer | None, int]:
    """Feed *data* at most *step* bytes a time; return the answer and the bytes consumed."""
    reader = AnswerReader()
    position = 0
    while position < len(data) and reader.wanted():
        piece = data[position : position + min(step, reader.wanted())]
        answer = reader.feed(piece)
        position += len(piece)
        assert position == reader.received
        if answer is not None:
            assert reader.wanted() == 0
            return answer, position
    return None, position


def test_answer_reader_when_new_then_it_wants_the_size_first() -> None:
    assert AnswerReader().wanted() == 4


@pytest.mark.parametrize("step", [1, 3, 65536])
def test_answer_reader_when_more_follows_then_it_is_left(step: int) -> None:
    data = pack_answer(b"h" * 20) + b"for the kernel"

    assert (Answer(cookie_hash=b"h" * 20), 24) == read_answer(data, step=step)


@pytest.mark.parametrize("step", [1, 7, 65536])
def test_answer_reader_when_answer_is_longer_then_its_tail_is_swallowed(step: int) -> None:
    data = struct.pack("<I", 40) + b"h" * 20 + b"t" * 16 + b"kernel"

    assert (Answer(cookie_hash=b"h" * 20), 40) == read_answer(data, step=step)


def test_answer_reader_when_answer_is_of_the_greatest_size_then_accepted() -> None:
    data = struct.pack("<I", 65536) + b"h" * 65532

    assert (Answer(cookie_hash=b"h" * 20), 65536) == read_answer(data, step=65536)


@pytest.mark.parametrize("size", [0, 3, 4, 23, 65537, 0xFFFFFFFF])
def test_answer_reader_when_size_is_out_of_range_then_protocol_error(size: int) -> None:
    with pytest.raises(HandshakeProtocolError, match=f"announces {size} bytes"):
        AnswerReader().feed(struct.pack("<I", size))


def test_answer_reader_when_fed_more_than_wanted_then_value_error() -> None:
    with pytest.raises(ValueError, match="only 4 wanted"):
        AnswerReader().feed(bytes(5))


def test_answer_reader_when_complete_then_it_takes_no_more() -> None:
    reader = AnswerReader()
    reader.feed(pack_answer()[:4])
    reader.feed(pack_answer()[4:])

    with pytest.raises(ValueError, match="only 0 wanted"):
        reader.feed(b"x")


@given(st.binary(max_size=100), st.integers(1, 50))
def test_answer_reader_when_bytes_are_arbitrary_then_pieces_do_not_matter(
    data: bytes, step: int
) -> None:
    def outcome(step: int) -> object:
        try:
            return read_answer(data, step=step)
        except HandshakeProtocolError as error:
            return str(error)

    assert outcome(65536) == outcome(1) == outcome(step)


@given(st.binary(max_size=100))
def test_answer_reader_when_bytes_are_arbitrary_then_it_never_reads_beyond_the_answer(
    data: bytes,
) -> None:
    try:
        answer, consumed = read_answer(data, step=65536)
    except HandshakeProtocolError:
        return
    if answer is not None:
        assert struct.unpack_from("<I", data)[0] == consumed


@pytest.mark.parametrize("abi", REVISIONS, ids=lambda abi: abi.name)
@pytest.mark.parametrize("step", [1, 200])
def test_hello_reader_when_whole_hello_fed_then_same_as_unpacked(abi: object, step: int) -> None:
    data = pack_hello(abi, HELLO)  # type: ignore[arg-type] # parametrize loses the type
    reader = HelloReader()
    found = None
    position = 0
    while found is None:
        piece = data[position : position + min(step, reader.wanted())]
        position += len(piece)
        found = reader.feed(piece)

    assert (unpack_hello(data), len(data), len(data)) == (found, reader.size, position)


def test_hello_reader_when_hello_is_huge_then_only_known_fields_are_kept() -> None:
    reader = HelloReader()
    data = struct.pack("<I", 65536) + pack_hello(V12, HELLO)[4:] + b"\xff" * (65536 - 104)
    reader.feed(data[:4])

    assert (reader.feed(data[4:]), reader.size) == (HELLO, 65536)
    assert len(reader._data) == 104


@given(st.binary(max_size=200))
def test_hello_reader_when_bytes_are_arbitrary_then_as_unpack_hello(data: bytes) -> None:
    def by_reader() -> object:
        reader = HelloReader()
        position = 0
        try:
            while position < len(data):
                piece = data[position : position + min(13, reader.wanted())]
                position += len(piece)
                if (hello := reader.feed(piece)) is not None:
                    return hello
        except HandshakeProtocolError:
            pass
        return None

    def at_once() -> object:
        try:
            return unpack_hello(data)
        except HandshakeProtocolError:
            return None

    assert at_once() == by_reader()
