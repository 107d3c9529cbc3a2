# SPDX-License-Identifier: Apache-2.0
"""The introspection protocol where the recorded answers do not reach."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmi_libvirt.abi.kvmi import Scope
from kvmi_libvirt.abi.v12 import V12
from kvmi_libvirt.emulator.kernel import VmState
from kvmi_libvirt.emulator.protocol import (
    MAX_PAYLOAD_LEN,
    ChannelBroken,
    Decoder,
    Message,
    Service,
)

ALL = (1 << 64) - 1
HEADER = struct.Struct("<HHI")

EPERM, ENOENT, EAGAIN, EINVAL, EOPNOTSUPP, ENOSYS = -1, -2, -11, -22, -95, -1000


class TwoVcpus:
    def vcpu_count(self) -> int:
        return 2

    def read_physical(self, gpa: int, length: int) -> bytes | None:
        return None

    def write_physical(self, gpa: int, data: bytes) -> bool:
        return False

    def max_gfn(self) -> int:
        return 0


def service(*, commands: int = 0, events: int = 0, introspected_vcpus: int = 2) -> Service:
    vm = VmState(
        hooked=True,
        connected=True,
        commands=commands,
        events=events,
        introspected_vcpus=introspected_vcpus,
    )
    return Service(V12, vm, TwoVcpus())


def error_of(reply: bytes) -> int:
    return int(struct.unpack_from("<i", reply, HEADER.size)[0])


def error(served: Service, message_id: int, payload: bytes = b"") -> int:
    return error_of(served.reply(Message(message_id, 1, payload)))


def test_reply_when_made_then_it_repeats_id_and_seq_and_its_size_is_right() -> None:
    reply = service(commands=ALL).reply(Message(8, 0xDEADBEEF, b""))

    assert HEADER.unpack_from(reply) == (8, len(reply) - HEADER.size, 0xDEADBEEF)
    assert reply[HEADER.size :] == struct.pack("<iI", 0, 0) + struct.pack("<I12x", 2)


def test_every_command_when_not_allowed_then_eperm_whatever_the_payload() -> None:
    served = service(commands=0)

    errors = {c.name: error(served, c.id, b"\xff" * 100) for c in V12.commands}

    assert errors == {c.name: EPERM for c in V12.commands}


def test_vcpu_command_when_the_header_is_right_then_eopnotsupp() -> None:
    served = service(commands=ALL)
    vcpu_ids = [c.id for c in V12.commands if c.scope is Scope.VCPU]

    assert {error(served, i, struct.pack("<HHI", 1, 0, 0)) for i in vcpu_ids} == {EOPNOTSUPP}


@pytest.mark.parametrize(
    "header", [(2, 0, 0), (0, 1, 0), (0, 0, 1)], ids=["no such vCPU", "padding", "padding 2"]
)
def test_vcpu_command_when_the_header_is_wrong_then_einval(header: tuple[int, int, int]) -> None:
    assert error(service(commands=ALL), 3, struct.pack("<HHI", *header)) == EINVAL


def test_vcpu_when_it_came_after_the_hook_then_eagain_but_for_pause() -> None:
    served = service(commands=ALL, events=ALL, introspected_vcpus=1)

    answers = {vcpu: error(served, 3, struct.pack("<HHI", vcpu, 0, 0)) for vcpu in range(3)}
    assert answers == {0: EOPNOTSUPP, 1: EAGAIN, 2: EINVAL}
    assert error(served, 3, struct.pack("<HHI", 1, 1, 0)) == EINVAL
    assert error(served, 16, struct.pack("<HBBI", 1, 0, 0, 0)) == EOPNOTSUPP


def test_vm_command_when_not_emulated_then_eopnotsupp_for_who_may_use_it() -> None:
    command_id = V12.commands_by_name["KVMI_VM_SET_PAGE_ACCESS"].id

    assert error(service(commands=ALL), command_id) == EOPNOTSUPP
    assert error(service(), command_id) == EPERM


@pytest.mark.parametrize("payload", [b"", bytes(15), struct.pack("<QHHI", 0, 3, 0, 0) + b"ab"])
def test_write_physical_when_data_is_missing_then_the_channel_breaks(payload: bytes) -> None:
    with pytest.raises(ChannelBroken):
        service(commands=ALL).reply(Message(14, 1, payload))


def test_write_physical_when_it_is_denied_then_its_payload_is_not_looked_at() -> None:
    assert error(service(), 14) == EPERM


def test_pause_vcpu_when_checked_then_payload_then_event_then_vcpu() -> None:
    allowed, without_event = service(commands=ALL, events=2), service(commands=ALL)

    assert error(without_event, 16, struct.pack("<HBBI", 9, 2, 0, 0)) == EINVAL
    assert error(without_event, 16, struct.pack("<HBBI", 9, 1, 0, 0)) == EPERM
    assert error(allowed, 16, struct.pack("<HBBI", 9, 1, 0, 0)) == EINVAL
    assert error(allowed, 16, struct.pack("<HBBI", 1, 1, 0, 0)) == EOPNOTSUPP


def test_vcpu_event_reply_when_no_event_was_sent_then_the_channel_breaks() -> None:
    served = service()

    with pytest.raises(ChannelBroken):
        served.reply(Message(1, 1, b""))
    assert error(served, 1, struct.pack("<HHI", 2, 0, 0)) == EINVAL


@given(st.integers(0, 0xFFFF).filter(lambda i: i not in {c.id for c in V12.commands} | {1}))
def test_unknown_id_when_everything_is_allowed_then_enosys(message_id: int) -> None:
    assert error(service(commands=ALL, events=ALL), message_id) == ENOSYS


@given(st.integers(MAX_PAYLOAD_LEN + 1, 0xFFFF), st.integers(0, 0xFFFF))
def test_decoder_when_a_message_is_too_long_then_it_breaks_at_the_header(
    size: int, message_id: int
) -> None:
    decoder = Decoder()
    decoder.feed(HEADER.pack(message_id, size, 0))

    with pytest.raises(ChannelBroken):
        decoder.take()


MESSAGES = st.lists(
    st.builds(Message, st.integers(0, 0xFFFF), st.integers(0, 2**32 - 1), st.binary(max_size=40)),
    max_size=6,
)


@given(MESSAGES, st.data())
def test_decoder_when_the_stream_is_cut_anywhere_then_the_messages_are_the_same(
    messages: list[Message], data: st.DataObject
) -> None:
    stream = b"".join(HEADER.pack(m.id, len(m.payload), m.seq) + m.payload for m in messages)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    decoder, taken = Decoder(), []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        decoder.feed(stream[start:end])
        while (message := decoder.take()) is not None:
            taken.append(message)

    assert taken == messages


@given(st.lists(st.binary(max_size=64), max_size=8))
def test_decoder_when_fed_what_it_wants_then_no_byte_too_many_is_asked_for(
    payloads: list[bytes],
) -> None:
    stream = b"".join(HEADER.pack(2, len(p), 0) + p for p in payloads)
    decoder, taken = Decoder(), []
    while stream or decoder.wanted() < HEADER.size:
        step = decoder.wanted()
        decoder.feed(stream[:step])
        stream = stream[step:]
        if (message := decoder.take()) is not None:
            taken.append(message.payload)
        elif not stream:
            break

    assert taken == payloads


@given(st.lists(st.binary(max_size=300), max_size=10), st.integers(0, ALL), st.integers(0, ALL))
def test_service_when_fed_any_bytes_then_it_replies_or_breaks_and_nothing_else(
    chunks: list[bytes], commands: int, events: int
) -> None:
    served, decoder = service(commands=commands, events=events), Decoder()
    for chunk in chunks:
        decoder.feed(chunk)
        try:
            while (message := decoder.take()) is not None:
                reply = served.reply(message)
                assert HEADER.unpack_from(reply) == (message.id, len(reply) - 8, message.seq)
        except ChannelBroken:
            return
