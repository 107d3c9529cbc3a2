# SPDX-License-Identifier: Apache-2.0
"""Who besides root can change a file that root is going to run. Imports nothing of the package."""

from __future__ import annotations

import os
import pwd
import stat
from pathlib import Path

ROOT = 0


def who_can_change(path: str | os.PathLike[str]) -> str | None:
    """Return who can change *path*, or put something else in its place, in words.

    The file and every directory above it are looked at, as named and behind symbolic links.
    None when it is only root, or when there is nothing.
    """
    named = Path(os.path.abspath(path))
    for each in dict.fromkeys((named, *named.parents, *_behind(named))):
        try:
            found = os.lstat(each)
        except OSError:
            continue
        problem = _problem(found)
        if problem is not None:
            return f"{each} {problem}"
    return None


def _behind(named: Path) -> list[Path]:
    real = Path(os.path.realpath(named))
    return [real, *real.parents]


def _problem(found: os.stat_result) -> str | None:
    if found.st_uid != ROOT:
        return f"belongs to {_name(found.st_uid)}"
    if stat.S_ISLNK(found.st_mode):  # its mode means nothing
        return None
    # In a sticky directory nobody can take away what is root's.
    if stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX:
        return None
    if found.st_mode & stat.S_IWOTH:
        return "can be written by everybody"
    if found.st_mode & stat.S_IWGRP and found.st_gid != ROOT:
        return f"can be written by group {found.st_gid}"
    return None


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"
