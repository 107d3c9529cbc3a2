# SPDX-License-Identifier: Apache-2.0
"""Proxmox VE: a real QEMU, started as qemu-server does, and the hookscript as it is called.

What Proxmox VE does itself (the phases, its files, its use of the monitor) is done here
as its sources do it; there is no Proxmox VE on a development machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import host
import pytest
from agent_rig import RunningAgent
from live_support import BIN, NAMESPACE, allowed, cli, probe
from patient_tool import PatientTool
from support import wait_until

from kvmi_libvirt.abi.revisions import ALWAYS_ALLOWED
from kvmi_libvirt.agent.jobs import Jobs
from kvmi_libvirt.agent.jobs import Places as JobPlaces
from kvmi_libvirt.agent.managers import Proxmox
from kvmi_libvirt.errors import UnsupportedByKernel
from kvmi_libvirt.kernel import running_abi
from kvmi_libvirt.policy.host import HOST_POLICY_PATH
from kvmi_libvirt.proxmox import Hookscript, Phase
from kvmi_libvirt.proxmoxfiles import Places
from kvmi_libvirt.qmp import Monitor
from kvmi_libvirt.state import STATE_DIR, StateDir

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from two_hosts import SecondHost

pytestmark = [
    pytest.mark.kvm,
    pytest.mark.seccomp,
    pytest.mark.skipif(os.geteuid() != 0, reason="QEMU is root's on Proxmox VE: run as root"),
    pytest.mark.skipif(Path("/etc/pve/local").exists(), reason="this is a Proxmox VE node"),
]

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "hooks" / "proxmox" / "kvmi-hookscript"
RUN = Path("/var/run/qemu-server")
CLUSTER = Path("/etc/pve/kvmi")
CONFIGS = Path("/etc/pve/qemu-server")
LOCAL = Path("/etc/kvmi-libvirt/proxmox")
COMMANDS = {"KVMI_VM_GET_INFO", "KVMI_VM_READ_PHYSICAL"}
VMID = 9100


def hookscript(vmid: int, phase: str) -> list[str | Path]:
    """Return the command that Proxmox VE runs.

    Before the start the hookscript asks the kernel itself: that has to be the emulated
    one as well, which QEMU will run on.
    """
    emulated = (BIN / "kvmi-libvirt", "emulate", "--") if phase == "pre-start" else ()
    return [*emulated, SCRIPT, str(vmid), phase]


@dataclass
class Machine:
    """One VM of the node."""

    kvm: Path
    serial: Path
    vmid: int = VMID
    uuid: str = field(default_factory=lambda: str(uuid.uuid4()))

    @property
    def socket(self) -> Path:
        """Where its tool listens."""
        return host.SOCKET_DIR / f"pve-{self.vmid}.sock"

    def element(self, mode: str = "required", inner: str = "") -> str:
        """Return a policy for it."""
        return (
            f"<introspection xmlns='{NAMESPACE}' mode='{mode}'>"
            f"<source type='unix' path='{self.socket}'/>{inner}<handshake timeout='1'/>"
            "<commands><allow name='VM_GET_INFO'/><allow name='VM_READ_PHYSICAL'/></commands>"
            "</introspection>"
        )

    def configure(self, *lines: str) -> None:
        """Write its configuration, as qm does."""
        text = ("#freeze%3A 1", "name: web", "tags: kvmi", *lines, "", "[snap]", "freeze: 1", "")
        (CONFIGS / f"{self.vmid}.conf").write_text("\n".join(text), encoding="utf-8")

    def hook(self, phase: str) -> subprocess.CompletedProcess[str]:
        """Run the hookscript as exec_hookscript() does; its output is the task log."""
        return subprocess.run(
            hookscript(self.vmid, phase),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=100,
            check=False,
        )

    def command_line(self, *state: str, emulated: bool = True) -> list[str | Path]:
        """Return the arguments of config_to_command(); -id and -bios are of this machine."""
        qmp = f"socket,id=qmp,path={RUN}/{self.vmid}.qmp,server=on,wait=off"
        program = BIN / "kvmi-emulated-qemu" if emulated else self.kvm
        events = "socket,id=qmp-event,path=/var/run/qmeventd.sock,reconnect=5"
        return [
            *(program, "-id", str(self.vmid), "-name", "web,debug-threads=on"),
            *("-no-shutdown", "-chardev", qmp, "-mon", "chardev=qmp,mode=control"),
            *("-chardev", events, "-mon", "chardev=qmp-event,mode=control"),
            *("-pidfile", f"{RUN}/{self.vmid}.pid", "-daemonize"),
            *("-smbios", f"type=1,uuid={self.uuid}"),
            *("-smp", "2,sockets=1,cores=2,maxcpus=2", "-nodefaults"),
            *("-vnc", f"unix:{RUN}/{self.vmid}.vnc,password=on"),
            *("-cpu", "qemu64,+kvm_pv_eoi,+kvm_pv_unhalt", "-m", "64"),
            *("-machine", "type=pc", "-accel", "kvm", "-bios", self.kvm.parent / "rom"),
            *("-serial", f"file:{self.serial}", *state),
        ]

    def start_qemu(self, *state: str, emulated: bool = True) -> int:
        """Start QEMU and return its pid."""
        subprocess.run(
            self.command_line(*state, emulated=emulated),
            stdin=subprocess.DEVNULL,
            env={**os.environ, "KVMI_QEMU": str(self.kvm)},
            check=True,
            timeout=60,
        )
        return self.pid()

    def pid(self) -> int:
        """Return QEMU's process id."""
        return int((RUN / f"{self.vmid}.pid").read_text())

    def run_state(self) -> str:
        """Return QEMU's run state."""
        return run_state_at(RUN / f"{self.vmid}.qmp")

    def status(self) -> dict[str, object] | None:
        """Return what ``status`` says of the VM, by its number."""
        result = cli("status", "--json", str(self.vmid))
        if result.returncode == 5:
            return None
        (found,) = json.loads(result.stdout)
        assert isinstance(found, dict)
        return found

    def guest_output_len(self) -> int:
        """Return how many bytes the guest has written to its serial port."""
        return self.serial.stat().st_size if self.serial.exists() else 0

    def has_ended(self, pid: int) -> bool:
        """Say whether QEMU's process is gone; nobody here is its parent."""
        return not Path(f"/proc/{pid}").exists()

    def kill(self) -> None:
        """End QEMU, if it runs, and remove what it leaves."""
        with contextlib.suppress(OSError, ValueError):
            pid = self.pid()
            os.kill(pid, signal.SIGTERM)
            wait_until(lambda: self.has_ended(pid), what="QEMU ended")
        for suffix in ("pid", "qmp", "vnc"):
            (RUN / f"{self.vmid}.{suffix}").unlink(missing_ok=True)
        self.hook("post-stop")


