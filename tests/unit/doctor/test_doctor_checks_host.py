# SPDX-License-Identifier: Apache-2.0
"""The verdicts about a host: one fact is changed, one line says so and what to do."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
from doctor_facts import (
    AGENT,
    CONFIG,
    DAEMON,
    HOOK,
    HOOK_PATH,
    KERNEL,
    KVM,
    LIBVIRT,
    QEMU_UID,
    SECURITY,
    SOCKET,
    SOCKETS,
    STATE,
    TOOL_UID,
    access,
)

from kvmi_libvirt.abi.probing import Outcome
from kvmi_libvirt.doctor import check_host
from kvmi_libvirt.doctor.check_files import (
    check_agent,
    check_config,
    check_sockets,
    check_state,
    socket_problem,
)
from kvmi_libvirt.doctor.check_hook import check_hook, check_libvirt
from kvmi_libvirt.doctor.check_host import check_kernel, check_security
from kvmi_libvirt.doctor.facts import LibvirtFacts, Listener
from kvmi_libvirt.doctor.report import Verdict
from kvmi_libvirt.errors import ExitCode

if TYPE_CHECKING:
    from kvmi_libvirt.doctor.facts import (
        AgentFacts,
        ConfigFacts,
        HookFacts,
        KernelFacts,
        KvmFacts,
        SecurityFacts,
        SocketsFacts,
        StateFacts,
    )
    from kvmi_libvirt.doctor.report import Line

VERSION: Final = "1.0"
UNAWARE: Final = replace(DAEMON, knows_hooks=False)


def hook_lines(
    hook: HookFacts = HOOK,
    libvirt: LibvirtFacts = LIBVIRT,
    security: SecurityFacts = SECURITY,
) -> list[Line]:
    return list(check_hook(hook, libvirt, security, own_version=VERSION))


def bad(lines: list[Line]) -> tuple[str, str, str]:
    """Return check, verdict and text of the one line that is not a PASS."""
    (line,) = [line for line in lines if line.verdict is not Verdict.PASS]
    assert line.reason
    return line.check, line.verdict.value, f"{line.reason}; {line.todo}"


def test_nothing_is_wrong_with_a_sound_host() -> None:
    lines = [
        *hook_lines(),
        *check_libvirt(LIBVIRT, is_needed=True),
        *check_config(CONFIG),
        *check_state(STATE),
        *check_sockets(SOCKETS),
        *check_agent(AGENT, needed_by="somebody"),
        *check_security(SECURITY, LIBVIRT),
        *check_kernel(KERNEL, KVM, excuse=None),
    ]

    assert {line.verdict for line in lines} == {Verdict.PASS}
    names = [line.check for line in lines]
    assert len(names) == len(set(names)) >= 15


@pytest.mark.parametrize(
    ("change", "check", "verdict", "text"),
    [
        ({"exists": False}, "hook", "FAIL", "is not there: no VM is hooked"),
        ({"is_ours": False}, "hook", "FAIL", "is not a hook of kvmi-libvirt"),
        ({"is_executable": False}, "hook-executable", "FAIL", f"chmod 0755 {HOOK_PATH}"),
        ({"shebang_problem": "no python3"}, "hook-starts", "FAIL", "(no python3)"),
        ({"is_current": False}, "hook-version", "WARN", "kvmi-libvirt install"),
        ({"python_problem": "No module"}, "hook-interpreter", "FAIL", "(No module)"),
        ({"version": "0.9"}, "hook-interpreter", "WARN", "has version 0.9, this command is 1.0"),
        ({"others_can": ("/x belongs to joe",)}, "hook-owner", "WARN", "/x belongs to joe"),
        ({"stray": ("/x/50-a~",)}, "hook-leftovers", "WARN", "chmod -x /x/50-a~"),
        ({"broken": (("/x/a", "no #! line"),)}, "hook-leftovers", "FAIL", "no #! line"),
    ],
)
def test_the_hook(change: dict[str, Any], check: str, verdict: str, text: str) -> None:
    found = bad(hook_lines(replace(HOOK, **change)))

    assert found[:2] == (check, verdict)
    assert text in found[2]


def test_a_hook_that_cannot_run_is_not_looked_at_further() -> None:
    for change in ({"exists": False}, {"is_ours": False}, {"is_executable": False}):
        lines = hook_lines(
            replace(HOOK, **change, python_problem="x"),  # type: ignore[arg-type]
            replace(LIBVIRT, daemons=(UNAWARE,)),
        )
        assert bad(lines)[1] == "FAIL"


def test_a_host_without_libvirt_needs_no_hook() -> None:
    nowhere = LibvirtFacts(is_installed=False, problem="no libvirt")

    assert bad(hook_lines(replace(HOOK, exists=False), nowhere))[:2] == ("hook", "WARN")
    assert bad(list(check_libvirt(nowhere, is_needed=False)))[:2] == ("libvirt", "WARN")
    assert bad(list(check_libvirt(nowhere, is_needed=True)))[:2] == ("libvirt", "FAIL")


def test_a_daemon_that_does_not_know_of_the_hook_is_named_with_what_to_type() -> None:
    found = bad(hook_lines(libvirt=replace(LIBVIRT, daemons=(DAEMON, replace(UNAWARE, pid=5)))))

    assert found[:2] == ("hook-known", "FAIL")
    assert "libvirtd (process 5) looked for qemu hooks at 2026-01-02 03:04:05" in found[2]
    assert "systemctl reload libvirtd" in found[2]


def test_a_daemon_that_cannot_be_seen_is_not_judged() -> None:
    unseen = replace(LIBVIRT, daemons=())

    assert bad(hook_lines(libvirt=unseen))[:2] == ("hook-known", "WARN")
    asleep = replace(unseen, version=None, problem="nobody listens")
    assert [line.verdict for line in hook_lines(libvirt=asleep)][-1] is Verdict.PASS


def test_a_daemon_that_runs_and_does_not_answer() -> None:
    hung = replace(LIBVIRT, version=None, problem="no answer within 10 s", is_silent=True)

    found = bad(list(check_libvirt(hung, is_needed=False)))

    assert found[:2] == ("libvirt", "FAIL")
    assert "ps --ppid 4711" in found[2]

    waiting = replace(hung, daemons=(replace(DAEMON, waits_for=("hook x (process 9), for 3 s",)),))
    found = bad(list(check_libvirt(waiting, is_needed=False)))
    assert "it waits for hook x (process 9), for 3 s; end that process" in found[2]

    refuses = replace(hung, problem="python3-libvirt is not installed", is_silent=False)
    found = bad(list(check_libvirt(refuses, is_needed=False)))
    assert found == (
        "libvirt",
        "FAIL",
        "python3-libvirt is not installed; see its log: journalctl -u libvirtd",
    )


@pytest.mark.parametrize(("has_ptrace", "verdict"), [(False, "FAIL"), (None, "WARN")])
def test_a_daemon_without_the_right_to_trace(has_ptrace: bool | None, verdict: str) -> None:
    limited = replace(LIBVIRT, daemons=(replace(DAEMON, has_ptrace=has_ptrace),))

    assert bad(list(check_libvirt(limited, is_needed=False)))[:2] == ("capabilities", verdict)


@pytest.mark.parametrize(
    ("change", "check", "code"),
    [
        ({"schema_problem": "no schema"}, "schemas", ExitCode.FAILED),
        ({"host_policy_problem": "/etc/hp.xml:3: no"}, "host-policy", ExitCode.POLICY),
        ({"profile_problems": ("p.xml:1: a", "b")}, "profiles", ExitCode.POLICY),
        ({"secret_problems": ("s: open to others",)}, "secrets", ExitCode.POLICY),
        ({"agent_problem": "unknown key 'x'"}, "agent-conf", ExitCode.FAILED),
    ],
)
def test_configuration(change: dict[str, Any], check: str, code: ExitCode) -> None:
    config: ConfigFacts = replace(CONFIG, **change)
    lines = list(check_config(config))

    assert bad(lines)[:2] == (check, "FAIL")
    assert [line.code for line in lines if line.verdict is Verdict.FAIL] == [code]


@pytest.mark.parametrize(
    ("change", "verdict", "text"),
    [
        ({"access": access("/run/kvmi-libvirt")}, "FAIL", "root:root 0755"),
        ({"access": access("/run/kvmi-libvirt", uid=7, mode=0o700)}, "FAIL", "uid7"),
        ({"problem": "cannot read"}, "WARN", "run as root"),
        ({"damaged": ("x.json is damaged",)}, "FAIL", "x.json is damaged"),
        ({"interrupted": ("web1", "web2")}, "WARN", "kvmi-libvirt unhook web1"),
    ],
)
def test_records(change: dict[str, Any], verdict: str, text: str) -> None:
    state: StateFacts = replace(STATE, **change)
    found = bad(list(check_state(state)))

    assert found[:2] == ("state", verdict)
    assert text in found[2]


def test_a_host_on_which_nothing_was_recorded_yet() -> None:
    (line,) = check_state(replace(STATE, access=None))
    assert line.verdict is Verdict.PASS


# -- the tools' sockets --------------------------------------------------------------------

DIRECTORIES: Final = (access("/"), access("/run"), access("/run/kvmi"))
OWN_DIRECTORY: Final = (*DIRECTORIES, access("/run/kvmi/t", uid=TOOL_UID))
OWN_TOOL: Final = Listener(uids=frozenset({TOOL_UID}), who="tool")


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"access": access("/s", uid=TOOL_UID), "listener": OWN_TOOL, "directories": OWN_DIRECTORY},
        # Made by root's service manager for the tool's user.
        {
            "access": access("/s", uid=TOOL_UID),
            "listener": Listener(uids=frozenset({0, TOOL_UID}), who="tool"),
        },
        # Left by a tool in its own directory.
        {"access": access("/s", uid=TOOL_UID), "listener": None, "directories": OWN_DIRECTORY},
        # Of another network namespace: nothing is known of who listens.
        {"access": access("/s", uid=7), "listener": Listener(uids=frozenset(), who="?")},
        {"access": access("/s", mode=0o777)},
    ],
)
def test_a_socket_of_root_or_of_its_tool_is_trusted(change: dict[str, Any]) -> None:
    assert socket_problem(replace(SOCKET, **change), qemu_uid=QEMU_UID) is None


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"access": access("/s", uid=65534, owner="nobody")}, "/s belongs to nobody, but the tool"),
        ({"access": access("/s", uid=65534), "listener": None}, "nobody listens on it"),
        ({"access": access("/s", uid=QEMU_UID)}, "as whom QEMU runs"),
        (
            {
                "access": access("/s", uid=QEMU_UID),
                "listener": Listener(uids=frozenset({QEMU_UID}), who="qemu"),
            },
            "as whom QEMU runs",
        ),
        ({"directories": (*DIRECTORIES[:2], access("/run/kvmi", uid=7))}, "can put another socket"),
        ({"directories": (*DIRECTORIES[:2], access("/run/kvmi", mode=0o1777))}, "chmod o-w"),
        ({"directories": OWN_DIRECTORY}, "can put another socket"),
    ],
)
def test_a_socket_somebody_else_could_replace_is_not(change: dict[str, Any], text: str) -> None:
    problem = socket_problem(replace(SOCKET, **change), qemu_uid=QEMU_UID)

    assert problem is not None
    assert text in "; ".join(problem)


def test_where_qemu_runs_as_root_root_is_no_stranger() -> None:
    assert socket_problem(SOCKET, qemu_uid=0) is None


@pytest.mark.parametrize(
    ("change", "check", "verdict", "text"),
    [
        ({"directory": None}, "socket-directory", "WARN", "kvmi-libvirt install"),
        ({"directory": access("/run/kvmi", mode=0o777)}, "socket-directory", "FAIL", "pose as"),
        ({"directory": access("/run/kvmi", uid=7)}, "socket-directory", "FAIL", "uid7"),
        ({"problem": "/run/kvmi: no"}, "sockets", "WARN", "run as root"),
        ({"sockets": (replace(SOCKET, listener=None),)}, "sockets", "WARN", "nobody listens"),
        (
            {"sockets": (SOCKET, replace(SOCKET, access=access("/s", uid=7)))},
            "sockets",
            "FAIL",
            "/s belongs to uid7",
        ),
    ],
)
def test_the_sockets(change: dict[str, Any], check: str, verdict: str, text: str) -> None:
    sockets: SocketsFacts = replace(SOCKETS, **change)
    found = bad(list(check_sockets(sockets)))

    assert found[:2] == (check, verdict)
    assert text in found[2]


# -- the agent -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "needed_by", "verdict", "text"),
    [
        ({"pid": None, "access": None}, None, "WARN", "none runs"),
        ({"pid": None, "access": None}, "the policy of a takes one", "FAIL", "the policy of a"),
        ({"pid": None, "access": None, "is_enabled": True}, None, "FAIL", "is enabled"),
        ({"pid": None, "problem": "nobody listens"}, None, "FAIL", "nobody listens"),
        ({"access": access("/a", mode=0o666)}, None, "FAIL", "others could give it orders"),
        ({"access": access("/a", uid=7, mode=0o600)}, None, "FAIL", "uid7"),
    ],
)
def test_the_agent(change: dict[str, Any], needed_by: str | None, verdict: str, text: str) -> None:
    agent: AgentFacts = replace(AGENT, **change)
    found = bad(list(check_agent(agent, needed_by=needed_by)))

    assert found[:2] == ("agent", verdict)
    assert text in found[2]


# -- the kernel and its security modules -----------------------------------------------------


@pytest.mark.parametrize(
    ("change", "check", "verdict", "text"),
    [
        ({"is_root": False}, "root", "WARN", "sudo"),
        ({"yama": 3}, "yama", "FAIL", "until the next boot"),
        ({"refusals": ("old", 'apparmor="DENIED"')}, "refusals", "WARN", 'has: apparmor="DENIED"'),
        ({"selinux": "enforcing", "selinux_module": False}, "selinux", "WARN", "ausearch"),
        ({"selinux": "permissive", "selinux_module": False}, "selinux", "WARN", "permissive"),
        ({"selinux": "enforcing", "selinux_module": None}, "selinux", "WARN", "cannot be read"),
        (
            {"selinux": "enforcing", "selinux_module": True, "selinux_loaded": False},
            "selinux",
            "WARN",
            "semodule -B",
        ),
        ({"has_ptrace": False}, "own-capabilities", "FAIL", "CAP_SYS_PTRACE"),
    ],
)
def test_what_may_forbid_it(change: dict[str, Any], check: str, verdict: str, text: str) -> None:
    found = bad(list(check_security(replace(SECURITY, **change), LIBVIRT)))

    assert found[:2] == (check, verdict)
    assert text in found[2]


@pytest.mark.parametrize("loaded", [True, None])
def test_a_module_that_is_in_the_policy_or_at_least_installed(loaded: bool | None) -> None:
    on = replace(SECURITY, selinux="enforcing", selinux_module=True, selinux_loaded=loaded)

    # It lets us trace QEMU whatever that boolean says.
    for security in (on, replace(on, deny_ptrace=True)):
        assert {line.verdict for line in check_security(security, LIBVIRT)} == {Verdict.PASS}


def test_selinux_that_lets_nobody_trace() -> None:
    strict = replace(SECURITY, selinux="enforcing", selinux_module=False, deny_ptrace=True)

    found = [line for line in check_security(strict, LIBVIRT) if line.check == "selinux-ptrace"]

    assert [line.verdict for line in found] == [Verdict.FAIL]
    assert "setsebool -P deny_ptrace off" in str(found[0].todo)


def test_the_boolean_without_which_the_modular_daemon_runs_no_hook() -> None:
    def found(label: str, *, is_on: bool | None) -> list[tuple[Verdict, str | None]]:
        security = replace(
            SECURITY, selinux="enforcing", selinux_loaded=True, hooks_unconfined=is_on
        )
        libvirt = replace(LIBVIRT, daemons=(replace(DAEMON, label=label),))
        lines = check_security(security, libvirt)
        return [(line.verdict, line.todo) for line in lines if line.check == "selinux-hooks"]

    modular = "system_u:system_r:virtqemud_t:s0-s0:c0.c1023"
    assert found(modular, is_on=False) == [(Verdict.WARN, "setsebool -P virt_hooks_unconfined on")]
    assert found(modular, is_on=True) == [(Verdict.PASS, None)]
    assert found(modular, is_on=None) == []  # an older policy, without that domain for hooks
    assert found("system_u:system_r:virtd_t:s0-s0:c0.c1023", is_on=False) == []


@pytest.mark.parametrize("yama", [None, 0, 1, 2])
def test_yama_that_lets_root_trace(yama: int | None) -> None:
    lines = check_security(replace(SECURITY, yama=yama), LIBVIRT)
    assert {line.verdict for line in lines} == {Verdict.PASS}


def test_apparmor_matters_where_libvirt_is_confined() -> None:
    on = replace(SECURITY, apparmor=True)
    confined = replace(LIBVIRT, daemons=(replace(DAEMON, label="libvirtd (enforce)"),))

    assert {line.verdict for line in check_security(on, LIBVIRT)} == {Verdict.PASS}
    assert bad(list(check_security(on, confined)))[:2] == ("apparmor", "WARN")
    ruled = replace(on, apparmor_rules=("/etc/apparmor.d/local/x",))
    (line,) = [line for line in check_security(ruled, confined) if line.check == "apparmor"]
    assert line.verdict is Verdict.PASS
    assert str(line.reason).startswith("/etc/apparmor.d/local/x")
    stale = replace(ruled, apparmor_unloaded=(("libvirtd", "/etc/apparmor.d/local/x"),))
    found = bad(list(check_security(stale, confined)))
    assert found[:2] == ("apparmor", "WARN")
    assert "/etc/apparmor.d/local/x was changed after the profile libvirtd was loaded" in found[2]


def test_an_interpreter_apparmor_would_not_let_the_hook_run() -> None:
    on = replace(SECURITY, apparmor=True)

    assert not [line for line in hook_lines(security=on) if line.verdict is not Verdict.PASS]
    found = bad(hook_lines(replace(HOOK, python_program="/opt/venv/bin/python3"), security=on))
    assert found[:2] == ("hook-interpreter", "WARN")
    assert "/usr/bin only" in found[2]


@pytest.mark.parametrize(
    ("outcome", "text"),
    [
        (Outcome.ABSENT, "kvmi-emulated-qemu"),
        (Outcome.OFF, "kvm.introspection=1"),
        (Outcome.STRANGE, "unknown way"),
        (None, "/dev/kvm: Permission denied"),
    ],
)
def test_a_kernel_without_kvmi(outcome: Outcome | None, text: str) -> None:
    kernel: KernelFacts = replace(
        KERNEL,
        outcome=outcome,
        abi=None,
        why="" if outcome is None else outcome.value,
        problem="/dev/kvm: Permission denied" if outcome is None else None,
    )

    def about_kvmi(excuse: str | None) -> tuple[str, str, str]:
        lines = check_kernel(kernel, KVM, excuse=excuse)
        return bad([line for line in lines if line.check == "kvmi"])

    found = about_kvmi(None)
    assert found[:2] == ("kvmi", "FAIL")
    assert text in found[2]
    excused = about_kvmi("all run emulated")
    assert excused[:2] == ("kvmi", "WARN")
    assert excused[2].endswith("; all run emulated")


@pytest.mark.parametrize(("excuse", "verdict"), [(None, "FAIL"), ("all run emulated", "WARN")])
def test_the_module_parameter(excuse: str | None, verdict: str) -> None:
    for shown in ("Y", "1"):
        lines = check_kernel(replace(KERNEL, parameter=shown), KVM, excuse=excuse)
        assert {line.verdict for line in lines} == {Verdict.PASS}
    for shown in ("N", "0"):
        lines = check_kernel(replace(KERNEL, parameter=shown), KVM, excuse=excuse)
        assert bad(list(lines))[:2] == ("kvmi-parameter", verdict)


def test_a_kernel_that_has_no_such_parameter() -> None:
    def of(kernel: KernelFacts) -> Line:
        lines = check_kernel(replace(kernel, parameter=None), KVM, excuse=None)
        (line,) = [line for line in lines if line.check == "kvmi-parameter"]
        return line

    assert of(KERNEL).verdict is Verdict.PASS
    assert of(replace(KERNEL, outcome=Outcome.ABSENT)).verdict is Verdict.WARN


@pytest.mark.parametrize(
    ("change", "check", "verdict"),
    [
        ({"has_pidfd_getfd": False}, "pidfd", "FAIL"),
        ({"has_sock_diag": False}, "sock-diag", "WARN"),
    ],
)
def test_what_else_is_needed_of_a_kernel(change: dict[str, Any], check: str, verdict: str) -> None:
    lines = check_kernel(replace(KERNEL, **change), KVM, excuse=None)
    assert bad(list(lines))[:2] == (check, verdict)


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({"access": None}, Verdict.FAIL),
        ({"may_open": False}, Verdict.FAIL),
        ({"may_open": None}, Verdict.PASS),
    ],
)
def test_the_device(change: dict[str, Any], verdict: Verdict) -> None:
    kvm: KvmFacts = replace(KVM, **change)
    (line,) = [x for x in check_kernel(KERNEL, kvm, excuse=None) if x.check == "dev-kvm"]
    assert line.verdict is verdict


# -- all checks ------------------------------------------------------------------------------


def test_whatever_is_wrong_it_is_said_what_to_do() -> None:
    silent = []
    for path in sorted(Path(check_host.__file__).parent.glob("check_*.py")):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
                continue
            is_starred = any(isinstance(argument, ast.Starred) for argument in call.args)
            if call.func.attr in ("fail", "warn") and len(call.args) < 2 and not is_starred:
                silent.append(f"{path.name}:{call.lineno}")
    assert silent == []
