# SPDX-License-Identifier: Apache-2.0
"""The Ansible role, run on a host of its own: a namespace with its own /etc, /opt and libvirtd."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from live_support import BIN, NAMESPACE, allowed, element
from support import skip_unless_ci
from two_hosts import another_host

from kvmi_libvirt import __version__
from kvmi_libvirt.abi.revisions import ALWAYS_ALLOWED

if TYPE_CHECKING:
    from collections.abc import Iterator

    from live_support import Host, Vm
    from two_hosts import SecondHost

pytestmark = [pytest.mark.kvm, pytest.mark.libvirt, pytest.mark.seccomp, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
ROLE = ROOT / "packaging" / "ansible"
OWN = (
    *("/etc", "/opt", "/usr/local", "/var/lib/libvirt", "/var/lib/kvmi-libvirt", "/var/log"),
    *("/var/cache/libvirt", "/run"),
)
SECRET = "correct horse battery staple"
PROFILE = (
    f'<profile xmlns="{NAMESPACE}" name="audit" title="an audit">'
    '<commands><allow name="VM_GET_INFO"/></commands></profile>'
)
POLICY = (
    f'<host-policy xmlns="{NAMESPACE}"><assign mode="required" profile="audit">'
    '<match name="kvmi-test-*"/><source type="unix" path="/run/kvmi/fleet.sock"/>'
    '<secret name="fleet"/></assign></host-policy>'
)
COMMAND = "/opt/kvmi-libvirt/bin/kvmi-libvirt"


# No systemd runs there. This stands in for systemctl(1), so that the role's own calls of
# it are seen: it knows the units that are installed, and notes what it is told.
SYSTEMCTL = """#!/bin/sh
state=/run/systemctl
mkdir -p $state
echo "$*" >>$state/calls
verb=$1
unit=${2:-}
file=/etc/systemd/system/$unit
case $verb in
cat | show | is-enabled | is-active | enable | disable | start | stop | restart | reload)
	if ! [ -f "$file" ]; then
		[ $verb != show ] || printf 'Id=%s\\nLoadState=not-found\\nActiveState=inactive\\n' "$unit"
		exit $([ $verb = show ] && echo 0 || echo 1)
	fi
	;;
esac
case $verb in
cat) cat "$file" ;;
show)
	active=inactive
	[ ! -e $state/active ] || active=active
	printf 'Id=%s\\nLoadState=loaded\\nActiveState=%s\\nFragmentPath=%s\\n' "$unit" $active "$file"
	;;
