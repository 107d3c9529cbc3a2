# SPDX-License-Identifier: Apache-2.0
"""How verbs print data."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from collections.abc import Sequence


def in_colour(stream: TextIO) -> bool:
    """Say whether *stream* is a terminal with colours, of somebody who wants them.

    As no-color.org has it: NO_COLOR counts when it is set and not empty.
    """
    is_plain = os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") == "dumb"
    return stream.isatty() and not is_plain


def print_json(value: object) -> None:
    """Print *value* as JSON on stdout, in ASCII, keys in the order they were made."""
    json.dump(value, sys.stdout, indent=2)
    sys.stdout.write("\n")


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print *rows* in left-aligned columns below *header* on stdout."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        cells = (f"{cell:{width}}" for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())
