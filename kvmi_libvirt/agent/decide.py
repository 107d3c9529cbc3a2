# SPDX-License-Identifier: Apache-2.0
"""What to do about one VM, from what is wanted and what is. Pure.

The table of docs/agent.md in code: nothing here looks at the world, and nothing here
depends on what happened before, so that an agent that was killed goes on rightly.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from kvmi_libvirt import state as st

if TYPE_CHECKING:
    from kvmi_libvirt.policy.model import Policy
    from kvmi_libvirt.state import VmState


class Step(enum.Enum):
    """What is to be done next."""

    NOTHING = "nothing"
    HOOK = "hook"
    CHANGE = "change"
    LEAVE = "leave"
    """Ask the tool to let go, wait, unhook."""
    UNHOOK = "unhook"
    """Nobody is there to be asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One VM as it is.

    Parameters
        wanted        its policy now, None for no introspection
        digest        of that policy, "" for none
        record        what is recorded about this very process, None for nothing
        is_open       the channel of a VM that is on record as hooked is open
    """

    wanted: Policy | None
    digest: str
    record: VmState | None
    is_open: bool


def next_step(seen: Seen) -> Step:
    """Return what is to be done about a VM.

    A VM that was unhooked by hand, or is about to be, stays so until its policy changes:
    HOOK is only for policies that were not acted upon yet, and for tools that are to be
    called again.
    """
    record, wanted = seen.record, seen.wanted
    if record is None:
        return Step.NOTHING if wanted is None else Step.HOOK
    has_hook = bool(record.socket_inode)
    if wanted is None:
        if not has_hook:
            return Step.NOTHING
        return Step.LEAVE if seen.is_open else Step.UNHOOK
    if has_hook and seen.is_open:
        # A secret can only be proven in a handshake; one no longer asked for harms nobody.
        is_proven = wanted.secret in (None, record.secret)
        is_other_tool = record.source != wanted.source.describe() or not is_proven
        return Step.LEAVE if is_other_tool else Step.CHANGE
    is_new = record.policy != seen.digest
    if has_hook:
        if record.leaving:
            return Step.UNHOOK
        if is_new or wanted.reconnect_s is not None:
            return Step.HOOK
        return Step.UNHOOK
    if record.state == st.UNHOOKED or record.error in FINAL:
        return Step.HOOK if is_new else Step.NOTHING
    return Step.HOOK


TOOL_HAS_GONE: Final = "the tool has gone, and the policy does not say to call it again"
FINAL: Final = frozenset({TOOL_HAS_GONE})
"""Errors after which a policy is not acted upon again."""


@dataclass(frozen=True, slots=True)
class Backoff:
    """How long to wait before the next try.

    Parameters
        first_s, last_s  seconds before the first retry, and at most
    """

    first_s: float = 0.5
    last_s: float = 10.0

    def delay_s(self, tries: int) -> float:
        """Return seconds to wait after *tries* failures: twice as long each time."""
        if tries < 1:
            return 0.0
        return min(self.last_s, self.first_s * 2.0 ** min(tries - 1, 32))
