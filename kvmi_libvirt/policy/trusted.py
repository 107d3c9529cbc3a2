# SPDX-License-Identifier: Apache-2.0
"""Read files that only the host's administrator may have written.

Imports errors.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING, Final

from kvmi_libvirt.errors import PolicyRefused

if TYPE_CHECKING:
    from pathlib import Path

ROOT: Final = 0


def read_trusted(
    path: Path, *, limit: int, owner: int = ROOT, is_private: bool = False
) -> bytes | None:
    """Return the content of *path*, or None when there is no such file.

    The file, and the directory it lies in or would lie in, must belong to *owner* and be
    writable by nobody else. What is checked is what is read: the open file. Symbolic links, pipes
    and devices are refused, and never waited for.

    Parameters
        limit       bytes; of a longer file one byte more is returned
        is_private  it must not be readable by anybody else either
    Raises
        PolicyRefused  it is there but not to be trusted, or cannot be read; .source
                       is *path*.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        _check_directory(path, owner=owner)
        return None
    except OSError as error:
        what = error.strerror
        if error.errno == errno.ELOOP:
            what = "it is a symbolic link; put the file itself there"
        raise _refused(path, f"cannot be read ({what}); nothing is allowed without it") from error
    try:
        _check(os.fstat(fd), path, owner=owner, is_private=is_private)
        _check_directory(path, owner=owner)
        with open(fd, "rb", closefd=False) as file:
            return file.read(limit + 1)
    except PolicyRefused:
        raise
    except OSError as error:
        raise _refused(path, f"cannot be read ({error.strerror})") from error
    finally:
        os.close(fd)


def _check_directory(path: Path, *, owner: int) -> None:
    # Also where the file is not there: who can write the directory can have taken it away.
    try:
        found = os.stat(path.parent)
    except FileNotFoundError:
        return
    except OSError as error:
        raise _refused(path, f"its directory cannot be seen ({error.strerror})") from error
    problem = _problem(found, owner=owner, forbidden=0o022)
    if problem is not None:
        raise _refused(path, f"its directory {problem}")


def _check(found: os.stat_result, path: Path, *, owner: int, is_private: bool) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise _refused(path, "is no regular file")
    problem = _problem(found, owner=owner, forbidden=0o077 if is_private else 0o022)
    if problem is not None:
        raise _refused(path, problem)


def _problem(found: os.stat_result, *, owner: int, forbidden: int) -> str | None:
    if found.st_uid != owner:
        whose = "root" if owner == ROOT else f"uid {owner}"
        return f"belongs to uid {found.st_uid}, not to {whose}; chown it"
    if found.st_mode & forbidden:
        mode = stat.S_IMODE(found.st_mode)
        if forbidden == 0o022:
            return f"is writable by others (mode {mode:04o}); chmod go-w"
        return f"is open to others (mode {mode:04o}); chmod 0600"
    return None


def _refused(path: Path, message: str) -> PolicyRefused:
    return PolicyRefused(message, source=str(path))
