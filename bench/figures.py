# SPDX-License-Identifier: Apache-2.0
"""What a benchmark returns."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One measured figure.

    ``key`` names it in results.json, ``what`` says how it was measured, ``limit`` is the
    largest value that is good enough, None where any is.
    """

    key: str
    value: float
    unit: str
    what: str
    limit: float | None = None

    @property
    def is_met(self) -> bool:
        """Say whether the figure is good enough."""
        return self.limit is None or self.value <= self.limit
