# SPDX-License-Identifier: Apache-2.0
"""The libvirt hook as a whole process, against a Python that does nothing."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import host
import rig
from agent_rig import RunningAgent, write_status
from figures import Figure
from fleet import StandIn

from kvmi_libvirt import installer, introspect
from kvmi_libvirt.abi.v12 import V12
from kvmi_libvirt.agentclient import SOCKET_NAME
from kvmi_libvirt.introspect.calling import tool_channel
from kvmi_libvirt.policy.host import HOST_POLICY_PATH
from kvmi_libvirt.policy.model import UnixSource
from kvmi_libvirt.qemu.process import LIBVIRT_QEMU_RUN_DIR
from kvmi_libvirt.state import HOOKED, STATE_DIR, StateDir

if TYPE_CHECKING:
    from collections.abc import Iterator

NOOP_ROUNDS: Final = 60
FULL_ROUNDS: Final = 15
_ENVIRONMENT: Final = {"LC_ALL": "C", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
_BEFORE: Final = ("prepare", "start")  # what libvirt calls before "started"
_PYTHON: Final = ("/usr/bin/python3", "-IS", "-c", "pass")


def measure() -> Iterator[Figure]:
    """Measure the hook for a domain without introspection, and for one that is hooked.

    Raises OSError where an agent runs: the hook would hand everything over to it.
    """
    if host.answers(STATE_DIR / SOCKET_NAME):
        raise OSError("an agent runs on this host; stop it first")
    with tempfile.TemporaryDirectory(prefix="kvmi-bench-") as name:
        script = Path(name) / installer.HOOK_NAME
        script.write_bytes(installer.hook_text(sys.executable))
        script.chmod(0o755)
        plain = _domain("plain", str(uuid.uuid4()), "")
        noop_s, python_s = [], []
        for _ in range(NOOP_ROUNDS):
            noop_s.append(_timed((str(script), "plain", "started", "begin", "-"), plain))
            python_s.append(_timed(_PYTHON, b""))
        found = _full(script, Path(name))
    python = statistics.median(python_s)
    agent = statistics.median(found.agent_s)
    yield Figure(
        key="hook_noop_vs_python",
        value=statistics.median(noop_s) / python,
        unit="x",
        what="the hook for a VM without introspection, against python3 -IS -c pass",
        limit=1.5,
    )
    yield Figure(
        key="hook_full_vs_python",
        value=statistics.median(found.alone_s) / python,
        unit="x",
        what="the hook that hooks a VM, no agent, against the same",
    )
    yield Figure(
        key="hook_agent_vs_python",
        value=agent / python,
        unit="x",
        what="the hook that has an agent hook it, against the same",
    )
    yield Figure(
        key="hook_agent_less_handshake_vs_python",
        value=(agent - statistics.median(found.handshake_s)) / python,
        unit="x",
        what="that without the time in which the tool is called and answers",
        limit=3,
    )
    yield Figure(
        key="hook_agent_other_vs_python",
        value=statistics.median(found.other_s) / python,
        unit="x",
        what="the other calls of the hook at a start of that VM, with an agent",
        limit=3,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    # Seconds that the start of a VM waits for its hook: for "started" without an agent and
    # with one, for the operations before with one; and for how long the tool is called.
    alone_s: list[float]
    agent_s: list[float]
    other_s: list[float]
    handshake_s: list[float]


def _full(script: Path, directory: Path) -> _Found:
    socket_path = host.SOCKET_DIR / f"bench-{os.getpid()}.sock"
    name = f"kvmi-bench-{os.getpid()}"
    with host.directories(), rig.qemu(host.marker_rom()) as machine:
        LIBVIRT_QEMU_RUN_DIR.mkdir(parents=True, exist_ok=True)
        pidfile = LIBVIRT_QEMU_RUN_DIR / f"{name}.pid"
        pidfile.write_text(f"{machine.process.pid}\n")
        xml = _domain(name, machine.uuid, _element(socket_path))
        started = (str(script), name, "started", "begin", "-")
        others = [(str(script), name, operation, "begin", "-") for operation in _BEFORE]
        probe = [str(rig.BIN / "kvmi-libvirt"), "probe", "--listen", f"unix:{socket_path}"]
        with subprocess.Popen(
            probe, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as tool:
            try:
                assert tool.stderr is not None
                tool.stderr.readline()
                alone_s = _hooked_again(started, xml, machine, FULL_ROUNDS)
                vm = StandIn(name=name, uuid=machine.uuid, pid=machine.process.pid, vcpus=1)
                write_status(directory, vm, _element(socket_path))
                with RunningAgent(
                    directory,
                    domains=str(directory),
                    run_dir=LIBVIRT_QEMU_RUN_DIR,
                    state_dir=STATE_DIR,
                    host_policy=HOST_POLICY_PATH,
                ):
                    agent_s = _hooked_again(started, xml, machine, FULL_ROUNDS)
                    other_s = [
                        _timed(command, xml) for _ in range(FULL_ROUNDS) for command in others
                    ]
                handshake_s = [_handshake_s(machine, name, socket_path) for _ in range(FULL_ROUNDS)]
            finally:
                tool.terminate()
                pidfile.unlink()
                host.forget_vm(machine.uuid)
    return _Found(alone_s=alone_s, agent_s=agent_s, other_s=other_s, handshake_s=handshake_s)


def _handshake_s(machine: rig.Rig, name: str, socket_path: Path) -> float:
    domain = machine.domain(name)
    policy = rig.full_policy(UnixSource(path=str(socket_path)))
    began = time.monotonic()
    with tool_channel(machine.process, domain, policy, V12):
        return time.monotonic() - began


def _hooked_again(
    command: tuple[str, ...], xml: bytes, machine: rig.Rig, rounds: int
) -> list[float]:
    state = StateDir()
    found = []
    for _ in range(rounds):
        found.append(_timed(command, xml))
        recorded = state.load(machine.uuid)
        if recorded is None or recorded.state != HOOKED:
            raise RuntimeError(f"the hook did not hook: {recorded}")
        introspect.unhook_vm(machine.process, recorded, state=state)
    return found


def _element(socket_path: Path) -> str:
    return (
        '<k:introspection xmlns:k="urn:kvmi-libvirt:introspection:1.0" mode="required">'
        f'<k:source type="unix" path="{socket_path}"/>'
        '<k:commands><k:allow name="KVMI_VM_GET_INFO"/></k:commands></k:introspection>'
    )


def _domain(name: str, domain_uuid: str, element: str) -> bytes:
    return (
        f"<domain type='kvm'><name>{name}</name><uuid>{domain_uuid}</uuid>"
        f"<metadata>{element}</metadata><memory unit='MiB'>32</memory><vcpu>1</vcpu>"
        "<os><type arch='x86_64' machine='pc'>hvm</type></os></domain>"
    ).encode()


def _timed(command: tuple[str, ...], stdin: bytes) -> float:
    started = time.monotonic()
    result = subprocess.run(
        command, input=stdin, capture_output=True, env=_ENVIRONMENT, cwd="/", check=False
    )
    elapsed = time.monotonic() - started
    if result.returncode:
        raise RuntimeError(f"{command[0]} ended with {result.returncode}: {result.stderr!r}")
    return elapsed
