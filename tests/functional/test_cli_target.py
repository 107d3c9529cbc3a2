# SPDX-License-Identifier: Apache-2.0
"""``hook``, ``apply``, ``allow``, ``deny`` and ``unhook``: which VM, and whose policy counts."""

from __future__ import annotations

import contextlib
import json
import os
from typing import TYPE_CHECKING

import pytest
from emulator_harness import EMULATOR_ENDED, channels_kept_open, end_supervisor
from stand_in import UUID, running_tool, stand_in
from support import wait_for_supervisor

from kvmi_libvirt import libvirtio
from kvmi_libvirt.cli import hook, live, main, progress, target
from kvmi_libvirt.errors import ExitCode
from kvmi_libvirt.policy.host import HostPolicy, parse_host_policy
from kvmi_libvirt.policy.model import NAMESPACE
from kvmi_libvirt.state import FAILED, StateDir

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kvmi_libvirt.policy.element import Domain
    from kvmi_libvirt.policy.model import Policy
    from kvmi_libvirt.qemu.process import Process

READ, WRITE, PAUSE = "KVMI_VM_READ_PHYSICAL", "KVMI_VM_WRITE_PHYSICAL", "KVMI_VM_PAUSE_VCPU"
BROKEN = f'<k:introspection xmlns:k="{NAMESPACE}" mode="required"><k:nonsense/></k:introspection>'


def xml(element: str = "") -> str:
    inner = f"<name>web1</name><uuid>{UUID}</uuid><metadata>{element}</metadata>"
    return f"<domain>{inner}</domain>"


def element(directory: Path, *names: str) -> str:
    allows = "".join(f'<k:allow name="{name}"/>' for name in names)
    return (
        f'<k:introspection xmlns:k="{NAMESPACE}">'
        f'<k:source type="unix" path="{directory}/tool.sock"/>'
        f"<k:commands>{allows}</k:commands></k:introspection>"
    )


def host(directory: Path, *names: str, ceiling: str | None = None, sockets: str = "") -> HostPolicy:
    """Return a host that allows sockets in *directory*, and assigns *names* if there are any.

    Parameters
        ceiling  the one command that may be granted, None for no ceiling
        sockets  where tools may listen instead
    """
    allows = "".join(f'<allow name="{name}"/>' for name in names)
    assign = (
        f'<assign><match name="web*"/><source type="unix" path="{directory}/tool.sock"/>'
        f"<commands>{allows}</commands></assign>"
    )
    top = f'<ceiling><commands><allow name="{ceiling}"/></commands></ceiling>' if ceiling else ""
    text = (
        f'<host-policy xmlns="{NAMESPACE}">'
        f'<sockets><unix path="{sockets or directory}/**"/></sockets>'
        f"{top}{assign if names else ''}</host-policy>"
    )
    return parse_host_policy(text.encode(), source="hp.xml")


