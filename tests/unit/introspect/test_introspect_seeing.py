# SPDX-License-Identifier: Apache-2.0
"""What status makes of a record when it looks at the channel."""

from __future__ import annotations

import dataclasses
from typing import Final

import pytest

from kvmi_libvirt.errors import StateError
from kvmi_libvirt.introspect import seeing
from kvmi_libvirt.state import FAILED, HOOKED, UNHOOKED, VmState

READ: Final = "KVMI_VM_READ_PHYSICAL"
RECORD: Final = VmState(
    domain="web1",
    uuid="6c8a6a34-5fd6-4a1e-9b7c-1b1f0d3f5f10",
    pid=1,
    start_ticks=1,
    abi="v12",
    mode="required",
    state=HOOKED,
    source="unix:/run/kvmi/tool.sock",
    commands=(READ,),
    events=("KVMI_VM_EVENT_UNHOOK",),
    since="2026-01-01T00:00:00Z",
    error=None,
    socket_inode=7,
    all_ids=("events",),
)


def test_rights_are_shown_only_while_the_tool_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    is_open = True
    monkeypatch.setattr(seeing, "channel_is_open", lambda _record: is_open)
    assert seeing.verified(RECORD) == RECORD

    is_open = False
    seen = seeing.verified(RECORD)
    assert (seen.state, seen.commands, seen.events, seen.all_ids) == (FAILED, (), (), ())
    assert seen.error is not None
    assert "closed its channel" in seen.error


def test_what_cannot_be_told_is_not_taken_for_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(_record: VmState) -> bool:
        raise StateError("cannot tell")

    monkeypatch.setattr(seeing, "channel_is_open", cannot)
    assert seeing.verified(RECORD) == dataclasses.replace(RECORD, error="cannot tell")


def test_what_is_not_hooked_is_not_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(seeing, "channel_is_open")
    off = dataclasses.replace(RECORD, state=UNHOOKED)
    assert seeing.verified(off) == off
