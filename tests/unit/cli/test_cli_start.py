# SPDX-License-Identifier: Apache-2.0
"""``kvmi-libvirt start``: what becomes of the VM, whatever fails and whoever interrupts.

libvirt and hooking are replaced; the real ones are in tests/live/test_start_verb.py.
"""

from __future__ import annotations

import contextlib
import os
import signal
import types
from typing import TYPE_CHECKING, Any, Final

import pytest

from kvmi_libvirt import cli, libvirtio
from kvmi_libvirt.cli import interrupts
from kvmi_libvirt.cli import start as verb
from kvmi_libvirt.errors import ExitCode, HandshakeRefused, PolicySchemaError, TargetNotFound
from kvmi_libvirt.policy.host import HostPolicy
from kvmi_libvirt.policy.model import NAMESPACE
from kvmi_libvirt.state import StateDir

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

NAME: Final = "db1"
UUID: Final = "5a4a2b4e-7c1d-4e0f-9a52-0d6f6f1b0a01"


def xml(mode: str, commands: str = "<k:commands/>") -> bytes:
    return (
        f"<domain type='kvm'><name>{NAME}</name><uuid>{UUID}</uuid><metadata>"
        f"<k:introspection xmlns:k='{NAMESPACE}' mode='{mode}'>"
        f"<k:source type='unix' path='/run/kvmi/tool.sock'/>{commands}<k:events/>"
        "</k:introspection></metadata><memory unit='KiB'>4</memory><vcpu>1</vcpu>"
        "<os><type arch='x86_64' machine='pc'>hvm</type></os></domain>"
    ).encode()


class FakeDomain:
    """Takes the place of NewDomain, and notes what is asked of it."""

    name = NAME
    uuid = UUID

    def __init__(self) -> None:
        self.done: list[str] = []
        self.text = xml("required")
        self.fails: dict[str, Callable[[], None]] = {}

    def _do(self, what: str) -> None:
        self.done.append(what)
        self.fails.get(what, lambda: None)()

    def xml(self) -> bytes:
        return self.text

    def start(self) -> None:
        self._do("start")

    def resume(self) -> None:
        self._do("resume")

    def undo(self) -> str:
        self._do("undo")
        return "it was destroyed"


def failing(error: Exception) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


