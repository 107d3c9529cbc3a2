# SPDX-License-Identifier: Apache-2.0
"""What the agent remembers about one VM, beside what is recorded on disk."""

from __future__ import annotations

import asyncio
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvmi_libvirt.state import VmState, decode

if TYPE_CHECKING:
    from kvmi_libvirt.agent.jobs import Outcome


@dataclass(slots=True)
class Vm:
    """One running VM.

    Everything in here can be lost: it is found again from the record, the process
    and the domain XML.

    Parameters
        packed   its domain XML, compressed: there may be a thousand VMs
        turn     one job at a time
        is_due   something changed since the last look
        task     looks at it as long as it is due
        record   what is recorded about it, as far as is known here
        error    what the last job failed with
        warning  what is wrong with it though it is hooked
        has_left its tool has gone, and it was not hooked again since
        ended    inode of its channel, if that ended while a job was under way
        departed inode of the last channel whose end was put down to its tool

    Of channels:
        channel  our copy of its channel, as watched; None where it cannot be watched
        parting  while its tool is waited for to let go: whether that is over
        pidfd    of its process, as watched
        process  id and start time of that process

    Of retries:
        retry    the timer of the next attempt
        tries    how many attempts to hook it failed in a row
        flaps    how many times in a row its tool left soon after it came
        came_s   when its tool came, in the loop's time
        called_s when its tool was last called because it made its socket
    """

    uuid: str
    name: str
    packed: bytes
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    is_due: bool = False
    task: asyncio.Task[None] | None = None
    record: VmState | None = None
    error: str | None = None
    warning: str | None = None
    has_left: bool = False
    ended: int = 0
    departed: int = 0

    channel: int | None = None
    parting: asyncio.Future[bool] | None = None
    pidfd: int | None = None
    process: tuple[int, int] | None = None

    retry: asyncio.TimerHandle | None = None
    tries: int = 0
    flaps: int = 0
    came_s: float = 0.0
    called_s: float = 0.0

    @property
    def xml(self) -> bytes:
        """Return the domain XML as it was last seen."""
        return zlib.decompress(self.packed)

    def argument(self, **more: str) -> dict[str, str]:
        """Return what a job needs to know to find it."""
        return {"name": self.name, "uuid": self.uuid, **more}

    def take(self, outcome: Outcome) -> None:
        """Remember what a job found; one that failed may not have got that far."""
        if outcome.record is not None:
            self.record = record_of(outcome.record)
        elif outcome.error is None:
            self.record = None
        self.error = outcome.error


def pack(xml: bytes) -> bytes:
    """Return *xml* as :class:`Vm` keeps it."""
    return zlib.compress(xml, 1)


def record_of(fields: dict[str, Any]) -> VmState:
    """Return the record whose fields crossed a process boundary as JSON."""
    return decode(fields, VmState)
