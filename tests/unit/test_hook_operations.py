# SPDX-License-Identifier: Apache-2.0
"""Which of libvirt's operations may be refused, for which domains, and which never.

With state and pidfiles in temporary directories; nothing is traced, no VM is needed.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import logging
import os
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmi_libvirt import hook as hook_module
from kvmi_libvirt import hooklog
from kvmi_libvirt.errors import PolicyRefused, PolicySyntaxError
from kvmi_libvirt.hook import VETO, Hook, Operation, main, read_xml
from kvmi_libvirt.newtypes import Pid
from kvmi_libvirt.policy.host import HostPolicy
from kvmi_libvirt.policy.model import NAMESPACE
from kvmi_libvirt.policy.required import is_required, scan
from kvmi_libvirt.qemu.process import Process
from kvmi_libvirt.state import FAILED, HOOKED, StateDir, VmState
from kvmi_libvirt.tool import connect

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kvmi_libvirt.policy.element import Domain
    from kvmi_libvirt.policy.model import Policy

NAME: Final = "db1"
UUID: Final = "5a4a2b4e-7c1d-4e0f-9a52-0d6f6f1b0a01"

CHECKING: Final = ("prepare", "start", "migrate", "restore")
NEVER: Final = ("reconnect", "stopped", "release")
UNKNOWN: Final = ("attach", "prepared", "PREPARE", "", "-", "\udc80", "a\0b")

VALID: Final = (
    '<k:source type="unix" path="/run/kvmi/tool.sock"/>'
    '<k:handshake timeout="1"/>'
    '<k:commands><k:allow name="KVMI_VM_GET_INFO"/></k:commands>'
)
INVALID: Final = '<k:commands><k:allow name="KVMI_VM_GET_INF"/></k:commands>'


def domain(element: str = "") -> bytes:
    return (
        f"<domain type='kvm' id='1'><name>{NAME}</name><uuid>{UUID}</uuid>"
        f"<metadata>{element}</metadata><memory unit='KiB'>262144</memory><vcpu>1</vcpu>"
        "<os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type></os></domain>"
    ).encode()


def element(body: str, mode: str | None) -> str:
    attribute = "" if mode is None else f' mode="{mode}"'
    return f'<k:introspection xmlns:k="{NAMESPACE}"{attribute}>{body}</k:introspection>'


DOMAINS: Final = {
    "no element": domain(),
    "default mode": domain(element(VALID, None)),
    "optional": domain(element(VALID, "optional")),
    "required": domain(element(VALID, "required")),
    "invalid": domain(element(INVALID, None)),
    "invalid optional": domain(element(INVALID, "optional")),
    "invalid required": domain(element(INVALID, "required")),
    "mode misspelt": domain(element(VALID, "requird")),
    "mode empty": domain(element(VALID, "")),
    "not XML": b"mode='required' <",
    "not XML required": b'<k:introspection mode="required">',
    "nothing": b"",
    "no domain": b"<network/>",
    "no uuid": domain().replace(UUID.encode(), b""),
    "not UTF-8": domain(element(VALID, "required")).replace(b"db1", b"\xff\xfe"),
}

REFUSED_WHEN_CHECKED: Final = frozenset(
    {"invalid required", "mode misspelt", "mode empty", "not XML required", "not UTF-8"}
)
REFUSED_WHEN_STARTED: Final = REFUSED_WHEN_CHECKED | {"required"}  # here no tool listens


@pytest.fixture(autouse=True)
def _a_host_without_a_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hook_module, "load_host_policy", HostPolicy)


@pytest.fixture
def state(tmp_path: Path) -> StateDir:
    return StateDir(tmp_path / "state")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "qemu"
    directory.mkdir()
    return directory


@pytest.fixture
def hook(state: StateDir, run_dir: Path) -> Hook:
    return Hook(state=state, run_dir=run_dir)


@contextlib.contextmanager
def running(run_dir: Path, *, uuid: str = UUID) -> Iterator[Process]:
    """Start a process that libvirt could take for the domain's QEMU, with its pidfile."""
    command = ["/bin/sh", "-c", "read line", "qemu", "-uuid", uuid]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as popen:
        try:
            (run_dir / f"{NAME}.pid").write_text(f"{popen.pid}\n", encoding="ascii")
            with Process(Pid(popen.pid)) as process:
                yield process
        finally:
            popen.kill()


