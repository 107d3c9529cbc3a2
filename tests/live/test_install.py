# SPDX-License-Identifier: Apache-2.0
"""``install`` and ``uninstall`` on a running libvirtd, as an operator types them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import host
import pytest
from live_support import cli, element, probe
from support import wait_until

from kvmi_libvirt import daemons, installer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from live_support import Host, Vm

pytestmark = [pytest.mark.kvm, pytest.mark.libvirt, pytest.mark.seccomp]

COMMANDS = ("KVMI_VM_GET_INFO",)
CONFIG = Path("/etc/kvmi-libvirt")


@pytest.fixture
def bare_host(prepared: Host) -> Iterator[None]:
    """Have a libvirtd that has never seen a qemu hook, and nothing of ours on the host."""
    places = (Path("/var/lib/kvmi-libvirt"), Path("/etc/tmpfiles.d/kvmi-libvirt.conf"))
    there = [path for path in places if path.exists()]
    there += [path for path in CONFIG.rglob("*") if not path.is_dir()]
    if there:
        pytest.skip(f"kvmi-libvirt is installed on this host: {there[0]}")
    others = [file.path for file in daemons.qemu_hooks() if file.path != prepared.hook]
    if others:
        pytest.skip(f"libvirt has other qemu hooks here: {others}")
    installer.uninstall_hook()
    daemons.forget()
    host.restart_libvirtd()
    try:
        yield
    finally:
        cli("uninstall", "--purge")
        host.LOG_DIR.mkdir(exist_ok=True)  # the logs went, and with them what "prepared" had made
        host.LOG_DIR.chmod(0o1777)
        installer.install_hook(python=sys.executable)
        host.reload_libvirtd()


@pytest.mark.usefixtures("bare_host")
def test_from_nothing_to_a_hooked_vm_and_back(vm: Vm, tmp_path: Path) -> None:
    prefix = ("--prefix", str(tmp_path))
    vm.define(element(vm.socket, commands=COMMANDS))

    first = cli("install", *prefix)
    assert first.returncode == 0, first.stderr
    assert f"installed {vm.host.hook}\n" in first.stdout
    assert "looked for qemu hooks before there were any" in first.stdout
    assert "next: " in first.stdout.splitlines()[-1]
    assert (CONFIG / "secrets").stat().st_mode & 0o777 == 0o700
    # It is true: nobody refuses a start without the tool.
    vm.must_start()
    vm.virsh("destroy", vm.name)

    again = cli("install", "--reload", *prefix)
    assert again.returncode == 0, again.stderr
    assert again.stdout.endswith("reloaded libvirtd\n")
    assert "installed " not in again.stdout

    def is_refused() -> bool:  # libvirtd reloads when it comes to it
        started = vm.start().returncode == 0
        if started:
            vm.virsh("destroy", vm.name)
        return not started

    wait_until(is_refused, what="libvirtd runs the hook")
    third = cli("install", *prefix)
    assert "runs qemu hooks already: nothing to reload" in third.stdout.splitlines()[-1]
    doctor = cli("doctor", vm.name)
    assert "knows of the hook" not in "".join(
        line for line in doctor.stdout.splitlines() if " : PASS" not in line
    )

    with probe(vm.socket) as tool:
        vm.must_start()
        tool.result()
        (CONFIG / "agent.conf").write_text("# edited\n")
        gone = cli("uninstall", *prefix)
        assert gone.returncode == 0, gone.stderr
        assert f"{vm.name} stays hooked by unix:{vm.socket}, as it is\n" in gone.stdout
        assert "from now on VMs start without introspection" in gone.stdout
        assert not vm.host.hook.exists()
        assert (CONFIG / "agent.conf").read_text() == "# edited\n"
        assert "hooked" in cli("status", vm.name).stdout
        assert vm.qmp("query-status")["status"] == "running"

    purged = cli("uninstall", "--purge", *prefix)
    assert purged.returncode == 0, purged.stderr
    assert not CONFIG.exists() or not any(CONFIG.iterdir())
    assert not list(tmp_path.rglob("*kvmi*"))
