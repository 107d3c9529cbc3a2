# SPDX-License-Identifier: Apache-2.0
"""The introspection tool's side: how it is reached, greeted, spoken to, and played.

``handshake`` and ``wire`` are bytes only, ``connect`` is what a session uses to
reach a tool, ``inquiry`` and ``probe`` are a tool. May import ``abi``, ``errors``,
``newtypes`` and the source types of ``policy.model``; never ``linux`` or ``qemu``.
"""