def record(process: Process | None = None, **changes: Any) -> VmState:
    whole = VmState(
        domain=NAME,
        uuid=UUID,
        pid=process.pid if process else 1,
        start_ticks=process.start_ticks if process else 0,
        abi="v12",
        mode="required",
        state=HOOKED,
        source="unix:/run/kvmi/tool.sock",
        commands=("KVMI_VM_GET_INFO",),
        events=(),
        since="2026-01-02T03:04:05Z",
        error=None,
        socket_inode=1,
    )
    return dataclasses.replace(whole, **changes)


# -- veto or not -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DOMAINS)
@pytest.mark.parametrize("operation", CHECKING)
def test_checking_refuses_what_is_demanded_and_wrong(hook: Hook, operation: str, kind: str) -> None:
    veto = hook.run(NAME, operation, DOMAINS[kind])

    assert (veto is not None) == (kind in REFUSED_WHEN_CHECKED)


@pytest.mark.parametrize("kind", DOMAINS)
def test_a_start_that_cannot_be_hooked_is_refused_where_that_is_demanded(
    hook: Hook, kind: str
) -> None:
    veto = hook.run(NAME, "started", DOMAINS[kind])

    assert (veto is not None) == (kind in REFUSED_WHEN_STARTED)


@pytest.mark.parametrize("kind", DOMAINS)
@pytest.mark.parametrize("operation", [*NEVER, *UNKNOWN])
def test_other_operations_are_never_refused(hook: Hook, operation: str, kind: str) -> None:
    assert hook.run(NAME, operation, DOMAINS[kind]) is None


def test_every_operation_is_of_one_of_these_kinds() -> None:
    assert {operation.value for operation in Operation} == {*CHECKING, *NEVER, "started"}


@pytest.mark.parametrize("kind", REFUSED_WHEN_CHECKED)
def test_the_reason_is_one_line_that_names_the_domain(hook: Hook, kind: str) -> None:
    veto = hook.run(NAME, "prepare", DOMAINS[kind])

    assert veto is not None
    assert "\n" not in veto
    asked = f"kvmi-libvirt doctor {NAME}"
    assert veto.endswith(f"; domain '{NAME}' requires introspection; next: {asked}")


def test_the_reason_tells_the_line_and_what_to_write(hook: Hook) -> None:
    veto = hook.run(NAME, "prepare", DOMAINS["invalid required"])

    assert veto is not None
    assert f"(XML of domain '{NAME}':1)" in veto


def test_an_optional_failure_is_logged(hook: Hook, caplog: pytest.LogCaptureFixture) -> None:
    assert hook.run(NAME, "prepare", DOMAINS["invalid optional"]) is None

    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert NAME in caplog.text


def test_a_refusal_is_logged_as_an_error(hook: Hook, caplog: pytest.LogCaptureFixture) -> None:
    assert hook.run(NAME, "prepare", DOMAINS["invalid required"]) is not None

    assert [record.levelname for record in caplog.records] == ["ERROR"]