class Operator:
    """One who types verbs on a host of his own."""

    def __init__(
        self, directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.directory = directory
        self.file = directory / "web1.xml"
        self.state = StateDir(directory / "state")
        self.err = ""
        self.waited: list[str] = []
        self._monkeypatch = monkeypatch
        self._capsys = capsys
        monkeypatch.setattr(target, "StateDir", lambda: self.state)
        monkeypatch.setattr(progress, "shown", self._shown)
        self.on(host(directory))

    def _shown(self, what: str) -> contextlib.nullcontext[None]:
        self.waited.append(what)
        return contextlib.nullcontext()

    def on(self, some: HostPolicy) -> None:
        for module in (target, live):
            self._monkeypatch.setattr(module, "load_host_policy", lambda: some)

    def writes(self, text: str) -> None:
        self.file.write_text(text, encoding="utf-8")

    def types(self, *words: object, code: int = 0) -> str:
        got = main([str(word) for word in words])
        out, self.err = self._capsys.readouterr()
        assert got == code, self.err
        return out

    def in_force(self, *words: object) -> list[str]:
        """Type a verb with --json and return the commands that are allowed then."""
        found: list[str] = json.loads(self.types(*words, "--json"))["commands"]
        return found


@pytest.fixture
def operator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Operator:
    return Operator(tmp_path, monkeypatch, capsys)


# -- a process that libvirt does not run ----------------------------------------------------


@pytest.mark.ptrace
@pytest.mark.seccomp
def test_every_verb_reaches_a_process_that_libvirt_does_not_run(operator: Operator) -> None:
    operator.writes(xml(element(operator.directory, READ, WRITE)))
    with stand_in() as process, running_tool(operator.directory) as tool:
        by_pid = ("--pid", process.pid)
        with_xml = (*by_pid, "--xml", operator.file)
        assert operator.in_force("hook", *with_xml) == [READ, WRITE]
        tool.told(READ, WRITE)

        operator.writes(xml(element(operator.directory, READ)))
        assert operator.in_force("apply", *with_xml) == [READ]
        tool.told(READ)
        operator.types("apply", *by_pid, code=2)
        assert "--pid needs --xml FILE here" in operator.err
        # It is recorded: from here on the process says who it is.
        assert operator.in_force("allow", *by_pid, "vm_pause_vcpu", WRITE) == [PAUSE, READ, WRITE]
        assert operator.in_force("deny", *with_xml, WRITE) == [PAUSE, READ]
        tool.told(PAUSE, READ)

        assert "web1: unhooked" in operator.types("unhook", *by_pid)
        operator.types("allow", *by_pid, READ, code=5)
        assert "domain 'web1' is not hooked" in operator.err
    # Whoever waits for it on a terminal is told what for.
    where = f"unix:{operator.directory}/tool.sock"
    rights = "changing the rights on web1"
    assert operator.waited == [
        *(f"hooking web1 for the tool at {where}", "moving web1 to its policy"),
        *(rights, rights, f"waiting for {where} to let web1 go", rights),
    ]


@pytest.mark.ptrace
@pytest.mark.seccomp
def test_apply_that_is_refused_leaves_nothing_that_the_host_does_not_allow(
    operator: Operator,
) -> None:
    operator.writes(xml(element(operator.directory, READ, WRITE)))
    with stand_in() as process, running_tool(operator.directory) as tool:
        with_xml = ("--pid", process.pid, "--xml", operator.file)
        assert operator.in_force("hook", *with_xml) == [READ, WRITE]
        tool.told(READ, WRITE)

        operator.on(host(operator.directory, ceiling=READ))
        operator.types("apply", *with_xml, code=3)
        assert "ceiling" in operator.err
        tool.told(READ)

        operator.writes(xml(BROKEN))
        operator.types("apply", *with_xml, code=3)
        operator.on(host(operator.directory, sockets="/run/elsewhere"))
        operator.types("apply", *with_xml, code=3)
        assert operator.state.all()[0].state == "unhooked"


@pytest.mark.ptrace
@pytest.mark.seccomp
def test_every_verb_says_that_the_emulator_has_ended(operator: Operator) -> None:
    operator.writes(xml(element(operator.directory, READ)))
    with stand_in() as process, running_tool(operator.directory):
        by_pid = ("--pid", process.pid)
        with_xml = (*by_pid, "--xml", operator.file)
        assert operator.in_force("hook", *with_xml) == [READ]
        supervisor = wait_for_supervisor(process.pid)
        # While the channel seems to be there: the ioctl itself tells.
        with channels_kept_open(supervisor):
            end_supervisor(supervisor)
            operator.writes(xml(element(operator.directory, READ, WRITE)))
            changes: list[tuple[object, ...]] = [("apply", *with_xml), ("allow", *by_pid, WRITE)]
            for words in [*changes, ("deny", *by_pid, READ)]:
                operator.types(*words, code=ExitCode.UNSUPPORTED)
                assert operator.err == f"kvmi-libvirt: {EMULATOR_ENDED}\n", words
        again: list[tuple[object, ...]] = [("hook", *with_xml), ("unhook", *by_pid)]
        again += [("unhook", *by_pid), ("unhook", "--now", *by_pid), ("hook", *with_xml)]
        for words in again:
            operator.types(*words, code=ExitCode.UNSUPPORTED)
            assert operator.err == f"kvmi-libvirt: {EMULATOR_ENDED}\n", words
            (record,) = operator.state.all()
            assert (record.state, record.error) == (FAILED, EMULATOR_ENDED)
            assert (record.commands, record.events) == ((), ())
        operator.types("deny", *by_pid, READ, code=ExitCode.TARGET)
        assert "is not hooked" in operator.err
        assert process.is_alive()


@pytest.mark.ptrace
@pytest.mark.seccomp
def test_assignment_counts_for_hook_and_apply_whatever_the_element_says(
    operator: Operator,
) -> None:
    operator.writes(xml(BROKEN))
    with stand_in() as process, running_tool(operator.directory) as tool:
        with_xml = ("--pid", process.pid, "--xml", operator.file)
        operator.types("hook", *with_xml, code=3)
        assert f"{operator.file}:1: unknown element <k:nonsense>" in operator.err
        assert operator.state.all() == []

        operator.on(host(operator.directory, READ))
        assert operator.in_force("hook", *with_xml) == [READ]
        operator.on(host(operator.directory, PAUSE))
        assert operator.in_force("apply", *with_xml) == [PAUSE]
        tool.told(PAUSE)
        # The assignment is gone, and the element is wrong: nothing is guessed, nothing changed.
        operator.on(host(operator.directory))
        operator.types("apply", *with_xml, code=3)
        assert operator.in_force("deny", *with_xml, READ) == [PAUSE]
        operator.types("unhook", *with_xml)


@pytest.mark.ptrace
@pytest.mark.seccomp
def test_policy_given_to_hook_counts_before_all_others(operator: Operator) -> None:
    operator.writes(xml(BROKEN))
    operator.on(host(operator.directory, WRITE))
    own = operator.directory / "own.xml"
    own.write_text(element(operator.directory, READ), encoding="utf-8")
    with stand_in() as process, running_tool(operator.directory):
        with_xml = ("--pid", process.pid, "--xml", operator.file)
        assert operator.in_force("hook", *with_xml, "--policy", own) == [READ]


# -- one that libvirt runs ------------------------------------------------------------------


@pytest.fixture
def wanted(operator: Operator, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Policy]]:
    """What ``hook`` would have done, on a libvirt that runs one domain: operator.file."""
    found: list[tuple[str, Policy]] = []

    def running(_name: str, *, uri: str) -> libvirtio.RunningDomain:
        assert uri == libvirtio.DEFAULT_URI
        return libvirtio.RunningDomain(name="web1", uuid=UUID, xml=operator.file.read_bytes())

    @contextlib.contextmanager
    def opened(name: str, uuid: str) -> Iterator[None]:
        assert (name, uuid) == ("web1", UUID)
        yield

    def hooked(
        _process: Process, domain: Domain, policy: Policy, *, state: StateDir, allow_standin: bool
    ) -> None:
        assert state is operator.state
        assert not allow_standin
        found.append((domain.uuid, policy))

    monkeypatch.setattr(libvirtio, "running_domain", running)
    monkeypatch.setattr(target, "open_domain", opened)
    monkeypatch.setattr(hook, "hook_vm", hooked)
    monkeypatch.setattr(hook, "summary", lambda _state: "hooked")
    return found


