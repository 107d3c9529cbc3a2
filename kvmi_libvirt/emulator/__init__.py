# SPDX-License-Identifier: Apache-2.0
"""KVMI for machines whose kernel has none: see docs/emulator.md.

``kernel``, ``protocol``, ``protocol_v7``, ``memory``, ``faults``, ``revisions`` and
``filter`` are pure. ``supervisor`` is the process that serves QEMU and its tool:
``listener`` brings it the ioctls, ``calls`` answers them, ``registry``, ``process`` and
``vmfile`` tell which VM is meant, ``channel`` is the tool's socket, ``trace`` the log.
``launch`` starts it and becomes the program, ``scripts/kvmi-emulated-qemu`` does so for
QEMU. Imports ``abi``, ``linux``, ``errors`` and ``newtypes``; only ``cli.emulate`` and the
wrapper import it.
"""
