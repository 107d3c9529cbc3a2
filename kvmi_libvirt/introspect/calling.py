# SPDX-License-Identifier: Apache-2.0
"""Call the tool of a VM, and prove that it is the right one."""

from __future__ import annotations

import contextlib
import hmac
import logging
import socket
import time
import uuid as uuid_module
from typing import TYPE_CHECKING, Final, NamedTuple

from kvmi_libvirt.abi.kvmi import KvmiAbi
from kvmi_libvirt.errors import (
    HandshakeRefused,
    HandshakeTimeout,
)
from kvmi_libvirt.policy.model import Policy
from kvmi_libvirt.policy.secret import read_secret
from kvmi_libvirt.qemu.layout import highest_ram_end
from kvmi_libvirt.qemu.network import current_network, network_of
from kvmi_libvirt.qemu.process import Process
from kvmi_libvirt.tool.connect import (
    check_channel,
    connect,
    peer_credentials,
    set_send_timeout,
    shake_hands,
)
from kvmi_libvirt.tool.handshake import Answer, Hello, cookie_hash, pack_hello

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmi_libvirt.policy.element import Domain

logger = logging.getLogger(__name__)

_SEND_TIMEOUT_S: Final = 10


class Channel(NamedTuple):
    """A tool that was called and is proven.

    Parameters
        sock     connected to it
        network  inode of the network namespace in which that was made
    """

    sock: socket.socket
    network: int


@contextlib.contextmanager
def tool_channel(
    process: Process, domain: Domain, policy: Policy, abi: KvmiAbi
) -> Iterator[Channel]:
    """Call the tool of *policy*, shake hands, and keep the channel open for the block.

    It is called from QEMU's network namespace, whoever we are, if we may go there.

    Raises
        HandshakeError  it is not there, does not answer as it must, or does not know the
                        policy's secret; nothing is left open
    """
    secret = None if policy.secret is None else read_secret(policy.secret)
    # One deadline for connecting and shaking hands together.
    deadline = time.monotonic() + policy.handshake_timeout_s
    hello = Hello(
        uuid=uuid_module.UUID(domain.uuid),
        start_time_s=process.start_time_s(),
        name=domain.name,
        max_gpa=highest_ram_end(domain.machine, domain.memory_bytes),
    )
    with contextlib.ExitStack() as stack:
        with _network(process):
            sock = stack.enter_context(connect(policy.source, deadline=deadline))
            network = current_network()
        answer = shake_hands(sock, pack_hello(abi, hello), deadline=deadline)
        if secret is not None:
            _require_secret(sock, answer, secret, policy, domain)
        # KVM writes replies and events from its own threads: a tool that stops
        # reading must not block a vCPU, or UNHOOK, for ever.
        set_send_timeout(sock, _SEND_TIMEOUT_S)
        check_channel(sock)
        if time.monotonic() > deadline:
            raise HandshakeTimeout(f"no handshake within {policy.handshake_timeout_s:g} s")
        yield Channel(sock, network)


@contextlib.contextmanager
def _network(process: Process) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(network_of(process.pid))
        except OSError as error:
            # From here then: what is in the file system is reached from anywhere.
            logger.debug("not in the network namespace of process %d: %s", process.pid, error)
        yield


def _require_secret(
    sock: socket.socket, answer: Answer, secret: bytes, policy: Policy, domain: Domain
) -> None:
    if hmac.compare_digest(cookie_hash(secret), answer.cookie_hash):
        return
    peer = peer_credentials(sock)
    who = f"process {peer.pid} of uid {peer.uid}" if peer is not None else "its end"
    where = policy.source.describe()
    text = f"the tool does not know the secret '{policy.secret}' ({where}; {who})"
    logger.warning("domain %s (%s): %s", domain.name, domain.uuid, text)
    raise HandshakeRefused(text)
