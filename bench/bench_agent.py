# SPDX-License-Identifier: Apache-2.0
"""The agent with a thousand hooked VMs: memory, idle CPU, a policy change, a restart.

VM processes without guests (see tools/fleet.py), a real VM of /dev/kvm each, on the
emulated kernel. KVMI_BENCH_VMS sets their number, for looking at how it grows.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from agent_rig import RunningAgent, Wanted, write_policy, write_status
from figures import Figure
from fleet import Fleet, raise_fd_limit
from patient_tool import PatientTool

if TYPE_CHECKING:
    from collections.abc import Iterator

COUNT: Final = int(os.environ.get("KVMI_BENCH_VMS", "1000"))
SUPERVISORS: Final = 2
IDLE_S: Final = 20.0
LET_GO_S: Final = 8.0
STATUS_ROUNDS: Final = 11
_TICK_S: Final = 1 / os.sysconf("SC_CLK_TCK")


def measure() -> Iterator[Figure]:
    """Measure an agent that finds all VMs running, hooks them, and keeps them."""
    raise_fd_limit()
    with tempfile.TemporaryDirectory(prefix="kvmi-bench-") as name:
        directory = Path(name)
        run_dir = directory / "run"
        with (
            Fleet(directory, run_dir=run_dir, supervisors=SUPERVISORS) as fleet,
            PatientTool(directory / "tool.sock"),
        ):
            vms = fleet.start([f"vm{number}" for number in range(COUNT)])
            for vm in vms:
                write_status(run_dir, vm)
            _allow(directory, "KVMI_VM_EVENT_UNHOOK")
            agent = RunningAgent(directory, domains=str(run_dir), run_dir=run_dir)
            agent.start()
            try:
                yield from _figures(agent, directory)
            finally:
                agent.stop()


def _figures(agent: RunningAgent, directory: Path) -> Iterator[Figure]:
    began = time.monotonic()
    _wait_hooked(agent, events=1)
    yield Figure(
        key="agent_1000_hook_s",
        value=time.monotonic() - began,
        unit="s",
        what=f"to hook all {COUNT} VMs that ran before the agent",
    )
    _allow(directory, "KVMI_VM_EVENT_UNHOOK", "KVMI_VCPU_EVENT_BREAKPOINT")
    began = time.monotonic()
    agent.reload()
    _wait_hooked(agent, events=2)
    yield Figure(
        key="agent_1000_apply_s",
        value=time.monotonic() - began,
        unit="s",
        what=f"a right added by the host's policy is in force on all {COUNT} VMs",
        limit=5.0,
    )
    yield Figure(
        key="agent_1000_status_ms",
        value=statistics.median(_timed_status(agent) for _ in range(STATUS_ROUNDS)) * 1e3,
        unit="ms",
        what="status of all VMs",
    )
    agent.kill()
    began = time.monotonic()
    agent.start()
    _wait_hooked(agent, events=2)
    yield Figure(
        key="agent_1000_reconcile_s",
        value=time.monotonic() - began,
        unit="s",
        what="from its start after a SIGKILL until it has looked at all VMs",
    )
    time.sleep(LET_GO_S)  # the measurement itself: it lets its workers go when idle
    pids = agent.processes()
    used = sum(map(_cpu_s, pids))
    time.sleep(IDLE_S)
    used = sum(map(_cpu_s, pids)) - used
    yield Figure(
        key="agent_1000_idle_cpu_percent",
        value=used / IDLE_S * 100,
        unit="%",
        what="CPU of one core, all its processes, while nothing happens",
        limit=1.0,
    )
    yield Figure(
        key="agent_1000_rss_mib",
        value=sum(map(_rss_mib, pids)),
        unit="MiB",
        what=f"memory of all its {len(pids)} processes, shared pages counted each time",
        limit=100.0,
    )


def _allow(directory: Path, *events: str) -> None:
    wanted = Wanted(tool=directory / "tool.sock", events=events)
    write_policy(directory, wanted.assignment())


def _wait_hooked(agent: RunningAgent, *, events: int) -> None:
    def is_done() -> bool:
        if agent.ask("ping")["hooked"] < COUNT:
            return False
        return all(len(vm["events"]) == events for vm in agent.status().values())

    agent.wait(is_done, what=f"{COUNT} VMs hooked with {events} events", timeout_s=300)


def _timed_status(agent: RunningAgent) -> float:
    began = time.monotonic()
    if len(agent.status()) != COUNT:
        raise OSError("not all VMs are known")
    return time.monotonic() - began


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    return (int(fields[11]) + int(fields[12])) * _TICK_S


def _rss_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0