@pytest.fixture
def node() -> Iterator[Path]:
    """Have the directories of a Proxmox VE node, as pmxcfs shows them."""
    made = [path for path in (Path("/etc/pve"), RUN, LOCAL) if not path.exists()]
    with contextlib.ExitStack() as stack:
        for path in made:
            stack.callback(shutil.rmtree, path, ignore_errors=True)
        for path in (CLUSTER, CONFIGS, RUN, LOCAL):
            path.mkdir(mode=0o755, parents=True, exist_ok=True)
            stack.callback(_empty, path)
        stack.enter_context(host.directories())
        yield stack.enter_context(host.public_directory())


def _empty(directory: Path) -> None:
    for file in directory.glob(f"{VMID // 10}*"):
        file.unlink()


@pytest.fixture(scope="session")
def kvm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a QEMU that takes "-id VMID" as Proxmox VE's own does."""
    directory = tmp_path_factory.mktemp("pve")
    library = directory / "pve_id.so"
    source = ROOT / "tests" / "live" / "victims" / "pve_id.c"
    flags = ("-O1", "-Wall", "-Werror", "-shared", "-fPIC")
    subprocess.run(["cc", *flags, "-o", library, source, "-ldl"], check=True)
    script = directory / "kvm"
    script.write_text(
        f'#!/bin/sh\nexec env LD_PRELOAD={library} /usr/bin/qemu-system-x86_64 "$@"\n'
    )
    script.chmod(0o755)
    (directory / "rom").write_bytes(host.marker_rom())
    return script


@pytest.fixture
def machine(node: Path, kvm: Path) -> Iterator[Machine]:
    made = Machine(kvm, node / "serial")
    made.configure()
    try:
        yield made
    finally:
        made.kill()


def cluster_file(name: str, text: str) -> Path:
    """Write a file as pmxcfs keeps it: root's and www-data's, whatever umask says."""
    path = CLUSTER / name
    path.write_text(text, encoding="utf-8")
    os.chown(path, 0, 33)
    path.chmod(0o640)
    return path


