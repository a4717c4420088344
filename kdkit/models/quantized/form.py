"""The description of a GPTQ checkpoint: ``quantization_config`` of config.json, and quantize_config.json. Light."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from kdkit import __version__
from kdkit.api.errors import ModelError

__all__ = ["QUANTIZE_CONFIG", "GptqFormat", "old_names", "read_form", "refuse_quantized", "with_form"]

QUANTIZE_CONFIG: Final = "quantize_config.json"
_CONFIG: Final = "config.json"
_KEY: Final = "quantization_config"
_VERSIONS: Final[dict[str, Literal[1, 2]]] = {"gptq": 1, "gptq_v2": 2}
_BITS: Final = (2, 4, 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class GptqFormat:
    """How the layers of a checkpoint are packed, and how they were made.

    Attributes:
        bits: Width of a code.
        group_size: Neighbouring inputs that share a grid; -1 is all of them.
        sym: Every zero point is the middle code.
        desc_act: Groups are not neighbours; ``g_idx`` says which input belongs to which.
        lm_head: The output projection is quantised, too.
        version: 1 is ``gptq`` (zero points are stored minus 1), 2 is ``gptq_v2``.
        damp_percent: Of the solver; None where none was used.
        true_sequential: Of the solver; None where none was used.
        static_groups: Of the solver; None where none was used.
    """

    bits: int
    group_size: int
    sym: bool
    desc_act: bool = False
    lm_head: bool = False
    version: Literal[1, 2] = 1
    damp_percent: float | None = None
    true_sequential: bool | None = None
    static_groups: bool | None = None

    @classmethod
    def standard(cls, *, sym: bool, **rest: Any) -> GptqFormat:
        """The version that most readers take: ``gptq`` for symmetric grids, ``gptq_v2`` for others."""
        return cls(sym=sym, version=1 if sym else 2, **rest)

    def notes(self) -> list[str]:
        """What the person who passes the checkpoint on should know."""
        random = "transformers puts random numbers in the place of a quantised output projection, without a word"
        return [f"{random}: read this checkpoint with kdkit or gptqmodel"] if self.lm_head else []

    def config(self) -> dict[str, Any]:
        """The entries for other readers, the same in both files. No path, no text of calibration."""
        name = next(name for name, version in _VERSIONS.items() if version == self.version)
        solver = {
            "damp_percent": self.damp_percent,
            "true_sequential": self.true_sequential,
            "static_groups": self.static_groups,
        }
        return {
            "quant_method": "gptq",
            "bits": self.bits,
            "group_size": self.group_size,
            "sym": self.sym,
            "desc_act": self.desc_act,
            "lm_head": self.lm_head,
            "checkpoint_format": name,
            "format": name,
            "pack_dtype": "int32",
            **{key: value for key, value in solver.items() if value is not None},
            "meta": {"quantizer": [f"kdkit:{__version__}"]},
        }


def with_form(config: dict[str, Any], form: GptqFormat | None) -> dict[str, Any]:
    """A model's config.json with ``form``, or without any trace of quantisation."""
    plain = {key: value for key, value in config.items() if key not in {_KEY, "torch_dtype", "dtype"}}
    return plain | {"dtype": "float16"} | ({_KEY: form.config()} if form is not None else {})


def old_names(config: dict[str, Any]) -> dict[str, Any]:
    """The same facts of a config.json by the names that transformers 4 knows.

    It ignores ``rope_parameters``, so that a model would silently get the usual rotary frequencies instead of its own.
    """
    old = {"torch_dtype": config["dtype"]} if "dtype" in config else {}
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        return old
    if "rope_theta" in rope:
        old["rope_theta"] = rope["rope_theta"]
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    if scaling.get("rope_type", "default") != "default":
        old["rope_scaling"] = scaling
    return old


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in ``file``.

    Raises:
        ModelError: There is none.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"is not JSON: {error}"
        raise ModelError(f"cannot be read: {reason}", where=str(file)) from error
    if not isinstance(data, dict):
        raise ModelError("is not a JSON object", where=str(file))
    return data


def _stored(path: Path) -> dict[str, Any] | None:
    """What ``path`` says about its quantisation; None for a plain model."""
    inside = read_json(path / _CONFIG).get(_KEY)
    if inside is None and (path / QUANTIZE_CONFIG).is_file():
        # Old files have it beside config.json only, where there is no method but this one.
        inside = {"quant_method": "gptq"} | read_json(path / QUANTIZE_CONFIG)
    if inside is not None and not isinstance(inside, dict):
        raise ModelError(f"{_KEY} is not an object", where=str(path / _CONFIG))
    return inside


def refuse_quantized(path: Path) -> None:
    """Refuse a model whose weights are codes already.

    Raises:
        ModelError: It says so.
    """
    stored = _stored(path)
    if stored is not None:
        method = stored.get("quant_method", "unknown method")
        raise ModelError(
            f"is already quantised ({method})", where=str(path), hint="quantise the model that it was made from"
        )
    if any(path.glob("*.gguf")):
        raise ModelError("is a GGUF file already", where=str(path), hint="quantise the model that it was made from")


def read_form(path: Path) -> GptqFormat:
    """What the checkpoint in ``path`` says about itself.

    Raises:
        ModelError: It is no GPTQ checkpoint, or one of a kind that is not read here.
    """
    stored = _stored(path)
    if stored is None:
        raise ModelError("is not quantised", where=str(path), allowed="a GPTQ checkpoint")
    where = f"{path} ({_KEY})"
    _one_of(stored, "quant_method", ("gptq",), where)
    name = _one_of({"checkpoint_format": "gptq"} | stored, "checkpoint_format", tuple(_VERSIONS), where)
    _one_of({"pack_dtype": "int32"} | stored, "pack_dtype", ("int32", "torch.int32"), where)
    if stored.get("dynamic"):
        raise ModelError("has other settings for certain layers (dynamic), which is not read here", where=where)
    return GptqFormat(
        bits=_one_of(stored, "bits", _BITS, where),
        group_size=_group_size(stored, where),
        sym=_flag(stored, "sym", default=True, where=where),
        desc_act=_flag(stored, "desc_act", default=False, where=where),
        lm_head=_flag(stored, "lm_head", default=False, where=where),
        version=_VERSIONS[name],
        damp_percent=_number(stored.get("damp_percent")),
        true_sequential=_optional_flag(stored.get("true_sequential")),
        static_groups=_optional_flag(stored.get("static_groups")),
    )


def _one_of(stored: dict[str, Any], key: str, allowed: tuple[Any, ...], where: str) -> Any:
    value = stored.get(key)
    if isinstance(value, bool) or not isinstance(value, int | str) or value not in allowed:
        raise ModelError(f"{key} is {_short(value)}", where=where, allowed=" or ".join(map(str, allowed)))
    return value


def _group_size(stored: dict[str, Any], where: str) -> int:
    value = stored.get("group_size", -1)
    if not isinstance(value, int) or isinstance(value, bool) or not (value == -1 or value > 0):
        raise ModelError(f"group_size is {_short(value)}", where=where, allowed="a positive number, or -1")
    return value


def _flag(stored: dict[str, Any], key: str, *, default: bool, where: str) -> bool:
    value = stored.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ModelError(f"{key} is {_short(value)}", where=where, allowed="true or false")
    return value


def _optional_flag(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


def _number(value: Any) -> float | None:
    real = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if real and abs(value) < 1e9 and math.isfinite(value) else None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
