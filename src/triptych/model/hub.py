"""Models on a Hugging Face hub: small files first, weights when a component asks for them.

Endpoint, token, cache folder and offline mode are huggingface_hub's own settings; this module adds none.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from triptych.errors import LoadError, ModelNotFound, TriptychError
from triptych.model.topology import Source

SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
"""Configurations, indices and tokenizers. Weights have none of these suffixes."""


def open_repository(name: str, revision: str | None, offline: bool, code: bool) -> Source:
    """Fetches a repository's small files (its Python files too if `code`), none of its weights, into the hub's cache.

    The source's revision is the commit that `revision` (default: the main branch) stands for now, so that every later
    fetch, in any process, takes the same files. Raises ModelNotFound with the reason.
    """
    from huggingface_hub import snapshot_download

    patterns: list[str] = [*SMALL_FILES, *(["*.py"] if code else [])]
    try:
        folder = snapshot_download(
            name, revision=revision, allow_patterns=patterns, local_files_only=offline, tqdm_class=_silent_bar()
        )
    except Exception as error:
        raise _explained(error, name, revision, offline) from error
    return Source(name, folder, "hub", revision=Path(folder).name, offline=offline)


def fetch(source: Source, files: Iterable[str]) -> None:
    """Brings files (relative to the folder) of a hub source into its snapshot. Raises LoadError naming what is
    missing offline, or why the hub did not give it."""
    missing = [file for file in files if not (Path(source.folder) / file).is_file()]
    if not missing:
        return
    if source.offline:
        raise LoadError(f"offline, and {source.name} lacks in the cache: {', '.join(missing)}", field="model")
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(source.name, revision=source.revision, allow_patterns=[_literal(file) for file in missing])
    except Exception as error:
        reason = _explained(error, source.name, source.revision, False)
        raise LoadError(f"cannot fetch {', '.join(missing)}: {reason.message}", field="model") from error
    left = [file for file in missing if not (Path(source.folder) / file).is_file()]
    if left:
        raise LoadError(f"{source.name} has no {', '.join(left)} at revision {source.revision}", field="model")


def remote_sizes(source: Source) -> dict[str, int]:
    """Bytes of every file of a hub source's commit, as the hub told when the repository was opened; empty if it was
    never asked."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        return {file.path: file.size for file in get_cached_repo_tree(source.name, revision=source.revision)}
    except CachedRepoTreeNotFoundError:
        return {}


def _literal(file: str) -> str:
    """A pattern that matches only that file."""
    return "".join(f"[{letter}]" if letter in "[]*?" else letter for letter in file)


def _silent_bar() -> Any:
    """A progress bar that shows nothing: small files are not worth one."""
    from huggingface_hub.utils.tqdm import tqdm

    class Silent(tqdm):
        def __init__(self, *args, **kwargs) -> None:
            kwargs["disable"] = True
            super().__init__(*args, **kwargs)

    return Silent


def _explained(error: Exception, name: str, revision: str | None, offline: bool) -> TriptychError:
    """The hub's many errors in one line each."""
    from huggingface_hub import constants, errors

    at = f" at revision {revision!r}" if revision else ""
    if isinstance(error, errors.GatedRepoError):
        return ModelNotFound(f"{name} is gated: accept its terms on the hub and log in with a token", field="model")
    if isinstance(error, errors.RevisionNotFoundError):
        return ModelNotFound(f"{name} has no revision {revision!r}", field="revision")
    if isinstance(error, errors.RepositoryNotFoundError):
        return ModelNotFound(f"no repository {name!r} on {constants.ENDPOINT} (or it is private)", field="model")
    if isinstance(error, errors.HFValidationError):
        return ModelNotFound(f"{name!r} is not a hub id: {error}", field="model")
    if isinstance(error, errors.IncompleteSnapshotError):
        return ModelNotFound(f"{name}{at} is only partly in the cache: {_first_line(error)}", field="model")
    if isinstance(error, errors.LocalEntryNotFoundError) and (offline or constants.HF_HUB_OFFLINE):
        return ModelNotFound(f"offline, and {name}{at} is not in the cache {constants.HF_HUB_CACHE}", field="model")
    if isinstance(error, errors.LocalEntryNotFoundError):
        cause = type(error.__cause__ or error).__name__
        return ModelNotFound(
            f"cannot reach {constants.ENDPOINT} ({cause}), and {name}{at} is not in the cache", field="model"
        )
    return ModelNotFound(f"cannot open {name}{at}: {type(error).__name__}: {_first_line(error)}", field="model")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]
