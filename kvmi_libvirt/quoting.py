# SPDX-License-Identifier: Apache-2.0
"""Make text from a document safe to show: one line, printable, bounded.

Whoever writes a domain's XML must not be able to forge a log line or send an
escape sequence to a terminal. Pure; imports nothing.
"""

from __future__ import annotations

from typing import Final

_LIMIT: Final = 80


def printable(text: str) -> str:
    """Return *text* with every character that cannot be printed as an escape."""
    if text.isprintable():
        return text
    escaped = (c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    return "".join(escaped)


def shortened(text: str, limit: int = _LIMIT) -> str:
    """Return *text* printable, and cut to a length that fits a message."""
    return printable(text if len(text) <= limit else f"{text[: limit - 3]}...")


def counted(number: int, noun: str) -> str:
    """Return *number* and *noun*, in the plural where there is not one."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def quoted(text: str) -> str:
    """Return *text* printable, cut and in double quotes."""
    return f'"{shortened(text)}"'
