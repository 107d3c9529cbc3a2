# SPDX-License-Identifier: Apache-2.0
"""Which signals a process ignores, as the kernel tells."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from kvmi_libvirt.newtypes import Pid
from kvmi_libvirt.qemu.process import Process

SET = "import signal, sys; signal.signal(signal.SIGPIPE, signal.{}); print(flush=True); input()"


@pytest.mark.parametrize(("disposition", "ignores"), [("SIG_IGN", True), ("SIG_DFL", False)])
def test_a_signal_is_ignored_or_not(disposition: str, ignores: bool) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SET.format(disposition)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        with Process(Pid(child.pid)) as process:
            assert process.ignores(signal.SIGPIPE) is ignores
            assert process.ignores(signal.SIGTERM) is False
        child.communicate(b"\n")
