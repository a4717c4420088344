"""One process decides for all of them: what a judge says, or how a number rounds, may differ between processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from kdkit.api.errors import StageError

__all__ = ["of_first_rank"]

T = TypeVar("T")


def of_first_rank(make: Callable[[], T]) -> T:
    """What ``make`` gives on the first process, on every process; the others do not call it.

    Every process calls this at the same place. What is given has to be picklable when there are several.

    Raises:
        StageError: ``make`` raised on the first process, where its own error goes on.
    """
    state = PartialState()
    if state.num_processes == 1:
        return make()
    found: list[Any] = [False, None]
    if state.is_main_process:
        try:
            found = [True, make()]
        finally:
            # Also after an error: the others would wait for ever.
            broadcast_object_list(found)
    else:
        broadcast_object_list(found)
        if not found[0]:
            raise StageError("the first process failed, and the others with it", hint="its error says why")
    return cast("T", found[1])