is-enabled) [ -e $state/enabled ] && echo enabled || { echo disabled; exit 1; } ;;
is-active) [ -e $state/active ] && echo active || { echo inactive; exit 3; } ;;
enable) touch $state/enabled ;;
disable) rm -f $state/enabled ;;
start | restart) touch $state/active ;;
stop) rm -f $state/active ;;
daemon-reload | reload | list-unit-files) ;;
*) exit 1 ;;
esac
"""
CHANGING = {"daemon-reload", "enable", "disable", "start", "stop", "restart", "reload"}
AGENT = "kvmi-libvirt-agent.service"


class Fleet:
    """Runs playbooks on one host, or on several names of it."""

    def __init__(self, machine: SecondHost, directory: Path) -> None:
        self.machine = machine
        self.directory = directory
        self.variables: dict[str, Any] = {
            "kvmi_libvirt_source": f"kvmi-libvirt=={__version__}",
            "kvmi_libvirt_pip_environment": {
                "PIP_NO_INDEX": "1",
                "PIP_NO_DEPS": "1",
                "PIP_FIND_LINKS": str(directory),
            },
            "kvmi_libvirt_system_packages": [],  # they are there; nothing is to be fetched
            "kvmi_libvirt_host_policy": POLICY,
            "kvmi_libvirt_profiles": {"audit": PROFILE},
            "kvmi_libvirt_secrets": {"fleet": SECRET},
            "kvmi_libvirt_agent_settings": {"log-level": "info"},
            "kvmi_libvirt_doctor_arguments": ["--emulated"],
            "kvmi_libvirt_verify_by": "check",
            "ansible_connection": "local",
            "ansible_become": False,
            "ansible_python_interpreter": "/usr/bin/python3",
        }

    def play(
        self, *options: str, playbook: str = "site.yml", hosts: str = "one", **variables: object
    ) -> subprocess.CompletedProcess[str]:
        """Run a playbook there."""
        inventory = self.directory / "inventory"
        inventory.write_text("[hypervisors]\n" + "\n".join(hosts.split()) + "\n")
        extra = self.directory / "variables.json"
        extra.write_text(json.dumps({**self.variables, **variables}))
        return self.machine.run(
            *("env", f"HOME={self.directory}", "LC_ALL=C.UTF-8", "ANSIBLE_NOCOLOR=1"),
            *("ANSIBLE_DEPRECATION_WARNINGS=0", "ANSIBLE_DISPLAY_SKIPPED_HOSTS=0"),
            "ANSIBLE_PIPELINING=1",
            *(
                f"ANSIBLE_ROLES_PATH={ROLE / 'roles'}",
                f"PATH={BIN}:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            ),
            *(BIN / "ansible-playbook", "-i", inventory, "-e", f"@{extra}"),
            *options,
            ROLE / playbook,
            timeout_s=300,
        )

    @contextlib.contextmanager
    def systemd(self) -> Iterator[None]:
        """Have what makes Ansible take the host for one of systemd's, for the block."""
        comm = self.machine.path("/run/comm")
        comm.write_text("systemd\n")
        program = self.machine.path("/usr/local/bin/systemctl")
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(SYSTEMCTL)
        program.chmod(0o755)
        mounted = self.machine.run("mount", "--bind", "/run/comm", "/proc/1/comm")
        assert mounted.returncode == 0, mounted.stderr
        try:
            yield
        finally:
            self.machine.run("umount", "/proc/1/comm")
            program.unlink()

    def told(self) -> list[str]:
        """Return what systemctl was told to do since the last time, without questions."""
        calls = self.machine.path("/run/systemctl/calls")
        lines = calls.read_text().splitlines() if calls.exists() else []
        calls.unlink(missing_ok=True)
        return [line for line in lines if line.split()[0] in CHANGING]


