"""The one place that reads and writes ``save_pretrained`` directories through transformers.

Reading is strict (safetensors only, no weight left at its random value, no code run unless the recipe trusts it), quiet
and fails in one line. Writing chooses the precision on disk without touching the model in memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from kdkit.api.errors import EnvironmentUnmet, KdkitError, ModelError, StageError

__all__ = ["load_errors", "quiet", "read_config", "read_model", "read_tokenizer", "write_pretrained"]


def read_tokenizer(path: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer in ``path``.

    Raises:
        ModelError: It cannot be loaded.
        EnvironmentUnmet: It needs a package that is not installed.
    """
    with quiet(), load_errors(path, "tokenizer"):
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=trust_remote_code)


def read_config(path: Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration in ``path``, without the weights. Raises like :func:`read_tokenizer`."""
    with quiet(), load_errors(path, "configuration"):
        return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=trust_remote_code)


def read_model(path: Path, *, dtype: torch.dtype | Literal["auto"], trust_remote_code: bool = False) -> PreTrainedModel:
    """The causal language model in ``path``, in evaluation mode.

    Args:
        path: Directory that ``save_pretrained`` wrote.
        dtype: Precision of the weights in memory; ``auto`` is that of the file.
        trust_remote_code: Run the model's own Python code.

    Raises:
        ModelError: It cannot be loaded, or its files lack weights that the architecture has.
        EnvironmentUnmet: It needs a package that is not installed.
    """
    with quiet(), load_errors(path, "model"):
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=trust_remote_code)
        # None is SDPA where the architecture supports it, else eager, whatever kernel config.json asks for.
        config._attn_implementation = None  # noqa: SLF001 (the argument of from_pretrained cannot say None)
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    missing = sorted(info["missing_keys"])
    if missing:  # transformers only logs this and goes on with random values
        raise ModelError(f"the weights lack {missing[0]} ({len(missing)} tensors are missing)", where=str(path))
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars and load reports of transformers inside the block."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def load_errors(path: Path, what: str) -> Iterator[None]:
    """Turn whatever transformers raises over a broken or unknown ``path`` into one line.

    Raises:
        ModelError: ``what`` in ``path`` cannot be loaded.
        EnvironmentUnmet: A package is missing.
    """
    try:
        yield
    except KdkitError:
        raise
    except ImportError as error:
        raise EnvironmentUnmet(f"the {what} needs a package: {_first_line(error)}", where=str(path)) from error
    except Exception as error:
        # A boundary to foreign files and, when trusted, foreign code: transformers lets through OSError, KeyError,
        # TypeError, validation errors of three libraries, and tokenizers raises a bare Exception.
        raise ModelError(f"the {what} cannot be loaded: {_first_line(error)}", where=str(path)) from error


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    line = text.splitlines()[0].rstrip(" .:")
    return f"{type(error).__name__}: {line}" if isinstance(error, (KeyError, TypeError, AttributeError)) else line


def write_pretrained(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dest: Path, *, dtype: torch.dtype
) -> None:
    """Write weights (as ``dtype``), configuration, generation configuration and tokenizer into ``dest``.

    Raises:
        StageError: A weight is not finite, in memory or once rounded to ``dtype``. Nothing is written then.
    """
    state = _cast(model, dtype)
    with quiet():
        model.save_pretrained(dest, state_dict=state)
        tokenizer.save_pretrained(dest)
    _set_config_dtype(dest / "config.json", dtype)


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The state dict in ``dtype``; tensors that share memory (tied heads) still share it afterwards."""
    seen: dict[tuple[int, torch.Size, tuple[int, ...]], torch.Tensor] = {}
    state: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if key not in seen:
            seen[key] = tensor.to(dtype) if tensor.is_floating_point() else tensor
            _refuse_non_finite(name, tensor, seen[key])
        state[name] = seen[key]
    return state


def _refuse_non_finite(name: str, tensor: torch.Tensor, cast: torch.Tensor) -> None:
    if not cast.is_floating_point() or bool(cast.isfinite().all()):
        return
    count = int((~cast.isfinite()).sum())
    if bool(tensor.isfinite().all()):
        what = f"{name} has {count} values too large for {_name(cast.dtype)}"
        raise StageError(f"the model is not saved: {what}", hint="save it in bfloat16 or float32")
    raise StageError(
        f"the model is not saved: {name} has {count} values that are not finite",
        hint="training diverged; lower learning_rate or max_grad_norm",
    )


def _set_config_dtype(file: Path, dtype: torch.dtype) -> None:
    # save_pretrained writes the precision of the model in memory (float32 masters), and from_pretrained believes it.
    config = json.loads(file.read_text(encoding="utf-8"))
    config["dtype"] = _name(dtype)
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
