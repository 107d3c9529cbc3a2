# SPDX-License-Identifier: Apache-2.0
"""The verdicts about a VM: the first FAIL is the cause, what follows from it comes later."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import pytest
from doctor_facts import AGENT, KERNEL, POLICY, QEMU_UID, SOCKET, VM, access

from kvmi_libvirt.abi.probing import Outcome
from kvmi_libvirt.doctor.check_vm import check_vm, summary
from kvmi_libvirt.doctor.facts import ProcessFacts, RecordFacts, ToolFacts
from kvmi_libvirt.doctor.report import Verdict, exit_code
from kvmi_libvirt.errors import ExitCode
from kvmi_libvirt.policy.model import Mode

if TYPE_CHECKING:
    from kvmi_libvirt.doctor.facts import AgentFacts, KernelFacts, VmFacts
    from kvmi_libvirt.doctor.report import Line

NO_KVMI: Final = replace(KERNEL, outcome=Outcome.ABSENT, abi=None, why=Outcome.ABSENT.value)
NO_AGENT: Final = replace(AGENT, pid=None, access=None)
ABSENT: Final = ToolFacts(where="unix:/run/kvmi/t.sock", listens=False, problem="no tool listens")
FAILED: Final = RecordFacts(state="failed", since="then", error="it failed")
QEMU: Final = ProcessFacts(pid=55, pidfile="/run/libvirt/qemu/web1.pid", vcpus=2)
DOUBTFUL: Final = ToolFacts(where="tcp:a:1", listens=None, problem="it is on another machine")


def lines_about(vm: VmFacts, kernel: KernelFacts = KERNEL, agent: AgentFacts = AGENT) -> list[Line]:
    return list(check_vm(vm, kernel, agent, qemu_uid=QEMU_UID))


def verdicts(lines: list[Line]) -> dict[str, str]:
    """Return the checks that did not pass, with their verdict."""
    return {line.check: line.verdict.value for line in lines if line.verdict is not Verdict.PASS}


def first_fail(lines: list[Line]) -> Line:
    return next(line for line in lines if line.verdict is Verdict.FAIL)


def test_a_hooked_vm_passes_with_a_word_about_everything() -> None:
    lines = lines_about(VM)

    assert verdicts(lines) == {}
    assert [line.check for line in lines] == [
        *("domain", "policy", "emulator", "process", "process-fit", "kvmi", "tool", "state"),
    ]
    assert {line.domain for line in lines} == {"web1"}


@pytest.mark.parametrize(
    ("change", "check", "code", "text"),
    [
        (
            {"policy": None, "policy_problem": "line 3: what is that"},
            "policy",
            ExitCode.POLICY,
            "virsh edit web1",
        ),
        ({"secret_problem": "no such secret"}, "secret", ExitCode.POLICY, "no such secret"),
        ({"emulator_problem": "/x is not there"}, "emulator", ExitCode.UNSUPPORTED, "/x"),
        (
            {"process": replace(QEMU, pidfile_problem="names another")},
            "process",
            ExitCode.TARGET,
            "echo 55 >/run/libvirt/qemu/web1.pid",
        ),
        (
            {"process": replace(QEMU, pid=None, pidfile_problem="no process 9")},
            "process",
            ExitCode.TARGET,
            "restart libvirtd",
        ),
        ({"process": replace(QEMU, problem="is traced")}, "process-fit", 4, "is traced"),
        ({"is_emulated": True}, "kvmi", ExitCode.UNSUPPORTED, "has ended"),
        ({"unsupported": "v12 lacks X"}, "kvmi-rights", ExitCode.UNSUPPORTED, 'optional="yes"'),
        (
            {"tool": ABSENT, "record": FAILED},
            "tool",
            ExitCode.HANDSHAKE,
            "kvmi-libvirt hook web1",
        ),
        (
            {
                "tool": ToolFacts(
                    where="x",
                    listens=True,
                    socket=replace(SOCKET, access=access("/s", uid=7)),
                )
            },
            "tool",
            ExitCode.HANDSHAKE,
            "/s belongs to uid7",
        ),
        ({"record": None}, "state", ExitCode.FAILED, "nothing tells that it was ever hooked"),
        ({"record": FAILED}, "state", ExitCode.FAILED, "it failed (since then)"),
        (
            {"record": replace(FAILED, state="damaged", error="is damaged")},
            "state",
            ExitCode.FAILED,
            "is damaged",
        ),
    ],
)
def test_the_cause_is_named_first(change: dict[str, Any], check: str, code: int, text: str) -> None:
    policy = replace(POLICY, secret="db1") if "secret_problem" in change else POLICY
    vm: VmFacts = replace(VM, **{"policy": policy, **change})

    lines = lines_about(vm)

    found = first_fail(lines)
    assert found.check == check
    assert text in f"{found.reason}; {found.todo}"
    assert exit_code(lines) == code


def test_whatever_follows_from_a_cause_does_not_come_before_it() -> None:
    # Everything at once, in the order in which each needs the one before.
    vm: VmFacts = replace(
        VM,
        emulator_problem="gone",
        process=replace(QEMU, pidfile_problem="stale", problem="traced"),
        unsupported="lacks",
        tool=ABSENT,
        record=FAILED,
    )
    order = [line.check for line in lines_about(vm, NO_KVMI) if line.verdict is Verdict.FAIL]

    assert order == ["emulator", "process", "process-fit", "kvmi", "kvmi-rights", "tool", "state"]


@pytest.mark.parametrize(
    ("change", "check", "text"),
    [
        ({"warnings": ("allowed twice",)}, "policy-warning", "allowed twice"),
        ({"config_differs": True}, "policy-config", "--live"),
        ({"process": replace(QEMU, vcpus=1)}, "process-fit", "1 of its 2 vCPUs"),
        ({"tool": DOUBTFUL}, "tool", "another machine"),
        ({"journal": "was interrupted"}, "journal", "kvmi-libvirt unhook web1"),
        ({"record": replace(FAILED, state="waiting")}, "state", "the agent tries again"),
        ({"record": replace(FAILED, state="hooked")}, "state", "it failed"),
    ],
)
def test_what_is_only_worth_a_warning(change: dict[str, Any], check: str, text: str) -> None:
    vm: VmFacts = replace(VM, **change)
    if "tool" in change:
        vm = replace(vm, record=replace(FAILED, state="waiting"))
    lines = lines_about(vm)

    assert verdicts(lines).get(check) == "WARN"
    assert "FAIL" not in verdicts(lines).values()
    (line,) = [line for line in lines if line.check == check]
    assert text in f"{line.reason}; {line.todo}"


def test_a_tool_that_serves_the_vm_need_not_listen_any_more() -> None:
    assert verdicts(lines_about(replace(VM, tool=ABSENT))) == {}


@pytest.mark.parametrize(
    ("mode", "verdict", "code"), [(Mode.OPTIONAL, "WARN", 0), (Mode.REQUIRED, "FAIL", 6)]
)
def test_a_vm_that_is_shut_off_is_judged_by_its_next_start(
    mode: Mode, verdict: str, code: int
) -> None:
    vm: VmFacts = replace(
        VM,
        is_active=False,
        policy=replace(POLICY, mode=mode),
        tool=ABSENT,
        record=None,
        process=ProcessFacts(pidfile="/x"),
    )

    lines = lines_about(vm)

    assert verdicts(lines) == {"domain": "WARN", "tool": verdict}
    assert exit_code(lines) == code


def test_a_pidfile_left_behind_by_a_vm_that_does_not_run() -> None:
    process = ProcessFacts(pidfile="/run/x.pid", pidfile_problem="names nobody")
    vm: VmFacts = replace(VM, is_active=False, record=None, process=process)

    found = first_fail(lines_about(vm))

    assert (found.check, found.todo) == ("process", "rm /run/x.pid")


def test_a_policy_that_takes_an_agent() -> None:
    vm: VmFacts = replace(VM, policy=replace(POLICY, reconnect_s=5.0))

    assert verdicts(lines_about(vm)) == {}
    assert verdicts(lines_about(vm, agent=NO_AGENT)) == {"agent": "FAIL"}
    assert verdicts(lines_about(VM, agent=NO_AGENT)) == {}


def test_a_vm_nobody_wants_introspected() -> None:
    vm: VmFacts = replace(VM, policy=None, tool=None, record=None)

    assert verdicts(lines_about(vm, NO_KVMI)) == {"policy": "WARN"}


def test_a_vm_that_is_hooked_though_no_policy_says_so() -> None:
    found = {line.check: line for line in lines_about(replace(VM, policy=None, tool=None))}

    assert found["state"].verdict is Verdict.WARN
    assert found["state"].todo == "kvmi-libvirt unhook web1"


@pytest.mark.parametrize(
    ("kernel", "verdict"),
    [
        (NO_KVMI, Verdict.FAIL),
        (replace(KERNEL, outcome=Outcome.OFF, why="off"), Verdict.FAIL),
        (replace(KERNEL, outcome=None, problem="no /dev/kvm"), Verdict.WARN),
        (KERNEL, Verdict.PASS),
    ],
)
def test_the_hosts_kernel_counts_unless_the_vm_runs_on_the_emulated_one(
    kernel: KernelFacts, verdict: Verdict
) -> None:
    emulated: VmFacts = replace(
        VM, is_emulated=True, emulated_abi="v7", process=replace(QEMU, supervisor=77)
    )

    def of(vm: VmFacts) -> Line:
        return next(line for line in lines_about(vm, kernel) if line.check == "kvmi")

    assert of(VM).verdict is verdict
    assert of(emulated).verdict is Verdict.PASS
    assert of(emulated).reason == "an emulated one (v7)"


# -- in one line -----------------------------------------------------------------------------


def test_the_summary_is_the_first_fail() -> None:
    vm: VmFacts = replace(VM, tool=ABSENT, record=FAILED)
    line = summary(vm, lines_about(vm))

    assert line is not None
    assert (line.verdict, line.reason, line.code) == (Verdict.FAIL, "no tool listens", 6)
    assert line.title == "domain 'web1'"
    assert "kvmi-libvirt doctor web1" in str(line.todo)


def test_the_summary_of_others() -> None:
    def of(vm: VmFacts) -> tuple[Verdict, str | None] | None:
        line = summary(vm, lines_about(vm))
        return None if line is None else (line.verdict, line.reason)

    assert of(VM) == (Verdict.PASS, "hooked")
    assert of(replace(VM, policy=None, record=None)) is None
    warned: VmFacts = replace(VM, journal="was interrupted")
    assert of(warned) == (Verdict.WARN, "was interrupted")
    off: VmFacts = replace(VM, is_active=False, record=None, process=ProcessFacts(pidfile="/x"))
    assert of(off) == (Verdict.PASS, "shut off; nothing stands in the way of its start")
