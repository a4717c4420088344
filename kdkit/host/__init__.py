"""Finds plugins, keeps the broken ones apart, and answers "which component is called that?".

``Catalog.discover()`` is built once by a command and passed down; there is no global plugin manager.
"""

from __future__ import annotations

from kdkit.host.catalog import Catalog
from kdkit.host.compat import check_extras, extras_of
from kdkit.host.describe import ParamDoc, describe_params, param_names
from kdkit.host.records import BrokenPlugin, Entry
from kdkit.host.runtime import plugin_errors

__all__ = [
    "BrokenPlugin",
    "Catalog",
    "Entry",
    "ParamDoc",
    "check_extras",
    "describe_params",
    "extras_of",
    "param_names",
    "plugin_errors",
]
