# SPDX-License-Identifier: Apache-2.0
"""The benchmarks' runner: the names that others rely on, and what makes a run fail."""

from __future__ import annotations

import ast
import json
import sys
import types
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

BENCH = Path(__file__).parents[2] / "bench"

KEYS = {
    *("stall_us", "stall_vs_gdb", "stall_vs_native", "gap_us", "gap_vs_native"),
    *("vcpu_gap_vs_idle", "qmp_p99_vs_idle"),
    *("hook_noop_vs_python", "hook_full_vs_python", "hook_agent_vs_python"),
    *("emulator_ioctl_us", "qemu_start_emulated_vs_plain"),
    *("agent_1000_rss_mib", "agent_1000_idle_cpu_percent"),
    *("agent_1000_apply_s", "agent_1000_reconcile_s"),
}
"""Whoever compares two runs reads results.json by these."""


def figures() -> dict[str, bool]:
    """Return whether each Figure that is made has a limit, by its key."""
    found: dict[str, bool] = {}
    for path in BENCH.glob("bench_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Figure":
                given = {each.arg: each.value for each in node.keywords if each.arg}
                key = ast.literal_eval(given["key"])
                assert key not in found, f"{key} is measured twice"
                found[key] = "limit" in given
    return found


def test_the_keys_that_others_read_are_measured() -> None:
    assert figures().keys() >= KEYS


def test_what_has_a_bar_has_a_limit() -> None:
    bars = {
        *("stall_vs_gdb", "stall_vs_native", "vcpu_gap_vs_idle", "hook_noop_vs_python"),
        *("hook_agent_less_handshake_vs_python", "hook_agent_other_vs_python"),
        *("qemu_start_emulated_vs_plain", "agent_1000_rss_mib"),
        *("agent_1000_idle_cpu_percent", "agent_1000_apply_s"),
    }
    assert {key for key, has_limit in figures().items() if has_limit} >= bars


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[types.ModuleType]:
    monkeypatch.syspath_prepend(str(BENCH))
    import run

    monkeypatch.setattr(run, "RESULTS", tmp_path / "results.json")
    yield run
    for name in ("run", "figures"):
        del sys.modules[name]


def topic(
    monkeypatch: pytest.MonkeyPatch, runner: types.ModuleType, name: str, *values: float
) -> None:
    """Have a topic that measures one figure a value, of at most 1, and then cannot go on."""

    def measure() -> Iterator[object]:
        from figures import Figure

        for number, value in enumerate(values):
            yield Figure(key=f"{name}_{number}", value=value, unit="x", what="a test", limit=1)
        if not values:
            raise OSError("there is no gdb")

    module = types.ModuleType(f"bench_{name}")
    module.measure = measure  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(runner, "topics", lambda: [name])


@pytest.mark.parametrize(("values", "code"), [((1, 0.5), 0), ((0.5, 1.01), 1), ((), 1)])
def test_a_run_fails_when_a_limit_is_missed_or_nothing_is_measured(
    monkeypatch: pytest.MonkeyPatch,
    runner: types.ModuleType,
    values: tuple[float, ...],
    code: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    topic(monkeypatch, runner, "topic", *values)

    assert runner.main([]) == code
    found = json.loads(runner.RESULTS.read_text(encoding="utf-8"))
    assert found == {f"topic_{number}": value for number, value in enumerate(values)}
    out = capsys.readouterr().out
    assert ("MISSED" in out) == (1.01 in values)
    assert ("not measured: there is no gdb" in out) == (not values)


def test_a_run_of_everything_keeps_nothing_of_an_earlier_one(
    monkeypatch: pytest.MonkeyPatch, runner: types.ModuleType
) -> None:
    runner.RESULTS.write_text('{"older": 1}', encoding="utf-8")
    topic(monkeypatch, runner, "topic", 1)

    assert runner.main(["topic"]) == 0
    assert set(json.loads(runner.RESULTS.read_text(encoding="utf-8"))) == {"older", "topic_0"}
    assert runner.main([]) == 0
    assert set(json.loads(runner.RESULTS.read_text(encoding="utf-8"))) == {"topic_0"}
