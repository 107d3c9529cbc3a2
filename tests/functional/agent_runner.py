# SPDX-License-Identifier: Apache-2.0
"""The agent as tests need it: dying at a named point, or started as by a service manager.

    python agent_runner.py --config FILE

KVMI_TEST_DIE=POINT:COUNT   SIGKILLs the daemon when it reaches a point of agent.tracing
                            for the COUNT-th time, and makes the file POINT beside the
                            configuration
KVMI_TEST_FDS=FD:NAME,..    passes descriptors as a service manager does that kept them
"""

from __future__ import annotations

import os
import signal
import sys
from collections import Counter
from pathlib import Path

from kvmi_libvirt.agent import daemon, tracing
from kvmi_libvirt.agent.settings import load_settings


def die_at(text: str, directory: Path) -> None:
    """Die at a point."""
    wanted, _, count = text.partition(":")
    reached: Counter[str] = Counter()

    def point(name: str) -> None:
        reached[name] += 1
        if name == wanted and reached[name] == int(count):
            (directory / wanted).touch()
            os.kill(os.getpid(), signal.SIGKILL)

    assert wanted in tracing.POINTS
    tracing.point = point


def pass_on(text: str) -> None:
    """Make descriptors look as if a service manager had passed them."""
    pairs = [item.partition(":") for item in text.split(",")]
    # Out of the way first: one may have a number that another is to get.
    safe = [os.dup(int(fd)) for fd, _, _ in pairs]
    for number, fd in enumerate(safe, start=3 + len(safe) + 100):
        os.dup2(fd, number, inheritable=False)
    for fd in {*safe, *(int(fd) for fd, _, _ in pairs)}:
        os.close(fd)
    for index in range(len(pairs)):
        os.dup2(103 + len(pairs) + index, 3 + index)
        os.close(103 + len(pairs) + index)
    os.environ["LISTEN_PID"] = str(os.getpid())
    os.environ["LISTEN_FDS"] = str(len(pairs))
    os.environ["LISTEN_FDNAMES"] = ":".join(name for _, _, name in pairs)


def main() -> None:
    """Be the agent."""
    config = Path(sys.argv[2])
    if "KVMI_TEST_FDS" in os.environ:
        pass_on(os.environ["KVMI_TEST_FDS"])
    if "KVMI_TEST_DIE" in os.environ:
        die_at(os.environ["KVMI_TEST_DIE"], config.parent)
    daemon.run(load_settings(config))


if __name__ == "__main__":
    main()
