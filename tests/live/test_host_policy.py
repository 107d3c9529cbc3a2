# SPDX-License-Identifier: Apache-2.0
"""What an operator writes below /etc/kvmi-libvirt, and what then holds on real VMs."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import host
import pytest
from live_support import NAMESPACE, allowed, cli, element, probe
from protocol_client import Client, Refused

from kvmi_libvirt.abi.revisions import ALWAYS_ALLOWED
from kvmi_libvirt.policy.groups import GROUPS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from live_support import Vm

pytestmark = [pytest.mark.kvm, pytest.mark.libvirt, pytest.mark.seccomp]

ETC = Path("/etc/kvmi-libvirt")
INFO, READ, WRITE = "KVMI_VM_GET_INFO", "KVMI_VM_READ_PHYSICAL", "KVMI_VM_WRITE_PHYSICAL"
NOVA = """<nova:instance xmlns:nova="http://openstack.org/xmlns/libvirt/nova/1.1">
  <nova:package version="32.2.1"/><nova:name>web-1</nova:name>
  <nova:flavor name="m1.small" id="7">
    <nova:extraSpecs><nova:extraSpec name="kvmi:profile">{spec}</nova:extraSpec></nova:extraSpecs>
  </nova:flavor>
  <nova:image uuid=""><nova:properties>
    <nova:property name="kvmi:profile">observe</nova:property>
  </nova:properties></nova:image>
