# SPDX-License-Identifier: Apache-2.0
"""Patterns with ``*`` and ``?``, matched in bounded time. Pure; imports nothing.

Not fnmatch: brackets mean themselves, and no pattern can make the matcher slow.
"""

from __future__ import annotations


def matches(pattern: str, text: str) -> bool:
    """Say whether *pattern* is the whole of *text*; ``*`` is any text, ``?`` one character.

    Takes at most len(pattern) * len(text) steps.
    """
    at = start = 0
    star = -1
    position = 0
    while position < len(text):
        if at < len(pattern) and pattern[at] == "*":
            star, start = at, position
            at += 1
        elif at < len(pattern) and pattern[at] in ("?", text[position]):
            at += 1
            position += 1
        elif star >= 0:
            at, start = star + 1, start + 1
            position = start
        else:
            return False
    return all(character == "*" for character in pattern[at:])


def path_matches(pattern: str, path: str) -> bool:
    """Say whether *pattern* is the whole of the absolute *path*.

    ``*`` and ``?`` stay within one part of the path; a last part ``**`` is everything
    below, at any depth. Both must be normalised.
    """
    wanted, parts = pattern.split("/"), path.split("/")
    if wanted[-1] == "**":
        wanted = wanted[:-1]
        if len(parts) <= len(wanted):
            return False
        parts = parts[: len(wanted)]
    if len(wanted) != len(parts):
        return False
    return all(matches(one, part) for one, part in zip(wanted, parts, strict=True))
