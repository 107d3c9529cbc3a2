# SPDX-License-Identifier: Apache-2.0
"""Distinct integer types, so that a type checker refuses to mix them.

A process id is not a thread id, and a file descriptor number inside QEMU means
nothing in our own process. Anything may import this module; it imports nothing.
"""

from typing import NewType

Pid = NewType("Pid", int)
"""Thread-group id, as getpid(2) returns it."""

Tid = NewType("Tid", int)
"""Thread id, as gettid(2) returns it. The leader's equals its Pid."""

LocalFd = NewType("LocalFd", int)
"""File descriptor of this process."""

RemoteFd = NewType("RemoteFd", int)
"""File descriptor number in the traced process."""

RemoteAddr = NewType("RemoteAddr", int)
"""Virtual address in the traced process."""
