"""From a text to one vector for each of its tokens: a table of vectors, or the hidden states of a model."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from kdkit.api import EnvironmentUnmet, ModelError, RecipeError

__all__ = ["Embedded", "Encoder", "Static", "Vectors", "encoder_of", "static_vectors"]

_WEIGHTS: Final = "weights/l2_supercat_256.safetensors"
_TOKENIZER: Final = "tokenizers/l2_supercat_tokenizer_config.json"
_HINT: Final = "run: pip install 'wordllama==0.4.*'"


@dataclass(frozen=True, slots=True)
class Embedded:
    """The tokens of a text.

    Attributes:
        vectors: [n, d] float64 of length 1; those of length 0 stay so, and are similar to nothing.
        cut: The text was longer than the model can read.
    """

    vectors: NDArray[np.float64]
    cut: bool = False


class Vectors(Protocol):
    """What gives vectors."""

    @property
    def longest(self) -> int | None:
        """Tokens that are read of a text; None when all are."""

    def __call__(self, text: str, /) -> Embedded:
        """The tokens of ``text``, without those that mark its start and end."""


class Static:
    """A vector for each token of a vocabulary.

    Args:
        tokenizer: From text to ids.
        table: [vocabulary, d].
    """

    longest = None

    def __init__(self, tokenizer: Tokenizer, table: NDArray[Any]) -> None:
        self._tokenizer, self._table = tokenizer, table

    def __call__(self, text: str, /) -> Embedded:
        """See :class:`Vectors`."""
        ids = self._tokenizer.encode(_whole(text), add_special_tokens=False).ids
        return Embedded(_unit(self._table[np.asarray(ids, dtype=np.int64)]))


class Encoder:
    """The hidden states of a model, one text at a time, so that no text changes the rounding of another.

    Args:
        tokenizer: A fast tokenizer of transformers.
        model: In float32 and evaluation mode.
        layer: Index into its hidden states.
        longest: Tokens that it can read.
    """

    def __init__(self, tokenizer: Any, model: Any, layer: int, longest: int | None) -> None:
        self._tokenizer, self._model, self._layer = tokenizer, model, layer
        self.longest = longest

    def __call__(self, text: str, /) -> Embedded:
        """See :class:`Vectors`."""
        import torch

        encoded = self._tokenizer(_whole(text), return_special_tokens_mask=True, verbose=False)
        ids, special = encoded["input_ids"], encoded["special_tokens_mask"]
        cut = self.longest is not None and len(ids) > self.longest
        if cut:
            # Again and not by hand: what marks the end stays at the end.
            encoded = self._tokenizer(
                _whole(text), return_special_tokens_mask=True, truncation=True, max_length=self.longest
            )
            ids, special = encoded["input_ids"], encoded["special_tokens_mask"]
        if all(special):
            return Embedded(np.zeros((0, 1)))
        with torch.no_grad():
            states = self._model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
        hidden = states[self._layer][0].double().numpy()
        return Embedded(_unit(hidden[np.asarray(special) == 0]), cut=cut)


def static_vectors() -> Static:
    """The vectors of the package wordllama, which is not imported.

    Raises:
        EnvironmentUnmet: It is missing, or another release.
    """
    spec = find_spec("wordllama")
    if spec is None or not spec.submodule_search_locations:
        raise EnvironmentUnmet("the package wordllama is missing", where="metric bertscore-lite", hint=_HINT)
    root = Path(spec.submodule_search_locations[0])
    absent = [name for name in (_WEIGHTS, _TOKENIZER) if not (root / name).is_file()]
    if absent:
        raise EnvironmentUnmet(f"wordllama has no {absent[0]}", where="metric bertscore-lite", hint=_HINT)
    (table,) = load_file(root / _WEIGHTS).values()
    return Static(Tokenizer.from_file(str(root / _TOKENIZER)), table)


def encoder_of(path: Path, layer: int | None) -> Encoder:
    """The model in a directory.

    Raises:
        ModelError: It cannot be loaded, or lacks weights.
        RecipeError: It has no such layer.
    """
    import torch
    from transformers import AutoModel

    from kdkit.models.pretrained import load_errors, quiet, read_config, read_tokenizer

    path = path.expanduser()
    if not (path / "config.json").is_file():
        raise ModelError("is no directory of a transformers model: it has no config.json", where=str(path))
    config, tokenizer = read_config(path).get_text_config(), read_tokenizer(path)
    with quiet(), load_errors(path, "model"):
        model, info = AutoModel.from_pretrained(
            path, dtype=torch.float32, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    # A head for whole sentences is often left out, and not used here.
    missing = sorted(name for name in info["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise ModelError(f"the weights lack {missing[0]} ({len(missing)} tensors are missing)", where=str(path))
    count = int(config.num_hidden_layers)
    if layer is not None and layer > count:
        raise RecipeError(f"layer {layer} of a model with {count}", where=str(path), allowed=f"0 to {count}")
    return Encoder(tokenizer, model.eval(), count if layer is None else layer, _longest(config, tokenizer))


def _longest(config: Any, tokenizer: Any) -> int | None:
    """Tokens that the model has positions for; RoBERTa and its like count them from behind the padding's id."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and "roberta" in str(config.model_type):
        positions -= config.pad_token_id + 1
    said = [size for size in (positions, tokenizer.model_max_length) if isinstance(size, int) and 0 < size < 10**9]
    return min(said, default=None)


def _whole(text: str) -> str:
    """Halves of characters have no tokens."""
    return text.encode("utf-8", "replace").decode()


def _unit(vectors: NDArray[Any]) -> NDArray[np.float64]:
    exact = vectors.astype(np.float64)
    lengths = np.linalg.norm(exact, axis=1, keepdims=True)
    unit: NDArray[np.float64] = np.divide(exact, lengths, out=np.zeros_like(exact), where=lengths > 0)
    return unit
