# SPDX-License-Identifier: Apache-2.0
"""Hook with a secret, then change the rights in force: what the tool is told each time.

On a stand-in VM process below the emulated kernel: everything but the guest is real.
"""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING

import pytest
from stand_in import UUID, Tool, running_tool, stand_in

from kvmi_libvirt.cli.rights import changed, read_names
from kvmi_libvirt.errors import HandshakeRefused, SessionError, UnsupportedByKernel
from kvmi_libvirt.introspect import calling, change_vm, follow_policy, hook_vm
from kvmi_libvirt.policy.element import Domain
from kvmi_libvirt.policy.model import Mode, Policy, Rights, UnixSource
from kvmi_libvirt.policy.secret import read_secret
from kvmi_libvirt.state import FAILED, HOOKED, StateDir

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kvmi_libvirt.qemu.process import Process

pytestmark = [pytest.mark.ptrace, pytest.mark.seccomp]

READ, WRITE, PAUSE = "KVMI_VM_READ_PHYSICAL", "KVMI_VM_WRITE_PHYSICAL", "KVMI_VM_PAUSE_VCPU"
TRAP, UNHOOK = "KVMI_VCPU_EVENT_TRAP", "KVMI_VM_EVENT_UNHOOK"


@pytest.fixture
def process() -> Iterator[Process]:
    with stand_in() as found:
        yield found


@pytest.fixture
def secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "secrets"
    directory.mkdir(mode=0o700)
    (directory / "db1").touch(mode=0o600)
    (directory / "db1").write_bytes(b"open sesame")

    def read(name: str) -> bytes:
        return read_secret(name, directory=directory, owner=os.geteuid())

    monkeypatch.setattr(calling, "read_secret", read)
    return directory


def policy(tool: Tool, commands: set[str], events: set[str] | None = None) -> Policy:
    return Policy(
        mode=Mode.REQUIRED,
        source=UnixSource(path=str(tool.path)),
        handshake_timeout_s=10.0,
        secret="db1",
        commands=Rights(allowed=frozenset(commands)),
        events=Rights(allowed=frozenset(events or ())),
    )


def domain_with(some: Policy) -> Domain:
    return Domain(name="t", uuid=UUID, vcpus=1, memory_bytes=1 << 28, machine="q35", policy=some)


@pytest.mark.usefixtures("secrets")
def test_rights_of_a_hooked_vm_follow_its_policy_and_single_changes(
    tmp_path: Path, process: Process
) -> None:
    state = StateDir(tmp_path / "state")
    with running_tool(tmp_path, b"open sesame") as tool:
        first = policy(tool, {READ, WRITE}, {UNHOOK})
        hook_vm(process, domain_with(first), first, state=state, allow_standin=True)
        tool.told(READ, WRITE, UNHOOK)

        now = change_vm(process, UUID, policy(tool, {READ, PAUSE}, {TRAP}), state=state)
        assert (now.commands, now.events) == ((PAUSE, READ), (TRAP,))
        assert state.load(UUID) == now
        tool.told(READ, PAUSE, TRAP)

        named = read_names([PAUSE, TRAP])
        now = change_vm(process, UUID, lambda s: changed(s, named, allow=False), state=state)
        assert (now.commands, now.events) == ((READ,), ())
        tool.told(READ)

        everything = dataclasses.replace(
            first, commands=Rights(allowed=frozenset({READ, WRITE}), everything=True)
        )
        now = change_vm(process, UUID, everything, state=state)
        assert now.all_ids == ("commands",)
        now = change_vm(process, UUID, policy(tool, set()), state=state)
        assert (now.commands, now.events, now.all_ids) == ((), (), ())
        tool.told()


@pytest.mark.usefixtures("secrets")
def test_change_that_cannot_be_changes_nothing(tmp_path: Path, process: Process) -> None:
    state = StateDir(tmp_path / "state")
    with running_tool(tmp_path, b"open sesame") as tool:
        first = policy(tool, {READ})
        with pytest.raises(SessionError, match="is not hooked"):
            change_vm(process, UUID, first, state=state)
        before = hook_vm(process, domain_with(first), first, state=state, allow_standin=True)
        with pytest.raises(UnsupportedByKernel):
            change_vm(process, UUID, policy(tool, {"KVMI_VM_GET_MAX_GFN"}), state=state)
        other = dataclasses.replace(first, source=UnixSource(path="/run/kvmi/other"))
        with pytest.raises(SessionError, match="names the tool at unix:/run/kvmi/other"):
            change_vm(process, UUID, other, state=state)
        assert state.load(UUID) == before
        tool.told(READ)


