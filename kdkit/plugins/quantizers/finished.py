"""Quantised layers on disk, block by block, so that an interrupted run goes on and memory holds none of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Literal

from safetensors import safe_open

from kdkit.api.errors import EnvironmentUnmet
from kdkit.models.quantized.linear import QuantizedLinear
from kdkit.train import checkpoint

__all__ = ["Finished", "LayerFigures"]

_TENSORS: Final = ("codes", "scales", "zeros", "g_idx")


@dataclass(frozen=True, slots=True)
class LayerFigures:
    """How a layer came out; see :class:`kdkit.plugins.quantizers.gptq_solver.Solved`."""

    name: str
    error: float
    rtn_error: float
    damp: float
    kept: Literal["gptq", "rtn"]
    note: str | None


class Finished(Mapping[str, QuantizedLinear]):
    """The layers of all finished blocks by name; each is read when it is asked for.

    Args:
        root: Directory of the blocks; those of another run (another ``identity``) are removed.
        identity: Changes with whatever the result depends on.
        bits: Width of a code.
        log: Is told what is passed over.
    """

    def __init__(self, root: Path, identity: str, bits: int, log: Callable[[str], None]) -> None:
        self._root, self._identity, self._bits, self._log = root, identity, bits, log
        self._of_block: dict[str, list[LayerFigures]] = {}
        self._places: dict[str, Path] = {}
        for path in sorted(root.glob("block-*")):
            self._adopt(path)

    def _adopt(self, path: Path) -> None:
        why = checkpoint.problem_of(path)
        facts = {} if why else json.loads((path / "layers.json").read_text(encoding="utf-8"))
        if not why and facts["identity"] != self._identity:
            why = "made with other settings, rows or weights"
        if why:
            self._log(f"{path.name} of an earlier attempt cannot be used ({why}): it is made again")
            shutil.rmtree(path)
            return
        self._note(path, facts["block"], [LayerFigures(**layer) for layer in facts["layers"]])

    def _note(self, path: Path, block: str, layers: list[LayerFigures]) -> None:
        self._of_block[block] = layers
        self._places.update({layer.name: path for layer in layers})

    def add(self, index: int, block: str, layers: Sequence[tuple[LayerFigures, QuantizedLinear]]) -> None:
        """Keep a finished block.

        Raises:
            EnvironmentUnmet: It cannot be written, most likely because the disk is full.
        """
        path = self._root / f"block-{index:05d}"
        tensors = {f"{f.name}/{key}": getattr(linear, key).cpu().clone() for f, linear in layers for key in _TENSORS}
        figures = [layer for layer, _ in layers]
        facts = {"identity": self._identity, "block": block, "layers": [asdict(layer) for layer in figures]}
        if not checkpoint.write(path, {"linears": tensors}, {"layers": facts}, self._log):
            raise EnvironmentUnmet(
                f"the finished layers of {block} cannot be written", where=str(path), hint="free space on this disk"
            )
        self._note(path, block, figures)

    def figures(self, block: str) -> list[LayerFigures] | None:
        """Those of a block's layers; None when it is not finished."""
        return self._of_block.get(block)

    def __getitem__(self, name: str) -> QuantizedLinear:
        with safe_open(self._places[name] / "linears.safetensors", framework="pt") as file:
            return QuantizedLinear(**{key: file.get_tensor(f"{name}/{key}") for key in _TENSORS}, bits=self._bits)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
