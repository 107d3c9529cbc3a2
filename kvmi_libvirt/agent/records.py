# SPDX-License-Identifier: Apache-2.0
"""What the event loop itself does with the records of VMs.

Jobs write them. The loop only takes away those of VMs that have ended, and notes that a
tool has gone; it never waits for a VM's lock: whoever holds it is at work on the VM or on
its successor, and has the last word.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from typing import TYPE_CHECKING

from kvmi_libvirt import introspect
from kvmi_libvirt import state as st
from kvmi_libvirt.agent.telling import TOOL_LEFT
from kvmi_libvirt.errors import StateError

if TYPE_CHECKING:
    from pathlib import Path

    from kvmi_libvirt.agent.vm import Vm

logger = logging.getLogger(__name__)


class Records:
    """The records in a state directory."""

    def __init__(self, directory: Path) -> None:
        """Nothing is read yet."""
        self._state = st.StateDir(directory)

    def all(self) -> list[st.VmState]:
        """Return every record that can be read; what cannot be is told."""
        try:
            return self._state.all(lambda problem: logger.warning("%s", problem))
        except StateError as error:
            logger.warning("%s", error)
            return []

    def differs(self, vm: Vm) -> bool:
        """Say whether there is another record of *vm* than the one the agent knows."""
        with contextlib.suppress(StateError):
            return self._state.load(vm.uuid) != vm.record
        return False

    def note_departure(self, vm: Vm) -> None:
        """Note that the tool of *vm* has gone, in the agent's memory and on disk.

        Nothing is in force any more, whatever the ioctls would say.
        """
        record = vm.record
        if record is None or record.state != st.HOOKED:
            return
        vm.record = dataclasses.replace(
            record, state=st.WAITING, commands=(), events=(), all_ids=(), error=TOOL_LEFT
        )
        vm.error = TOOL_LEFT
        with contextlib.suppress(StateError), self._state.locked(vm.uuid, deadline=0.0):
            if self._state.load(vm.uuid) == record:
                self._state.save(vm.record)

    def remove_dead(self, uuid: str) -> None:
        """Remove the record of a VM, unless its process runs."""
        with contextlib.suppress(StateError), self._state.locked(uuid, deadline=0.0):
            record = self._state.load(uuid)
            if record is None or not introspect.process_runs(record):
                self._state.remove(uuid)
