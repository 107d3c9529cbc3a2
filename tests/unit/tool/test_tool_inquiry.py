# SPDX-License-Identifier: Apache-2.0
"""The asking tool's conversation, against a fake kernel and a clock of ours."""

from __future__ import annotations

import contextlib
import struct
from typing import TYPE_CHECKING

import pytest
from fake_kvmi import (
    UUID_TEXT,
    V11_COMMANDS,
    V12_COMMANDS,
    FakeKernel,
    hello_bytes,
)
from hypothesis import given
from hypothesis import strategies as st

from kvmi_libvirt.abi.v7 import V7
from kvmi_libvirt.abi.v11 import V11, V11_OR_V12
from kvmi_libvirt.abi.v12 import V12
from kvmi_libvirt.errors import (
    HandshakeError,
    HandshakeProtocolError,
    HandshakeRefused,
    HandshakeTimeout,
)
from kvmi_libvirt.tool.inquiry import Conversation, Pace, ProbeResult, Verdict
from kvmi_libvirt.tool.wire import WireError

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmi_libvirt.abi.kvmi import KvmiAbi

PACE = Pace(timeout_s=10.0, settle_s=0.3, interval_s=0.02, watch_interval_s=0.2)


class Talk:
    """Drives a Conversation against a FakeKernel; time moves only by its own timers."""

    def __init__(
        self,
        kernel: FakeKernel,
        *,
        pace: Pace = PACE,
        abi: KvmiAbi | None = None,
        watch: bool = False,
    ) -> None:
        self.now = 1000.0
        self.kernel = kernel
        self.conversation = Conversation(now=self.now, pace=pace, abi=abi, watch=watch)

    def greet(self, hello: bytes) -> None:
        """Say hello, take the answer, and let the kernel reply to what follows it."""
        output = self.conversation.receive(hello, now=self.now)
        assert output[:24] == struct.pack("<I20x", 24)
        self.exchange(output[24:])

    def exchange(self, output: bytes) -> None:
        """Pass bytes back and forth until neither side has anything to say."""
        while output:
            output = self.conversation.receive(self.kernel.feed(output), now=self.now)

    def step(self) -> None:
        """Let the next timer expire."""
        wake_at = self.conversation.wake_at
        assert wake_at is not None
        assert wake_at >= self.now
        self.now = wake_at
        self.exchange(self.conversation.tick(now=self.now))

    def until_result(
        self, change: Callable[[FakeKernel], None] = lambda kernel: None
    ) -> ProbeResult:
        """Go on until there is a result; call *change* before each round."""
        for _ in range(200):
            if (result := self.conversation.take_result()) is not None:
                return result
            change(self.kernel)
            self.step()
        pytest.fail("no result after 200 rounds")


def allowed(verdicts: object) -> set[str]:
    """Return the names that are allowed in a result's mapping."""
    assert hasattr(verdicts, "items")
    return {name for name, verdict in verdicts.items() if verdict is Verdict.ALLOWED}


def test_conversation_when_v12_then_exactly_the_granted_are_allowed() -> None:
    talk = Talk(FakeKernel(commands={12, 16, 7}, events={5, 17}))
    talk.greet(hello_bytes())
    result = talk.until_result()

    assert (result.name, result.uuid, result.abi, result.version) == ("db1", UUID_TEXT, "v12", 1)
    assert allowed(result.commands) == {
        "KVMI_GET_VERSION",
        "KVMI_VM_CHECK_COMMAND",
        "KVMI_VM_CHECK_EVENT",
        "KVMI_VM_READ_PHYSICAL",
        "KVMI_VM_PAUSE_VCPU",
        "KVMI_VCPU_GET_REGISTERS",
    }
    assert allowed(result.events) == {"KVMI_VCPU_EVENT_BREAKPOINT", "KVMI_VCPU_EVENT_PF"}
    assert set(result.commands) == set(V12.commands_by_name)
    assert set(result.events) == set(V12.events_by_name)


def test_conversation_when_id_22_is_known_then_it_is_v11() -> None:
    talk = Talk(FakeKernel(commands={22}, known_commands=V11_COMMANDS))
    talk.greet(hello_bytes())
    result = talk.until_result()

    assert result.abi == "v11"
    assert set(result.commands) == set(V11.commands_by_name)
    assert result.commands["KVMI_VM_SET_PAGE_ACCESS"] is Verdict.ALLOWED
    assert result.commands["KVMI_VM_GET_MAX_GFN"] is Verdict.DENIED