def sending(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


@pytest.fixture
def domain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeDomain:
    fake = FakeDomain()

    @contextlib.contextmanager
    def new_domain(*_: object, **__: object) -> Iterator[FakeDomain]:
        yield fake

    def hooked(*_: object) -> Any:
        fake._do("hook")
        return None

    monkeypatch.setattr(libvirtio, "new_domain", new_domain)
    monkeypatch.setattr(verb, "load_host_policy", HostPolicy)
    monkeypatch.setattr(verb, "_hooked", hooked)
    monkeypatch.setattr(verb, "state_dir", lambda: StateDir(tmp_path / "state"))
    return fake


def start() -> int:
    return cli.main(["start", NAME])


def test_it_is_hooked_between_start_and_resume(domain: FakeDomain) -> None:
    assert start() == ExitCode.OK
    assert domain.done == ["start", "hook", "resume"]


def test_a_required_vm_that_is_not_hooked_is_not_started(
    domain: FakeDomain, capsys: pytest.CaptureFixture[str]
) -> None:
    domain.fails["hook"] = failing(HandshakeRefused("no tool listens"))
    assert start() == ExitCode.HANDSHAKE
    assert domain.done == ["start", "hook", "undo"]
    assert capsys.readouterr().err == (
        "kvmi-libvirt: no tool listens; db1 was not started: it was destroyed, and none of its "
        "instructions ran; next: kvmi-libvirt doctor db1\n"
    )


def test_an_optional_vm_runs_without_and_that_is_said(
    domain: FakeDomain, capsys: pytest.CaptureFixture[str]
) -> None:
    domain.text = xml("optional")
    domain.fails["hook"] = failing(HandshakeRefused("no tool listens"))
    assert start() == ExitCode.HANDSHAKE
    assert domain.done == ["start", "hook", "resume"]
    assert capsys.readouterr().err == (
        "kvmi-libvirt: db1 runs without introspection: no tool listens; "
        "next: kvmi-libvirt doctor db1\n"
    )


@pytest.mark.parametrize("mode", ["required", "optional"])
def test_a_wrong_policy_is_found_before_the_start(domain: FakeDomain, mode: str) -> None:
    domain.text = xml(mode, "<k:commands><k:allow name='no such'/></k:commands>")
    domain.fails["hook"] = failing(PolicySchemaError("wrong"))
    assert start() == ExitCode.POLICY
    assert domain.done == ([] if mode == "required" else ["start", "hook", "resume"])


@pytest.mark.parametrize("mode", ["required", "optional"])
def test_one_that_cannot_be_resumed_is_not_left_paused(
    domain: FakeDomain, mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    domain.text = xml(mode)
    domain.fails["resume"] = failing(libvirtio.LibvirtError("cannot be resumed"))
    assert start() == ExitCode.UNSUPPORTED
    assert domain.done == ["start", "hook", "resume", "undo"]
    assert "cannot be resumed; db1 was not started: it was destroyed" in capsys.readouterr().err


@pytest.mark.parametrize("failure", ["hook", "resume", "interrupted"])
def test_where_it_cannot_be_taken_back_it_is_said_that_it_may_be_paused(
    domain: FakeDomain, failure: str, capsys: pytest.CaptureFixture[str]
) -> None:
    domain.fails["undo"] = failing(libvirtio.LibvirtError("the connection is gone"))
    if failure == "interrupted":
        domain.fails["hook"] = sending(signal.SIGINT)
    else:
        domain.fails[failure] = failing(libvirtio.LibvirtError("the connection is gone"))
    assert start() != ExitCode.OK
    text = capsys.readouterr().err
    assert "db1 MAY BE LEFT PAUSED (the connection is gone)" in text
    assert "virsh domstate db1" in text
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize("mode", ["required", "optional"])
@pytest.mark.parametrize("moment", ["start", "hook"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interruption_takes_the_start_back(
    domain: FakeDomain, mode: str, moment: str, number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    domain.text = xml(mode)
    domain.fails[moment] = sending(number)
    before = signal.getsignal(number)
    assert start() == 130
    assert domain.done == {"start": ["start", "undo"], "hook": ["start", "hook", "undo"]}[moment]
    assert "interrupted; db1 was not started: it was destroyed" in capsys.readouterr().err
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("moment", ["resume", "undo"])
def test_an_interruption_of_what_ends_it_comes_too_late(domain: FakeDomain, moment: str) -> None:
    domain.fails[moment] = sending(signal.SIGINT)
    if moment == "undo":
        domain.fails["hook"] = failing(HandshakeRefused("no tool listens"))
    assert start() == (ExitCode.HANDSHAKE if moment == "undo" else ExitCode.OK)
    assert domain.done == ["start", "hook", moment]


def test_a_start_that_fails_by_itself_needs_nothing(
    domain: FakeDomain, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        sending(signal.SIGTERM)()
        raise libvirtio.LibvirtError("does not start")

    domain.fails["start"] = fail
    assert start() == ExitCode.UNSUPPORTED
    assert domain.done == ["start"]
    assert capsys.readouterr().err == (
        "kvmi-libvirt: does not start; next: kvmi-libvirt doctor db1\n"
    )


def test_a_vm_without_introspection_is_started_and_that_is_said(
    domain: FakeDomain, capsys: pytest.CaptureFixture[str]
) -> None:
    domain.text = xml("optional").replace(NAMESPACE.encode(), b"urn:other")
    assert start() == ExitCode.OK
    assert domain.done == ["start", "hook", "resume"]
    assert "db1 has no introspection" in capsys.readouterr().err


def test_a_signal_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interrupts.Interrupts() as taken, taken.heard():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_another_host_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["start", "-c", "qemu+ssh://far/system", NAME]) == ExitCode.USAGE
    assert "not this host" in capsys.readouterr().err


# -- what is there already -------------------------------------------------------------------


RUNNING, PAUSED, SHUTOFF, CRASHED = 1, 3, 5, 6
FAKE_LIBVIRT: Final = types.SimpleNamespace(
    VIR_DOMAIN_PAUSED=PAUSED,
    VIR_DOMAIN_SHUTOFF=SHUTOFF,
    VIR_DOMAIN_CRASHED=CRASHED,
    libvirtError=ValueError,
)
"""As much of libvirt as is asked about a domain before its start."""


@pytest.mark.parametrize(
    ("state", "text"),
    [
        (RUNNING, "runs already"),
        (PAUSED, "is there already, paused; 'virsh resume'"),
        (CRASHED, "has crashed and its QEMU is there still; destroy it"),
    ],
)
def test_what_is_there_already_is_not_touched(
    monkeypatch: pytest.MonkeyPatch, state: int, text: str
) -> None:
    @contextlib.contextmanager
    def connection(_uri: str) -> Iterator[None]:
        yield None

    found = types.SimpleNamespace(
        name=lambda: NAME, state=lambda: [state, 0], isActive=lambda: state != SHUTOFF
    )
    monkeypatch.setattr(libvirtio, "_library", lambda: FAKE_LIBVIRT)
    monkeypatch.setattr(libvirtio, "_connection", connection)
    monkeypatch.setattr(libvirtio, "_lookup", lambda *_: found)
    with pytest.raises(TargetNotFound, match=text), libvirtio.new_domain(NAME):
        pytest.fail("not refused")