def counts(result: subprocess.CompletedProcess[str], name: str = "one") -> dict[str, int]:
    """Return the numbers of a host in the recap; fail with everything if there are none."""
    match = re.search(rf"^{name}\s+: (ok=.*)$", result.stdout, re.MULTILINE)
    assert match is not None, result.stdout + result.stderr
    return {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", match[1])}


def changed(result: subprocess.CompletedProcess[str]) -> int:
    """Return how many tasks changed something; all must have gone well."""
    found = counts(result)
    assert (result.returncode, found["failed"]) == (0, 0), result.stdout + result.stderr
    return found["changed"]


@pytest.fixture(scope="module")
def bare(prepared: Host, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Have a host with nothing of ours, and the wheel of this checkout."""
    if not (BIN / "ansible-playbook").exists():
        skip_unless_ci("no ansible-playbook beside this Python (pip install ansible-core)")
    directory = tmp_path_factory.mktemp("ansible")
    source = directory / "source"
    ignore = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "build", "dist")
    shutil.copytree(ROOT, source, ignore=ignore)
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"),
            *("--no-deps", "--no-build-isolation", "--wheel-dir", directory, source),
        ],
        check=True,
    )
    with another_host(name="kvmi-fleet", own=OWN) as machine:
        yield Fleet(machine, directory)


@pytest.fixture(scope="module")
def fleet(bare: Fleet) -> Fleet:
    """Have a host on which the role was run once."""
    assert changed(bare.play()) > 0
    return bare


def test_check_mode_on_a_bare_host_fails_nowhere_and_changes_nothing(bare: Fleet) -> None:
    if bare.machine.path(COMMAND).exists():
        pytest.fail("the host is not bare any more: this test must be the first")

    assert changed(bare.play("--check", "--diff")) > 0

    assert not bare.machine.path("/etc/kvmi-libvirt/secrets").exists()
    assert not bare.machine.path(COMMAND).exists()
    assert not bare.machine.path("/etc/libvirt/hooks").exists()

    with bare.systemd():
        assert changed(bare.play("--check", "--diff")) > 0
        assert bare.told() == []


def test_the_second_run_changes_nothing(fleet: Fleet) -> None:
    for options in ((), ("--check", "--diff")):
        result = fleet.play(*options)
        assert changed(result) == 0, result.stdout


def test_everything_is_in_its_place(fleet: Fleet) -> None:
    machine = fleet.machine
    secret = machine.path("/etc/kvmi-libvirt/secrets/fleet")
    assert secret.read_text() == SECRET
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert stat.S_IMODE(secret.parent.stat().st_mode) == 0o700
    hook = machine.path("/etc/libvirt/hooks/qemu.d/50-kvmi-libvirt")
    assert f'PYTHON = "{Path(COMMAND).parent}' in hook.read_text()
    assert machine.path("/etc/systemd/system/kvmi-libvirt-agent.service").exists()
    assert "log-level = info\n" in machine.path("/etc/kvmi-libvirt/agent.conf").read_text()
    checked = machine.run(COMMAND, "check", "/etc/kvmi-libvirt/host-policy.xml")
    assert checked.returncode == 0, checked.stderr


def test_a_vm_on_that_host_gets_its_introspection(fleet: Fleet, vm: Vm) -> None:
    # The libvirtd there was running before there was any hook.
    machine = fleet.machine
    vm.define()
    xml = vm.virsh("dumpxml", vm.name).stdout
    file = fleet.directory / "vm.xml"
    file.write_text(xml)
    secret = fleet.directory / "secret"
    secret.write_text(SECRET)
    with machine.probe(Path("/run/kvmi/fleet.sock"), "--secret", str(secret)) as tool:
        try:
            assert machine.virsh("define", str(file)).returncode == 0
            started = machine.virsh("start", vm.name)
            assert started.returncode == 0, started.stderr
            answers = tool.result()
            assert allowed(answers["commands"]) == {"KVMI_VM_GET_INFO", *ALWAYS_ALLOWED}
        finally:
            machine.virsh("destroy", vm.name)
            machine.virsh("undefine", vm.name)
    # Without its tool it does not start: the policy requires it.
    assert machine.virsh("create", str(file)).returncode != 0


def test_a_secret_is_never_shown(fleet: Fleet) -> None:
    result = fleet.play("-vvvv", "--diff", kvmi_libvirt_secrets={"fleet": "hunter2", "b": "b3ta"})

    assert changed(result) == 1
    assert "hunter2" not in result.stdout + result.stderr
    assert "b3ta" not in result.stdout + result.stderr
    again = fleet.play(kvmi_libvirt_secrets_absent=["b"])
    assert changed(again) == 2  # the old one is back, the other one gone
    assert not fleet.machine.path("/etc/kvmi-libvirt/secrets/b").exists()


def _configuration(fleet: Fleet) -> dict[str, bytes]:
    top = fleet.machine.path("/etc/kvmi-libvirt")
    return {str(path): path.read_bytes() for path in top.rglob("*") if path.is_file()}


def test_a_wrong_policy_is_never_put_in_place_and_stops_a_rolling_run(fleet: Fleet) -> None:
    before = _configuration(fleet)
    wrong = POLICY.replace("audit", "audits")

    result = fleet.play(hosts="one two three", kvmi_libvirt_host_policy=wrong)

    assert result.returncode != 0
    assert counts(result)["failed"] == 1
    assert "did you mean audit?" in result.stdout
    assert "two" not in result.stdout.partition("PLAY RECAP")[2]
    assert _configuration(fleet) == before


def test_pip_is_never_left_to_find_the_program_by_its_name(fleet: Fleet) -> None:
    result = fleet.play(kvmi_libvirt_source="")

    assert result.returncode != 0
    assert (counts(result)["failed"], counts(result)["changed"]) == (1, 0)
    assert "kvmi_libvirt_source is not set" in result.stdout


def test_a_rolling_run_reaches_every_host(fleet: Fleet) -> None:
    result = fleet.play(hosts="one two")

    assert changed(result) == counts(result, "two")["changed"] == 0
    assert counts(result, "two")["failed"] == 0
    assert [line for line in result.stdout.splitlines() if line.startswith("PLAY [")] == [
        "PLAY [KVM introspection on the hypervisors] " + "*" * 36,
    ] * 2


def test_where_systemd_is_the_agent_runs_and_hears_of_changes(fleet: Fleet) -> None:
    with fleet.systemd():
        assert changed(fleet.play("--check")) == 1  # it would be started
        assert fleet.told() == []
        fleet.play()
        assert fleet.told() == ["daemon-reload", f"enable {AGENT}", f"start {AGENT}"]
        assert changed(fleet.play()) == 0
        assert fleet.told() == ["daemon-reload"]

        # A policy is read again, the settings and another version take a new start.
        wider = POLICY.replace("kvmi-test-*", "kvmi-*")
        assert changed(fleet.play(kvmi_libvirt_host_policy=wider)) == 2
        assert fleet.told() == ["daemon-reload", f"reload {AGENT}"]
        assert changed(fleet.play(kvmi_libvirt_agent_settings={"log-level": "debug"})) == 4
        assert fleet.told() == ["daemon-reload", f"reload {AGENT}", f"restart {AGENT}"]
        removed = fleet.machine.run(
            *(Path(COMMAND).with_name("pip"), "uninstall", "--yes", "-q", "kvmi-libvirt")
        )
        assert removed.returncode == 0, removed.stderr
        assert changed(fleet.play()) == 3  # the program, the settings, and once for both
        assert fleet.told() == ["daemon-reload", f"restart {AGENT}"]

        fleet.play(playbook="remove.yml")
        assert fleet.told() == [f"disable {AGENT}", f"stop {AGENT}"]
        fleet.play(playbook="remove.yml")
        assert fleet.told() == []
    assert changed(fleet.play()) > 0  # for the next test


def test_doctor_has_the_last_word(fleet: Fleet) -> None:
    assert changed(fleet.play(kvmi_libvirt_verify_by="doctor")) == 0
    hook = fleet.machine.path("/etc/libvirt/hooks/qemu.d/broken")
    hook.write_text("#!/no/such/program\n")
    hook.chmod(0o755)
    try:
        sick = fleet.play(kvmi_libvirt_verify_by="doctor")
    finally:
        hook.unlink()
    assert counts(sick)["failed"] == 1
    assert "for leftovers that libvirt would run" in sick.stdout


def test_proxmox_gets_its_hookscript_and_policies(fleet: Fleet) -> None:
    snippets = fleet.machine.path("/opt/snippets")
    snippets.mkdir()
    policy = element(Path("/run/kvmi/fleet.sock"), commands=("KVMI_VM_GET_INFO",))
    variables: dict[str, Any] = {
        "kvmi_libvirt_proxmox_snippets": "/opt/snippets",
        "kvmi_libvirt_proxmox_policies": {"100": policy},
    }

    del fleet.variables["kvmi_libvirt_agent_settings"]
    assert changed(fleet.play("--check", **variables)) == 4
    assert changed(fleet.play(**variables)) == 4  # with agent.conf
    assert changed(fleet.play(**variables)) == 0
    assert changed(fleet.play("--check", **variables)) == 0
    assert (snippets / "kvmi-hookscript").exists()
    file = fleet.machine.path("/etc/kvmi-libvirt/proxmox/100.xml")
    assert (file.read_text(), stat.S_IMODE(file.stat().st_mode)) == (policy, 0o644)
    assert "domains = proxmox\n" in fleet.machine.path("/etc/kvmi-libvirt/agent.conf").read_text()
    variables["kvmi_libvirt_proxmox_policies"] = {}
    assert changed(fleet.play(**variables, kvmi_libvirt_proxmox_policies_absent=["100"])) == 1
    assert not file.exists()


def test_removing_it_leaves_the_configuration_unless_it_is_purged(fleet: Fleet) -> None:
    machine = fleet.machine
    assert changed(fleet.play("--check", playbook="remove.yml")) > 0
    assert machine.path(COMMAND).exists()

    assert changed(fleet.play(playbook="remove.yml")) > 0

    assert not machine.path(COMMAND).exists()
    assert not machine.path("/etc/libvirt/hooks/qemu.d/50-kvmi-libvirt").exists()
    assert machine.path("/etc/kvmi-libvirt/secrets/fleet").exists()
    assert changed(fleet.play(playbook="remove.yml")) == 0
    assert changed(fleet.play(playbook="remove.yml", kvmi_libvirt_purge=True)) == 1
    assert not machine.path("/etc/kvmi-libvirt").exists() or not any(
        machine.path("/etc/kvmi-libvirt").iterdir()
    )
