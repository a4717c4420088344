"""Built-in quantizers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kdkit.api import QuantizerSpec, hookimpl
from kdkit.plugins.quantizers.gguf_plugin import GGUF
from kdkit.plugins.quantizers.gptq_plugin import GPTQ
from kdkit.plugins.quantizers.rtn_plugin import RTN


@hookimpl
def kdkit_quantizers() -> Iterator[QuantizerSpec[Any]]:
    """The quantizers."""
    yield RTN
    yield GPTQ
    yield GGUF