def test_a_vm_is_hooked_as_its_file_in_the_cluster_says(machine: Machine) -> None:
    cluster_file(f"{VMID}.xml", machine.element())
    with probe(machine.socket) as tool:
        before = machine.hook("pre-start")
        assert (before.returncode, before.stdout) == (0, "")
        pid = machine.start_qemu()

        after = machine.hook("post-start")

        answers = tool.result()
        assert (answers["name"], answers["uuid"]) == (str(VMID), machine.uuid)
        assert allowed(answers["commands"]) == {*COMMANDS, *ALWAYS_ALLOWED}
        rights = "2 commands and 0 events allowed"
        line = f"kvmi-libvirt: VM {VMID}: hooked, by unix:{machine.socket} (v12): {rights}\n"
        assert (after.returncode, after.stdout) == (0, line)
        found = machine.status()
        assert found is not None
        assert (found["state"], found["pid"], found["domain"]) == ("hooked", pid, str(VMID))
        assert machine.run_state() == "running"

        # Run again, by hand: nothing happens to it.
        again = machine.hook("post-start")
        assert again.returncode == 0
        assert "hooked already" in again.stdout

        # Before the stop it stays hooked: the guest may take its time, or refuse.
        assert (machine.hook("pre-stop").returncode, machine.run_state()) == (0, "running")
        assert machine.status() == found
        execute_at(RUN / f"{VMID}.qmp", "quit")
        wait_until(lambda: machine.has_ended(pid), what="QEMU ended")
        after = machine.hook("post-stop")
        assert (after.returncode, after.stdout) == (0, "")
        assert not list(Path("/run/kvmi-libvirt").glob(f"{machine.uuid}.*"))


@pytest.mark.parametrize("place", ["cluster", "node"])
def test_an_assignment_of_the_host_comes_before_the_file(machine: Machine, place: str) -> None:
    policy = f"""<host-policy xmlns="{NAMESPACE}"><assign mode="required">
      <match proxmox-vmid="{VMID}"/><source type="unix" path="{machine.socket}"/>
      <commands><allow name="VM_GET_INFO"/></commands></assign></host-policy>"""
    file = machine.element().replace("VM_GET_INFO", "VM_PAUSE_VCPU")
    (LOCAL / f"{VMID}.xml").write_text(file, encoding="utf-8")
    with contextlib.ExitStack() as stack:
        if place == "cluster":
            stack.callback(cluster_file("host-policy.xml", policy).unlink)
        else:
            stack.enter_context(host.host_policy(policy))
        tool = stack.enter_context(probe(machine.socket))
        assert machine.hook("pre-start").returncode == 0
        machine.start_qemu()
        assert machine.hook("post-start").returncode == 0

        assert allowed(tool.result()["commands"]) == {"KVMI_VM_GET_INFO", *ALWAYS_ALLOWED}


def test_freeze_hooks_before_the_first_instruction(machine: Machine) -> None:
    machine.configure("freeze: 1")
    cluster_file(f"{VMID}.xml", machine.element())
    with probe(machine.socket) as tool:
        machine.start_qemu("-S")
        assert (machine.run_state(), machine.guest_output_len()) == ("prelaunch", 0)

        after = machine.hook("post-start")

        assert after.returncode == 0
        assert "hooked before its first instruction, by unix:" in after.stdout
        assert allowed(tool.result()["commands"]) == {*COMMANDS, *ALWAYS_ALLOWED}
        assert machine.run_state() == "running"
        wait_until(lambda: machine.guest_output_len() > 0, what="the guest runs")


@pytest.mark.parametrize(
    ("lines", "why"),
    [((), "started paused by somebody else"), (("freeze: 1", "lock: backup"), "a backup's start")],
)
def test_a_vm_that_others_have_paused_stays_paused(
    machine: Machine, lines: tuple[str, ...], why: str
) -> None:
    machine.configure(*lines)
    cluster_file(f"{VMID}.xml", machine.element())
    with probe(machine.socket) as tool:
        machine.start_qemu("-S")
        assert machine.hook("post-start").returncode == 0
        tool.result()
        assert machine.run_state() == "prelaunch", why


def test_a_frozen_vm_without_policy_stays_frozen_and_that_is_told(machine: Machine) -> None:
    machine.configure("freeze: 1")
    machine.start_qemu("-S")

    after = machine.hook("post-start")

    assert after.returncode == 0
    assert f"frozen as its configuration says: qm resume {VMID}" in after.stdout
    assert machine.run_state() == "prelaunch"


def test_a_vm_that_was_left_frozen_is_resumed_by_the_phase_run_again(machine: Machine) -> None:
    machine.configure("freeze: 1", "lock: backup")
    cluster_file(f"{VMID}.xml", machine.element())
    with probe(machine.socket):
        machine.start_qemu("-S")
        assert machine.hook("post-start").returncode == 0
        machine.configure("freeze: 1")

        again = machine.hook("post-start")

        assert "hooked already before its first instruction, by unix:" in again.stdout
        assert machine.run_state() == "running"


