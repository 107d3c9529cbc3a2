# SPDX-License-Identifier: Apache-2.0
"""What the doctor reads of a host: configuration, records, logs, accounts, processes."""

from __future__ import annotations

import contextlib
import os
import pwd
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support import start_ticks

from kvmi_libvirt.abi.probing import Outcome
from kvmi_libvirt.doctor import look_kernel, look_logs, look_security, look_vm
from kvmi_libvirt.doctor.facts import Access
from kvmi_libvirt.doctor.look_config import look_at_config, look_at_state
from kvmi_libvirt.doctor.look_kernel import access_of, look_at_kernel, look_at_kvm
from kvmi_libvirt.doctor.look_libvirt import CAP_SYS_PTRACE, has_capability
from kvmi_libvirt.doctor.look_logs import hook_ran_at, lines_about, refusals
from kvmi_libvirt.doctor.look_process import Processes
from kvmi_libvirt.policy.model import NAMESPACE
from kvmi_libvirt.state import Journal, StateDir, VmState

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmi_libvirt.doctor.facts import ConfigFacts

UUID = "5a4a2b4e-7c1d-4e0f-9a52-0d6f6f1b0a01"
WAIT = "import sys; print(flush=True); sys.stdin.read()"


# -- configuration -------------------------------------------------------------------------


def config(directory: Path) -> ConfigFacts:
    return look_at_config(
        host_policy=directory / "host-policy.xml",
        profiles=directory / "profiles.d",
        secrets=directory / "secrets",
        agent_conf=directory / "agent.conf",
        owner=os.geteuid(),
    )


def test_a_host_without_any_configuration(tmp_path: Path) -> None:
    found = config(tmp_path)

    assert not found.has_host_policy
    assert (found.schema_problem, found.host_policy_problem) == (None, None)
    assert (found.profile_problems, found.secret_problems, found.secrets) == ((), (), 0)


def test_a_host_policy_and_what_it_takes(tmp_path: Path) -> None:
    source = "<source type='unix' path='/run/kvmi/t'><reconnect enabled='yes'/></source>"
    (tmp_path / "host-policy.xml").write_text(
        f"<host-policy xmlns='{NAMESPACE}'>"
        f"<assign profile='observe'><match name='a'/>{source}</assign>"
        f"<assign profile='observe'><match name='b'/><source type='unix' path='/run/kvmi/t'/>"
        "</assign></host-policy>",
        encoding="ascii",
    )

    found = config(tmp_path)

    assert (found.has_host_policy, found.host_policy_problem) == (True, None)
    assert (found.assignments, found.reconnecting) == (2, 1)


def test_everything_wrong_is_told_with_its_place(tmp_path: Path) -> None:
    policy = tmp_path / "host-policy.xml"
    policy.write_text(f"<host-policy xmlns='{NAMESPACE}'><x/></host-policy>", encoding="ascii")
    (tmp_path / "profiles.d").mkdir()
    profile = tmp_path / "profiles.d" / "mine.xml"
    profile.write_text("<profile/>", encoding="ascii")
    (tmp_path / "profiles.d" / "README").write_text("no profile", encoding="ascii")
    (tmp_path / "secrets").mkdir(mode=0o700)
    (tmp_path / "secrets" / "good").write_bytes(b"x")
    (tmp_path / "secrets" / "good").chmod(0o600)
    (tmp_path / "secrets" / "open").write_bytes(b"x")
    (tmp_path / "secrets" / "open").chmod(0o644)

    found = config(tmp_path)

    assert str(found.host_policy_problem).startswith(f"{policy}:1: ")
    assert [str(profile) in problem for problem in found.profile_problems] == [True]
    assert found.secrets == 2
    assert len(found.secret_problems) == 1
    assert "secrets/open: is open to others (mode 0644)" in found.secret_problems[0]

    (tmp_path / "secrets").chmod(0o755)
    assert "secrets is open to others" in config(tmp_path).secret_problems[0]


@pytest.mark.skipif(os.geteuid() != 0, reason="the agent's configuration is root's")
def test_an_agents_configuration_it_would_not_start_with(tmp_path: Path) -> None:
    conf = tmp_path / "agent.conf"
    assert config(tmp_path).agent_problem is None
    conf.write_text("[agent]\nlog-level = info\n", encoding="ascii")
    assert config(tmp_path).agent_problem is None

    conf.write_text("[agent]\nlog-levl = info\n", encoding="ascii")

    assert "unknown key 'log-levl'" in str(config(tmp_path).agent_problem)


