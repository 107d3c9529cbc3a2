# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C, a hang-up or a kill in the middle of what must not be left half done."""

from __future__ import annotations

import contextlib
import signal
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType, TracebackType
    from typing import Any

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """For the block, signals that would end us only interrupt where we listen for them.

    One that comes elsewhere is heard at the next such place, or, when there is none, comes too
    late: what it was to end is done.
    """

    def __init__(self) -> None:
        """Nothing is changed yet."""
        self._before: dict[signal.Signals, Any] = {}
        self._has_come = False
        self._is_heard = False

    def __enter__(self) -> Interrupts:
        """Take the signals; one that is ignored, as under nohup, stays so."""
        for number in _SIGNALS:
            before = signal.getsignal(number)
            if before is not signal.SIG_IGN:
                self._before[number] = before
                signal.signal(number, self._come)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Give them back."""
        for number, before in self._before.items():
            signal.signal(number, before)

    def _come(self, _number: int, _frame: FrameType | None) -> None:
        self._has_come = True
        if self._is_heard:
            self._is_heard = False  # once: what follows must not be interrupted again
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """Raise KeyboardInterrupt in this block when a signal comes, or has come before."""
        self._is_heard = True
        try:
            if self._has_come:
                raise KeyboardInterrupt
            yield
        finally:
            self._is_heard = False