@pytest.mark.parametrize("mode", ["required", "optional"])
def test_early_takes_a_frozen_start(machine: Machine, mode: str) -> None:
    early = machine.element(mode).replace(" mode=", " early='yes' mode=")
    cluster_file(f"{VMID}.xml", early)
    with probe(machine.socket) as tool:
        before = machine.hook("pre-start")
        assert before.returncode == (1 if mode == "required" else 0)
        assert f"qm set {VMID} --freeze 1" in before.stdout

        machine.configure("freeze: 1")
        before = machine.hook("pre-start")
        assert (before.returncode, before.stdout) == (0, "")
        machine.start_qemu("-S")
        assert "before its first instruction" in machine.hook("post-start").stdout
        tool.result()


def test_required_and_no_tool_is_refused_before_the_start(machine: Machine) -> None:
    cluster_file(f"{VMID}.xml", machine.element())

    before = machine.hook("pre-start")

    reason = f"no tool listens on unix:{machine.socket}: start the tool first"
    assert (before.returncode, before.stdout) == (1, f"kvmi-libvirt: VM {VMID}: {reason}\n")


@pytest.mark.parametrize("state", [(), ("-S",)])
def test_required_that_fails_after_the_start_ends_the_vm(
    machine: Machine, state: tuple[str, ...]
) -> None:
    machine.configure(*(["freeze: 1"] if state else []))
    cluster_file(f"{VMID}.xml", machine.element())
    with host.bad_tool(machine.socket, host.Tool.SILENT):
        assert machine.hook("pre-start").returncode == 0  # somebody listens
        pid = machine.start_qemu(*state)

        after = machine.hook("post-start")

    assert after.returncode == 1
    assert after.stdout.count("\n") == 1
    assert "did not answer within" in after.stdout
    assert after.stdout.endswith("; it requires introspection, so it has been stopped\n")
    wait_until(lambda: machine.has_ended(pid), what="QEMU ended")
    if state:
        assert machine.guest_output_len() == 0  # not one instruction ran


def test_required_and_a_kernel_without_kvmi_ends_the_vm(machine: Machine) -> None:
    cluster_file(f"{VMID}.xml", machine.element())
    with probe(machine.socket):
        pid = machine.start_qemu(emulated=False)
        after = machine.hook("post-start")

    assert after.returncode == 1
    assert "has no KVM introspection (KVMI)" in after.stdout
    wait_until(lambda: machine.has_ended(pid), what="QEMU ended")


def test_optional_starts_whatever_fails(machine: Machine) -> None:
    machine.configure("freeze: 1")
    cluster_file(f"{VMID}.xml", machine.element("optional"))

    before = machine.hook("pre-start")
    machine.start_qemu("-S")
    after = machine.hook("post-start")

    for result in (before, after):
        assert result.returncode == 0
        assert result.stdout.startswith(f"kvmi-libvirt: VM {VMID}: warning: no tool listens on ")
    assert machine.run_state() == "running"
    found = machine.status()
    assert found is not None
    assert (found["state"], found["mode"]) == ("failed", "optional")

    # The tool comes, and the operator runs the phase by hand.
    with probe(machine.socket) as tool:
        assert machine.hook("post-start").returncode == 0
        assert allowed(tool.result()["commands"]) == {*COMMANDS, *ALWAYS_ALLOWED}


def test_run_by_hand_it_never_ends_a_vm_that_was_hooked(machine: Machine) -> None:
    cluster_file(f"{VMID}.xml", machine.element())
    with probe(machine.socket, "--once") as tool:
        machine.start_qemu()
        assert machine.hook("post-start").returncode == 0
        tool.process.communicate(timeout=30)

    def is_closed() -> bool:
        found = machine.status()
        return found is not None and found["state"] == "failed"

    wait_until(is_closed, what="the channel's end is seen")
    again = machine.hook("post-start")
    assert again.returncode == 1
    assert again.stdout.endswith("; it has no introspection\n")
    assert machine.run_state() == "running"


@pytest.mark.parametrize("mode", ["required", "optional"])
def test_a_policy_that_is_wrong_is_told_with_its_line(machine: Machine, mode: str) -> None:
    file = cluster_file(f"{VMID}.xml", machine.element(mode).replace("GET_INFO", "GET_INFOS"))

    before = machine.hook("pre-start")

    assert before.returncode == (1 if mode == "required" else 0)
    assert f"{file}:1: " in before.stdout
    assert before.stdout.count("\n") == 1