def test_a_host_policy_others_can_write_is_not_believed(tmp_path: Path) -> None:
    policy = tmp_path / "host-policy.xml"
    policy.write_text(f"<host-policy xmlns='{NAMESPACE}'/>", encoding="ascii")
    policy.chmod(0o666)

    assert "is writable by others (mode 0666)" in str(config(tmp_path).host_policy_problem)


# -- records -------------------------------------------------------------------------------


@contextlib.contextmanager
def guest(*arguments: str) -> Iterator[int]:
    """Run a process that was started with *arguments*; yields its id."""
    command = [sys.executable, "-c", WAIT, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        running.stdout.readline()
        yield running.pid


def record(pid: int, **changes: object) -> VmState:
    values = {
        "domain": "web1",
        "uuid": UUID,
        "pid": pid,
        "start_ticks": start_ticks(pid),
        "abi": "v12",
        "mode": "optional",
        "state": "failed",
        "source": "unix:/run/kvmi/t",
        "commands": (),
        "events": (),
        "since": "2026-01-02T03:04:05Z",
        "error": "no tool",
        "socket_inode": 0,
        **changes,
    }
    return VmState(**values)  # type: ignore[arg-type]


def test_records_are_counted_and_what_is_odd_is_named(tmp_path: Path) -> None:
    state = StateDir(tmp_path / "state")
    assert look_at_state(state).access is None
    others = [UUID.replace("5a4a", prefix) for prefix in ("6b5b", "7c6c")]
    with guest("-name", "guest=left") as pid:
        state.save(record(os.getpid()))
        state.save(record(os.getpid(), uuid=others[0], domain="tried", state="waiting"))
        state.save_journal(
            others[1],
            Journal(
                pid=pid,
                start_ticks=start_ticks(pid),
                sockets_before=(),
                channel_inode=1,
                request_unhook=0,
            ),
        )
        (state.path / "damaged.json").write_text("{", encoding="ascii")

        found = look_at_state(state)

    assert found.access is not None
    assert found.access.mode == 0o700
    assert (found.interrupted, found.waiting, found.hooked) == (("left",), ("tried",), 0)
    assert len(found.damaged) == 1


# -- logs ------------------------------------------------------------------------------------


@pytest.fixture
def no_other_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(look_logs, "_SYSLOGS", (str(tmp_path / "syslog"),))
    monkeypatch.setattr(look_logs, "_JOURNALS", (tmp_path / "journal",))
    return tmp_path


def test_the_last_lines_about_a_domain_and_no_others(no_other_logs: Path) -> None:
    log = no_other_logs / "hook.log"
    about = [f"2026 kvmi-libvirt[{n}]: INFO: domain web1: {n}" for n in range(5)]
    others = [
        "domain web10: not meant",
        "domain web1-old: not meant",
        "domain xweb1: not meant",
        f"domain other ({UUID.replace('5', '6')}): not meant",
    ]
    log.write_text("\n".join([about[0], *others, *about[1:], *others]) + "\n", encoding="ascii")

    assert lines_about("web1", UUID, hook_log=log) == (tuple(about[-3:]), str(log))
    assert hook_ran_at(hook_log=log) == log.stat().st_mtime
    log.write_bytes(b"")  # as logrotate leaves it
    assert hook_ran_at(hook_log=log) is None


def test_a_domain_is_found_by_its_uuid_and_quoted(no_other_logs: Path) -> None:
    log = no_other_logs / "hook.log"
    lines = [f"domain x ({UUID}): hooked", "kvmi-libvirt: domain 'a.b' requires introspection"]
    log.write_text("\n".join(lines), encoding="ascii")

    assert lines_about("unheard-of", UUID, hook_log=log).lines == (lines[0],)
    other = UUID.replace("5", "6")
    assert lines_about("a.b", other, hook_log=log).lines == (lines[1],)
    assert lines_about("aXb", other, hook_log=log).lines == ()


def test_only_our_lines_of_a_syslog_count(no_other_logs: Path) -> None:
    (no_other_logs / "syslog").write_text(
        "libvirtd: domain web1: theirs\nkvmi-libvirt[1]: domain web1: ours\n", encoding="ascii"
    )

    found = lines_about("web1", UUID, hook_log=no_other_logs / "missing")

    assert found.lines == ("kvmi-libvirt[1]: domain web1: ours",)
    assert found.place == str(no_other_logs / "syslog")


def test_a_long_log_is_read_from_its_end(no_other_logs: Path) -> None:
    log = no_other_logs / "hook.log"
    log.write_bytes(b"domain web1: old\n" + b"x" * (2 << 20) + b"\ndomain web1: new \xff\n")

    assert lines_about("web1", UUID, hook_log=log).lines == (
        "domain web1: new \N{REPLACEMENT CHARACTER}",
    )


def test_no_log_at_all(no_other_logs: Path) -> None:
    os.mkfifo(no_other_logs / "fifo")
    for log in (no_other_logs / "missing", no_other_logs / "fifo", no_other_logs):
        assert lines_about("web1", UUID, hook_log=log).lines == ()
    assert hook_ran_at(hook_log=no_other_logs / "missing") is None


def test_the_journal_is_asked_where_there_is_one(
    no_other_logs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = no_other_logs / "bin"
    programs.mkdir()
    script = programs / "journalctl"
    script.write_text(
        '#!/bin/sh\ncase "$*" in\n'
        "*short-unix*) echo '1700000000.5 host kvmi-libvirt[1]: x' ;;\n"
        "*) echo 'host kvmi-libvirt[1]: domain web1: ours' ;;\nesac\n",
        encoding="ascii",
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    missing = no_other_logs / "missing"
    assert hook_ran_at(hook_log=missing) is None  # no journal is kept

    (no_other_logs / "journal").mkdir()

    assert hook_ran_at(hook_log=missing) == 1700000000.5
    found = lines_about("web1", UUID, hook_log=missing)
    assert found == (
        ("host kvmi-libvirt[1]: domain web1: ours",),
        "the journal",
    )
    script.write_text("#!/bin/sh\nexit 1\n", encoding="ascii")
    assert hook_ran_at(hook_log=missing) is None


def test_what_apparmor_and_selinux_refused_us(
    no_other_logs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    audit, kern = no_other_logs / "audit.log", no_other_logs / "kern.log"
    monkeypatch.setattr(look_logs, "_KERNEL_LOGS", (str(audit), str(kern)))
    assert refusals() == ()
    ours = [
        'audit: apparmor="DENIED" operation="connect" profile="libvirt-x" name="/run/kvmi/t.sock"',
        "avc:  denied  { execute } for path=/etc/libvirt/hooks/qemu.d/50-kvmi-libvirt",
    ]
    kern.write_text(
        "\n".join(
            [
                ours[0],
                'audit: apparmor="DENIED" operation="open" profile="cupsd" name="/etc/x"',
                'audit: apparmor="ALLOWED" name="/run/kvmi/t.sock"',
                ours[1],
                "avc:  granted  { execute } for path=/etc/libvirt/hooks/qemu.d/50-kvmi-libvirt",
            ]
        ),
        encoding="ascii",
    )

    assert refusals() == tuple(ours)


# -- the kernel, the device, accounts --------------------------------------------------------


@pytest.mark.kvm
def test_the_kernel_is_asked() -> None:
    found = look_at_kernel()

    assert found.problem is None
    assert found.outcome is not None
    assert (found.abi is not None) == (found.outcome is Outcome.FOUND)
    assert found.has_pidfd_getfd
    assert found.has_sock_diag


def test_a_kernel_that_cannot_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise PermissionError(13, "Permission denied", "/dev/kvm")

    monkeypatch.setattr(look_kernel, "probe_kernel", refuse)
    assert look_at_kernel().problem == "/dev/kvm: Permission denied"

    monkeypatch.setattr(look_kernel, "probe_kernel", lambda: time.sleep(600))
    monkeypatch.setattr(look_kernel, "_PROBE_TIMEOUT_S", 0.2)
    assert "no answer within 0.2 s" in str(look_at_kernel().problem)


def device(tmp_path: Path, mode: int) -> str:
    path = tmp_path / "kvm"
    path.write_bytes(b"")
    path.chmod(mode)
    return str(path)


@pytest.mark.parametrize(
    ("mode", "may_open"), [(0o666, True), (0o606, True), (0o660, False), (0o604, False)]
)
def test_a_device_for_everybody_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int, may_open: bool
) -> None:
    nobody = pwd.getpwnam("nobody")
    if os.getegid() == nobody.pw_gid or os.geteuid() == nobody.pw_uid:
        pytest.skip("run as another user than nobody")
    conf = tmp_path / "qemu.conf"
    conf.write_text('#user = "root"\n user = "nobody"\ngroup = "+65534"\n', encoding="ascii")
    monkeypatch.setattr(look_kernel, "_QEMU_CONF", conf)

    found = look_at_kvm(device(tmp_path, mode))

    assert (found.user, found.may_open) == ("nobody", may_open)


@pytest.mark.parametrize(("mode", "may_open"), [(0o060, True), (0o600, False), (0o066, True)])
def test_a_device_of_a_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int, may_open: bool
) -> None:
    if os.geteuid() == pwd.getpwnam("nobody").pw_uid:
        pytest.skip("run as another user than nobody")
    monkeypatch.setattr(look_kernel, "qemu_account", lambda: ("nobody", {os.getegid()}))

    assert look_at_kvm(device(tmp_path, mode)).may_open is may_open


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    assert look_at_kvm(str(tmp_path / "missing")).access is None


def test_owners_are_named_and_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"")
    (tmp_path / "x").chmod(0o640)
    (tmp_path / "link").symlink_to("x")

    found = access_of(tmp_path / "x")
    assert isinstance(found, Access)
    assert (found.uid, found.owner) == (os.geteuid(), pwd.getpwuid(os.geteuid()).pw_name)
    assert found.describe().endswith(" 0640")
    link = access_of(tmp_path / "link")
    assert link is not None
    assert link.mode == 0o777
    assert access_of(tmp_path / "missing") is None


def test_apparmor_rules_of_ours_are_those_that_are_no_comment(tmp_path: Path) -> None:
    places = {
        "local/usr.sbin.libvirtd": "# about kvmi\n",
        "local/usr.sbin.virtqemud": "include if exists <abstractions/kvmi-libvirt-hook>\n",
        "local/abstractions/libvirt-qemu": "  #include <abstractions/kvmi-libvirt-qemu>\n",
        "abstractions/libvirt-qemu.d/kvmi-libvirt": "#x\n/run/kvmi/** rw,\n",
        "local/usr.sbin.cupsd": "/run/kvmi/** rw,\n",
    }
    for name, text in places.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="ascii")

    found = look_security.apparmor_rules(tmp_path)

    assert found == [
        tmp_path / "abstractions/libvirt-qemu.d/kvmi-libvirt",
        tmp_path / "local/abstractions/libvirt-qemu",
        tmp_path / "local/usr.sbin.virtqemud",
    ]
    assert [look_security.is_for_daemon(path) for path in found] == [False, False, True]


