# SPDX-License-Identifier: Apache-2.0
"""The agent as a process: put together, signals, the service manager, the end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kvmi_libvirt import __version__, proxmoxfiles
from kvmi_libvirt import state as st
from kvmi_libvirt.agent import logs, zygote
from kvmi_libvirt.agent.domains import LibvirtDomains, StatusFiles
from kvmi_libvirt.agent.inotify import MADE, Directories
from kvmi_libvirt.agent.jobs import Places
from kvmi_libvirt.agent.keeper import Keeper
from kvmi_libvirt.agent.machines import Machines
from kvmi_libvirt.agent.metrics import Metrics
from kvmi_libvirt.agent.notify import Notifier
from kvmi_libvirt.agent.pool import Pool
from kvmi_libvirt.agent.scrape import Scrape
from kvmi_libvirt.agent.server import Server
from kvmi_libvirt.agent.settings import PROXMOX
from kvmi_libvirt.agent.watch import Watcher
from kvmi_libvirt.agentclient import VERSION
from kvmi_libvirt.errors import KvmiLibvirtError

if TYPE_CHECKING:
    import socket

    from kvmi_libvirt.agent.domains import Domains
    from kvmi_libvirt.agent.settings import Settings

logger = logging.getLogger(__name__)

_WANTED_FDS: Final = 65536
_GATHER_S: Final = 0.2


def run(settings: Settings) -> None:
    """Be the agent until SIGTERM or SIGINT; every VM stays as it is.

    Call it in a fresh process with one thread.

    Raises
        KvmiLibvirtError  it cannot serve: another agent does, or a place is taken
    """
    # Until it can be served: every job reads the policy anew, so none is missed.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    logs.start(settings.log_level)
    _raise_fd_limit()
    notifier = Notifier()
    workers, pid = zygote.start(
        Places(
            state_dir=settings.state_dir,
            run_dir=settings.run_dir,
            host_policy=settings.host_policy,
            proxmox=_node(settings),
            allow_standin=settings.standin,
        ),
        not_theirs=notifier.passed(),
    )
    with workers:
        is_whole = asyncio.run(_Agent(settings, notifier, workers, pid).run())
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)  # ends with its socket
    if not is_whole:
        raise KvmiLibvirtError("the process that workers come from has ended; start the agent anew")


def _node(settings: Settings) -> proxmoxfiles.Places | None:
    if settings.domains != PROXMOX:
        return None
    return proxmoxfiles.Places(
        host_policy=(settings.host_policy, proxmoxfiles.CLUSTER_DIR / "host-policy.xml")
    )


def _raise_fd_limit() -> None:
    # Two descriptors a VM.
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = hard if hard != resource.RLIM_INFINITY else _WANTED_FDS
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, _WANTED_FDS), hard))


class _Agent:
    def __init__(
        self, settings: Settings, notifier: Notifier, workers: socket.socket, zygote_pid: int
    ) -> None:
        self._settings = settings
        self._workers = workers
        self._zygote_pid = zygote_pid
        self._is_whole = True
        self._since = time.time()
        self._notifier = notifier

    async def run(self) -> bool:
        loop = asyncio.get_running_loop()
        end = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, end.set)
        async with contextlib.AsyncExitStack() as stack:
            watcher = Watcher(loop)
            stack.callback(watcher.close)

            def zygote_ended() -> None:
                self._is_whole = False
                end.set()

            watcher.watch_process(os.pidfd_open(self._zygote_pid), zygote_ended)
            directories = Directories(loop)
            stack.callback(directories.close)
            # What tools may write into must not be able to keep us from our own.
            sockets = Directories(loop, mask=MADE, pause_s=_GATHER_S)
            stack.callback(sockets.close)
            pool = Pool(self._workers)
            stack.callback(pool.close)
            domains = self._domains(directories)
            stack.push_async_callback(domains.close)
            self._keeper: Keeper
            metrics = Metrics(lambda: self._keeper.vms)
            self._keeper = keeper = Keeper(
                self._settings,
                domains=domains,
                pool=pool,
                watcher=watcher,
                directories=directories,
                sockets=sockets,
                notifier=self._notifier,
                metrics=metrics,
            )
            stack.push_async_callback(keeper.close)
            server = Server(
                self._settings.socket_path, operate=keeper.hand_over.operation, answer=self._answer
            )
            await server.start()
            stack.push_async_callback(server.close)
            if self._settings.metrics != "off":
                scrape = Scrape(self._settings.metrics, metrics.render)
                await scrape.start()
                stack.push_async_callback(scrape.close)
                if not metrics.is_there:
                    logger.warning("no metrics: python3-prometheus-client is not installed")
            loop.add_signal_handler(signal.SIGHUP, self._reload)
            keeper.start()
            logger.info("kvmi-libvirt agent %s: ready", __version__)
            self._notifier.ready("serving")
            alive = asyncio.create_task(self._keep_alive())
            await end.wait()
            alive.cancel()
            logger.info("stopping; hooked VMs stay hooked")
            self._notifier.stopping()
        return self._is_whole

    def _domains(self, directories: Directories) -> Domains:
        node = _node(self._settings)
        if node is not None:
            return Machines(node, st.StateDir(self._settings.state_dir), directories)
        where = self._settings.domains
        if where.startswith("/"):
            return StatusFiles(Path(where), directories)
        return LibvirtDomains(where)

    def _reload(self) -> None:
        logger.info("SIGHUP: reading the host's policy again")
        self._notifier.reloading()
        self._keeper.policies_changed()
        self._notifier.ready("serving")

    async def _keep_alive(self) -> None:
        every = self._notifier.watchdog_s
        while every is not None:
            self._notifier.alive()
            await asyncio.sleep(every)

    async def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        if request.get("version") != VERSION:
            return {"version": VERSION, "ok": False, "error": f"only version {VERSION} is known"}
        answer: dict[str, Any] = {"version": VERSION, "ok": True, "pid": os.getpid()}
        if request.get("op") == "ping":
            counts = dict.fromkeys((st.HOOKED, st.WAITING, st.FAILED, st.UNHOOKED), 0)
            for vm in self._keeper.vms:
                if vm.record is not None:
                    counts[vm.record.state] += 1
            return {
                **answer,
                "release": __version__,
                "since": self._since,
                "libvirt": self._keeper.sees_domains,
                "vms": len(self._keeper.vms),
                "busy": self._keeper.busy,
                **counts,
            }
        if request.get("op") == "status":
            return {**answer, "vms": self._keeper.status()}
        return {**answer, "ok": False, "error": "unknown op"}
