# SPDX-License-Identifier: Apache-2.0
"""What is done about a VM: every row of the table, and that it comes to an end."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import strategies
from hypothesis import given
from hypothesis import strategies as hs

from kvmi_libvirt import state as st
from kvmi_libvirt.agent.decide import FINAL, TOOL_HAS_GONE, Backoff, Seen, Step, next_step
from kvmi_libvirt.policy.digest import digest
from kvmi_libvirt.policy.model import Mode, Policy, Rights, UnixSource
from kvmi_libvirt.state import VmState

HERE = UnixSource(path="/run/kvmi/tool.sock")
ELSEWHERE = UnixSource(path="/run/kvmi/other.sock")
POLICY = Policy(mode=Mode.OPTIONAL, source=HERE, reconnect_s=10)
ONCE = dataclasses.replace(POLICY, reconnect_s=None)


def record(of: Policy | None = POLICY, /, **more: object) -> VmState:
    """Return what is recorded of a VM that was hooked by a policy."""
    made = VmState(
        domain="vm",
        uuid="5a4a2b4e-7c1d-4e0f-9a52-0d6f6f1b0a01",
        pid=7,
        start_ticks=1,
        abi="v12",
        mode="optional",
        state=st.HOOKED,
        source=None if of is None else of.source.describe(),
        commands=(),
        events=(),
        since="",
        error=None,
        socket_inode=99,
        policy="" if of is None else digest(of),
        secret=None if of is None else of.secret,
    )
    return dataclasses.replace(made, **more)  # type: ignore[arg-type]


def seen(wanted: Policy | None, recorded: VmState | None, *, is_open: bool = False) -> Seen:
    text = "" if wanted is None else digest(wanted)
    return Seen(wanted=wanted, digest=text, record=recorded, is_open=is_open)


def off(state: str, of: Policy | None = POLICY, /, **more: object) -> VmState:
    return record(of, state=state, socket_inode=0, **more)


SECRET = dataclasses.replace(POLICY, secret="db1")
OTHER_SECRET = dataclasses.replace(POLICY, secret="db2")
MOVED = dataclasses.replace(POLICY, source=ELSEWHERE)
MORE = dataclasses.replace(POLICY, commands=Rights(allowed=frozenset({"KVMI_VM_GET_INFO"})))

ROWS = [
    # Nothing is recorded.
    ("nothing wanted, nothing there", seen(None, None), Step.NOTHING),
    ("wanted, nothing there", seen(POLICY, None), Step.HOOK),
    # A tool is there.
    ("as it is", seen(POLICY, record(), is_open=True), Step.CHANGE),
    ("other rights", seen(MORE, record(), is_open=True), Step.CHANGE),
    ("another tool", seen(MOVED, record(), is_open=True), Step.LEAVE),
    ("a secret it was not asked for", seen(SECRET, record(), is_open=True), Step.LEAVE),
    ("another secret", seen(OTHER_SECRET, record(SECRET), is_open=True), Step.LEAVE),
    ("the secret it proved", seen(SECRET, record(SECRET), is_open=True), Step.CHANGE),
    ("no secret any more", seen(POLICY, record(SECRET), is_open=True), Step.CHANGE),
    ("nothing wanted any more", seen(None, record(), is_open=True), Step.LEAVE),
    # It has gone, and its hook is still on.
    ("gone, to be called again", seen(POLICY, record()), Step.HOOK),
    ("gone for good", seen(ONCE, record(ONCE)), Step.UNHOOK),
    ("gone, and another policy", seen(MORE, record(ONCE)), Step.HOOK),
    ("gone, and another that is for once", seen(ONCE, record(POLICY)), Step.HOOK),
    ("gone, and nothing wanted", seen(None, record()), Step.UNHOOK),
    ("gone, told as waiting", seen(POLICY, record(state=st.WAITING)), Step.HOOK),
    # No hook is on.
    ("a try failed", seen(POLICY, off(st.FAILED)), Step.HOOK),
    ("a try failed, waiting", seen(POLICY, off(st.WAITING)), Step.HOOK),
    ("a try failed for once", seen(ONCE, off(st.WAITING, ONCE)), Step.HOOK),
    ("failed before its policy was read", seen(POLICY, off(st.FAILED, None)), Step.HOOK),
    ("failed, nothing wanted", seen(None, off(st.FAILED)), Step.NOTHING),
    ("unhooked by hand", seen(POLICY, off(st.UNHOOKED)), Step.NOTHING),
    ("unhooked by hand, new policy", seen(MORE, off(st.UNHOOKED)), Step.HOOK),
    ("unhooked by us", seen(POLICY, off(st.UNHOOKED, policy="")), Step.HOOK),
    ("unhooked, nothing wanted", seen(None, off(st.UNHOOKED)), Step.NOTHING),
    ("gone for good", seen(ONCE, off(st.FAILED, ONCE, error=TOOL_HAS_GONE)), Step.NOTHING),
    ("gone for good, new", seen(MORE, off(st.FAILED, ONCE, error=TOOL_HAS_GONE)), Step.HOOK),
]


@pytest.mark.parametrize(("what", "view", "step"), ROWS, ids=[row[0] for row in ROWS])
def test_each_row_of_the_table(what: str, view: Seen, step: Step) -> None:
    assert next_step(view) is step, what


def test_every_final_error_ends_the_calls() -> None:
    for error in FINAL:
        assert next_step(seen(POLICY, off(st.FAILED, error=error))) is Step.NOTHING


# -- to the end --------------------------------------------------------------------------


@dataclass
class World:
    """A VM to which steps are done as the jobs do them, when nothing fails."""

    wanted: Policy | None
    recorded: VmState | None
    is_open: bool

    def view(self) -> Seen:
        return seen(self.wanted, self.recorded, is_open=self.is_open)

    def do(self, step: Step) -> None:
        if step is Step.HOOK:
            assert self.wanted is not None
            self.recorded, self.is_open = record(self.wanted), True
        elif step is not Step.NOTHING:
            assert self.recorded is not None
            assert step is not Step.CHANGE
            # The tool has left by now, or is no longer asked.
            is_end = self.wanted is not None and self.wanted.reconnect_s is None
            self.is_open = False
            if is_end and self.wanted is not None and self.recorded.policy == digest(self.wanted):
                self.recorded = off(st.FAILED, self.wanted, error=TOOL_HAS_GONE)
            else:
                self.recorded = off(st.UNHOOKED, policy="")


@hs.composite
def records(draw: hs.DrawFn, wanted: Policy | None) -> VmState | None:
    if draw(hs.booleans()):
        return None
    policies = hs.sampled_from([POLICY, ONCE, MOVED, SECRET, MORE])
    known = draw(policies if wanted is None else hs.just(wanted) | policies)
    return record(
        known,
        state=draw(hs.sampled_from((st.HOOKED, st.WAITING, st.FAILED, st.UNHOOKED))),
        socket_inode=draw(hs.sampled_from((0, 99))),
        policy=draw(hs.sampled_from(("", digest(known)))),
        error=draw(hs.none() | hs.sampled_from(sorted(FINAL)) | hs.just("something else")),
    )


@given(hs.data(), hs.none() | strategies.policies(), hs.booleans())
def test_whatever_is_there_the_steps_come_to_an_end(
    data: hs.DataObject, wanted: Policy | None, is_open: bool
) -> None:
    recorded = data.draw(records(wanted))
    has_hook = recorded is not None and bool(recorded.socket_inode)
    world = World(wanted, recorded, is_open and has_hook)
    done = []
    while (step := next_step(world.view())) not in (Step.NOTHING, Step.CHANGE):
        done.append(step)
        world.do(step)
        assert len(done) <= 2, done
    assert done.count(Step.HOOK) <= 1
    if wanted is None:
        assert Step.HOOK not in done
        assert world.recorded is None or not world.recorded.socket_inode
    elif step is Step.CHANGE:
        # Only ever with the tool and the secret that are wanted.
        assert world.recorded is not None
        assert world.recorded.source == wanted.source.describe()
        assert wanted.secret in (None, world.recorded.secret)


# -- waiting -----------------------------------------------------------------------------


@given(hs.integers(-5, 10_000), hs.floats(0.01, 10), hs.floats(0.01, 100))
def test_each_wait_is_longer_than_the_one_before_up_to_a_limit(
    tries: int, first_s: float, last_s: float
) -> None:
    backoff = Backoff(first_s, last_s)
    delay = backoff.delay_s(tries)
    assert 0 <= delay <= last_s
    assert delay <= backoff.delay_s(tries + 1)
    assert (delay == 0) == (tries < 1)


def test_waits_double() -> None:
    assert [Backoff(0.5, 10).delay_s(tries) for tries in range(8)] == [0, 0.5, 1, 2, 4, 8, 10, 10]
