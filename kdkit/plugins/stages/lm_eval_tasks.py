"""Tasks of the lm-evaluation-harness, found and loaded without running what nobody has asked for.

The harness is made for people who trust every task: `!function` in a task file imports a Python file beside it, Jinja
templates may reach everything, and a metric that it does not know is fetched from the Hub and run. Here all three are
closed unless the recipe opens them; the version of the harness is pinned, since two of them are no public interface.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, chdir, contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import evaluate
import lm_eval.tasks
import numpy as np
import torch
from datasets.exceptions import DatasetsError
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.sandbox import SandboxedEnvironment
from lm_eval import utils
from lm_eval.tasks import _yaml_loader
from lm_eval.tasks._index import Kind

from kdkit.api.errors import DataError, EnvironmentUnmet, KdkitError

if TYPE_CHECKING:
    from kdkit.plugins.stages.lm_eval_plugin import LmEvalParams

__all__ = ["Tasks", "guarded"]

_OWN: Final = Path(lm_eval.tasks.__file__).parent
_ALLOW: Final = "read it, then set allow_code: true"


class Tasks:
    """The tasks that a stage names.

    Args:
        params: The stage's parameters.
        directory: Where the user's own task files are; None without.
        seed: Of the choice of solved examples, and of whatever else a task draws.

    Raises:
        DataError: A name is neither task, group nor tag, or the task runs programs of the model.
    """

    def __init__(self, params: LmEvalParams, directory: Path | None, seed: int) -> None:
        self._params, self._directory, self._seed = params, directory, seed % 2**32
        if directory is not None and not directory.is_dir():
            raise DataError("no directory", where=str(directory), hint="include_path names one with task files")
        self._manager = _manager(directory, params.tasks.values())
        for task in params.tasks.values():
            self._known(task)

    def load(self, task: str) -> dict[str, Any]:
        """A task's parts, freshly loaded: ``tasks`` and ``groups`` as the harness wants them.

        Raises:
            DataError: A file is wrong, needs code that is not allowed, or runs programs of the model.
            EnvironmentUnmet: Its data has to be fetched and cannot be.
        """
        # Task files may draw numbers while they are read.
        random.seed(self._seed)
        np.random.seed(self._seed)
        torch.manual_seed(self._seed)
        with guarded(allow_code=self._params.allow_code), ExitStack() as stack:
            if self._directory is not None:
                stack.enter_context(chdir(self._directory))
            loaded = _loaded(self._manager, task)
        for name, part in loaded["tasks"].items():
            _refuse_programs(name, getattr(part, "UNSAFE_CODE", False))
            if self._params.num_fewshot is not None and part.get_config("num_fewshot") != 0:
                part.set_config(key="num_fewshot", value=self._params.num_fewshot)
            elif part.get_config("num_fewshot") is None:
                part.set_config(key="num_fewshot", value=0)
            part.set_fewshot_seed(seed=self._seed)
        return loaded

    def _known(self, task: str) -> None:
        entry = self._manager.task_index.get(task)
        if entry is None:
            close = get_close_matches(task, self._manager.all_tasks, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "tasks of your own need include_path: ./DIRECTORY"
            raise DataError(f"the harness has no task {task!r}", where="tasks", hint=hint)
        _refuse_programs(task, (entry.cfg or {}).get("unsafe_code", False))


@contextmanager
def guarded(*, allow_code: bool) -> Iterator[None]:
    """While tasks are loaded or scored: no code but that of the installed harness, unless it is allowed.

    Raises:
        DataError: A task needs other code.
    """
    if allow_code:
        yield
        return
    refused: list[DataError] = []

    def no_metric(path: str, *args: Any, **named: Any) -> Any:
        del args, named
        what = f"a task loads the metric {path!r} with the package evaluate, which runs code from elsewhere"
        refused.append(DataError(what, where="tasks", hint=_ALLOW))
        raise refused[-1]

    import_function = _yaml_loader._import_func_in_yml  # noqa: SLF001 - the one place that imports for task files

    def only_own(qualified: str, base_dir: Path) -> Any:
        if Path(base_dir).resolve().is_relative_to(_OWN):
            return import_function(qualified, base_dir)
        what = f"a task file runs Python: !function {qualified}"
        raise DataError(what, where=str(base_dir), hint=_ALLOW)

    sandbox = SandboxedEnvironment(loader=utils.env.loader, undefined=utils.env.undefined, keep_trailing_newline=True)
    sandbox.filters |= utils.env.filters
    with (
        _replaced(evaluate, "load", no_metric),
        _replaced(_yaml_loader, "_import_func_in_yml", only_own),
        _replaced(utils, "env", sandbox),
    ):
        try:
            yield
        except SecurityError as error:
            what = f"a template in a task file reaches for more than its data: {error}"
            raise DataError(what, where="tasks", hint=_ALLOW) from error
        finally:
            # The harness takes a metric that cannot be loaded for one that is missing, and goes on.
            if refused:
                raise refused[0]


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _manager(directory: Path | None, wanted: Iterable[str]) -> Any:
    """The harness's index; its own files, of which there are thousands, only where they are needed."""
    if directory is not None:
        alone = lm_eval.tasks.TaskManager(include_path=str(directory), include_defaults=False)
        found = [alone.task_index.get(task) for task in wanted]
        if all(entry is not None and entry.kind in {Kind.TASK, Kind.PY_TASK} for entry in found):
            return alone
    return lm_eval.tasks.TaskManager(include_path=str(directory) if directory is not None else None)


def _loaded(manager: Any, task: str) -> dict[str, Any]:
    where = f"task {task}"
    try:
        return dict(manager.load([task]))
    except KdkitError:
        raise
    except ConnectionError as error:
        hint = "run it once with network; data that was fetched before is used offline"
        raise EnvironmentUnmet(f"its data cannot be fetched: {_line(error)}", where=where, hint=hint) from error
    except ImportError as error:
        hint = "install what it names; the harness has extras for its tasks"
        raise EnvironmentUnmet(f"it lacks a package: {_line(error)}", where=where, hint=hint) from error
    except SecurityError:
        raise
    except (
        FileNotFoundError,
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        DatasetsError,
        TemplateError,
    ) as error:
        raise DataError(f"the harness cannot load it: {type(error).__name__}: {_line(error)}", where=where) from error


def _refuse_programs(task: str, unsafe: bool) -> None:  # noqa: FBT001 - what a task says of itself
    if unsafe:
        raise DataError(
            "it runs programs that the model writes, and the harness has no sandbox",
            where=f"task {task}",
            hint="use the stage evaluate with pass-at-k and a judge, such as correctness",
        )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