@pytest.mark.usefixtures("secrets")
@pytest.mark.parametrize("obstacle", ["kernel", "tool", "secret"])
def test_policy_that_cannot_be_followed_takes_away_what_it_does_not_allow(
    tmp_path: Path, process: Process, obstacle: str
) -> None:
    state = StateDir(tmp_path / "state")
    with running_tool(tmp_path, b"open sesame") as tool:
        first = policy(tool, {READ, WRITE}, {UNHOOK, TRAP})
        hook_vm(process, domain_with(first), first, state=state, allow_standin=True)
        tool.told(READ, WRITE, UNHOOK, TRAP)
        less = policy(tool, {READ, PAUSE}, {UNHOOK})
        changed_so = {
            "kernel": policy(tool, {READ, "KVMI_VM_GET_MAX_GFN"}, {UNHOOK}),
            "tool": dataclasses.replace(less, source=UnixSource(path="/run/kvmi/other")),
            "secret": dataclasses.replace(less, secret="db2"),
        }
        with pytest.raises((SessionError, UnsupportedByKernel)):
            follow_policy(process, UUID, changed_so[obstacle], state=state)
        tool.told(READ, UNHOOK)  # and nothing that it would add
        record = state.load(UUID)
        assert record is not None
        assert (record.state, record.commands, record.events) == (HOOKED, (READ,), (UNHOOK,))


@pytest.mark.usefixtures("secrets")
def test_secret_that_the_tool_was_not_asked_for_takes_a_new_hook(
    tmp_path: Path, process: Process
) -> None:
    state = StateDir(tmp_path / "state")
    with running_tool(tmp_path, b"open sesame") as tool:
        first = policy(tool, {READ})
        wider = policy(tool, {READ, WRITE})
        hook_vm(process, domain_with(first), first, state=state, allow_standin=True)
        with pytest.raises(SessionError, match=r"secret 'db2', but .* was asked for 'db1' when"):
            change_vm(process, UUID, dataclasses.replace(wider, secret="db2"), state=state)
        # What it has proven it need not prove again, nor when less is asked of it.
        now = change_vm(process, UUID, wider, state=state)
        assert now.commands == (READ, WRITE)
        now = change_vm(process, UUID, dataclasses.replace(first, secret=None), state=state)
        assert now.commands == (READ,)
        now = change_vm(
            process, UUID, lambda s: changed(s, read_names([PAUSE]), allow=True), state=state
        )
        assert now.commands == (PAUSE, READ)
        tool.told(PAUSE, READ)


def test_tool_that_was_asked_for_no_secret_gets_nothing_of_a_policy_with_one(
    tmp_path: Path, process: Process
) -> None:
    state = StateDir(tmp_path / "state")
    with running_tool(tmp_path) as tool:
        first = dataclasses.replace(policy(tool, {READ}), secret=None)
        before = hook_vm(process, domain_with(first), first, state=state, allow_standin=True)
        with pytest.raises(SessionError, match="was asked for none when it was hooked; unhook it"):
            change_vm(process, UUID, policy(tool, {WRITE}), state=state)
        assert state.load(UUID) == before
        tool.told(READ)


def test_tool_without_the_secret_gets_nothing_and_no_trace_of_it_is_left(
    tmp_path: Path, process: Process, secrets: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = StateDir(tmp_path / "state")
    with running_tool(tmp_path, b"open says me") as tool:
        first = policy(tool, {READ})
        with pytest.raises(HandshakeRefused, match=r"know the secret .* process \d+ of uid \d+\)"):
            hook_vm(process, domain_with(first), first, state=state, allow_standin=True)
    recorded = state.load(UUID)
    assert recorded is not None
    assert recorded.state == FAILED
    texts = [caplog.text, *(file.read_text() for file in state.path.iterdir())]
    assert not any("sesame" in text for text in texts)
    assert (secrets / "db1").exists()
