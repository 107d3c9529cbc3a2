# SPDX-License-Identifier: Apache-2.0
"""The Ansible role, run on a host of its own: a namespace with its own /etc, /opt and libvirtd."""

from __future__ import annotations

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
            *(f"ANSIBLE_ROLES_PATH={ROLE / 'roles'}", f"PATH={BIN}:/usr/sbin:/usr/bin:/sbin:/bin"),
            *(BIN / "ansible-playbook", "-i", inventory, "-e", f"@{extra}"),
            *options,
            ROLE / playbook,
            timeout_s=300,
        )


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
        pytest.skip("no ansible-playbook beside this Python (pip install ansible-core)")
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


def test_a_rolling_run_reaches_every_host(fleet: Fleet) -> None:
    result = fleet.play(hosts="one two")

    assert changed(result) == counts(result, "two")["changed"] == 0
    assert counts(result, "two")["failed"] == 0
    assert [line for line in result.stdout.splitlines() if line.startswith("PLAY [")] == [
        "PLAY [KVM introspection on the hypervisors] " + "*" * 36,
    ] * 2


def test_a_host_without_doctor_is_checked_instead(fleet: Fleet) -> None:
    stub = fleet.machine.path("/opt/without-doctor")
    stub.write_text(
        f'#!/bin/sh\n[ "$1" != doctor ] || {{ echo "invalid choice" >&2; exit 2; }}\n'
        f'exec {COMMAND} "$@"\n'
    )
    stub.chmod(0o755)
    variables: dict[str, Any] = {
        "kvmi_libvirt_verify_by": "doctor",
        "kvmi_libvirt_command": "/opt/without-doctor",
    }

    assert changed(fleet.play(**variables)) == 0
    demanded = fleet.play(**variables, kvmi_libvirt_without_doctor="fail")
    assert counts(demanded)["failed"] == 1


def test_proxmox_gets_its_hookscript_and_policies(fleet: Fleet) -> None:
    snippets = fleet.machine.path("/opt/snippets")
    snippets.mkdir()
    policy = element(Path("/run/kvmi/fleet.sock"), commands=("KVMI_VM_GET_INFO",))
    variables: dict[str, Any] = {
        "kvmi_libvirt_proxmox_snippets": "/opt/snippets",
        "kvmi_libvirt_proxmox_policies": {"100": policy},
    }

    assert changed(fleet.play(**variables)) == 3
    assert changed(fleet.play(**variables)) == 0
    assert (snippets / "kvmi-hookscript").exists()
    assert fleet.machine.path("/etc/kvmi-libvirt/proxmox/100.xml").read_text() == policy


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
