"""Which stages of a recipe a command is about."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kdkit.api.errors import RecipeError

if TYPE_CHECKING:
    from kdkit.recipe import Stage

__all__ = ["Selection"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The ``--from``, ``--until``, ``--only``, ``--force`` and ``--fresh`` options.

    Attributes:
        first: Only this stage and the stages that depend on it.
        until: Only this stage and the stages it depends on.
        only: Only these stages.
        force: Run these again although their results are there.
        fresh: Throw checkpoints away instead of resuming.
    """

    first: str | None = None
    until: str | None = None
    only: tuple[str, ...] = ()
    force: tuple[str, ...] = ()
    fresh: bool = False

    def check(self, stages: Mapping[str, Stage]) -> None:
        """Refuse names that are no stages, and forced stages that are left out.

        Raises:
            RecipeError: With the stages there are.
        """
        given = {"--from": self._list(self.first), "--until": self._list(self.until), "--only": self.only}
        for option, names in {**given, "--force": self.force}.items():
            for name in names:
                if name not in stages:
                    close = difflib.get_close_matches(name, stages, n=1)
                    raise RecipeError(
                        f"no stage {name!r}",
                        where=option,
                        allowed=", ".join(stages),
                        hint=f"did you mean {close[0]!r}?" if close else None,
                    )
        chosen = self.stages(stages)
        if not chosen:
            raise RecipeError("no stage is left", where=" ".join(option for option, names in given.items() if names))
        for name in self.force:
            if name not in chosen:
                raise RecipeError(f"stage {name!r} is forced but left out", where="--force")

    def stages(self, stages: Mapping[str, Stage]) -> frozenset[str]:
        """Names of the selected stages."""
        chosen = set(self.only or stages)
        if self.until is not None:
            chosen &= _closure(self.until, {name: stage.upstream for name, stage in stages.items()})
        if self.first is not None:
            downstream = {name: [n for n, stage in stages.items() if name in stage.upstream] for name in stages}
            chosen &= _closure(self.first, downstream)
        return frozenset(chosen)

    @staticmethod
    def _list(name: str | None) -> tuple[str, ...]:
        return () if name is None else (name,)


def _closure(start: str, edges: Mapping[str, Iterable[str]]) -> set[str]:
    """``start`` and everything reachable from it."""
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting.extend(edges[name])
    return seen
