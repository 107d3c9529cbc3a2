# SPDX-License-Identifier: Apache-2.0
"""KVMI for machines whose kernel has none: see docs/emulator.md.

``kernel``, ``protocol``, ``protocol_v7``, ``memory``, ``faults``, ``revisions`` and
``filter`` are pure. ``supervisor`` answers the notified ioctls with the help of
``process``, ``vmfile``, ``registry``, ``channel`` and ``trace``; ``launch`` starts it
and becomes the program, and ``quick`` does so for QEMU's wrappers. Imports ``abi``,
``linux``, ``errors`` and ``newtypes``; only ``cli.emulate`` and the wrappers import it.
"""
