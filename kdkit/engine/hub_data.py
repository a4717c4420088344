"""Datasets on the Hugging Face Hub: which commit a name means, and its files. Light until it is called."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from kdkit.api.errors import DataError, EnvironmentUnmet, KdkitError

__all__ = ["dataset_commit", "dataset_snapshot"]

_TIMEOUT_S: Final = 20.0


def dataset_commit(repo: str, revision: str | None, *, offline: bool) -> str:
    """The commit that ``revision`` (the main branch when None) of a dataset is, from the Hub or from its cache.

    Raises:
        DataError: The Hub has no such dataset or revision.
        EnvironmentUnmet: The Hub cannot be asked and the cache does not know.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled

    cause: Exception | None = None
    if not offline:
        try:
            return str(HfApi().dataset_info(repo, revision=revision, timeout=_TIMEOUT_S).sha)
        except HFValidationError as error:
            raise DataError(f"{repo!r} is no Hub id: {error}", allowed="org/name") from error
        except HfHubHTTPError as error:
            raise _refused(repo, revision, error) from error
        except (HTTPError, ConnectionError, TimeoutError, OfflineModeIsEnabled) as error:
            cause = error
    if cached := _cached_commit(repo, revision):
        return cached
    raise _unreachable(repo, offline=offline) from cause


def dataset_snapshot(repo: str, commit: str | None, *, offline: bool) -> Path:
    """The directory with the files of a dataset, downloaded when the cache lacks them.

    Raises:
        DataError: The Hub has no such dataset or revision.
        EnvironmentUnmet: It is not in the cache and the Hub cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    try:
        return Path(snapshot_download(repo, repo_type="dataset", revision=commit, local_files_only=offline))
    except HfHubHTTPError as error:
        raise _refused(repo, commit, error) from error
    except (HTTPError, ConnectionError, TimeoutError, FileNotFoundError) as error:
        raise _unreachable(repo, offline=offline) from error


def _cached_commit(repo: str, revision: str | None) -> str | None:
    """The commit that an earlier download left: in the Hub's cache, else in that of the ``datasets`` library."""
    from huggingface_hub.constants import HF_HOME, HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE) / f"datasets--{repo.replace('/', '--')}"
    try:
        return (folder / "refs" / (revision or "main")).read_text(encoding="utf-8").strip()
    except OSError:
        commits = sorted(path.name for path in (folder / "snapshots").glob("*"))
    prepared = Path(os.environ.get("HF_DATASETS_CACHE") or Path(HF_HOME) / "datasets") / repo.replace("/", "___")
    # Tables that the datasets library prepared lie in CONFIG/VERSION/COMMIT.
    commits += sorted({path.name for path in prepared.glob("*/*/*") if path.is_dir()})
    return ",".join(dict.fromkeys(commits)) or None


def _refused(repo: str, revision: str | None, error: Exception) -> KdkitError:
    return DataError(
        f"the Hub has no such dataset, or it is private or gated ({type(error).__name__})",
        where=f"{repo}@{revision}" if revision else repo,
        hint=f"check the spelling, set HF_TOKEN, or write ./{repo} for a local directory",
    )


def _unreachable(repo: str, *, offline: bool) -> KdkitError:
    return EnvironmentUnmet(
        "not in the Hub cache, and offline" if offline else "not in the Hub cache, and the Hub cannot be reached",
        where=repo,
        hint="name a local file (./path), or connect once so that it is downloaded",
    )
