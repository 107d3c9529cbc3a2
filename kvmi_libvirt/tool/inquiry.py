# SPDX-License-Identifier: Apache-2.0
"""One conversation of an asking tool: hello, answer, then what may I do?

A state machine over bytes and a clock given from outside; sockets are the
business of ``tool.probe``. It asks only what no VM can deny, changes nothing in
the guest and subscribes to no event. May import ``abi``, ``errors``,
``tool.handshake`` and ``tool.wire``.

A tool is told neither which KVMI revision it talks to nor when its rights are
complete: between HOOK and the last grant the kernel truly answers "denied". So
the revision is concluded from the hello and from one answer in which v11 and v12
differ, and the questions are asked again until the answers stay the same.
"""

from __future__ import annotations

import contextlib
import enum
from collections import deque
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, NamedTuple

from kvmi_libvirt.abi.v7 import V7
from kvmi_libvirt.abi.v11 import V11
from kvmi_libvirt.abi.v12 import V12
from kvmi_libvirt.errors import HandshakeProtocolError, HandshakeRefused, HandshakeTimeout
from kvmi_libvirt.quoting import printable
from kvmi_libvirt.tool import wire
from kvmi_libvirt.tool.handshake import (
    HELLO_SIZE_V7,
    HELLO_SIZE_V12,
    Hello,
    HelloReader,
    cookie_hash,
    pack_answer,
)
from kvmi_libvirt.tool.wire import KvmError, Message, WireError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from kvmi_libvirt.abi.kvmi import Command, Event, KvmiAbi

_V11_ONLY_COMMAND: Final = 22
"""Known to v11 (SET_PAGE_ACCESS), a hole in v12."""


