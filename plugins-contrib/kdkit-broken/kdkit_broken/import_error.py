"""Fault: it imports what is not installed."""

from __future__ import annotations

from importlib import import_module

import_module("a_module_that_nobody_has")
