# SPDX-License-Identifier: Apache-2.0
"""The hook on a host with a policy: whose mode decides about a veto, and what a broken one does."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

import pytest

from kvmi_libvirt import hook as hook_module
from kvmi_libvirt import introspect
from kvmi_libvirt.abi.revisions import by_name
from kvmi_libvirt.errors import PolicyRefused, UnsupportedByKernel
from kvmi_libvirt.hook import Hook
from kvmi_libvirt.policy.host import HostPolicy, parse_host_policy
from kvmi_libvirt.policy.model import NAMESPACE
from kvmi_libvirt.session import Report
from kvmi_libvirt.state import StateDir

if TYPE_CHECKING:
    from pathlib import Path

UUID: Final = "5a4a2b4e-7c1d-4e0f-9a52-0d6f6f1b0a01"
ELEMENT: Final = (
    f'<k:introspection xmlns:k="{NAMESPACE}" mode="{{}}">'
    '<k:source type="unix" path="{}"/></k:introspection>'
)
NOWHERE: Final = "/tmp/tool.sock"  # no host allows it
BELOW: Final = "/run/kvmi/tool.sock"


def xml(element: str = "") -> bytes:
    return (
        f"<domain><name>db1</name><uuid>{UUID}</uuid><metadata>{element}</metadata></domain>"
    ).encode()


def assign(mode: str, inner: str = "") -> HostPolicy:
    text = f"""<host-policy xmlns="{NAMESPACE}"><assign mode="{mode}"><match name="db*"/>
      <source type="unix" path="{BELOW}"/>{inner}</assign></host-policy>"""
    return parse_host_policy(text.encode(), source="hp.xml")


@pytest.fixture
def hook(tmp_path: Path) -> Hook:
    return Hook(state=StateDir(tmp_path / "state"), run_dir=tmp_path)


def on(monkeypatch: pytest.MonkeyPatch, host: HostPolicy) -> None:
    monkeypatch.setattr(hook_module, "load_host_policy", lambda: host)


@pytest.mark.parametrize("element", ["", ELEMENT.format("optional", BELOW), "<k:x xmlns:k='u'/>"])
def test_mode_of_an_assignment_decides_and_not_the_elements(
    hook: Hook, element: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No QEMU runs here, so "started" must fail.
    on(monkeypatch, assign("required"))
    veto = hook.run("db1", "started", xml(element))
    assert veto is not None
    assert veto.endswith("; domain 'db1' requires introspection; next: kvmi-libvirt doctor db1")
    assert hook.run("db1", "reconnect", xml(element)) is None
    on(monkeypatch, assign("optional"))
    assert hook.run("db1", "started", xml(element)) is None


def test_demand_of_an_element_is_overruled_by_an_assignment(
    hook: Hook, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(monkeypatch, assign("optional"))
    wrong = xml(ELEMENT.format("required", NOWHERE))
    assert hook.run("db1", "prepare", wrong) is None
    assert hook.run("db1", "started", wrong) is None


@pytest.mark.parametrize(
    "wrong", [b"<memory unit='furlong'>1</memory>", b"<x " + b"y" * 99 + b"/>", b"<z/>" * 100_001]
)
def test_domain_that_cannot_be_matched_is_taken_for_one_that_may_be_meant(
    hook: Hook, wrong: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whatever somebody gets into a domain's XML, it must not start such a VM unwatched.
    unreadable = xml().replace(b"</uuid>", b"</uuid>" + wrong)
    on(monkeypatch, assign("required"))
    veto = hook.run("db1", "prepare", unreadable)
    assert veto is not None
    assert "(XML of domain 'db1':1)" in veto
    assert veto.endswith("domain 'db1' requires introspection; next: kvmi-libvirt doctor db1")
    assert hook.run("db1", "reconnect", unreadable) is None
    on(monkeypatch, assign("optional"))
    assert hook.run("db1", "prepare", unreadable) is None
    on(monkeypatch, HostPolicy())
    assert hook.run("db1", "prepare", unreadable) is None


def test_domain_that_no_assignment_fits_starts(hook: Hook, monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, assign("required"))
    other = xml().replace(b"db1", b"web1")
    assert hook.run("web1", "prepare", other) is None
    assert hook.run("web1", "started", other) is None


def test_broken_host_policy_stops_only_domains_that_demand_introspection(
    hook: Hook, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> HostPolicy:
        raise PolicyRefused("is writable by others", source="/etc/kvmi-libvirt/host-policy.xml")

    monkeypatch.setattr(hook_module, "load_host_policy", broken)
    assert hook.run("db1", "prepare", xml()) is None
    assert "host-policy.xml: is writable by others" in caplog.text
    assert hook.run("db1", "prepare", xml(ELEMENT.format("optional", BELOW))) is None
    veto = hook.run("db1", "prepare", xml(ELEMENT.format("required", BELOW)))
    assert veto is not None
    assert "is writable by others" in veto


def test_secret_that_is_not_there_is_told_before_qemu_exists(
    hook: Hook, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(monkeypatch, assign("required", '<secret name="no-such-secret-here"/>'))
    veto = hook.run("db1", "prepare", xml())
    assert veto is not None
    assert "no-such-secret-here" in veto


# -- the kernel's revision, where the host says it ------------------------------------------


class AnyProcess:
    owned_fds = ()


@pytest.mark.parametrize(
    ("probed", "pin", "result"),
    [
        ("v11-or-v12", "v11", "v11"),
        ("v11-or-v12", "v12", "v12"),
        ("v11-or-v12", None, "v11-or-v12"),
        ("v12", "v12", "v12"),
        ("v12", "v11", "v11-or-v12"),
        ("v11", "v12", "v11-or-v12"),
        ("v12", "v7", None),
        ("v7", "v12", None),
        ("v7", "v7", "v7"),
    ],
)
def test_pin_decides_between_v11_and_v12_only_where_the_kernel_does_not(
    probed: str,
    pin: str | None,
    result: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(
        "kvmi_libvirt.introspect.probing.worker.run", lambda *_, **__: Report(abi=probed)
    )
    ask = introspect.probe_revision
    process, fds = AnyProcess(), object()
    if result is None:
        with pytest.raises(UnsupportedByKernel, match="correct <kernel abi="):
            ask(process, fds, pin=pin)  # type: ignore[arg-type]  # not reached: run is a fake
        return
    assert ask(process, fds, pin=pin) is by_name(result)  # type: ignore[arg-type]  # as above
    is_told = "correct or remove <kernel abi=...>" in caplog.text
    assert is_told == (result == "v11-or-v12" != probed)


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
