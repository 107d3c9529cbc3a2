# SPDX-License-Identifier: Apache-2.0
"""Named points at which tests interfere, or end the agent. No package imports."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


def _nothing(_point: str) -> None:
    return


point: Callable[[str], None] = _nothing
"""Called with the name of a point that was reached. Only tests replace it."""

POINTS = (
    "started",
    "looked",
    "job-sent",
    "job-done",
    "watched",
    "leaving",
    "retry-planned",
    "handed-over",
    "answered",
    "forgotten",
)


def reach(name: str) -> None:
    """Say that the point *name* was reached."""
    point(name)