def test_a_file_that_others_could_have_written_stops_the_start(machine: Machine) -> None:
    cluster_file(f"{VMID}.xml", machine.element()).chmod(0o666)

    before = machine.hook("pre-start")

    assert before.returncode == 1
    assert "is writable by others" in before.stdout


def test_a_vm_without_policy_starts_and_is_told_so(machine: Machine) -> None:
    before = machine.hook("pre-start")
    machine.start_qemu()
    after = machine.hook("post-start")

    assert (before.returncode, after.returncode, after.stdout) == (0, 0, "")
    assert "no introspection" in before.stdout
    assert machine.status() is None


def test_another_process_in_the_pidfile_is_left_alone(machine: Machine) -> None:
    cluster_file(f"{VMID}.xml", machine.element())
    other = Machine(machine.kvm, machine.serial.with_name("other"), vmid=VMID + 1)
    try:
        pid = other.start_qemu()
        (RUN / f"{VMID}.pid").write_text(f"{pid}\n")
        with probe(machine.socket):
            after = machine.hook("post-start")
        assert after.returncode == 1
        assert f"is not the QEMU of VM {VMID}" in after.stdout
        assert other.run_state() == "running"
    finally:
        (RUN / f"{VMID}.pid").unlink()
        other.kill()


def test_two_vms_with_one_smbios_uuid_are_told_apart(machine: Machine) -> None:
    cluster_file(f"{VMID}.xml", machine.element())
    twin = Machine(machine.kvm, machine.serial.with_name("twin"), VMID + 1, machine.uuid)
    cluster_file(f"{twin.vmid}.xml", twin.element("optional"))
    try:
        with probe(machine.socket) as tool, probe(twin.socket):
            machine.start_qemu()
            assert machine.hook("post-start").returncode == 0
            tool.result()
            assert twin.hook("pre-start").stdout == ""  # its configuration does not tell
            twin.configure(f"smbios1: uuid={twin.uuid.upper()}")
            before = twin.hook("pre-start")
            assert before.returncode == 0
            assert f"warning: VM {VMID} has the same SMBIOS UUID" in before.stdout
            twin.start_qemu()
            after = twin.hook("post-start")

            assert f"VM {VMID} has the same SMBIOS UUID" in after.stdout
            found = machine.status()
            assert found is not None
            assert (found["domain"], found["state"]) == (str(VMID), "hooked")
            # The twin's end does not forget the other one.
            twin.kill()
            assert machine.status() == found
    finally:
        twin.kill()


def test_usage_is_one_line(node: Path) -> None:
    for arguments in ((), ("x", "pre-start"), (str(VMID), "mid-start")):
        done = subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)


# -- the package is gone -----------------------------------------------------------------


@pytest.fixture
def broken_script(tmp_path: Path) -> Path:
    copy = tmp_path / "kvmi-hookscript"
    copy.write_text(SCRIPT.read_text().replace('PYTHON = ""', 'PYTHON = "/usr/bin/python3"'))
    copy.chmod(0o755)
    return copy


