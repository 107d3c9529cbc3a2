# SPDX-License-Identifier: Apache-2.0
"""``make demo``: what the kernel side allows a tool, beside what the XML asked for.

Then the veto: the same VM does not start without its tool. On a real libvirt and a
real QEMU, with the KVMI kernel emulated; on a stand-in process where there is no
/dev/kvm. Needs root; removes everything it made.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import host

if TYPE_CHECKING:
    from collections.abc import Iterator

NAME: Final = "kvmi-demo"
UUID: Final = "6b766d69-6465-6d6f-8000-6b766d692d31"
SOCKET: Final = host.SOCKET_DIR / f"{NAME}.sock"
BIN: Final = Path(sys.executable).parent
VIRSH: Final = ("virsh", "-q", "-c", "qemu:///system")

ELEMENT: Final = f"""\
<kvmi:introspection xmlns:kvmi="urn:kvmi-libvirt:introspection:1.0" mode="required">
  <kvmi:source type="unix" path="{SOCKET}"/>
  <kvmi:commands default="deny">
    <kvmi:allow name="KVMI_VM_GET_INFO"/>
    <kvmi:allow name="KVMI_VM_READ_PHYSICAL"/>
    <kvmi:allow name="KVMI_VM_PAUSE_VCPU"/>
  </kvmi:commands>
  <kvmi:events default="deny">
    <kvmi:allow name="KVMI_VM_EVENT_UNHOOK"/>
    <kvmi:allow name="KVMI_VCPU_EVENT_BREAKPOINT"/>
  </kvmi:events>
</kvmi:introspection>
"""

_TEXT_WIDTH: Final = 88


class DemoError(Exception):
    """The demo did not show what it should; one line."""


def main(argv: list[str] | None = None) -> int:
    """Run the demo; return 0 when everything was as it should be."""
    parser = argparse.ArgumentParser(description="show kvmi-libvirt at work")
    parser.add_argument(
        "--stand-in", action="store_true", help="do without /dev/kvm, libvirt and QEMU"
    )
    args = parser.parse_args(argv)
    if os.geteuid() != 0:
        print("demo: run it as root (make demo uses sudo)", file=sys.stderr)
        return 1
    started_at = time.monotonic()
    try:
        with host.directories():
            if args.stand_in or not has_kvm():
                demo_on_standin(asked=args.stand_in)
            else:
                demo_on_libvirt()
    except (DemoError, host.HostError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    print(f"\nDone in {time.monotonic() - started_at:.0f} s; everything it made is removed.")
    return 0


def has_kvm() -> bool:
    """Say whether /dev/kvm can be used."""
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return False
    return True


# -- on libvirt --------------------------------------------------------------------------


def demo_on_libvirt() -> None:
    """Show it with virsh, a real QEMU and the emulated kernel."""
    with (
        host.libvirtd(),
        host.hook_installed() as hook,
        host.public_directory() as directory,
    ):
        rom = directory / "marker.rom"
        rom.write_bytes(host.marker_rom())
        emulator = host.emulator(BIN / "kvmi-emulated-qemu", directory)
        xml = directory / f"{NAME}.xml"
        xml.write_text(domain_xml(emulator, rom))
        say(f"The libvirt hook is {hook}. The VM's XML carries this in <metadata>:")
        show(ELEMENT)
        say(
            f"and its <emulator> is {emulator}: QEMU on an emulated KVMI kernel, "
            "since this machine's kernel need not have KVMI."
        )
        run("kvmi-libvirt", "check", str(xml))
        virsh("define", str(xml))
        try:
            with probe() as tool:
                virsh("start", NAME)
                answers = result_of(tool)
                compare(xml, answers)
                virsh("qemu-monitor-command", NAME, '{"execute":"query-status"}')
                run("kvmi-libvirt", "status")
                virsh("destroy", NAME)
            say('Now the veto. mode is "required", and the tool is gone:')
            refused = virsh("start", NAME, must_fail=True)
            if "requires introspection" not in refused.stderr:
                raise DemoError(f"the veto gave no reason: {refused.stderr}")
        finally:
            subprocess.run([*VIRSH, "destroy", NAME], capture_output=True, check=False)
            subprocess.run([*VIRSH, "undefine", NAME], capture_output=True, check=False)


def domain_xml(emulator: Path, rom: Path) -> str:
    """Return a domain that needs no disk: its firmware writes to the serial port."""
    return f"""\
<domain type='kvm'>
  <name>{NAME}</name>
  <uuid>{UUID}</uuid>
  <metadata>
{textwrap.indent(ELEMENT, "    ")}  </metadata>
  <memory unit='MiB'>64</memory>
  <vcpu>2</vcpu>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <loader readonly='yes' type='rom'>{rom}</loader>
  </os>
  <devices>
    <emulator>{emulator}</emulator>
    <serial type='null'/>
    <memballoon model='none'/>
  </devices>
