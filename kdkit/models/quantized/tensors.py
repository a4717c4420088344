"""The tensors of a model directory, one at a time: reading them from its safetensors files, and writing new ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kdkit.api.errors import ModelError
from kdkit.models.quantized.form import read_json

__all__ = ["Entry", "StoredTensors", "weight_bytes", "weight_files", "write_shards"]

_INDEX: Final = "model.safetensors.index.json"
_SHARD_BYTES: Final = 4 * 2**30


def weight_files(path: Path) -> list[Path]:
    """The files with the weights of a model directory, chosen as transformers does.

    That is ``model.safetensors``, else the files of the index, else every safetensors or GGUF file. Another copy of the
    weights beside them, such as the ``consolidated.safetensors`` of some models on the Hub, is no part of the model.

    Raises:
        ModelError: The index cannot be read.
    """
    whole, index = path / "model.safetensors", path / _INDEX
    if whole.is_file():
        return [whole]
    if index.is_file():
        return sorted({path / Path(name).name for name in _weight_map(index).values()})
    return sorted(path.glob("*.safetensors")) or sorted(path.glob("*.gguf"))


def _weight_map(index: Path) -> dict[str, str]:
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise ModelError("has no weight_map from tensors to files", where=str(index))
    return found


def weight_bytes(path: Path) -> int:
    """Bytes on disk of the weights of a model directory."""
    return sum(file.stat().st_size for file in weight_files(path))


class StoredTensors:
    """The tensors of the safetensors files in a directory, by name. A context manager; nothing is read ahead.

    Args:
        path: Directory of a model.

    Raises:
        ModelError: A file cannot be read, or two of them have a tensor of the same name.
    """

    def __init__(self, path: Path) -> None:
        self._files: dict[str, tuple[Path, Any]] = {}
        with ExitStack() as stack:
            for file in weight_files(path):
                if file.suffix == ".safetensors":
                    self._open(file, stack)
            if not self._files:
                raise ModelError("has no tensors in safetensors files", where=str(path))
            self._stack = stack.pop_all()

    def _open(self, file: Path, stack: ExitStack) -> None:
        try:
            opened = stack.enter_context(safe_open(file, framework="pt"))
        except (OSError, SafetensorError) as error:
            raise ModelError(f"cannot be read: {_line(error)}", where=str(file)) from error
        for name in opened.keys():  # noqa: SIM118 (not a mapping)
            if name in self._files:
                raise ModelError(f"has {name}, as {self._files[name][0].name} has", where=str(file))
            self._files[name] = (file, opened)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def names(self) -> list[str]:
        """Names in the order of the files."""
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header alone."""
        return tuple(self._files[name][1].get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        """A tensor.

        Raises:
            ModelError: It cannot be read.
        """
        file, opened = self._files[name]
        try:
            return opened.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{name} cannot be read: {_line(error)}", where=str(file)) from error


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


@dataclass(frozen=True, slots=True)
class Entry:
    """Tensors to write together, made when their file is written.

    Attributes:
        size: About how many bytes they take.
        make: The tensors by name, contiguous.
    """

    size: int
    make: Callable[[], Mapping[str, Tensor]]


def write_shards(entries: Sequence[Entry], directory: Path) -> None:
    """Write all tensors into safetensors files of about 4 GB, named and indexed as ``save_pretrained`` does."""
    shards: list[list[Entry]] = [[]]
    for entry in entries:
        if shards[-1] and sum(other.size for other in shards[-1]) + entry.size > _SHARD_BYTES:
            shards.append([])
        shards[-1].append(entry)
    if len(shards) == 1:
        save_file(_made(shards[0]), directory / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, 1):
        tensors = _made(shard)
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(tensors, directory / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _made(entries: Sequence[Entry]) -> dict[str, Tensor]:
    return {name: tensor for entry in entries for name, tensor in entry.make().items()}