def run(script: Path, phase: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [script, str(VMID), phase], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("quote", ["'", '"'])
@pytest.mark.parametrize("by", ["file", "proxmox-vmid='9100'", "name='91*'"])
def test_without_the_package_the_script_alone_refuses_what_demands(
    machine: Machine, broken_script: Path, by: str, quote: str
) -> None:
    if by == "file":
        cluster_file(f"{VMID}.xml", machine.element().replace("'", quote))
    else:
        policy = (
            f"<host-policy xmlns='{NAMESPACE}'><!-- <assign mode='optional'><match {by}/></assign>"
            "--><assign mode='optional'><match nova-flavor='x'/></assign>"
            f"<assign mode='required'><source type='unix' path='/x'/><match {by}/></assign>"
            "</host-policy>"
        )
        cluster_file("host-policy.xml", policy.replace("'", quote))
    try:
        before = run(broken_script, "pre-start")
        assert (before.returncode, before.stderr.count("\n")) == (1, 1)
        assert "requires introspection" in before.stderr

        pid = machine.start_qemu()
        after = run(broken_script, "post-start")
        assert after.returncode == 1
        assert after.stderr.endswith("it has been stopped\n")
        wait_until(lambda: machine.has_ended(pid), what="QEMU ended")
    finally:
        (CLUSTER / "host-policy.xml").unlink(missing_ok=True)


def test_without_the_package_a_hooked_vm_runs_on(machine: Machine, broken_script: Path) -> None:
    cluster_file(f"{VMID}.xml", machine.element().replace("'", '"'))
    with probe(machine.socket) as tool:
        machine.start_qemu()
        assert machine.hook("post-start").returncode == 0
        tool.result()

        after = run(broken_script, "post-start")

        assert after.returncode == 1
        assert after.stderr.endswith("it runs on\n")
        assert machine.run_state() == "running"


@pytest.mark.parametrize("quote", ["'", '"'])
def test_without_the_package_others_start(
    machine: Machine, broken_script: Path, quote: str
) -> None:
    comment = f"<!--{machine.element()}-->"
    cluster_file(f"{VMID}.xml", comment + machine.element("optional").replace("'", quote))

    before, after = (run(broken_script, phase) for phase in ("pre-start", "post-start"))

    assert before.returncode == after.returncode == 0
    assert before.stderr.endswith("no policy requires introspection\n")
    assert after.stderr.endswith(f"; if it is frozen: qm resume {VMID}\n")


# -- by hand -----------------------------------------------------------------------------


def test_the_verbs_take_a_vmid(machine: Machine) -> None:
    file = cluster_file(f"{VMID}.xml", machine.element())
    name = str(VMID)
    explained = cli("explain", name)  # it does not run yet
    assert explained.returncode == 0, explained.stderr
    assert str(file) in explained.stdout
    assert cli("hook", name).returncode == 5
    with probe(machine.socket) as tool:
        machine.start_qemu()
        hooked = cli("hook", name)
        assert hooked.returncode == 0, hooked.stderr
        assert allowed(tool.result()["commands"]) == {*COMMANDS, *ALWAYS_ALLOWED}
        assert rights(machine) == COMMANDS

        assert cli("deny", name, "VM_READ_PHYSICAL").returncode == 0
        assert rights(machine) == {"KVMI_VM_GET_INFO"}
        ceiling = (
            f"<host-policy xmlns='{NAMESPACE}'><ceiling><commands><allow name='VM_GET_INFO'/>"
            "</commands></ceiling></host-policy>"
        )
        cluster = cluster_file("host-policy.xml", ceiling)  # the cluster's is this node's
        try:
            above = cli("allow", name, "VM_READ_PHYSICAL")
            assert "above this host's ceiling" in above.stderr
            refused = cli("apply", name)
            assert refused.returncode == 3
            assert "above this host's ceiling" in refused.stderr
        finally:
            cluster.unlink()
        assert cli("apply", name).returncode == 0
        assert rights(machine) == COMMANDS

        assert cli("unhook", name).returncode == 0
        found = machine.status()
        assert found is not None
        assert found["state"] == "unhooked"
        assert machine.run_state() == "running"


def rights(machine: Machine) -> set[str]:
    found: dict[str, Any] = machine.status() or {}
    return set(found.get("commands", ()))


# -- the agent ---------------------------------------------------------------------------


@pytest.fixture
def agent(node: Path, tmp_path: Path) -> Iterator[RunningAgent]:
    with RunningAgent(
        tmp_path,
        domains="proxmox",
        run_dir=RUN,
        state_dir=STATE_DIR,
        host_policy=HOST_POLICY_PATH,
        settings={"sweep-seconds": "1"},
    ) as running:
        yield running


def reconnecting(machine: Machine, mode: str = "required") -> str:
    return machine.element(mode).replace(
        "sock'/>", "sock'><reconnect enabled='yes' timeout='2'/></source>"
    )


def wait_state(agent: RunningAgent, state: str) -> None:
    agent.wait(
        lambda: agent.status().get(str(VMID), {}).get("state") == state,
        what=f"VM {VMID} is {state}",
    )


def test_the_agent_calls_a_tool_that_comes_back(agent: RunningAgent, machine: Machine) -> None:
    cluster_file(f"{VMID}.xml", reconnecting(machine))
    with PatientTool(machine.socket) as tool:
        machine.start_qemu()
        assert machine.hook("post-start").returncode == 0
        assert cli("deny", str(VMID), "VM_READ_PHYSICAL").returncode == 0
        wait_state(agent, "hooked")
        assert tool.drop(machine.uuid) == 1
        assert tool.wait(at_least=1, timeout_s=60.0) == 1
        wait_state(agent, "hooked")
        # What was changed by hand is kept, as under libvirt.
        assert rights(machine) == {"KVMI_VM_GET_INFO"}
        assert machine.run_state() == "running"

        # The policy is another one by now: a reload makes it count.
        cluster_file(f"{VMID}.xml", reconnecting(machine).replace("VM_READ", "VM_WRITE"))
        agent.reload()
        agent.wait(
            lambda: rights(machine) == {"KVMI_VM_GET_INFO", "KVMI_VM_WRITE_PHYSICAL"},
            what="the new policy is in force",
        )
        # pmxcfs is away for a moment: that is no policy that has ended.
        files = [CLUSTER / f"{VMID}.xml", CONFIGS / f"{VMID}.conf"]
        texts = [file.read_text() for file in files]
        for file in files:
            file.unlink()
        agent.reload()
        agent.wait(lambda: "does pve-cluster run" in agent.log.read_text(), what="it is told")
        assert rights(machine) == {"KVMI_VM_GET_INFO", "KVMI_VM_WRITE_PHYSICAL"}
        assert "does pve-cluster run" in cli("apply", str(VMID)).stderr
        files[1].write_text(texts[1])
        agent.reload()
        wait_state(agent, "unhooked")


def test_the_agent_hooks_an_optional_vm_when_its_tool_comes(
    agent: RunningAgent, machine: Machine
) -> None:
    cluster_file(f"{VMID}.xml", reconnecting(machine, "optional"))
    machine.start_qemu()
    assert "no tool listens on" in machine.hook("post-start").stdout
    wait_state(agent, "waiting")
    with probe(machine.socket) as tool:
        assert allowed(tool.result()["commands"]) == {*COMMANDS, *ALWAYS_ALLOWED}
        wait_state(agent, "hooked")


def test_an_agent_that_was_not_there_finds_what_runs(
    node: Path, machine: Machine, tmp_path: Path
) -> None:
    cluster_file(f"{VMID}.xml", reconnecting(machine))
    with probe(machine.socket, "--once") as once:
        machine.start_qemu()
        assert machine.hook("post-start").returncode == 0
        once.process.communicate(timeout=30)
    with (
        RunningAgent(
            tmp_path,
            domains="proxmox",
            run_dir=RUN,
            state_dir=STATE_DIR,
            host_policy=HOST_POLICY_PATH,
        ) as agent,
        probe(machine.socket) as tool,
    ):
        tool.result()
        wait_state(agent, "hooked")
        pid = machine.pid()
        execute_at(RUN / f"{VMID}.qmp", "quit")
        wait_until(lambda: machine.has_ended(pid), what="QEMU ended")
        agent.wait(lambda: not agent.status(), what="the agent has forgotten it")
        assert not list(STATE_DIR.glob(f"{machine.uuid}.*"))


def test_the_agent_leaves_a_start_to_the_hookscript(agent: RunningAgent, machine: Machine) -> None:
    # Were the first try the agent's, nothing would end a VM that requires introspection.
    cluster_file(f"{VMID}.xml", reconnecting(machine))
    with host.bad_tool(machine.socket, host.Tool.SILENT):
        pid = machine.start_qemu()
        agent.wait(lambda: agent.ping()["vms"] == 1, what="the agent sees the VM")
        agent.reload()
        agent.wait(lambda: agent.ping()["busy"] == 0, what="the agent has looked")
        assert agent.status() == {}

        after = machine.hook("post-start")

    assert after.stdout.endswith("; it requires introspection, so it has been stopped\n")
    wait_until(lambda: machine.has_ended(pid), what="QEMU ended")


def reconcile(machine: Machine, *, settled_s: float) -> dict[str, object] | None:
    places = JobPlaces(proxmox=Places())
    jobs = Jobs(places, manager=Proxmox(Places(), StateDir(), settled_s=settled_s))
    argument = {"name": str(VMID), "uuid": machine.uuid, "asked": "", "may_call": "yes"}
    outcome = jobs.run("reconcile", argument, b"")
    if outcome.channel is not None:
        os.close(outcome.channel)
    assert (outcome.record is None) == (outcome.retry_s is not None)
    return outcome.record


def test_a_vm_that_nobody_recorded_is_the_agents_once_it_has_settled(machine: Machine) -> None:
    cluster_file(f"{VMID}.xml", reconnecting(machine))
    with probe(machine.socket) as tool:
        machine.start_qemu()
        assert reconcile(machine, settled_s=1000.0) is None
        record = reconcile(machine, settled_s=0.0)
        assert record is not None
        assert (record["state"], record["domain"]) == ("hooked", str(VMID))
        tool.result()


def test_the_agent_never_takes_a_twin_for_the_vm_it_knows(
    agent: RunningAgent, machine: Machine
) -> None:
    cluster_file(f"{VMID}.xml", reconnecting(machine))
    twin = Machine(machine.kvm, machine.serial.with_name("twin"), VMID + 1, machine.uuid)
    cluster_file(f"{twin.vmid}.xml", reconnecting(twin, "optional"))
    try:
        with PatientTool(machine.socket) as tool, probe(twin.socket):
            twin.start_qemu()
            machine.start_qemu()
            assert machine.hook("post-start").returncode == 0
            agent.reload()
            agent.wait(lambda: "have one SMBIOS UUID" in agent.log.read_text(), what="told")
            wait_state(agent, "hooked")
            assert set(agent.status()) == {str(VMID)}
            assert tool.drop(machine.uuid) == 1
            assert tool.wait(at_least=1, timeout_s=60.0) == 1
            wait_state(agent, "hooked")
            assert twin.run_state() == "running"
    finally:
        twin.kill()


# -- migration ---------------------------------------------------------------------------


@pytest.mark.libvirt
@pytest.mark.parametrize("has_tool", [True, False])
def test_a_vm_that_arrives_is_hooked_before_its_memory_comes(
    machine: Machine, second_host: SecondHost, has_tool: bool
) -> None:
    there = second_host.path("/run/qemu-server")
    there.mkdir(exist_ok=True)
    cluster_file(f"{VMID}.xml", machine.element())
    incoming = second_host.path("/run/migration/pve.sock")
    environment = ("env", f"KVMI_QEMU={machine.kvm}", "PVE_MIGRATED_FROM=first")

    def hook(phase: str) -> subprocess.CompletedProcess[str]:
        return second_host.run(*environment, *hookscript(VMID, phase))

    with probe(machine.socket) as tool, contextlib.ExitStack() as stack:
        machine.start_qemu()
        assert machine.hook("post-start").returncode == 0
        tool.result()
        if has_tool:
            second_tool = stack.enter_context(second_host.probe(machine.socket))
        # Without, somebody listens who is none: it cannot be known before QEMU runs.
        else:
            place = second_host.path(machine.socket)
            stack.enter_context(host.bad_tool(place, host.Tool.CLOSES))
        assert hook("pre-start").returncode == 0
        started = second_host.run(
            *environment, *machine.command_line("-incoming", f"unix:{incoming}", "-S")
        )
        assert started.returncode == 0, started.stderr
        pid = int((there / f"{VMID}.pid").read_text())

        after = hook("post-start")

        if not has_tool:
            assert after.returncode == 1
            assert after.stdout == ""
            assert "it has been stopped" in after.stderr
            wait_until(lambda: machine.has_ended(pid), what="the target's QEMU ended")
            assert machine.run_state() == "running"
            return
        assert (after.returncode, after.stderr) == (0, "")
        assert allowed(second_tool.result()["commands"]) == {*COMMANDS, *ALWAYS_ALLOWED}
        target = there / f"{VMID}.qmp"
        assert run_state_at(target) == "inmigrate"

        execute_at(RUN / f"{VMID}.qmp", "migrate", uri=f"unix:{incoming}")
        wait_until(lambda: machine.run_state() == "postmigrate", what="the VM has moved")
        wait_until(lambda: run_state_at(target) == "paused", what="the VM has arrived")
        execute_at(target, "cont")
        (found,) = json.loads(second_host.cli("status", "--json", str(VMID)).stdout)
        assert (found["state"], found["pid"]) == ("hooked", pid)
        # By hand it can be changed there, as any other.
        denied = second_host.cli("deny", str(VMID), "VM_READ_PHYSICAL")
        assert denied.returncode == 0, denied.stderr
        assert second_host.cli("apply", str(VMID)).returncode == 0
        assert second_host.cli("unhook", "--now", str(VMID)).returncode == 0
        assert run_state_at(target) == "running"
        execute_at(target, "quit")
        wait_until(lambda: machine.has_ended(pid), what="the target's QEMU ended")


def run_state_at(path: Path) -> str:
    with Monitor(path, deadline=time.monotonic() + 30) as monitor:
        return monitor.status()


def execute_at(path: Path, command: str, **arguments: str) -> object:
    with Monitor(path, deadline=time.monotonic() + 30) as monitor:
        return monitor.execute(command, **arguments)


@pytest.mark.skipif(running_abi()[0] is not None, reason="this machine's own kernel has KVMI")
@pytest.mark.parametrize("mode", ["required", "optional"])
def test_a_kernel_without_kvmi_is_told_before_the_start(machine: Machine, mode: str) -> None:
    # /usr/bin/kvm is QEMU itself on Proxmox VE; a script, as here, may be anything.
    cluster_file(f"{VMID}.xml", machine.element(mode))
    places = Places(kvm=Path("/usr/bin/qemu-system-x86_64"))
    called = Hookscript(VMID, places=places)
    if mode == "required":
        with pytest.raises(UnsupportedByKernel, match="has no KVM introspection"):
            called.run(Phase.PRE_START)
    else:
        assert called.run(Phase.PRE_START).startswith("warning: the running kernel has no")