class Verdict(enum.Enum):
    """What the kernel says about one command or event."""

    ALLOWED = "allowed"
    DENIED = "denied"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeResult:
    """What one VM's tool may do.

    ``commands`` and ``events`` go by canonical name in the order of ids. An id the
    kernel knows, or allows, and the revision's table does not name is "id N".
    """

    name: str
    uuid: str
    abi: str
    version: int
    commands: Mapping[str, Verdict]
    events: Mapping[str, Verdict]

    def to_json(self) -> dict[str, object]:
        """Return the verb's JSON document."""
        return {
            "name": self.name,
            "uuid": self.uuid,
            "abi": self.abi,
            "version": self.version,
            "commands": {name: verdict.value for name, verdict in self.commands.items()},
            "events": {name: verdict.value for name, verdict in self.events.items()},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How long to wait, and how often to ask; all in seconds.

    ``timeout_s`` bounds the wait for the hello, for the kernel to take over the
    connection, and for the answers of each round. Answers are final when they have
    not changed for ``settle_s``: a tool has no event for "the rights are complete".
    """

    timeout_s: float = 10.0
    settle_s: float = 0.3
    interval_s: float = 0.02
    watch_interval_s: float = 0.2


class _Phase(enum.Enum):
    HELLO = enum.auto()
    VERSION = enum.auto()
    ASKING = enum.auto()
    RESTING = enum.auto()
    SETTLED = enum.auto()


class _Question(NamedTuple):
    message_id: int
    seq: int
    about_id: int
    is_event: bool


class _Round(NamedTuple):
    commands: tuple[Verdict, ...]
    events: tuple[Verdict, ...]


class Conversation:
    """What to say to one VM, and what it means.

    Give it every received byte with ``receive()``, call ``tick()`` at ``wake_at``,
    send what they return. ``take_result()`` returns each settled result once.
    Not to be used after it raised.

    Parameters
        now    CLOCK_MONOTONIC seconds; so everywhere below.
        origin what to call the other end until it has said its name.
        abi    ask by this revision's table instead of concluding it from the hello.
        watch  go on asking after the first result, and settle again on a change.
        secret what the device manager wants to see proven, None: nothing.
    """

    def __init__(
        self,
        *,
        now: float,
        pace: Pace,
        origin: str = "a connection",
        abi: KvmiAbi | None = None,
        watch: bool = False,
        secret: bytes | None = None,
    ) -> None:
        self._pace = pace
        self._answer = pack_answer() if secret is None else pack_answer(cookie_hash(secret))
        self._origin = origin
        self._forced_abi = abi
        self._watch = watch
        self._phase = _Phase.HELLO
        self._wake_at = now + pace.timeout_s
        self._hello_reader = HelloReader()
        self._hello: Hello | None = None
        self._messages = wire.MessageReader()
        self._abi: KvmiAbi = abi or V12
        self._version: wire.Version | None = None
        self._seq = 0
        self._questions: deque[_Question] = deque()
        self._question_count = 0
        self._answers: dict[tuple[bool, int], Verdict] = {}
        self._round_began = now
        self._last: _Round | None = None
        self._last_changed = now
        self._published: _Round | None = None
        self._result: ProbeResult | None = None
        self._leaving = False

    @property
    def hello(self) -> Hello | None:
        """Return what the device manager said, None before all of it arrived."""
        return self._hello

    @property
    def has_spoken(self) -> bool:
        """Say whether a single byte has arrived."""
        return self._hello_reader.received > 0

    @property
    def is_settled(self) -> bool:
        """Say whether a result has been reached."""
        return self._published is not None

    @property
    def is_leaving(self) -> bool:
        """Say whether the kernel asked the tool to close (the UNHOOK event)."""
        return self._leaving

    @property
    def wake_at(self) -> float | None:
        """Return when ``tick()`` is due, None when only received bytes matter."""
        return None if self._phase is _Phase.SETTLED else self._wake_at

    @property
    def label(self) -> str:
        """Return how to name the VM in a message: printable, and one line."""
        if self._hello is None:
            return self._origin
        return f"VM {printable(self._hello.name) or self._hello.uuid}"

    def take_result(self) -> ProbeResult | None:
        """Return a result reached since the last call, else None."""
        result, self._result = self._result, None
        return result

    def receive(self, data: bytes, *, now: float) -> bytes:
        """Take received bytes, any number of them, and return what to send.

        Raises
            HandshakeProtocolError  the hello is none, or of an unknown revision.
            WireError               a message is none, or no reply to what was asked.
        """
        with self._naming_itself():
            output = b""
            if self._phase is _Phase.HELLO:
                while data and self._hello is None:
                    wanted = self._hello_reader.wanted()
                    self._hello = self._hello_reader.feed(data[:wanted])
                    data = data[wanted:]
                if self._hello is None:
                    return b""
                output = self._greet(self._hello, now)
            self._messages.feed(data)
            while (message := self._messages.take()) is not None:
                output += self._handle(message, now)
            return output

    def tick(self, *, now: float) -> bytes:
        """Do what is due at *now* and return what to send.

        Raises
            HandshakeTimeout  the VM kept silent for too long.
        """
        if self._phase is _Phase.SETTLED or now < self._wake_at:
            return b""
        if self._phase is _Phase.RESTING:
            return self._ask(now)
        if self._phase is _Phase.HELLO:
            missing = "no whole hello came"
        elif self._phase is _Phase.VERSION:
            missing = "it was not hooked: the kernel did not take over the connection"
        else:
            missing = f"{len(self._questions)} of {self._question_count} questions have no answer"
        raise HandshakeTimeout(f"{self.label}: {missing} within {self._pace.timeout_s:g} s")

    def closed(self) -> None:
        """Take notice that the other end closed the connection.

        Raises
            HandshakeRefused  before a result was reached.
        """
        if self.is_settled:
            return
        if self._phase is _Phase.HELLO:
            when = "before its hello was complete"
        elif self._phase is _Phase.VERSION:
            when = "after the handshake: it was not hooked"
        else:
            when = "before it had answered everything"
        raise HandshakeRefused(f"{self.label}: closed the connection {when}")

    @contextlib.contextmanager
    def _naming_itself(self) -> Iterator[None]:
        try:
            yield
        except (HandshakeProtocolError, WireError) as error:
            raise type(error)(f"{self.label}: {error}") from error

    def _greet(self, hello: Hello, now: float) -> bytes:
        self._abi = self._forced_abi or _revision_of(hello, self._hello_reader.size or 0)
        self._phase = _Phase.VERSION
        self._wake_at = now + self._pace.timeout_s
        # The kernel finds the question in the socket when it takes over.
        return self._answer + self._pack("KVMI_GET_VERSION")

    def _pack(self, name: str, payload: bytes = b"") -> bytes:
        self._seq = (self._seq + 1) & 0xFFFFFFFF
        return wire.pack_message(self._abi.commands_by_name[name].id, self._seq, payload)

    def _handle(self, message: Message, now: float) -> bytes:
        event_id = wire.decode_event(self._abi, message)
        if event_id is not None:
            # None was subscribed to, so at most UNHOOK means anything here.
            self._leaving = self._leaving or event_id == wire.UNHOOK_EVENT
            return b""
        if self._phase is _Phase.VERSION:
            id_ = self._abi.commands_by_name["KVMI_GET_VERSION"].id
            reply = wire.decode_reply(message, id=id_, seq=self._seq)
            if reply.error:
                raise WireError(
                    f"the kernel answered {wire.error_name(reply.error)} to KVMI_GET_VERSION, "
                    "which it never denies"
                )
            self._version = wire.decode_version(reply.data)
            return self._ask(now)
        if not self._questions:
            raise WireError(f"the kernel replied to a command never sent ({message.id})")
        self._note(message)
        return b"" if self._questions else self._end_round(now)

    def _ask(self, now: float) -> bytes:
        # All questions in one go: the kernel answers in order.
        abi = self._abi
        check_command = abi.commands_by_name["KVMI_VM_CHECK_COMMAND"]
        check_event = abi.commands_by_name["KVMI_VM_CHECK_EVENT"]
        output = bytearray()
        for check, slots in ((check_command, abi.command_slots), (check_event, abi.event_slots)):
            for about_id in range(slots):
                output += self._pack(check.name, wire.pack_check(about_id))
                self._questions.append(
                    _Question(check.id, self._seq, about_id, check is check_event)
                )
        self._question_count = len(self._questions)
        self._phase = _Phase.ASKING
        self._round_began = now
        self._wake_at = now + self._pace.timeout_s
        return bytes(output)

    def _note(self, message: Message) -> None:
        question = self._questions[0]
        reply = wire.decode_reply(message, id=question.message_id, seq=question.seq)
        verdict = _verdict(self._abi, reply.error)
        if verdict is None:
            what = "KVMI_VM_CHECK_EVENT" if question.is_event else "KVMI_VM_CHECK_COMMAND"
            raise WireError(
                f"the kernel answered {wire.error_name(reply.error)} to {what} "
                f"of id {question.about_id}: it does not speak KVMI {self._abi.name}"
            )
        self._questions.popleft()
        self._answers[question.is_event, question.about_id] = verdict

    def _end_round(self, now: float) -> bytes:
        answers = self._answers
        current = _Round(
            tuple(answers[False, id_] for id_ in range(self._abi.command_slots)),
            tuple(answers[True, id_] for id_ in range(self._abi.event_slots)),
        )
        pace = self._pace
        if current != self._last:
            self._last = current
            self._last_changed = now
        elif self._round_began >= self._last_changed + pace.settle_s:
            self._settle(current)
            self._phase = _Phase.RESTING if self._watch else _Phase.SETTLED
            self._wake_at = now + pace.watch_interval_s
            return b""
        self._phase = _Phase.RESTING
        # The very sum compared above: a difference could round to the other side.
        final_round_at = max(now, self._last_changed + pace.settle_s)
        self._wake_at = min(now + pace.interval_s, final_round_at)
        return b""

    def _settle(self, current: _Round) -> None:
        if current == self._published:
            return
        self._published = current
        assert self._hello is not None
        assert self._version is not None
        abi = self._abi
        if self._forced_abi is None and abi is V12:
            known = current.commands[_V11_ONLY_COMMAND] is not Verdict.UNKNOWN
            abi = V11 if known else V12
        # v7 answers EPERM for any id it does not know: that says nothing.
        tells_unknown = abi.name != V7.name
        self._result = ProbeResult(
            name=self._hello.name,
            uuid=str(self._hello.uuid),
            abi=abi.name,
            version=self._version.version,
            commands=_by_name(abi.commands, current.commands, tells_unknown=tells_unknown),
            events=_by_name(abi.events, current.events, tells_unknown=tells_unknown),
        )


def _revision_of(hello: Hello, size: int) -> KvmiAbi:
    # v11 and v12 differ in two ids only; asked as v12, told apart by an answer.
    if size == HELLO_SIZE_V12:
        return V12
    if size != HELLO_SIZE_V7:
        raise HandshakeProtocolError(
            f"a hello of {size} bytes belongs to no KVMI revision known here "
            f"({HELLO_SIZE_V12}: v11 and v12, {HELLO_SIZE_V7}: v7)"
        )
    if hello.start_time_s == 0 and not hello.name:
        raise HandshakeProtocolError(
            "the hello names no VM and no start time, as that of KVMI v6, "
            "which is not supported: its command ids are others"
        )
    return V7


def _verdict(abi: KvmiAbi, error: int) -> Verdict | None:
    if error == 0:
        return Verdict.ALLOWED
    if error == KvmError.KVM_EPERM:
        return Verdict.DENIED
    # An id out of range is EINVAL in v7. Later it would mean a question badly put.
    unknown = KvmError.KVM_EINVAL if abi.name == V7.name else KvmError.KVM_ENOENT
    return Verdict.UNKNOWN if error == unknown else None


def _by_name(
    table: tuple[Command, ...] | tuple[Event, ...],
    verdicts: tuple[Verdict, ...],
    *,
    tells_unknown: bool,
) -> Mapping[str, Verdict]:
    names = {entry.id: entry.name for entry in table}
    found = {}
    for id_, verdict in enumerate(verdicts):
        if id_ in names:
            found[names[id_]] = verdict
        elif verdict is Verdict.ALLOWED or (verdict is Verdict.DENIED and tells_unknown):
            found[f"id {id_}"] = verdict
    return MappingProxyType(found)
