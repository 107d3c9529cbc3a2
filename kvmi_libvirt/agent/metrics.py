# SPDX-License-Identifier: Apache-2.0
"""What the agent counts, for Prometheus.

Names begin with kvmi_libvirt_. Per-VM series carry domain and uuid and end with the VM.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from kvmi_libvirt import state as st

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from kvmi_libvirt.agent.jobs import Outcome
    from kvmi_libvirt.agent.vm import Vm


def _library() -> Any:
    # The agent runs without it, and without metrics.
    try:
        import prometheus_client
    except ImportError:
        return None
    return prometheus_client


CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_LATENCIES_S: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_STALLS_S: Final = (0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 1)
_STATES: Final = (st.HOOKED, st.WAITING, st.FAILED, st.UNHOOKED)


class Metrics:
    """The agent's counters; silently nothing where prometheus-client is not installed.

    Parameters
        vms  returns all VMs, when asked
    """

    def __init__(self, vms: Callable[[], Iterable[Vm]]) -> None:
        """All counters are 0."""
        self._library = prometheus = _library()
        self.is_there = prometheus is not None
        if not self.is_there:
            return
        self._registry = prometheus.CollectorRegistry()
        self._registry.register(_VmCollector(vms))

        def counter(name: str, text: str, *labels: str) -> Any:
            return prometheus.Counter(f"kvmi_libvirt_{name}", text, labels, registry=self._registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Any:
            return prometheus.Histogram(
                f"kvmi_libvirt_{name}", text, labels, buckets=buckets, registry=self._registry
            )

        self._hook_seconds = histogram(
            "hook_operation_seconds",
            "What a libvirt hook operation took the agent, the tool's handshake included",
            _LATENCIES_S,
            "operation",
        )
        self._stall_seconds = histogram(
            "stall_seconds", "How long QEMU's main thread was held to hook a VM", _STALLS_S
        )
        self._gap_seconds = histogram(
            "grant_gap_seconds", "From HOOK to the last grant of a VM", _STALLS_S
        )
        self._grants = counter("grants", "Commands and events granted to tools by hooking")
        self._refusals = counter("refusals", "VMs not hooked, by the kind of failure", "reason")
        self._vetoes = counter("vetoes", "VM starts refused")
        self._reconnects = counter("reconnects", "VMs hooked again after their tool went away")
        self._departures = counter("tool_departures", "Channels that their tool ended unasked")
        self._retries = counter("retries", "Attempts planned because one failed")

    def operation(self, operation: str, outcome: Outcome) -> None:
        """Count what libvirt's hook handed over."""
        if not self.is_there:
            return
        self._hook_seconds.labels(operation).observe(outcome.took_us / 1e6)
        if outcome.veto is not None:
            self._vetoes.inc()
        if outcome.veto is not None or outcome.kind is not None:
            self._refusals.labels(outcome.kind or "Veto").inc()

    def note(self, outcome: Outcome, *, is_again: bool = False) -> None:
        """Count what a job did.

        Parameters
            is_again  if it hooked a VM: whose tool had gone
        """
        if not self.is_there:
            return
        if outcome.stall_us:
            self._stall_seconds.observe(outcome.stall_us / 1e6)
            self._gap_seconds.observe(outcome.gap_us / 1e6)
            record = outcome.record or {}
            self._grants.inc(len(record.get("commands", ())) + len(record.get("events", ())))
            if is_again:
                self._reconnects.inc()
        if outcome.error is not None:
            self._refusals.labels(outcome.kind or "Error").inc()

    def tool_left(self) -> None:
        """Count a channel that its tool ended."""
        if self.is_there:
            self._departures.inc()

    def retry_planned(self) -> None:
        """Count an attempt to come."""
        if self.is_there:
            self._retries.inc()

    def render(self) -> bytes:
        """Return everything in Prometheus' text format."""
        if not self.is_there:
            return b"# prometheus-client is not installed\n"
        return bytes(self._library.generate_latest(self._registry))


class _VmCollector:
    # Read when asked, so that nothing has to be kept in step with the VMs.
    def __init__(self, vms: Callable[[], Iterable[Vm]]) -> None:
        self._vms = vms

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import GaugeMetricFamily

        vms = [vm for vm in self._vms() if vm.record is not None]
        counts = dict.fromkeys(_STATES, 0)
        connected = GaugeMetricFamily(
            "kvmi_libvirt_tool_connected",
            "1 while the VM's tool holds its channel open",
            labels=["domain", "uuid"],
        )
        rights = GaugeMetricFamily(
            "kvmi_libvirt_rights",
            "Commands and events in force on the VM",
            labels=["domain", "uuid", "kind"],
        )
        for vm in vms:
            record = vm.record
            assert record is not None
            counts[record.state] = counts.get(record.state, 0) + 1
            connected.add_metric([vm.name, vm.uuid], float(record.state == st.HOOKED))
            rights.add_metric([vm.name, vm.uuid, "command"], len(record.commands))
            rights.add_metric([vm.name, vm.uuid, "event"], len(record.events))
        states = GaugeMetricFamily(
            "kvmi_libvirt_vms", "VMs with introspection, by state", labels=["state"]
        )
        for state, count in counts.items():
            states.add_metric([state], count)
        yield from (states, connected, rights)