def test_conversation_when_v7_then_asked_by_its_ids_and_named_canonically() -> None:
    talk = Talk(FakeKernel(is_v7=True, commands={17, 7}, events={4}))
    talk.greet(hello_bytes(size=96))
    result = talk.until_result()

    assert result.abi == "v7"
    assert allowed(result.commands) == {
        "KVMI_GET_VERSION",
        "KVMI_VM_CHECK_COMMAND",
        "KVMI_VM_CHECK_EVENT",
        "KVMI_VM_READ_PHYSICAL",
        "KVMI_VM_PAUSE_VCPU",
    }
    assert allowed(result.events) == {"KVMI_VCPU_EVENT_BREAKPOINT"}
    # v7 denies what it does not know, so a hole tells nothing and has no line.
    assert set(result.commands) == set(V7.commands_by_name)


def test_conversation_when_v7_allows_an_unnamed_id_then_it_is_reported() -> None:
    talk = Talk(FakeKernel(is_v7=True, commands={31}))
    talk.greet(hello_bytes(size=96))

    assert talk.until_result().commands["id 31"] is Verdict.ALLOWED


def test_conversation_when_named_command_is_missing_then_unknown() -> None:
    talk = Talk(FakeKernel(known_commands=V12_COMMANDS - {29}))
    talk.greet(hello_bytes())

    assert talk.until_result().commands["KVMI_VCPU_TRANSLATE_GVA"] is Verdict.UNKNOWN


def test_conversation_when_kernel_knows_an_unnamed_id_then_it_is_reported() -> None:
    talk = Talk(FakeKernel(known_commands=V12_COMMANDS | {24, 26}, commands={24}))
    talk.greet(hello_bytes())
    commands = talk.until_result().commands

    assert (commands["id 24"], commands["id 26"]) == (Verdict.ALLOWED, Verdict.DENIED)
    assert "id 28" not in commands


def test_conversation_when_abi_is_forced_then_the_hello_does_not_decide() -> None:
    talk = Talk(FakeKernel(commands={20}), abi=V11_OR_V12)
    talk.greet(hello_bytes(size=200))
    result = talk.until_result()

    assert (result.abi, result.commands["id 20"]) == ("v11-or-v12", Verdict.ALLOWED)


def test_conversation_when_rights_come_late_then_the_settled_state_is_reported() -> None:
    kernel = FakeKernel()
    talk = Talk(kernel)
    talk.greet(hello_bytes())
    grants = [12, 16, 7, 14, 3]

    def grant_one(kernel: FakeKernel) -> None:
        if grants:
            kernel.commands.add(grants.pop())

    result = talk.until_result(grant_one)

    assert result.commands["KVMI_VCPU_GET_INFO"] is Verdict.ALLOWED
    assert result.commands["KVMI_VM_READ_PHYSICAL"] is Verdict.ALLOWED


def test_conversation_when_a_grant_comes_just_before_settling_then_it_waits_anew() -> None:
    talk = Talk(FakeKernel())
    talk.greet(hello_bytes())
    while talk.now < 1000.0 + PACE.settle_s - PACE.interval_s:
        talk.step()
        assert talk.conversation.take_result() is None
    talk.kernel.commands.add(12)
    changed_at = talk.now
    result = talk.until_result()

    assert result.commands["KVMI_VM_READ_PHYSICAL"] is Verdict.ALLOWED
    assert talk.now - changed_at >= PACE.settle_s


def test_conversation_when_settle_is_zero_then_two_rounds_must_agree() -> None:
    talk = Talk(FakeKernel(), pace=Pace(settle_s=0))
    talk.greet(hello_bytes())
    assert talk.conversation.take_result() is None
    talk.until_result()

    assert talk.kernel.rounds == 2


def test_conversation_when_settled_then_it_asks_no_more() -> None:
    talk = Talk(FakeKernel())
    talk.greet(hello_bytes())
    talk.until_result()

    assert talk.conversation.wake_at is None
    assert talk.conversation.tick(now=talk.now + 1e6) == b""
    assert talk.conversation.take_result() is None


def test_conversation_when_watching_then_only_a_change_gives_another_result() -> None:
    talk = Talk(FakeKernel(commands={12}), watch=True)
    talk.greet(hello_bytes())
    talk.until_result()
    for _ in range(10):
        talk.step()
        assert talk.conversation.take_result() is None
    talk.kernel.commands.discard(12)
    second = talk.until_result()

    assert second.commands["KVMI_VM_READ_PHYSICAL"] is Verdict.DENIED