</domain>
"""


def virsh(*arguments: str, must_fail: bool = False) -> subprocess.CompletedProcess[str]:
    """Show and run a virsh command."""
    return run("virsh", *arguments, program=VIRSH, must_fail=must_fail)


# -- on a stand-in -----------------------------------------------------------------------


def demo_on_standin(*, asked: bool) -> None:
    """Show it on a process that has a stand-in for a VM fd: no KVM, no libvirt."""
    say(
        "As asked, this runs without /dev/kvm:"
        if asked
        else "There is no usable /dev/kvm here, so no VM can run."
    )
    say(
        "A stand-in process takes the place of QEMU. The hook, the rights and the refusal are "
        "the same; there is no guest, and no libvirt to say no to."
    )
    with host.public_directory() as directory, standin() as pid:
        xml = directory / f"{NAME}.xml"
        xml.write_text(domain_xml(Path("/nonexistent"), Path("/nonexistent")))
        say("Its XML carries this in <metadata>:")
        show(ELEMENT)
        run("kvmi-libvirt", "check", str(xml))
        target = ("--pid", str(pid), "--xml", str(xml))
        with probe() as tool:
            run("kvmi-libvirt", "hook", *target)
            answers = result_of(tool)
            compare(xml, answers)
            run("kvmi-libvirt", "status")
            run("kvmi-libvirt", "unhook", *target)
        say("Now the refusal. The tool is gone:")
        run("kvmi-libvirt", "hook", *target, must_fail=True)
    host.forget_vm(UUID)


@contextlib.contextmanager
def standin() -> Iterator[int]:
    """Run a stand-in VM process on the emulated kernel for the block; yield its pid."""
    command = [
        *(str(BIN / "kvmi-libvirt"), "emulate", "--stand-in", "--"),
        *(sys.executable, "-m", "kvmi_libvirt.emulator.standin"),
        *("--name", NAME, "--uuid", UUID, "--vcpus", "2"),
    ]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            if not line.startswith("pid "):
                raise DemoError("the stand-in process did not start")
            yield int(line.split()[1])
        finally:
            process.terminate()


# -- both --------------------------------------------------------------------------------


@contextlib.contextmanager
def probe() -> Iterator[subprocess.Popen[str]]:
    """Run ``kvmi-libvirt probe`` as the introspection tool for the block."""
    arguments = ["probe", "--listen", f"unix:{SOCKET}", "--json"]
    print(f"\n$ kvmi-libvirt {' '.join(arguments)} &")
    with subprocess.Popen(
        [BIN / "kvmi-libvirt", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stderr is not None
            line = process.stderr.readline()
            if not line.startswith("listening"):
                raise DemoError(f"the probe does not listen: {line.strip()}")
            yield process
        finally:
            process.terminate()


def result_of(tool: subprocess.Popen[str]) -> dict[str, Any]:
    """Return what the probe learnt."""
    assert tool.stdout is not None
    line = tool.stdout.readline()
    if not line:
        raise DemoError("the probe ended without a result")
    found: dict[str, Any] = json.loads(line)
    return found


def compare(xml: Path, answers: dict[str, Any]) -> None:
    """Print what was asked beside what is allowed; DemoError where they differ."""
    plan = json.loads(run("kvmi-libvirt", "plan", "--json", str(xml), quiet=True).stdout)
    names = json.loads(run("kvmi-libvirt", "names", "--json", quiet=True).stdout)
    asked = {step["name"] for step in plan["steps"] if step["allow"]}
    always = {entry["name"] for entry in names["commands"] if entry["always_allowed"]}
    say(
        f"The kernel side ({answers['abi']}) now answers the tool, "
        "for every command and event it knows:"
    )
    print(f"  {'':36}{'the XML':10}the kernel")
    wrong = []
    for kind in ("commands", "events"):
        for name, verdict in answers[kind].items():
            wanted = "always" if name in always else "allow" if name in asked else "deny"
            print(f"  {name:36}{wanted:10}{verdict}")
            if (wanted != "deny") != (verdict == "allowed"):
                wrong.append(name)
    missing = asked - {*answers["commands"], *answers["events"]}
    if wrong or missing:
        raise DemoError(f"not as asked: {', '.join(sorted({*wrong, *missing}))}")
    print("  Exactly as asked.")


def say(text: str) -> None:
    """Print a paragraph."""
    print("\n" + textwrap.fill(text, _TEXT_WIDTH))


def show(text: str) -> None:
    """Print an indented block."""
    print(textwrap.indent(text, "    "), end="")


def run(
    *arguments: str,
    program: tuple[str, ...] = (),
    must_fail: bool = False,
    quiet: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Show and run a command; DemoError unless it succeeds, or fails, as it should."""
    name, *rest = arguments
    if not quiet:
        print(f"\n$ {' '.join(arguments)}", flush=True)
    command = [*(program or (str(BIN / name),)), *rest]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    if not quiet:
        show(result.stdout)
        show(result.stderr)
        if result.stdout + result.stderr and not (result.stdout + result.stderr).endswith("\n"):
            print()
    if (result.returncode != 0) != must_fail:
        raise DemoError(f"'{' '.join(arguments)}' ended with {result.returncode}")
    return result


if __name__ == "__main__":
    sys.exit(main())