</nova:instance>"""


class Etc:
    """Files below /etc/kvmi-libvirt; what was there before is there again afterwards."""

    def __init__(self) -> None:
        self._before: list[tuple[Path, bytes | None]] = []
        self._made: list[Path] = []

    def write(self, name: str, text: str, mode: int = 0o644) -> Path:
        path = ETC / name
        for directory in (ETC, path.parent):
            if not directory.exists():
                directory.mkdir(mode=0o755)
                self._made.append(directory)
        if path not in (known for known, _ in self._before):
            self._before.append((path, path.read_bytes() if path.exists() else None))
        path.write_text(text, encoding="utf-8")
        path.chmod(mode)
        return path

    def policy(self, inner: str) -> Path:
        return self.write(
            "host-policy.xml", f'<host-policy xmlns="{NAMESPACE}">\n{inner}\n</host-policy>\n'
        )

    def restore(self) -> None:
        for path, content in self._before:
            if content is None:
                path.unlink(missing_ok=True)
            else:
                path.write_bytes(content)
                path.chmod(0o644)
        for directory in reversed(self._made):
            directory.rmdir()


@pytest.fixture
def etc() -> Iterator[Etc]:
    files = Etc()
    yield files
    files.restore()


def assign(
    vm: Vm, spec: str = "observe", *, profile: str = "observe", mode: str = "required"
) -> str:
    return (
        f'<assign mode="{mode}" profile="{profile}"><match nova-extra-spec="kvmi:profile={spec}"/>'
        f'<source type="unix" path="{vm.socket}"/></assign>'
    )


def members(*groups: str) -> set[str]:
    return {name for group in groups for name in GROUPS[group].commands}


def explained(vm: Vm) -> Any:
    result = cli("explain", vm.name, "--json")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def in_force(vm: Vm) -> set[str]:
    result = cli("status", "--json", vm.name)
    assert result.returncode == 0, result.stderr
    (found,) = json.loads(result.stdout)
    return {*found["commands"], *found["events"]}


def test_instance_of_a_flavor_is_hooked_though_it_carries_no_element(vm: Vm, etc: Etc) -> None:
    path = etc.policy(assign(vm))
    assert cli("check", str(path)).returncode == 0
    vm.define(NOVA.format(spec="observe"))
    with probe(vm.socket) as tool:
        vm.must_start()
        answers = tool.result()
        told = in_force(vm)  # while the tool is there: without it nothing is
    got = allowed(answers["commands"]) - set(ALWAYS_ALLOWED)
    assert got >= {READ, "KVMI_VCPU_GET_REGISTERS"}
    assert got <= {*members("query", "memory-read", "registers-read"), "KVMI_VM_CONTROL_EVENTS"}
    assert allowed(answers["events"]) == {"KVMI_VM_EVENT_UNHOOK"}

    found = explained(vm)
    assert (found["policy"]["from"], found["policy"]["mode"]) == ("assignment", "required")
    assert (found["policy"]["file"], found["policy"]["line"]) == (str(path), 2)
    said = {
        entry["name"]
        for entry in (*found["commands"], *found["events"])
        if entry["verdict"] == "allowed" and entry["in_kernel"]
    }
    assert said == told == got | {"KVMI_VM_EVENT_UNHOOK"}


def test_what_a_tenant_can_set_selects_nothing(vm: Vm, etc: Etc) -> None:
    etc.policy(assign(vm))
    vm.define(NOVA.format(spec="none"))
    vm.must_start()
    assert explained(vm)["policy"] is None
    assert cli("hook", vm.name).returncode == 3


def test_running_vm_follows_what_its_host_comes_to_allow(vm: Vm, etc: Etc) -> None:
    etc.policy(assign(vm, profile="debug"))
    vm.define(NOVA.format(spec="observe"))
    with probe(vm.socket) as tool:
        vm.must_start()
        tool.result()
        assert WRITE in in_force(vm)

        ceiling = '<ceiling excess="{}"><commands><allow group="memory-read"/></commands></ceiling>'
        etc.policy(ceiling.format("trim") + assign(vm, profile="debug"))
        result = cli("apply", vm.name)
        assert result.returncode == 0, result.stderr
        assert WRITE in result.stderr.partition("above this host's ceiling, not granted: ")[2]
        assert in_force(vm) <= members("memory-read")
        assert READ in in_force(vm)
        # By hand, too, nothing comes above it.
        result = cli("allow", vm.name, WRITE)
        assert (result.returncode, result.stderr.count("\n")) == (3, 1)
        assert f"{WRITE}: above this host's ceiling ({ETC}/host-policy.xml:2)" in result.stderr
        (entry,) = (e for e in explained(vm)["commands"] if e["name"] == WRITE)
        assert (entry["verdict"], entry["line"]) == ("denied", 2)
        assert entry["rule"].startswith("cut by the ceiling")

        # A host policy that contradicts itself permits nothing new, and changes nothing.
        before = in_force(vm)
        etc.policy(ceiling.format("refuse") + assign(vm, profile="debug"))
        assert cli("apply", vm.name).returncode == 3
        assert cli("allow", vm.name, READ).returncode == 3
        assert in_force(vm) == before
        assert vm.state() == "running"


def test_files_that_others_can_write_are_refused_before_a_vm_starts(vm: Vm, etc: Etc) -> None:
    vm.define(element(vm.socket, commands=(INFO,)))
    path = etc.policy("<sockets/>")
    spoilers: tuple[tuple[Callable[[], None], str], ...] = (
        (lambda: path.chmod(0o666), f"is writable by others (mode 0666); chmod go-w ({path})"),
        (
            lambda: os.chown(path, 65534, -1),
            f"belongs to uid 65534, not to root; chown it ({path})",
        ),
    )
    for spoil, said in spoilers:
        os.chown(path, 0, -1)
        path.chmod(0o644)
        spoil()
        result = vm.start()
        assert result.returncode != 0
        assert said in result.stderr
    os.chown(path, 0, -1)
    result = vm.start()
    assert f'it takes <unix path="{vm.socket}"/> in <sockets> of {path}' in result.stderr


def test_profile_of_the_host_is_used_by_name(vm: Vm, etc: Etc) -> None:
    name = f"kvmi-test-{vm.uuid[:8]}"
    path = etc.write(
        f"profiles.d/{name}.xml",
        f'<profile xmlns="{NAMESPACE}" name="{name}" title="for a test">\n'
        f'<commands><allow name="{INFO}"/></commands></profile>',
    )
    assert name in cli("names").stdout
    vm.define(element(vm.socket).replace("mode=", f'profile="{name}" mode='))
    with probe(vm.socket) as tool:
        vm.must_start()
        assert allowed(tool.result()["commands"]) == {INFO, *ALWAYS_ALLOWED}
        (entry,) = (e for e in explained(vm)["commands"] if e["name"] == INFO)
        assert (entry["file"], entry["line"]) == (str(path), 2)
        vm.virsh("destroy", vm.name)
    os.chown(path, 65534, -1)
    result = vm.start()
    assert result.returncode != 0
    assert f"{path}: belongs to uid 65534, not to root; chown it" in result.stderr


SECRET = "xyzzy-plugh-quux"


def traces_of(text: str) -> list[Path]:
    """Return the files in which we write that hold *text*."""
    places = [Path("/run/kvmi-libvirt"), host.LOG_DIR]
    files = [file for place in places for file in place.rglob("*") if file.is_file()]
    return [file for file in files if text.encode() in file.read_bytes()]


def test_tool_must_know_the_secret_which_is_never_told(vm: Vm, etc: Etc, tmp_path: Path) -> None:
    name = f"kvmi-test-{vm.uuid[:8]}"
    secret = etc.write(f"secrets/{name}", SECRET, 0o640)
    known = tmp_path / "known"
    vm.define(element(vm.socket).replace("<k:handshake", f"<k:secret name='{name}'/><k:handshake"))
    told = []

    def refused() -> str:
        result = vm.start()
        assert result.returncode != 0
        told.append(result.stderr)
        return result.stderr

    assert f"is open to others (mode 0640); chmod 0600 ({secret})" in refused()
    secret.chmod(0o600)
    known.write_text("something else", encoding="ascii")
    with probe(vm.socket, "--secret", str(known)) as tool:
        who = f"process {tool.process.pid} of uid {os.getuid()}"
        why = f"the tool does not know the secret '{name}' (unix:{vm.socket}; {who})"
        assert why in refused()
    known.write_text(SECRET, encoding="ascii")
    with probe(vm.socket, "--secret", str(known)) as tool:
        vm.must_start()
        tool.result()
        for verb in (["status", vm.name], ["explain", vm.name], ["get", vm.name]):
            told.append(cli(*verb, "--json").stdout)
        told.append(vm.virsh("dumpxml", vm.name).stdout)
    assert all(SECRET not in text for text in told)
    assert traces_of(SECRET) == []


def test_tool_on_another_machine_is_reached_where_the_host_allows_it(vm: Vm, etc: Etc) -> None:
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        listener.settimeout(60)
        port = listener.getsockname()[1]
        by_tcp = f"type='tcp' host='127.0.0.1' port='{port}'"
        policy = element(vm.socket, commands=(INFO,))
        vm.define(policy.replace(f"type='unix' path='{vm.socket}'", by_tcp))
        place = f'<tcp host="127.0.0.1" port="{port}"/>'
        result = vm.start()
        assert result.returncode != 0
        assert f"it takes {place} in <sockets> of {ETC}/host-policy.xml" in result.stderr

        etc.policy(f"<sockets>{place}</sockets>")
        clients = []

        def serve() -> None:
            sock = stack.enter_context(listener.accept()[0])
            sock.settimeout(60)
            clients.append(Client(sock))

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            vm.must_start()
        finally:
            thread.join()
        (client,) = clients
        assert client.hello.name.decode() == vm.name
        assert client.vcpu_count() == 2
        with pytest.raises(Refused, match="EPERM"):
            client.read_once(0, 8)
        assert in_force(vm) == {INFO}
