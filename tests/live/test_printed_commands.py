# SPDX-License-Identifier: Apache-2.0
"""Every command that README.md and the manual pages print runs as printed, in its order.

On a host of its own: domains web1 and instance-0000000a, a tool that listens, and
policy.xml, which is the README's own example. What only an installation of the package
can show, the README's quick start, runs in a clean Debian: ``make test-packages``.
"""

from __future__ import annotations

import re
import uuid
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
SNIPPETS: Final = "/var/lib/vz"
EXAMPLE: Final = pages.ROOT / "docs" / "examples" / "kvmi-try.xml"


@pytest.fixture(scope="module")
def machine(prepared: Host) -> Iterator[SecondHost]:
    """Have a host with what the pages presuppose, but for the domains."""
    own = (SNIPPETS, *OWN)
    with another_host(hook=prepared.hook, name="kvmi-pages", own=own) as found:
        found.path(f"{SNIPPETS}/snippets").mkdir()
        secret = found.path(SECRET)
        secret.parent.mkdir(mode=0o700)
        secret.write_text("known to the tool\n", encoding="utf-8")
        secret.chmod(0o600)
        yield found


@pytest.fixture
def web1(machine: SecondHost, prepared: Host, tmp_path: Path) -> Iterator[Path]:
    """Have the domains and the tool; yield the directory with policy.xml."""
    xml = EXAMPLE.read_text(encoding="utf-8").replace("kvmi-try", "web1")
    xml = re.sub(r"<metadata>.*</metadata>", "", xml, flags=re.DOTALL)
    xml = xml.replace("/usr/bin/kvmi-emulated-qemu", str(prepared.emulator))
    instance = Vm(
        host=prepared,
        name="instance-0000000a",
        uuid=str(uuid.uuid4()),
        serial=tmp_path / "serial",
        socket=tmp_path / "socket",
    )
    define(machine, host.write(tmp_path / "web1.xml", xml))
    define(machine, host.write(tmp_path / "nova.xml", nova_xml(instance, NEW, "flavor")))
    text = pages.README.read_text(encoding="utf-8").partition("## Write a policy")[2]
    host.write(tmp_path / "policy.xml", text.partition("```xml\n")[2].partition("```")[0])
    try:
        with probe(machine.path(TOOL), "--secret", SECRET, within=machine.within):
            yield tmp_path
    finally:
        machine.virsh("destroy", "web1")
        for name in ("web1", "instance-0000000a"):
            machine.virsh("undefine", name)


def define(machine: SecondHost, xml: Path) -> None:
    defined = machine.virsh("define", str(xml))
    assert defined.returncode == 0, defined.stderr


def run(machine: SecondHost, directory: Path, command: Command) -> None:
    """Run a command as it is printed; it must end as the page says."""
    path = f"PATH={BIN}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    script = f"cd {directory}\n{command.text}"
    done = machine.run("env", path, "bash", "-c", script)

    assert done.returncode == command.code, f"{command.text}\n{done.stdout}{done.stderr}"
    assert "Traceback" not in done.stderr


def test_the_readmes_commands_run_as_printed(machine: SecondHost, web1: Path) -> None:
    count = 0
    for block in pages.readme_blocks():
        for command in block.commands:
            if block.name is None and command.text not in (*BY_CI, *NOT_RUN):
                run(machine, web1, command)
                count += 1

    assert count >= 10
    found = status_of(machine.cli, "web1")
    assert found["state"] == "hooked"
    assert "KVMI_VM_PAUSE_VCPU" in found["commands"]
    explained = machine.cli("explain", "instance-0000000a").stdout
    assert "host-policy.xml" in explained
    assert machine.path(f"{SNIPPETS}/snippets/kvmi-hookscript").exists()


@pytest.mark.parametrize(
    "page",
    [page for page in sorted(pages.MAN.glob("*.[1-8]")) if pages.man_commands(page)],
    ids=lambda page: page.name,
)
def test_a_manual_pages_commands_run_as_printed(
    machine: SecondHost, web1: Path, page: Path
) -> None:
    for words in (("set", "web1", str(web1 / "policy.xml"), "--config"), ("start", "web1")):
        assert machine.cli(*words).returncode == 0

    for command in pages.man_commands(page):
        assert command.text not in NOT_RUN
        run(machine, web1, command)
