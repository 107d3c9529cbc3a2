# SPDX-License-Identifier: Apache-2.0
"""The agent with a thousand hooked VMs: memory, idle CPU, a policy change, a restart, starts.

VM processes without guests (see tools/fleet.py), a real VM of /dev/kvm each, on the
emulated kernel. A quarter of them is measured first: memory and work must not grow faster
than their number. KVMI_BENCH_VMS sets that.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import usage
from agent_rig import RunningAgent, Wanted, domain_xml, write_policy, write_status
from figures import Figure
from fleet import Fleet, raise_fd_limit
from hook_copy import hook_copy
from patient_tool import PatientTool

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from fleet import StandIn

COUNT: Final = int(os.environ.get("KVMI_BENCH_VMS", "1000"))
STARTS: Final = 50
SUPERVISORS: Final = 2
IDLE_S: Final = 20.0
LET_GO_S: Final = 8.0
STATUS_ROUNDS: Final = 11
_ENVIRONMENT: Final = {"LC_ALL": "C", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}


def measure() -> Iterator[Figure]:
    """Measure an agent that finds all VMs running, hooks them, and keeps them."""
    raise_fd_limit()
    with _site(0) as few:
        without = few.rest_mib()
    with _site(COUNT // 4) as few:
        few.hook_all()
        quarter_cpu_s = few.apply()[1]
        quarter_mib = few.rest_mib()
    with _site(COUNT) as many:
        yield Figure(
            key="agent_1000_hook_s",
            value=many.hook_all(),
            unit="s",
            what=f"to hook all {COUNT} VMs that ran before the agent",
        )
        apply_s, cpu_s = many.apply()
        yield Figure(
            key="agent_1000_apply_s",
            value=apply_s,
            unit="s",
            what=f"a right added by the host's policy is in force on all {COUNT} VMs",
            limit=5.0,
        )
        yield Figure(
            key="agent_apply_growth",
            value=cpu_s / COUNT / (quarter_cpu_s / (COUNT // 4)),
            unit="x",
            what=f"CPU of that for a VM of {COUNT}, against one of {COUNT // 4}",
            limit=1.5,
        )
        yield Figure(
            key="agent_1000_status_ms",
            value=statistics.median(many.status_s() for _ in range(STATUS_ROUNDS)) * 1e3,
            unit="ms",
            what="status of all VMs",
        )
        yield Figure(
            key="agent_1000_reconcile_s",
            value=many.reconcile(),
            unit="s",
            what="from its start after a SIGKILL until it has looked at all VMs",
        )
        mib = many.rest_mib()
        yield Figure(
            key="agent_1000_idle_cpu_percent",
            value=many.idle_percent(),
            unit="%",
            what="CPU of one core, all its processes, while nothing happens",
            limit=1.0,
        )
        yield Figure(
            key="agent_1000_rss_mib",
            value=mib,
            unit="MiB",
            what="memory of all its processes at rest, shared pages counted each time",
            limit=100.0,
        )
        yield Figure(
            key="agent_rss_growth",
            value=(mib - quarter_mib) / (COUNT * 3 / 4) / ((quarter_mib - without) / (COUNT / 4)),
            unit="x",
            what=f"memory for a VM more, up to {COUNT}, against up to {COUNT // 4}",
            limit=1.5,
        )
        yield from _starts(many)


def _starts(site: _Site) -> Iterator[Figure]:
    vms = site.fleet.start([f"new{number}" for number in range(STARTS)])
    # No helper: what the agent does not do fails.
    script = hook_copy(
        site.directory,
        PYTHON="/bin/false",
        STATE_DIR=str(site.agent.state_dir),
        HOST_POLICY=str(site.directory / "host-policy.xml"),
    )
    element = Wanted(tool=site.directory / "tool.sock", mode="required").element()

    def started(vm: StandIn) -> float:
        command = [str(script), vm.name, "started", "begin", "-"]
        return _timed(command, domain_xml(vm, element).encode())

    with concurrent.futures.ThreadPoolExecutor(STARTS) as threads:
        began = time.monotonic()
        python_s = list(threads.map(lambda _: _timed(_PYTHON, b""), vms))
        all_python_s = time.monotonic() - began
        began = time.monotonic()
        calls_s = list(threads.map(started, vms))
        all_s = time.monotonic() - began
    hooked = site.agent.status()
    if not all(hooked[vm.name]["state"] == "hooked" for vm in vms):
        raise RuntimeError("not every VM that started is hooked")
    yield Figure(
        key="agent_50_starts_s",
        value=all_s,
        unit="s",
        what=f"{STARTS} VMs that start at once, beside {COUNT}, until all are hooked",
    )
    yield Figure(
        key="agent_50_starts_slowest_s",
        value=max(calls_s),
        unit="s",
        what=f"the slowest of their hook calls; the slowest of {STARTS} python3 -IS -c pass at "
        f"once took {max(python_s):.2f}",
        limit=5.0,
    )
    yield Figure(
        key="agent_50_starts_vs_python",
        value=all_s / all_python_s,
        unit="x",
        what=f"all of them, handshakes included, against {STARTS} python3 -IS -c pass at once",
    )


_PYTHON: Final = ("/usr/bin/python3", "-IS", "-c", "pass")


def _timed(command: Sequence[str], stdin: bytes) -> float:
    began = time.monotonic()
    done = subprocess.run(
        command, input=stdin, capture_output=True, env=_ENVIRONMENT, cwd="/", check=False
    )
    elapsed = time.monotonic() - began
    if done.returncode:
        raise RuntimeError(f"{command[0]} ended with {done.returncode}: {done.stderr!r}")
    return elapsed


class _Site:
    # VMs that run, an agent that finds them, and the tool that it calls.

    def __init__(self, directory: Path, fleet: Fleet, agent: RunningAgent, count: int) -> None:
        self.directory = directory
        self.fleet = fleet
        self.agent = agent
        self._count = count

    def hook_all(self) -> float:
        """Let the agent find the VMs; return seconds until all are hooked."""
        for vm in self.fleet.vms.values():
            write_status(self.fleet.run_dir, vm)
        self.agent.stop()
        self.agent.start()
        began = time.monotonic()
        self._wait_hooked(events=1)
        return time.monotonic() - began

    def apply(self) -> tuple[float, float]:
        """Add a right; return seconds until it is in force on all VMs, and seconds of CPU."""
        _allow(self.directory, "KVMI_VM_EVENT_UNHOOK", "KVMI_VCPU_EVENT_BREAKPOINT")
        before = {pid: usage.cpu_s(pid) for pid in self.agent.processes()}
        began = time.monotonic()
        self.agent.reload()
        self._wait_hooked(events=2)
        elapsed = time.monotonic() - began
        # New workers are idle for some seconds before they are let go.
        used = sum(usage.cpu_s(pid) - before.get(pid, 0.0) for pid in self.agent.processes())
        return elapsed, used

    def reconcile(self) -> float:
        """Kill the agent; return seconds until the next one has looked at all VMs."""
        self.agent.kill()
        began = time.monotonic()
        self.agent.start()
        self._wait_hooked(events=2)
        return time.monotonic() - began

    def status_s(self) -> float:
        """Return how many seconds a status takes."""
        began = time.monotonic()
        if len(self.agent.status()) != self._count:
            raise OSError("not all VMs are known")
        return time.monotonic() - began

    def rest_mib(self) -> float:
        """Return the memory of all processes of the agent at rest."""
        time.sleep(LET_GO_S)  # the measurement itself: it lets its workers go when idle
        return sum(map(usage.rss_kib, self.agent.processes())) / 1024

    def idle_percent(self) -> float:
        """Return how much of a core it uses while nothing happens."""
        pids = self.agent.processes()
        used = sum(map(usage.cpu_s, pids))
        time.sleep(IDLE_S)
        return (sum(map(usage.cpu_s, pids)) - used) / IDLE_S * 100

    def _wait_hooked(self, *, events: int) -> None:
        def is_done() -> bool:
            if self.agent.ask("ping")["hooked"] < self._count:
                return False
            return all(len(vm["events"]) == events for vm in self.agent.status().values())

        what = f"{self._count} VMs hooked with {events} events"
        self.agent.wait(is_done, what=what, timeout_s=300)


@contextlib.contextmanager
def _site(count: int) -> Iterator[_Site]:
    with tempfile.TemporaryDirectory(prefix="kvmi-bench-") as name:
        directory = Path(name)
        run_dir = directory / "run"
        with (
            Fleet(directory, run_dir=run_dir, supervisors=SUPERVISORS) as fleet,
            PatientTool(directory / "tool.sock"),
        ):
            fleet.start([f"vm{number}" for number in range(count)])
            _allow(directory, "KVMI_VM_EVENT_UNHOOK")
            with RunningAgent(directory, domains=str(run_dir), run_dir=run_dir) as agent:
                yield _Site(directory, fleet, agent, count)


def _allow(directory: Path, *events: str) -> None:
    wanted = Wanted(tool=directory / "tool.sock", events=events)
    write_policy(directory, wanted.assignment())