@pytest.mark.parametrize("operation", [*CHECKING, "started"])
def test_what_the_host_forbids_is_refused(
    hook: Hook, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    def forbid() -> HostPolicy:
        raise PolicyRefused("not on this host", source="/etc/x")

    monkeypatch.setattr(hook_module, "load_host_policy", forbid)

    assert hook.run(NAME, operation, DOMAINS["optional"]) is None
    veto = hook.run(NAME, operation, DOMAINS["required"])
    assert veto is not None
    assert veto.startswith("not on this host (/etc/x); ")


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), PermissionError(13, "no")])
@pytest.mark.parametrize("operation", Operation, ids=lambda operation: operation.value)
def test_an_error_of_the_system_is_judged_like_any_other(
    hook: Hook, monkeypatch: pytest.MonkeyPatch, operation: Operation, error: OSError
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    for step in ("_check", "_watch", "_start", "_verify", "_forget"):
        monkeypatch.setattr(Hook, step, fail)

    assert hook.run(NAME, operation.value, DOMAINS["optional"]) is None
    veto = hook.run(NAME, operation.value, DOMAINS["required"])
    assert (veto is None) == (operation.value in NEVER)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(xml=st.binary(max_size=80), operation=st.sampled_from(NEVER))
def test_no_bytes_make_a_running_vm_die(
    tmp_path_factory: pytest.TempPathFactory, xml: bytes, operation: str
) -> None:
    nowhere = tmp_path_factory.mktemp("nowhere")

    assert (
        Hook(state=StateDir(nowhere / "state"), run_dir=nowhere).run(NAME, operation, xml) is None
    )


# -- started -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pidfile", "reason"),
    [
        (None, "no pidfile"),
        ("", "holds no process id"),
        ("x\n", "holds no process id"),
        ("-1", "no process -1"),
        ("999999999999999999999", "no process 999999999999999999999"),
        (str(os.getpid()), "is not the QEMU of domain"),
    ],
)
def test_a_qemu_that_cannot_be_found_is_a_reason(
    hook: Hook, run_dir: Path, pidfile: str | None, reason: str
) -> None:
    if pidfile is not None:
        (run_dir / f"{NAME}.pid").write_text(pidfile, encoding="ascii")

    assert hook.run(NAME, "started", DOMAINS["optional"]) is None
    veto = hook.run(NAME, "started", DOMAINS["required"])
    assert veto is not None
    assert reason in veto


def test_a_process_without_a_vm_is_a_reason(hook: Hook, run_dir: Path) -> None:
    with running(run_dir):
        assert hook.run(NAME, "started", DOMAINS["optional"]) is None
        veto = hook.run(NAME, "started", DOMAINS["required"])

    assert veto is not None
    assert "no KVM VM fd" in veto


