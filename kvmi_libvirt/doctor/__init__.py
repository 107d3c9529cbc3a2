# SPDX-License-Identifier: Apache-2.0
"""What is wrong with this host, or why a VM is not hooked, and what to do about it.

``facts`` says what can be known, ``look_*`` modules find it out, ``check_*`` modules
judge it without looking at anything, ``examine`` puts them together. Nothing here
changes anything, touches a VM, or calls a tool.
"""
