# SPDX-License-Identifier: Apache-2.0
"""A sound host and a sound VM, as facts, to be changed by one thing at a time."""

from __future__ import annotations

from typing import Final

from kvmi_libvirt.abi.probing import Outcome
from kvmi_libvirt.doctor.facts import (
    Access,
    AgentFacts,
    ConfigFacts,
    DaemonFacts,
    HookFacts,
    KernelFacts,
    KvmFacts,
    LibvirtFacts,
    Listener,
    ProcessFacts,
    RecordFacts,
    SecurityFacts,
    SocketFacts,
    SocketsFacts,
    StateFacts,
    ToolFacts,
    VmFacts,
)
from kvmi_libvirt.policy.model import Mode, Policy, UnixSource

QEMU_UID: Final = 64055
TOOL_UID: Final = 990
HOOK_PATH: Final = "/etc/libvirt/hooks/qemu.d/50-kvmi-libvirt"


def access(path: str, *, uid: int = 0, mode: int = 0o755, owner: str | None = None) -> Access:
    name = owner or ("root" if uid == 0 else f"uid{uid}")
    return Access(path=path, uid=uid, owner=name, gid=0, group="root", mode=mode)


HOOK: Final = HookFacts(
    path=HOOK_PATH,
    exists=True,
    is_ours=True,
    is_executable=True,
    is_current=True,
    python="/opt/venv/bin/python3",
    python_program="/usr/bin/python3.11",
    version="1.0",
)
DAEMON: Final = DaemonFacts(
    name="libvirtd",
    pid=4711,
    since="2026-01-02 03:04:05",
    knows_hooks=True,
    reload="systemctl reload libvirtd",
    has_ptrace=True,
)
LIBVIRT: Final = LibvirtFacts(is_installed=True, daemons=(DAEMON,), version="9.0.0")
KERNEL: Final = KernelFacts(outcome=Outcome.FOUND, abi="v12", why="KVMI v12")
KVM: Final = KvmFacts(access=access("/dev/kvm", mode=0o660), user="libvirt-qemu", may_open=True)
SECURITY: Final = SecurityFacts(is_root=True)
CONFIG: Final = ConfigFacts(has_host_policy=True)
STATE: Final = StateFacts(access=access("/run/kvmi-libvirt", mode=0o700), hooked=1)
SOCKET: Final = SocketFacts(
    access=access("/run/kvmi/t.sock"),
    directories=(access("/"), access("/run"), access("/run/kvmi")),
    listener=Listener(uids=frozenset({0}), who="tool, process 12 of root"),
)
SOCKETS: Final = SocketsFacts(directory=access("/run/kvmi"), sockets=(SOCKET,), qemu_uid=QEMU_UID)
AGENT: Final = AgentFacts(
    path="/run/kvmi-libvirt/agent.sock",
    access=access("/run/kvmi-libvirt/agent.sock", mode=0o600),
    pid=99,
)
POLICY: Final = Policy(mode=Mode.OPTIONAL, source=UnixSource(path="/run/kvmi/t.sock"))
VM: Final = VmFacts(
    name="web1",
    uuid="5a4a2b4e-7c1d-4e0f-9a52-0d6f6f1b0a01",
    is_active=True,
    policy=POLICY,
    policy_source="XML of domain 'web1':5",
    emulator="/usr/bin/qemu-system-x86_64",
    vcpus=2,
    process=ProcessFacts(pid=55, pidfile="/run/libvirt/qemu/web1.pid", vcpus=2),
    tool=ToolFacts(where="unix:/run/kvmi/t.sock", listens=True, socket=SOCKET),
    record=RecordFacts(
        state="hooked", source="unix:/run/kvmi/t.sock", since="2026-01-02T03:04:05Z", commands=2
    ),
)
