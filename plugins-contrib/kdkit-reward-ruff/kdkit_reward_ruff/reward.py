"""Asks ruff about programs: as text on its standard input, one process each, never by running them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sysconfig
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

from kdkit.api import EnvironmentUnmet, RecipeError, RewardScore, Rollout
from kdkit_reward_ruff.programs import program_of

if TYPE_CHECKING:
    from kdkit_reward_ruff.plugin import RuffParams

_LONGEST: Final = 20_000
_NO_PYTHON: Final = (None, "invalid-syntax")
"""The code of a finding that is a syntax error: releases of ruff differ."""
_FROM_OUTSIDE: Final = frozenset({signal.SIGKILL, signal.SIGTERM, signal.SIGINT})
_AT_ONCE: Final = 8


class RuffReward:
    """See :class:`kdkit_reward_ruff.plugin.RuffParams`.

    Raises:
        EnvironmentUnmet: There is no ruff on this machine.
        RecipeError: It does not know a rule or the version of Python.
    """

    def __init__(self, params: RuffParams) -> None:
        self._params = params
        self._command = [
            _ruff(),
            "check",
            "--isolated",
            "--no-cache",
            "--ignore-noqa",
            "--output-format=json",
            f"--target-version={params.target_version}",
            f"--select={','.join(params.select)}",
            *(f"--ignore={rule}" for rule in params.ignore),
            "--stdin-filename=answer.py",
            "-",
        ]
        # Ruff takes options from variables, too.
        self._env = {name: value for name, value in os.environ.items() if not name.startswith("RUFF_")}
        self._check_options()

    def __call__(self, rollouts: Sequence[Rollout], /) -> list[RewardScore]:
        """See :class:`kdkit.api.Reward`."""
        programs = [program_of(rollout.prompt, rollout.text) for rollout in rollouts]
        distinct = list(dict.fromkeys(programs))
        with ThreadPoolExecutor(min(_AT_ONCE, os.cpu_count() or 1)) as pool:
            scores = dict(zip(distinct, pool.map(self._score, distinct), strict=True))
        return [scores[program] for program in programs]

    def _check_options(self) -> None:
        try:
            done = self._run(b"")
        except (OSError, subprocess.TimeoutExpired) as error:
            raise EnvironmentUnmet(f"ruff does not run: {error}", where="reward ruff") from error
        if done.returncode != 0:
            raise RecipeError(f"ruff refuses its options: {_last_line(done.stderr)}", where="reward ruff")

    def _score(self, program: str | None) -> RewardScore:
        if program is None or not _has_statement(program):
            return _scored(0.0, "no program in the answer")
        if len(program) > _LONGEST:
            return _scored(0.0, f"a program of {len(program):,} characters, more than {_LONGEST:,}")
        try:
            text = program.encode()
        except UnicodeEncodeError:
            text = b"\0"
        # Ruff takes NUL for a character like others, Python does not.
        if b"\0" in text:
            return _scored(0.0, "the program is no Python")
        try:
            done = self._run(text)
        except subprocess.TimeoutExpired:
            return RewardScore.infra_error(f"ruff took more than {self._params.time_limit:g} seconds")
        except OSError as error:
            return RewardScore.infra_error(f"ruff does not run: {error}")
        return self._judged(done)

    def _judged(self, done: subprocess.CompletedProcess[bytes]) -> RewardScore:
        if done.returncode < 0 and -done.returncode not in _FROM_OUTSIDE:
            # Its own parser gave up, for instance at ten thousand signs in a row.
            return _scored(0.0, "ruff cannot read the program")
        if done.returncode not in (0, 1):
            return RewardScore.infra_error(f"ruff failed ({done.returncode}): {_last_line(done.stderr)}")
        findings: list[dict[str, Any]] = json.loads(done.stdout)
        codes = Counter(finding["code"] for finding in findings)
        if any(codes[code] for code in _NO_PYTHON):
            return _scored(0.0, "the program is no Python")
        named = ", ".join(f"{code} x{count}" if count > 1 else code for code, count in sorted(codes.items()))
        return _scored(max(0.0, 1.0 - self._params.penalty * len(findings)), named or "no findings")

    def _run(self, program: bytes) -> subprocess.CompletedProcess[bytes]:
        limit = self._params.time_limit
        return subprocess.run(  # noqa: S603 - the command is ours, the program is text on its standard input
            self._command, input=program, capture_output=True, timeout=limit, env=self._env, check=False
        )


def _ruff() -> str:
    """The ruff beside this Python, else the one on the path."""
    found = shutil.which("ruff", path=sysconfig.get_path("scripts")) or shutil.which("ruff")
    if found is None:
        raise EnvironmentUnmet("ruff is not installed", where="reward ruff", hint="install it with: pip install ruff")
    return found


def _has_statement(program: str) -> bool:
    return any(line.strip() and not line.lstrip().startswith("#") for line in program.split("\n"))


def _scored(value: float, note: str) -> RewardScore:
    return RewardScore("ok", value, note)


def _last_line(text: bytes) -> str:
    lines = text.decode(errors="replace").strip().splitlines()
    return lines[-1].strip().removeprefix("Cause: ") if lines else "it says nothing"
