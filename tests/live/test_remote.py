# SPDX-License-Identifier: Apache-2.0
"""The element edited from another host: ``kvmi-libvirt -c URI set``, over libvirt's transports."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from live_support import cli, element
from support import skip_unless_ci

if TYPE_CHECKING:
    from collections.abc import Callable

    from live_support import Vm
    from two_hosts import SecondHost

pytestmark = [pytest.mark.kvm, pytest.mark.libvirt, pytest.mark.seccomp]

SSHD = Path("/usr/sbin/sshd")


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def by_command(second: SecondHost, directory: Path) -> str:
    """Return a URI by which libvirt runs a program that speaks to the other host's daemon."""
    enter = " ".join(second.within)
    helper = script(directory / "ext", f"exec {enter} virt-ssh-helper qemu:///system")
    return f"qemu+ext://kvmi-second/system?command={helper}"


def by_ssh(second: SecondHost, directory: Path) -> str:
    """Return a URI by which libvirt goes through ssh, to an sshd of the other host."""
    if not SSHD.exists() or shutil.which("ssh") is None:
        skip_unless_ci("no sshd (apt-get install openssh-server)")
    for name in ("host", "user"):
        key = ("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(directory / name))
        subprocess.run(key, check=True)
    shutil.copy(directory / "user.pub", directory / "authorized")
    second.path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    config = directory / "sshd.conf"
    config.write_text(
        f"HostKey {directory}/host\nAuthorizedKeysFile {directory}/authorized\n"
        "StrictModes no\nUsePAM no\nPasswordAuthentication no\nPermitRootLogin yes\n"
    )
    # No port and no network: ssh's other end is sshd itself, started there.
    proxy = " ".join((*second.within, f"{SSHD} -i -e -f {config}"))
    client = directory / "ssh.conf"
    client.write_text(
        f"Host kvmi-second\nProxyCommand {proxy} 2>{directory}/sshd.log\n"
        f"IdentityFile {directory}/user\nIdentitiesOnly yes\nUser root\n"
        f"UserKnownHostsFile {directory}/known\nStrictHostKeyChecking accept-new\n"
    )
    ssh = script(directory / "ssh", f'exec ssh -F {client} "$@"')
    return f"qemu+ssh://root@kvmi-second/system?command={ssh}&no_tty=1"


@pytest.mark.parametrize("transport", [by_command, by_ssh])
def test_the_element_is_edited_on_another_host(
    migrating_vm: Vm,
    second_host: SecondHost,
    tmp_path: Path,
    transport: Callable[[SecondHost, Path], str],
) -> None:
    vm = migrating_vm
    vm.define()
    plain = tmp_path / "vm.xml"
    plain.write_text(vm.virsh("dumpxml", vm.name).stdout, encoding="utf-8")
    assert second_host.virsh("define", str(plain)).returncode == 0
    policy = tmp_path / "policy.xml"
    policy.write_text(element(vm.socket, commands=("KVMI_VM_GET_INFO",)), encoding="utf-8")
    uri = transport(second_host, tmp_path)

    done = cli("-c", uri, "set", vm.name, str(policy), "--config")

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert "KVMI_VM_GET_INFO" in second_host.cli("get", vm.name).stdout
    assert cli("get", vm.name).returncode == 1  # the one of the same name here is untouched
    assert cli("-c", uri, "get", vm.name).stdout == second_host.cli("get", vm.name).stdout

    # The other host's hook does as it says.
    refused = second_host.virsh("start", vm.name)
    assert "no tool listens on" in refused.stderr
    with second_host.probe(vm.socket) as tool:
        assert second_host.virsh("start", vm.name).returncode == 0
        tool.result()
        policy.write_text(element(vm.socket), encoding="utf-8")
        done = cli("-c", uri, "set", vm.name, str(policy), "--live", "--config")
        assert done.returncode == 0
        assert "runs on another host" in done.stderr
        applied = second_host.cli("apply", vm.name)
        assert applied.returncode == 0, applied.stderr
        assert "0 commands and 0 events" in applied.stdout

    # What needs the process itself is not done from afar.
    for verb in ("hook", "unhook"):
        elsewhere = cli(verb, "-c", uri, vm.name)
        assert (elsewhere.returncode, elsewhere.stderr.count("\n")) == (2, 1)
        assert "is another host: run this there" in elsewhere.stderr
    assert cli("-c", uri, "unset", vm.name, "--config").returncode == 0
    assert second_host.cli("get", vm.name, "--config").returncode == 1