def test_hook_of_a_domain_whose_element_is_overruled_does_not_read_it(
    operator: Operator, wanted: list[tuple[str, Policy]]
) -> None:
    operator.writes(xml(BROKEN))
    operator.types("hook", "web1", code=3)
    assert "XML of domain 'web1':1: unknown element <k:nonsense>" in operator.err
    operator.on(host(operator.directory, READ))
    assert operator.types("hook", "web1") == "hooked\n"
    ((uuid, policy),) = wanted
    assert uuid == UUID
    assert policy.commands.allowed == {READ}


@pytest.mark.usefixtures("wanted")
def test_hook_of_a_domain_without_a_policy_says_what_to_do(operator: Operator) -> None:
    operator.writes(xml())
    operator.types("hook", "web1", code=3)
    assert operator.err == (
        "kvmi-libvirt: XML of domain 'web1': no introspection element, and no assignment of "
        "the host fits; give one with --policy FILE\n"
    )


# -- which VM -------------------------------------------------------------------------------

ALL = ["hook", "apply", "allow", "deny", "unhook"]


@pytest.mark.parametrize("verb", ALL)
def test_target_that_makes_no_sense_is_one_line(verb: str, operator: Operator) -> None:
    names = (READ,) if verb in ("allow", "deny") else ()
    operator.writes(xml().replace(UUID, ""))
    nobody = ("--pid", 2**22 + 1)
    cases = [
        (nobody, 5, "no process 4194305"),
        (("--pid", -1), 5, "no process -1"),
        ((*nobody, "--xml", operator.file), 3, f'{operator.file}:1: <uuid> is "", which is no'),
        ((*nobody, "--xml", operator.directory / "none"), 1, "No such file"),
    ]
    if not names:
        cases += [
            (("--xml", operator.file), 2, "--xml goes with --pid PID"),
            ((), 2, "name a DOMAIN, or --pid PID with --xml FILE"),
            (("web1", *nobody), 2, "name either a DOMAIN or --pid PID, not both"),
        ]
    for words, code, message in cases:
        operator.types(verb, *words, *names, code=code)
        assert message in operator.err
        assert operator.err.count("\n") == 1


@pytest.mark.parametrize("words", [["web1"], [], ["--pid", "1"], ["--json", "web1"]])
@pytest.mark.parametrize("verb", ["allow", "deny"])
def test_right_must_be_named(verb: str, words: list[str], operator: Operator) -> None:
    operator.types(verb, *words, code=2)
    assert operator.err == ("kvmi-libvirt: name what to change; 'kvmi-libvirt names' lists it\n")


@pytest.mark.parametrize("verb", ALL)
def test_process_of_which_nothing_is_recorded_needs_its_xml(verb: str, operator: Operator) -> None:
    names = (READ,) if verb in ("allow", "deny") else ()
    operator.types(verb, "--pid", os.getpid(), *names, code=5)
    assert operator.err == (
        f"kvmi-libvirt: nothing is recorded of process {os.getpid()}; "
        "name its domain XML with --xml FILE\n"
    )


def test_damaged_records_are_told_and_passed_over(
    operator: Operator, caplog: pytest.LogCaptureFixture
) -> None:
    operator.state.path.mkdir()
    (operator.state.path / f"{UUID}.json").write_text("{}", encoding="ascii")
    operator.types("unhook", "--pid", os.getpid(), code=5)
    assert f"{UUID}.json is damaged" in caplog.text
