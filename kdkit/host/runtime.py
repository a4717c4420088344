"""The boundary around code of components while it runs."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import kdkit
from kdkit.api.errors import KdkitError, StageError
from kdkit.api.slots import Found
from kdkit.host.records import BUILT_IN, one_line

__all__ = ["plugin_errors"]


@contextmanager
def plugin_errors(found: Found) -> Iterator[None]:
    """Name the component in every error that its code raises.

    Errors of kdkit pass unchanged: they already say what to do, and nested components have named themselves.

    Raises:
        StageError: With component, distribution, version and file, chained to the original error.
    """
    try:
        yield
    except KdkitError:
        raise
    except Exception as exc:
        raise StageError(one_line(exc), where=_where(found, exc)) from exc


def _where(found: Found, exc: Exception) -> str:
    dist, _, name = found.qualified_name.rpartition("/")
    owner = f"kdkit {kdkit.__version__}" if dist == BUILT_IN else found.identity.partition(" ")[0]
    if owner.startswith("sha256:"):
        owner = f"{dist} {owner[:19]}"
    return f"{found.spec.kind} {name!r} of {owner.replace('==', ' ')} ({_place(found, exc)})"


def _place(found: Found, exc: Exception) -> str:
    """The last line of the plugin's own code in the traceback; where the component is defined when there is none."""
    defined = Path(found.source.rpartition(":")[0] or found.source)
    # Only a package has a directory of its own: a single-file plugin shares site-packages with everything else.
    own = defined.parent if (defined.parent / "__init__.py").is_file() else defined
    for frame in reversed(traceback.extract_tb(exc.__traceback__)):
        if Path(frame.filename).is_relative_to(own):
            return f"{frame.filename}:{frame.lineno}"
    return found.source
