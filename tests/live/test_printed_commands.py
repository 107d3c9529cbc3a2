# SPDX-License-Identifier: Apache-2.0
"""Every command that README.md and the manual pages print runs as printed, in its order.

On a host of its own: domains web1 and instance-0000000a, a tool that listens, and
policy.xml, which is an example of the README's. What only an installation of the package
can show, the README's quick start, runs in a clean Debian: ``make test-packages``.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import host
import pages
import pytest
from live_support import BIN, Vm, probe
from printed import BY_CI, NOT_RUN
from test_openstack import NEW, nova_xml
from two_hosts import OWN, another_host, status_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from live_support import Host
    from pages import Command
    from two_hosts import SecondHost

pytestmark = [pytest.mark.kvm, pytest.mark.libvirt, pytest.mark.seccomp]

TOOL: Final = "/run/kvmi/tool.sock"
SECRET: Final = "/etc/kvmi-libvirt/secrets/db1"
HOST_POLICY: Final = "/etc/kvmi-libvirt/host-policy.xml"
SNIPPETS: Final = "/var/lib/vz"
INSTANCE: Final = "instance-0000000a"
EXAMPLE: Final = pages.ROOT / "docs" / "examples" / "kvmi-try.xml"
PATH: Final = f"PATH={BIN}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass
class Site:
    """A host with what the pages presuppose.

    Parameters
        directory  where the commands are typed; policy.xml is in it
        tools      what listens, as long as it is wanted
    """

    machine: SecondHost
    directory: Path
    tools: contextlib.ExitStack

    def run(self, command: Command) -> None:
        """Run a command as it is printed; it must end as the page says."""
        if command.text.endswith("&"):
            self.tools.close()  # another tool, in the place of the one that is there
            self.tools.enter_context(self._in_background(command))
            return
        done = self.machine.run(*self._typed(command.text))

        assert done.returncode == command.code, f"{command.text}\n{done.stdout}{done.stderr}"
        assert "Traceback" not in done.stderr

    def _typed(self, text: str) -> tuple[str, ...]:
        return ("env", PATH, "bash", "-c", f"cd {self.directory}\n{text}")

    @contextlib.contextmanager
    def _in_background(self, command: Command) -> Iterator[None]:
        words = self._typed(f"exec {command.text.removesuffix('&')}")
        with subprocess.Popen(
            [*self.machine.within, *words], stderr=subprocess.PIPE, text=True
        ) as process:
            try:
                assert process.stderr is not None
                assert process.stderr.readline().startswith("listening on ")
                yield
                assert process.wait(timeout=30) == command.code
            finally:
                process.kill()


@pytest.fixture(scope="module")
def machine(prepared: Host) -> Iterator[SecondHost]:
    """Have a host of its own, with a secret and a directory for Proxmox VE's hookscript."""
    own = (SNIPPETS, *OWN)
    with another_host(hook=prepared.hook, name="kvmi-pages", own=own) as found:
        found.path(f"{SNIPPETS}/snippets").mkdir()
        secret = found.path(SECRET)
        secret.parent.mkdir(mode=0o700)
        secret.write_text("known to the tool\n", encoding="utf-8")
        secret.chmod(0o600)
        yield found


@pytest.fixture
def site(machine: SecondHost, prepared: Host, tmp_path: Path) -> Iterator[Site]:
    """Have the domains too, and a tool that listens."""
    xml = EXAMPLE.read_text(encoding="utf-8").replace("kvmi-try", "web1")
    xml = re.sub(r"<metadata>.*</metadata>", "", xml, flags=re.DOTALL)
    xml = xml.replace("/usr/bin/kvmi-emulated-qemu", str(prepared.emulator))
    instance = Vm(
        host=prepared,
        name=INSTANCE,
        uuid=str(uuid.uuid4()),
        serial=tmp_path / "serial",
        socket=tmp_path / "socket",
    )
    define(machine, host.write(tmp_path / "web1.xml", xml))
    define(machine, host.write(tmp_path / "nova.xml", nova_xml(instance, NEW, "flavor")))
    try:
        with contextlib.ExitStack() as tools:
            tools.enter_context(
                probe(machine.path(TOOL), "--secret", SECRET, within=machine.within)
            )
            yield Site(machine, tmp_path, tools)
            # First the tools: one that the page began has its result once the VM is hooked.
    finally:
        machine.virsh("destroy", "web1")
        for name in ("web1", INSTANCE):
            machine.virsh("undefine", name)
        machine.path(HOST_POLICY).unlink(missing_ok=True)


def define(machine: SecondHost, xml: Path) -> None:
    defined = machine.virsh("define", str(xml))
    assert defined.returncode == 0, defined.stderr


def readme_policy(number: int) -> str:
    """Return the element of one of the README's XML examples."""
    examples = re.findall(r"```xml\n(.*?)```", pages.README.read_text(encoding="utf-8"), re.DOTALL)
    return re.sub(r"</?metadata>\n?", "", examples[number])


def test_the_readmes_commands_run_as_printed(site: Site) -> None:
    host.write(site.directory / "policy.xml", readme_policy(1))
    count = 0
    for block in pages.readme_blocks():
        for command in block.commands:
            if block.name is None and command.text not in (*BY_CI, *NOT_RUN):
                site.run(command)
                count += 1

    assert count >= 10
    found = status_of(site.machine.cli, "web1")
    assert found["state"] == "hooked"
    assert "KVMI_VM_PAUSE_VCPU" in found["commands"]
    assert HOST_POLICY in site.machine.cli("explain", INSTANCE).stdout
    assert site.machine.path(f"{SNIPPETS}/snippets/kvmi-hookscript").exists()


@pytest.mark.parametrize(
    "page",
    [page for page in sorted(pages.MAN.glob("*.[1-8]")) if pages.man_commands(page)],
    ids=lambda page: page.name,
)
def test_a_manual_pages_commands_run_as_printed(site: Site, page: Path) -> None:
    policy = host.write(site.directory / "policy.xml", readme_policy(0))
    host.write(
        site.machine.path(HOST_POLICY), "<host-policy xmlns='urn:kvmi-libvirt:introspection:1.0'/>"
    )
    commands = [one for one in pages.man_commands(page) if one.text not in NOT_RUN]
    if any("web1" in command.text for command in commands):
        for words in (("set", "web1", str(policy), "--config"), ("start", "web1")):
            done = site.machine.cli(*words)
            assert done.returncode == 0, done.stderr

    for command in commands:
        site.run(command)
