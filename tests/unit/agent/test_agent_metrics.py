# SPDX-License-Identifier: Apache-2.0
"""What is counted: series appear with a VM and end with it, and without the library all is well."""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING

import pytest

from kvmi_libvirt import state as st
from kvmi_libvirt.agent.jobs import Outcome
from kvmi_libvirt.agent.metrics import Metrics
from kvmi_libvirt.agent.vm import Vm
from kvmi_libvirt.state import VmState

if TYPE_CHECKING:
    from collections.abc import Iterator

RECORD = VmState(
    domain="web1",
    uuid="5a4a2b4e-7c1d-4e0f-9a52-0d6f6f1b0a01",
    pid=7,
    start_ticks=1,
    abi="v12",
    mode="optional",
    state=st.HOOKED,
    source="unix:/run/kvmi/tool.sock",
    commands=("KVMI_VM_GET_INFO", "KVMI_VM_READ_PHYSICAL"),
    events=("KVMI_VM_EVENT_UNHOOK",),
    since="",
    error=None,
    socket_inode=9,
)


def vm(name: str = "web1", *, state: str | None = st.HOOKED) -> Vm:
    made = Vm(RECORD.uuid, name, b"")
    if state is not None:
        made.record = dataclasses.replace(RECORD, state=state)
    return made


@pytest.fixture
def vms() -> list[Vm]:
    return []


@pytest.fixture
def metrics(vms: list[Vm]) -> Metrics:
    pytest.importorskip("prometheus_client")
    return Metrics(lambda: vms)


def values(metrics: Metrics) -> dict[str, float]:
    """Return what is rendered, by series, read as Prometheus does."""
    from prometheus_client.parser import text_string_to_metric_families

    found = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for name, labels, value, *_ in family.samples:
            text = ",".join(f"{key}={label}" for key, label in sorted(labels.items()))
            found[f"{name.removeprefix('kvmi_libvirt_')}{{{text}}}"] = float(value)
    return found


def test_a_vm_has_its_series_as_long_as_it_is_there(metrics: Metrics, vms: list[Vm]) -> None:
    label = f"domain=web1,uuid={RECORD.uuid}"
    assert not [name for name in values(metrics) if "web1" in name]
    vms.append(vm())
    found = values(metrics)
    assert found[f"tool_connected{{{label}}}"] == 1
    assert found[f"rights{{domain=web1,kind=command,uuid={RECORD.uuid}}}"] == 2
    assert found[f"rights{{domain=web1,kind=event,uuid={RECORD.uuid}}}"] == 1
    vms[:] = [vm(state=st.WAITING)]
    assert values(metrics)[f"tool_connected{{{label}}}"] == 0
    vms.clear()
    assert not [name for name in values(metrics) if "web1" in name]


def test_vms_are_counted_by_state(metrics: Metrics, vms: list[Vm]) -> None:
    vms += [vm(), vm("web2"), vm("web3", state=st.FAILED), vm("web4", state=None)]
    found = values(metrics)
    assert found["vms{state=hooked}"] == 2
    assert found["vms{state=failed}"] == 1
    assert found["vms{state=waiting}"] == 0
    assert found["vms{state=unhooked}"] == 0


def test_names_cannot_forge_series(metrics: Metrics, vms: list[Vm]) -> None:
    vms.append(vm('x"} 1\nkvmi_libvirt_forged 1\n'))
    assert not [name for name in values(metrics) if name.startswith("forged")]


def test_what_a_hook_cost_is_observed(metrics: Metrics) -> None:
    metrics.operation("started", Outcome(step="started", took_us=30_000))
    metrics.operation("started", Outcome(step="started", took_us=9_000_000, veto="no tool"))
    found = values(metrics)
    assert found["hook_operation_seconds_count{operation=started}"] == 2
    assert found["hook_operation_seconds_sum{operation=started}"] == pytest.approx(9.03)
    assert found["hook_operation_seconds_bucket{le=0.05,operation=started}"] == 1
    assert found["vetoes_total{}"] == 1


def test_what_hooking_gave_is_counted(metrics: Metrics) -> None:
    fields = dataclasses.asdict(RECORD)
    metrics.note(Outcome(step="started", record=fields, stall_us=800, gap_us=300))
    assert values(metrics)["reconnects_total{}"] == 0
    metrics.note(Outcome(step="hook", record=fields, stall_us=800, gap_us=300), is_again=True)
    metrics.note(Outcome(step="change", record=fields), is_again=True)
    found = values(metrics)
    assert found["grants_total{}"] == 6
    assert found["reconnects_total{}"] == 1
    assert found["stall_seconds_count{}"] == 2
    assert found["stall_seconds_bucket{le=0.001}"] == 2
    assert found["grant_gap_seconds_sum{}"] == pytest.approx(0.0006)


def test_refusals_are_counted_by_kind(metrics: Metrics) -> None:
    for kind in ("HandshakeTimeout", "HandshakeTimeout", None):
        metrics.note(Outcome(error="some", kind=kind))
    found = values(metrics)
    assert found["refusals_total{reason=HandshakeTimeout}"] == 2
    assert found["refusals_total{reason=Error}"] == 1


def test_a_start_that_failed_is_counted_by_kind_refused_or_not(metrics: Metrics) -> None:
    metrics.operation("started", Outcome(step="started", kind="HandshakeRefused", veto="no tool"))
    metrics.operation("started", Outcome(step="started", kind="HandshakeRefused"))
    metrics.operation("prepare", Outcome(step="prepare", kind="PolicyValueError", veto="wrong"))
    found = values(metrics)
    assert found["refusals_total{reason=HandshakeRefused}"] == 2
    assert found["refusals_total{reason=PolicyValueError}"] == 1
    assert found["vetoes_total{}"] == 2


def test_departures_and_retries_are_counted(metrics: Metrics) -> None:
    metrics.tool_left()
    metrics.retry_planned()
    metrics.retry_planned()
    found = values(metrics)
    assert found["tool_departures_total{}"] == 1
    assert found["retries_total{}"] == 2


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    return iter(())


@pytest.mark.usefixtures("no_library")
def test_without_the_library_nothing_is_counted_and_nothing_fails() -> None:
    metrics = Metrics(lambda: [vm()])
    assert not metrics.is_there
    metrics.operation("started", Outcome(veto="x"))
    metrics.note(Outcome(error="x", stall_us=1))
    metrics.tool_left()
    metrics.retry_planned()
    assert metrics.render() == b"# prometheus-client is not installed\n"