@pytest.mark.parametrize("step", [1, 7])
def test_conversation_when_bytes_come_in_pieces_then_the_result_is_the_same(step: int) -> None:
    kernel = FakeKernel(commands={12})
    conversation = Conversation(now=0.0, pace=Pace(settle_s=0))
    stream = hello_bytes()
    for _ in range(3):
        replies = b""
        for start in range(0, len(stream), step):
            output = conversation.receive(stream[start : start + step], now=0.0)
            replies += kernel.feed(output[24:] if output.startswith(b"\x18\0\0\0") else output)
        stream = replies or kernel.feed(conversation.tick(now=1.0))
    conversation.receive(stream, now=1.0)
    result = conversation.take_result()

    assert result is not None
    assert result.commands["KVMI_VM_READ_PHYSICAL"] is Verdict.ALLOWED


def test_conversation_when_unhook_event_comes_then_it_is_leaving() -> None:
    talk = Talk(FakeKernel())
    talk.greet(hello_bytes())
    talk.conversation.receive(bytes.fromhex("00000800010000000000000000000000"), now=talk.now)

    assert talk.conversation.is_leaving


def test_conversation_when_another_event_comes_between_replies_then_it_is_passed_over() -> None:
    kernel = FakeKernel(commands={12})
    conversation = Conversation(now=0.0, pace=Pace(settle_s=0))
    questions = conversation.receive(hello_bytes(), now=0.0)[24:]
    questions = conversation.receive(kernel.feed(questions), now=0.0)
    replies = kernel.feed(questions)
    event = struct.pack("<HHI", 1, 24, 1) + struct.pack("<H6xHHI8x", 5, 16, 0, 0)
    conversation.receive(replies[:16] + event + replies[16:], now=0.0)

    assert not conversation.is_leaving
    conversation.receive(kernel.feed(conversation.tick(now=1.0)), now=1.0)
    assert conversation.is_settled


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("db1", "VM db1"),
        ("", f"VM {UUID_TEXT}"),
        ("a\x1b[2J\nb", "VM a\\x1b[2J\\nb"),
        ("é\u2028", "VM é\\u2028"),
    ],
)
def test_label_when_name_is_odd_then_it_is_one_printable_line(name: str, label: str) -> None:
    talk = Talk(FakeKernel())
    talk.greet(hello_bytes(name=name))

    assert talk.conversation.label == label


@pytest.mark.parametrize(
    ("hello", "match"),
    [
        (struct.pack("<I", 3), "announces 3 bytes"),
        (b"GET / HTTP/1.1\r\n", "announces 542393671 bytes"),
        (hello_bytes(size=128), "128 bytes belongs to no KVMI revision"),
        (hello_bytes(size=96, name="", start_time_s=0), "KVMI v6"),
    ],
)
def test_conversation_when_hello_is_unusable_then_protocol_error(hello: bytes, match: str) -> None:
    conversation = Conversation(now=0.0, pace=PACE, origin="connection from pid 7")

    with pytest.raises(HandshakeProtocolError, match=f"(VM|connection from pid 7).*: .*{match}"):
        conversation.receive(hello, now=0.0)


def test_tick_when_hello_is_not_whole_then_timeout() -> None:
    conversation = Conversation(now=0.0, pace=PACE)
    conversation.receive(hello_bytes()[:50], now=0.0)

    assert conversation.tick(now=9.99) == b""
    with pytest.raises(HandshakeTimeout, match="no whole hello came within 10 s"):
        conversation.tick(now=10.0)


def test_tick_when_hello_drips_then_the_deadline_does_not_move() -> None:
    conversation = Conversation(now=0.0, pace=PACE)
    conversation.receive(b"\x68", now=9.0)

    with pytest.raises(HandshakeTimeout):
        conversation.tick(now=10.0)


def test_tick_when_kernel_never_takes_over_then_timeout_says_not_hooked() -> None:
    conversation = Conversation(now=0.0, pace=PACE)
    conversation.receive(hello_bytes(), now=5.0)

    with pytest.raises(HandshakeTimeout, match="VM db1: it was not hooked"):
        conversation.tick(now=15.0)


def test_tick_when_answers_stop_then_timeout_says_how_many_are_missing() -> None:
    kernel = FakeKernel()
    conversation = Conversation(now=0.0, pace=PACE)
    output = conversation.receive(hello_bytes(), now=0.0)[24:]
    questions = conversation.receive(kernel.feed(output), now=0.0)
    conversation.receive(kernel.feed(questions)[: 16 * 20], now=1.0)

    with pytest.raises(HandshakeTimeout, match="30 of 50 questions have no answer"):
        conversation.tick(now=10.0)


