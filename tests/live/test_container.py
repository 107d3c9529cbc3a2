# SPDX-License-Identifier: Apache-2.0
"""libvirtd in a container that has the hook script and nothing else of ours, as with kolla-ansible.

The agent on the host does the work, over the shared /run. The container is a mount
namespace with hooks of its own; the script's interpreter with the package is not in it.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import host
import pytest
from agent_support import agent, seen
from live_support import allowed, cli, probe, processes_with
from support import wait_until
from test_openstack import COMMANDS, FLAVOR, NEW, nova_xml, policy
from two_hosts import status_of

from kvmi_libvirt import installer
from kvmi_libvirt.abi.revisions import ALWAYS_ALLOWED

if TYPE_CHECKING:
    from collections.abc import Iterator

    from agent_rig import RunningAgent
    from live_support import Host, Vm

__all__ = ["agent"]

pytestmark = [
    pytest.mark.kvm,
    pytest.mark.libvirt,
    pytest.mark.seccomp,
    pytest.mark.skipif(Path("/run/systemd/system").exists(), reason="libvirtd is systemd's here"),
]

_ENTER = 'mount --bind "$0" /etc/libvirt/hooks && exec "$@"'


@pytest.fixture
def container(prepared: Host) -> Iterator[None]:
    """Have libvirtd run in a mount namespace of its own, for one test."""
    with contextlib.ExitStack() as stack:
        hooks = stack.enter_context(host.public_directory())
        script = hooks / "qemu.d" / installer.HOOK_NAME
        script.parent.mkdir()
        script.write_bytes(installer.hook_text("/opt/not-in-this-image/bin/python3"))
        script.chmod(0o755)
        host.stop_daemon(host.LIBVIRTD_PIDFILE)
        stack.callback(host.restart_libvirtd)
        host.start_daemon(
            "libvirtd",
            host.LIBVIRT_SOCKET,
            within=(
                "unshare",
                "--mount",
                "--propagation",
                "private",
                "sh",
                "-c",
                _ENTER,
                str(hooks),
            ),
        )
        host.wait_until_ready()
        yield


def test_the_hosts_agent_hooks_what_the_container_starts(
    container: None, agent: RunningAgent, vm: Vm
) -> None:
    vm.define_xml(nova_xml(vm, NEW, "flavor"))
    with host.host_policy(policy(vm, FLAVOR)):
        agent.reload()
        with probe(vm.socket) as tool:
            vm.must_start("--paused")

            assert allowed(tool.result()["commands"]) == {*COMMANDS, *ALWAYS_ALLOWED}
            assert vm.guest_output_len() == 0
            assert status_of(cli, vm.name)["state"] == "hooked"
            assert seen(agent, vm)["state"] == "hooked"
            vm.virsh("destroy", vm.name)
        refused = vm.start()
        assert refused.returncode != 0
        assert "no tool listens on" in refused.stderr


def test_without_the_agent_the_script_refuses_what_is_required(container: None, vm: Vm) -> None:
    with host.host_policy(policy(vm, FLAVOR)):
        vm.define_xml(nova_xml(vm, NEW, "flavor"))
        refused = vm.start()
        assert refused.returncode != 0
        assert "the hook's helper is broken" in refused.stderr
        wait_until(lambda: not processes_with(vm.uuid), what="no QEMU is there")

        vm.define_xml(nova_xml(vm, NEW, "plain"))
        vm.must_start()