@pytest.fixture
def loaded_profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have the kernel show these profiles, all taken at the second 1000."""
    directory = tmp_path / "profiles"
    for name, profile in {
        "libvirtd.12": "libvirtd",
        "usr.sbin.virtqemud.3": "/usr/sbin/virtqemud",
        f"libvirt-{UUID}.40": f"libvirt-{UUID}",
    }.items():
        (directory / name).mkdir(parents=True)
        (directory / name / "name").write_text(f"{profile}\n", encoding="ascii")
        os.utime(directory / name, (1000, 1000))
    monkeypatch.setattr(look_security, "_APPARMOR_LOADED", directory)
    return directory


@pytest.mark.usefixtures("loaded_profiles")
def test_a_profile_that_was_loaded_before_our_rules_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = tmp_path / "apparmor.d"
    rules = {}
    for name in ("usr.sbin.libvirtd", "usr.sbin.virtqemud", "abstractions/libvirt-qemu"):
        rules[name] = files / "local" / name
        rules[name].parent.mkdir(parents=True, exist_ok=True)
        rules[name].write_text("include <abstractions/kvmi-libvirt-qemu>\n", encoding="ascii")
        os.utime(rules[name], (999, 999))
    monkeypatch.setattr(look_vm, "apparmor_rules", lambda: look_security.apparmor_rules(files))

    assert look_security._unloaded(list(rules.values())) == ()
    assert look_vm.newer_rules(UUID) is None

    for path in rules.values():
        os.utime(path, (1001, 1001))
    assert look_security._unloaded(list(rules.values())) == (
        ("libvirtd", str(rules["usr.sbin.libvirtd"])),
        ("/usr/sbin/virtqemud", str(rules["usr.sbin.virtqemud"])),
    )
    assert look_vm.newer_rules(UUID) == str(rules["abstractions/libvirt-qemu"])
    assert look_vm.newer_rules("another") is None  # not confined


def test_where_our_rules_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packaged = tmp_path / "apparmor.md"

    # In a checkout, and in a wheel, beside the rules.
    shipped = look_security._readme("packaging/apparmor", packaged)
    assert sorted(path.name for path in (Path(shipped).parent / "abstractions").iterdir())
    packaged.touch()
    assert look_security._readme("packaging/apparmor", packaged) == str(packaged)
    packaged.unlink()
    monkeypatch.setattr(look_security, "data_files", lambda *_arguments: [])
    assert look_security._readme("packaging/selinux", packaged) == (
        "packaging/selinux/README.md in the source"
    )


@pytest.mark.parametrize("before", [0, 10, (1 << 20) - 7])
def test_our_module_is_found_anywhere_in_the_kernels_policy(tmp_path: Path, before: int) -> None:
    policy = tmp_path / "policy"
    policy.write_bytes(bytes(before) + look_security.POLICY_MARK + bytes(100))

    assert look_security._has_mark(policy) is True
    policy.write_bytes(bytes(before) + look_security.POLICY_MARK[:-1])
    assert look_security._has_mark(policy) is False
    assert look_security._has_mark(tmp_path / "none") is None


def test_capabilities_are_read_of_any_process() -> None:
    with guest() as pid:
        mine = has_capability(os.getpid(), CAP_SYS_PTRACE)
        assert mine in (True, False)
        assert has_capability(pid, CAP_SYS_PTRACE) is mine
    assert has_capability(pid, CAP_SYS_PTRACE) is None  # it has ended


# -- processes -------------------------------------------------------------------------------


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    found = tmp_path / "run"
    found.mkdir()
    return found


def test_the_pidfile_leads_to_the_qemu(run_dir: Path) -> None:
    with guest("-uuid", UUID) as pid:
        (run_dir / "web1.pid").write_text(f"{pid}\n", encoding="ascii")

        found = Processes().look_at("web1", UUID, is_active=True, run_dir=run_dir)

        assert (found.pid, found.pidfile_problem, found.supervisor) == (pid, None, None)
        assert "no KVM VM fd" in str(found.problem)


@pytest.mark.parametrize("text", [str(os.getpid()), "4194304", "", "x"])
def test_behind_a_stale_pidfile_the_qemu_is_found_by_its_uuid(run_dir: Path, text: str) -> None:
    (run_dir / "web1.pid").write_text(text, encoding="ascii")
    with guest("-uuid", UUID) as pid:
        found = Processes().look_at("web1", UUID, is_active=True, run_dir=run_dir)
        assert found.pid == pid
        assert found.pidfile_problem

    gone = Processes().look_at("web1", UUID, is_active=True, run_dir=run_dir)
    assert gone.pid is None
    assert gone.pidfile_problem


def test_what_a_vm_that_does_not_run_has_left(run_dir: Path) -> None:
    def problem() -> str | None:
        return Processes().look_at("web1", UUID, is_active=False, run_dir=run_dir).pidfile_problem

    assert problem() is None
    pidfile = run_dir / "web1.pid"
    pidfile.write_text("4194304", encoding="ascii")
    assert "names process 4194304, which does not exist" in str(problem())
    pidfile.write_text(str(os.getpid()), encoding="ascii")
    assert "which is not the domain's QEMU" in str(problem())
    with guest("-uuid", UUID) as pid:
        pidfile.write_text(str(pid), encoding="ascii")
        assert "which libvirt has lost sight of" in str(problem())


def test_two_processes_with_one_uuid_are_none(run_dir: Path) -> None:
    with guest("-uuid", UUID), guest("-uuid", UUID):
        assert Processes().qemu_of(UUID) is None


def test_the_emulators_supervisor_is_known_by_its_title() -> None:
    with guest() as pid:
        title = f"kvmi-emulator for process {pid}"
        command = [title, "-c", WAIT]
        with subprocess.Popen(
            command, executable=sys.executable, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as supervisor:
            assert supervisor.stdout is not None
            supervisor.stdout.readline()
            assert Processes().supervisor_of(pid) == supervisor.pid
            assert Processes().supervisor_of(pid + 1) is None
        assert Processes().supervisor_of(pid) is None
