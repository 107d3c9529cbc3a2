# SPDX-License-Identifier: Apache-2.0
"""Kernel interfaces as data: numbers, structures and tables, no calls.

Imports nothing of the package but errors and newtypes. Everything here is a
fact about a kernel, with its source beside it.
"""