def test_a_domain_without_an_element_is_not_even_looked_for(
    hook: Hook, state: StateDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        pytest.fail("looked for QEMU, or for a tool")

    monkeypatch.setattr(hook_module, "open_domain", fail)
    monkeypatch.setattr(connect, "connect", fail)

    assert hook.run(NAME, "started", DOMAINS["no element"]) is None
    assert not state.path.exists()


# -- reconnect, stopped, release ---------------------------------------------------------


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff\xfe", b"[]", b'{"pid": 1}'])
@pytest.mark.parametrize("operation", NEVER)
@pytest.mark.parametrize("kind", ["required", "invalid required", "no element"])
def test_damaged_state_is_no_reason_to_refuse(
    hook: Hook, state: StateDir, run_dir: Path, operation: str, kind: str, damage: bytes
) -> None:
    state.path.mkdir()
    for suffix in ("json", "journal"):
        (state.path / f"{UUID}.{suffix}").write_bytes(damage)

    with running(run_dir):
        assert hook.run(NAME, operation, DOMAINS[kind]) is None


@pytest.mark.parametrize("operation", ["stopped", "release"])
@pytest.mark.parametrize("kind", ["no element", "required", "invalid required"])
def test_a_vm_that_ended_is_forgotten(
    hook: Hook, state: StateDir, operation: str, kind: str
) -> None:
    state.save(record())
    (state.path / f"{UUID}.journal").write_bytes(b"damaged")

    assert hook.run(NAME, operation, DOMAINS[kind]) is None
    assert list(state.path.iterdir()) == []


def test_another_vms_state_stays(hook: Hook, state: StateDir) -> None:
    other = record(uuid="5a4a2b4e-7c1d-4e0f-9a52-0d6f6f1b0a02", domain="db2")
    state.save(other)

    hook.run(NAME, "stopped", DOMAINS["required"])

    assert state.all() == [other]


@pytest.mark.parametrize("pidfile", ["missing", "garbage", "dead", "another process"])
def test_reconnect_without_the_right_process_changes_nothing(
    hook: Hook, state: StateDir, run_dir: Path, pidfile: str
) -> None:
    state.save(record())
    if pidfile == "garbage":
        (run_dir / f"{NAME}.pid").write_bytes(b"\xff")
    elif pidfile == "dead":
        with subprocess.Popen(["true"]) as ended:
            ended.wait()
        (run_dir / f"{NAME}.pid").write_text(str(ended.pid), encoding="ascii")
    elif pidfile == "another process":
        (run_dir / f"{NAME}.pid").write_text(str(os.getpid()), encoding="ascii")

    assert hook.run(NAME, "reconnect", DOMAINS["required"]) is None
    assert state.load(UUID) == record()


def test_reconnect_forgets_what_an_earlier_qemu_left(
    hook: Hook, state: StateDir, run_dir: Path
) -> None:
    with running(run_dir) as process:
        state.save(record(process, start_ticks=process.start_ticks - 1))

        assert hook.run(NAME, "reconnect", DOMAINS["required"]) is None

    assert state.load(UUID) is None


def test_reconnect_finds_an_open_channel_as_it_was(
    hook: Hook, state: StateDir, run_dir: Path
) -> None:
    ours, tools = socket.socketpair()
    with ours, tools, running(run_dir) as process:
        before = record(process, socket_inode=os.fstat(ours.fileno()).st_ino)
        state.save(before)

        assert hook.run(NAME, "reconnect", DOMAINS["required"]) is None

        assert state.load(UUID) == before


def test_reconnect_says_that_a_channel_was_closed_and_keeps_the_record_of_the_hook(
    hook: Hook, state: StateDir, run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ours, tools = socket.socketpair()
    with ours, tools, running(run_dir) as process:
        hooked = record(process, socket_inode=os.fstat(ours.fileno()).st_ino)
        state.save(hooked)
        tools.close()

        assert hook.run(NAME, "reconnect", DOMAINS["required"]) is None

        # The kernel keeps the hook: the next one must know that it has to come off.
        assert state.load(UUID) == hooked
    assert "closed its channel" in caplog.text


def test_reconnect_says_that_a_vm_runs_unhooked(
    hook: Hook, caplog: pytest.LogCaptureFixture
) -> None:
    hook.run(NAME, "reconnect", DOMAINS["required"])

    assert "runs without the introspection" in caplog.text


def test_reconnect_has_nothing_to_say_of_other_domains(
    hook: Hook, caplog: pytest.LogCaptureFixture
) -> None:
    hook.run(NAME, "reconnect", DOMAINS["no element"])

    assert caplog.text == ""


# -- what can be said of a domain without judging it -------------------------------------


def test_facts_are_found_whatever_the_prefix() -> None:
    xml = domain(f'<introspection xmlns="{NAMESPACE}" mode="required"/>')

    assert scan(xml) == (UUID, ("required",))


def test_an_element_of_a_foreign_namespace_is_not_ours() -> None:
    xml = domain('<k:introspection xmlns:k="urn:other" mode="required"/>')

    assert scan(xml) == (UUID, ())
    assert not is_required(xml)


def test_only_the_domains_own_uuid_counts() -> None:
    xml = domain(f"<a:uuid xmlns:a='urn:a'>{UUID[::-1]}</a:uuid><x><uuid>1</uuid></x>")

    assert scan(xml).uuid == UUID


@pytest.mark.parametrize(
    ("mode", "required"),
    [(None, False), ("optional", False), ("required", True), ("Required", True), ("", True)],
)
def test_a_mode_nobody_knows_counts_as_a_demand(mode: str | None, required: bool) -> None:
    assert is_required(domain(element("", mode))) == required


def test_the_first_element_counts_as_libvirt_keeps_only_that() -> None:
    both = element(VALID, "optional") + element(VALID, "required")

    assert scan(domain(both)).modes == ("optional", "required")
    assert not is_required(domain(both))


@pytest.mark.parametrize("xml", [b"", b"<", b"<a></b>", b"\xff", b"<a b='1' b='2'/>"])
def test_what_is_not_well_formed_is_said_in_one_line(xml: bytes) -> None:
    with pytest.raises(PolicySyntaxError) as caught:
        scan(xml)

    assert "\n" not in str(caught.value)


def test_nesting_without_end_is_no_recursion() -> None:
    assert scan(b"<a>" * 100_000 + b"</a>" * 100_000) == ("", ())


# -- the process edge --------------------------------------------------------------------


def call_main(argv: list[str], xml: bytes, tmp_path: Path) -> tuple[int, str, str]:
    """Run main() in a child with *xml* on stdin and everything of ours below *tmp_path*."""
    out, err, stdin = (tmp_path / name for name in ("out", "err", "in"))
    stdin.write_bytes(xml)
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            for number, path, flags in (
                (0, stdin, os.O_RDONLY),
                (1, out, os.O_WRONLY | os.O_CREAT),
                (2, err, os.O_WRONLY | os.O_CREAT),
            ):
                os.dup2(os.open(path, flags, 0o600), number)
            sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115 - for its life
            code = main(argv)
            print("never seen")
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return status, out.read_text(encoding="utf-8"), err.read_text(encoding="utf-8")


@pytest.fixture
def quiet_main(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hook_module, "StateDir", lambda: StateDir(tmp_path / "state"))
    monkeypatch.setattr(hooklog, "start", lambda: None)
    monkeypatch.setattr(
        Hook.__init__,
        "__kwdefaults__",
        {**(Hook.__init__.__kwdefaults__ or {}), "run_dir": tmp_path},
    )


@pytest.mark.usefixtures("quiet_main")
@pytest.mark.parametrize(
    ("operation", "kind", "code"),
    [
        ("prepare", "required", 0),
        ("prepare", "invalid required", VETO),
        ("started", "required", VETO),
        ("started", "optional", 0),
        ("reconnect", "invalid required", 0),
        ("bogus", "invalid required", 0),
    ],
)
def test_the_helper_ends_with_zero_or_the_veto_and_prints_nothing_to_stdout(
    tmp_path: Path, operation: str, kind: str, code: int
) -> None:
    status, out, err = call_main([NAME, operation, "begin", "-"], DOMAINS[kind], tmp_path)

    assert (status, out) == (code, "")
    assert len(err.splitlines()) == (1 if code else 0)


@pytest.mark.usefixtures("quiet_main")
def test_a_defect_of_ours_is_neither_zero_nor_a_veto(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So that the script decides by its own, simpler means.
    def defect(*_: object) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(Hook, "_check", defect)
    monkeypatch.setattr(logging, "raiseExceptions", False)
    status, out, err = call_main([NAME, "prepare", "begin", "-"], DOMAINS["optional"], tmp_path)

    assert status not in (0, VETO)
    assert out == ""
    assert err.splitlines()[-1] == "kvmi-libvirt: ZeroDivisionError: a defect"


@pytest.mark.usefixtures("quiet_main")
@pytest.mark.parametrize("argv", [[], [NAME]])
def test_without_an_operation_nothing_is_done(tmp_path: Path, argv: list[str]) -> None:
    assert call_main(argv, DOMAINS["invalid required"], tmp_path) == (0, "", "")


def test_stdin_is_read_to_its_end() -> None:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reader)
            for part in (b"<domain>", b"x" * 200_000, b"</domain>"):
                os.write(writer, part)
        finally:
            os._exit(0)
    os.close(writer)
    try:
        assert len(read_xml(reader)) == 200_017
    finally:
        os.close(reader)
        os.waitpid(pid, 0)


@pytest.mark.parametrize("version", ["2.0", "1", ""])
@pytest.mark.parametrize("operation", ["prepare", "started"])
def test_a_required_element_of_another_version_is_refused(
    hook: Hook, operation: str, version: str
) -> None:
    xml = DOMAINS["required"].replace(b"introspection:1.0", b"introspection:" + version.encode())

    veto = hook.run(NAME, operation, xml)

    assert veto is not None
    assert "the only version this release knows" in veto


def test_a_release_waits_for_the_session_that_holds_the_vm(
    hook: Hook, state: StateDir, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvmi_libvirt.hook._LOCK_S", 0.1)
    with running(run_dir) as process, state.locked(UUID, deadline=time.monotonic() + 5):
        held = record(process)
        state.save(held)

        assert hook.run(NAME, "release", DOMAINS["required"]) is None
        assert state.load(UUID) == held

    assert hook.run(NAME, "release", DOMAINS["required"]) is None
    assert state.load(UUID) is None


def test_a_bad_optional_policy_is_in_status(hook: Hook, state: StateDir, run_dir: Path) -> None:
    with running(run_dir) as process:
        assert hook.run(NAME, "started", DOMAINS["invalid optional"]) is None

        found = state.load(UUID)
        assert found is not None
        assert (found.pid, found.state, found.mode) == (process.pid, FAILED, "optional")
        assert found.error


def test_a_dead_hook_that_could_not_be_taken_off_is_remembered(
    hook: Hook, state: StateDir, run_dir: Path
) -> None:
    ours, tools = socket.socketpair()
    with ours, tools, running(run_dir) as process:
        inode = os.fstat(ours.fileno()).st_ino
        state.save(record(process, socket_inode=inode))
        tools.close()

        # The stand-in process has no VM fd: nothing can be done to it now.
        assert hook.run(NAME, "started", DOMAINS["optional"]) is None

        found = state.load(UUID)
        assert found is not None
        assert (found.state, found.socket_inode) == (FAILED, inode)


# -- early -------------------------------------------------------------------------------


@pytest.mark.parametrize(("early", "wanted"), [("yes", [NAME]), ("no", [])])
def test_only_an_early_start_is_watched_and_marked_before(
    tmp_path: Path, early: str, wanted: list[str]
) -> None:
    state = StateDir(tmp_path / "state")
    watched = []

    def watch(domain: Domain, _policy: Policy) -> None:
        assert (state.path / f"{UUID}.early").exists()
        watched.append(domain.name)

    hook = Hook(state=state, run_dir=tmp_path, watch_start=watch)
    text = DOMAINS["required"].replace(b'mode="required"', b'mode="required" early="%s"')
    assert hook.run(NAME, "start", text % early.encode()) is None
    assert watched == wanted
    assert (state.path / f"{UUID}.early").exists() == (early == "yes")
    for operation in ("stopped", "release"):
        assert hook.run(NAME, operation, text % early.encode()) is None
    assert not (state.path / f"{UUID}.early").exists()


def test_a_required_early_start_that_cannot_be_watched_is_refused(tmp_path: Path) -> None:
    def watch(_domain: Domain, _policy: Policy) -> None:
        raise OSError(11, "Resource temporarily unavailable")

    text = DOMAINS["required"].replace(b'mode="required"', b'mode="required" early="yes"')
    hook = Hook(state=StateDir(tmp_path / "state"), run_dir=tmp_path, watch_start=watch)
    veto = hook.run(NAME, "start", text)
    assert veto is not None
    assert "Resource temporarily unavailable" in veto


EARLY_REQUIRED: Final = DOMAINS["required"].replace(b'mode="', b'early="yes" mode="')
EARLY_OPTIONAL: Final = DOMAINS["optional"].replace(b'mode="', b'early="yes" mode="')


@pytest.fixture
def hooking(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace hooking by a list of what was hooked."""
    done: list[str] = []

    def ensure_hooked(
        process: Process, domain: Domain, _policy: Policy, *, state: StateDir, **_: object
    ) -> VmState:
        done.append(domain.name)
        new = record(process)
        state.save(new)
        return new

    monkeypatch.setattr(hook_module, "ensure_hooked", ensure_hooked)
    return done


def test_an_early_hook_that_failed_is_a_veto_even_if_the_guest_does_not_run(
    hook: Hook, state: StateDir, run_dir: Path, hooking: list[str]
) -> None:
    with running(run_dir) as process:
        state.save(record(process, state=FAILED, socket_inode=0, error="no tool listens"))
        veto = hook.run(NAME, "started", EARLY_REQUIRED)
    assert veto is not None
    assert veto.startswith("no tool listens; ")
    assert hooking == []


@pytest.mark.parametrize("source", ["unix:/run/kvmi/tool.sock", None])
def test_where_it_is_optional_a_tool_is_called_once_at_a_start(
    hook: Hook, state: StateDir, run_dir: Path, hooking: list[str], source: str | None
) -> None:
    with running(run_dir) as process:
        failed = record(process, state=FAILED, socket_inode=0, error="not it", source=source)
        state.save(failed)
        assert hook.run(NAME, "started", EARLY_OPTIONAL) is None
    # Without a source it was not even called: QEMU could not be had in time.
    assert hooking == ([] if source else [NAME])


def test_a_record_of_an_earlier_qemu_says_nothing(
    hook: Hook, state: StateDir, run_dir: Path, hooking: list[str]
) -> None:
    with running(run_dir) as process:
        old = process.start_ticks - 1
        state.save(record(process, start_ticks=old, state=FAILED, socket_inode=0, error="old"))
        assert hook.run(NAME, "started", EARLY_REQUIRED) is None
    assert hooking == [NAME]


def test_a_guest_that_ran_first_is_a_veto_or_told_in_the_record(
    hook: Hook,
    state: StateDir,
    run_dir: Path,
    hooking: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Process, "running_vcpus", lambda _process: ["CPU 0/KVM"])
    with running(run_dir):
        veto = hook.run(NAME, "started", EARLY_REQUIRED)
        assert veto is not None
        assert veto.startswith("the guest ran before it could be hooked (CPU 0/KVM); ")
        assert hooking == []

        assert hook.run(NAME, "started", EARLY_OPTIONAL) is None
        assert hooking == [NAME]
        found = state.load(UUID)
    assert found is not None
    assert (found.state, found.error) == (
        HOOKED,
        "the guest ran before it could be hooked (CPU 0/KVM)",
    )


def test_started_waits_for_a_watcher_that_is_still_at_work(
    hook: Hook, state: StateDir, run_dir: Path, hooking: list[str]
) -> None:
    state.mark_start(UUID)
    watcher = state.open_start(UUID)
    assert watcher is not None
    with running(run_dir) as process, concurrent.futures.ThreadPoolExecutor(1) as pool:
        with watcher:
            assert watcher.claim()
            started = pool.submit(hook.run, NAME, "started", EARLY_REQUIRED)
            while watcher.is_there():  # it is told that the start is over
                assert not started.done()
            state.save(record(process, state=FAILED, socket_inode=0, error="the tool is silent"))
        veto = started.result(60)
    assert veto is not None
    assert veto.startswith("the tool is silent; ")


def test_a_watcher_that_does_not_end_is_not_waited_for_for_ever(
    hook: Hook, state: StateDir, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hook_module, "SESSION_S", -60.0)
    state.mark_start(UUID)
    watcher = state.open_start(UUID)
    assert watcher is not None
    with watcher, running(run_dir):
        assert watcher.claim()
        veto = hook.run(NAME, "started", EARLY_REQUIRED)
    assert veto is not None
    assert "does not come to an end" in veto
