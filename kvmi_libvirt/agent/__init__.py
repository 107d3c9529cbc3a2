# SPDX-License-Identifier: Apache-2.0
"""The agent: keeps introspection right while VMs, tools and libvirtd come and go."""