def test_closed_when_before_the_result_then_refused_says_when() -> None:
    said = []
    kernel = FakeKernel()
    conversation = Conversation(now=0.0, pace=PACE)
    stream = [hello_bytes()[:4], hello_bytes()[4:]]
    for data in stream:
        output = conversation.receive(data, now=0.0)
        with pytest.raises(HandshakeRefused) as caught:
            conversation.closed()
        said.append(str(caught.value))
    conversation.receive(kernel.feed(output[24:]), now=0.0)
    with pytest.raises(HandshakeRefused) as caught:
        conversation.closed()
    said.append(str(caught.value))

    assert said == [
        "a connection: closed the connection before its hello was complete",
        "VM db1: closed the connection after the handshake: it was not hooked",
        "VM db1: closed the connection before it had answered everything",
    ]


def test_closed_when_settled_then_nothing_is_wrong() -> None:
    talk = Talk(FakeKernel())
    talk.greet(hello_bytes())
    talk.until_result()

    talk.conversation.closed()


@pytest.mark.parametrize(
    ("reply", "match"),
    [
        (struct.pack("<HHIiI", 2, 8, 1, -1, 0), "KVM_EPERM to KVMI_GET_VERSION"),
        (struct.pack("<HHIiI", 2, 8, 9, 0, 0), "seq 9"),
        (struct.pack("<HHIiI", 3, 8, 1, 0, 0), "replied to command 3 "),
        (struct.pack("<HHIiI", 2, 8, 1, 0, 0), "only 0 bytes"),
        (struct.pack("<HHI", 2, 9000, 1), "9000 bytes"),
    ],
)
def test_conversation_when_version_reply_is_wrong_then_wire_error(reply: bytes, match: str) -> None:
    conversation = Conversation(now=0.0, pace=PACE)
    conversation.receive(hello_bytes(), now=0.0)

    with pytest.raises(WireError, match=f"VM db1: .*{match}"):
        conversation.receive(reply, now=0.0)


def test_conversation_when_check_is_unknown_then_error_names_the_revision() -> None:
    kernel = FakeKernel()
    kernel.check_command = 99
    talk = Talk(kernel)

    with pytest.raises(WireError, match=r"KVM_ENOSYS to KVMI_VM_CHECK_COMMAND.*not speak KVMI v12"):
        talk.greet(hello_bytes())


def test_conversation_when_reply_comes_unasked_then_wire_error() -> None:
    talk = Talk(FakeKernel())
    talk.greet(hello_bytes())
    talk.until_result()

    with pytest.raises(WireError, match="never sent"):
        talk.conversation.receive(struct.pack("<HHIiI", 4, 8, 1, 0, 0), now=talk.now)


@given(st.lists(st.binary(max_size=150), max_size=6))
def test_conversation_when_bytes_are_arbitrary_then_only_declared_errors(
    pieces: list[bytes],
) -> None:
    conversation = Conversation(now=0.0, pace=PACE)
    with contextlib.suppress(HandshakeError, WireError):
        for data in pieces:
            conversation.receive(data, now=0.0)


@given(st.lists(st.binary(max_size=150), max_size=6))
def test_conversation_when_kernel_sends_arbitrary_bytes_then_only_declared_errors(
    pieces: list[bytes],
) -> None:
    conversation = Conversation(now=0.0, pace=PACE)
    conversation.receive(hello_bytes(), now=0.0)
    with contextlib.suppress(HandshakeError, WireError):
        for data in pieces:
            conversation.receive(data, now=0.0)


def test_to_json_when_called_then_it_is_the_contract() -> None:
    result = ProbeResult(
        name="db1",
        uuid=UUID_TEXT,
        abi="v12",
        version=1,
        commands={"KVMI_GET_VERSION": Verdict.ALLOWED, "KVMI_VM_GET_INFO": Verdict.DENIED},
        events={"KVMI_VCPU_EVENT_PF": Verdict.UNKNOWN},
    )

    assert result.to_json() == {
        "name": "db1",
        "uuid": UUID_TEXT,
        "abi": "v12",
        "version": 1,
        "commands": {"KVMI_GET_VERSION": "allowed", "KVMI_VM_GET_INFO": "denied"},
        "events": {"KVMI_VCPU_EVENT_PF": "unknown"},
    }
