"""The Hugging Face Hub behind one function, its errors as one line each. Light until it is called."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from kdkit.api.errors import EnvironmentUnmet, ModelError
from kdkit.models.files import write_errors

__all__ = ["ADD_ONS", "MODEL_FILES", "NotOnHubError", "is_offline", "snapshot"]

MODEL_FILES: Final = (
    "config.json",
    "generation_config.json",
    "quantize_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "*.safetensors",
    "*.safetensors.index.json",
    # Text that is only ever run for a model the recipe trusts; without it such a model could not load.
    "*.py",
)
"""Patterns of the files that make a model: what is downloaded and what is fingerprinted. Never a pickle."""

ADD_ONS: Final = ("*/*", "consolidated*.safetensors")
"""Files of the same kinds that are not downloaded: other formats in sub-folders and second copies of the weights."""


class NotOnHubError(EnvironmentUnmet):
    """The Hub cannot be reached and its cache lacks the model."""


def is_offline() -> bool:
    """Whether ``HF_HUB_OFFLINE`` or ``TRANSFORMERS_OFFLINE`` forbids network access."""
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.upper() in {"1", "ON", "YES", "TRUE"}


def snapshot(repo: str, *, revision: str | None, cache_only: bool, into: Path | None = None) -> Path:
    """The directory with the model files of ``repo``, downloaded when the cache lacks them.

    Args:
        repo: ``org/name``.
        revision: Branch, tag or commit; None is the main branch.
        cache_only: Never use the network.
        into: Download to this directory instead of the shared cache.

    Raises:
        NotOnHubError: No network (or none allowed) and nothing cached.
        ModelError: The Hub has no such model or revision, or wants a licence accepted first.
        EnvironmentUnmet: The disk is full or the cache cannot be written.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError

    try:
        with write_errors(into or Path(HF_HUB_CACHE)):
            found = snapshot_download(
                repo,
                revision=revision,
                local_files_only=cache_only,
                local_dir=into,
                allow_patterns=list(MODEL_FILES),
                ignore_patterns=list(ADD_ONS),
            )
    except HFValidationError as error:
        raise ModelError(f"{repo!r} is no Hub id: {error}", allowed="org/name") from error
    except HfHubHTTPError as error:
        raise _refused(error, repo, revision) from error
    except (HTTPError, ConnectionError, FileNotFoundError, TimeoutError) as error:
        raise NotOnHubError(
            "not in the Hub cache and offline" if cache_only else "not in the Hub cache and the Hub cannot be reached",
            where=repo,
            hint="name a local directory (./path), or connect once so that it is downloaded",
        ) from error
    return Path(found)


def _refused(error: Exception, repo: str, revision: str | None) -> ModelError | EnvironmentUnmet:
    """What an answer of the Hub that is not a file means for a person."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, GatedRepoError):
        return ModelError("is gated on the Hub", where=repo, hint="accept its licence there and set HF_TOKEN")
    if isinstance(error, RepositoryNotFoundError):
        return ModelError(
            "no such model on the Hub, or it is private",
            where=repo,
            hint=f"check the spelling, set HF_TOKEN, or write ./{repo} for a local directory",
        )
    if isinstance(error, RevisionNotFoundError):
        return ModelError(f"has no revision {revision!r} on the Hub", where=repo)
    return NotOnHubError(f"the Hub answered with an error: {error}", where=repo, hint="try again later")
