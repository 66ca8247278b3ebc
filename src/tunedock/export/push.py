"""An exported folder on its way to a hub or an object store: after it has passed, never before.

`hf://owner/name[@branch]` is a model repository of Hugging Face, made where it is not there (private); credentials are those of `hf
auth login`. Any other URL is a folder of a store that fsspec writes to (`s3://`, `gs://`, `az://`, `file://`), with the credentials
its client finds. Weights go first and the record last: a folder without `export.json` is not whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import fsspec

from tunedock.errors import DependencyError, EngineError, RecipeError, TunedockError

STORES = ("file", "memory", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss")
RECORD = "export.json"

_REPOSITORY = re.compile(
    r"hf://(?P<id>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:@(?P<branch>[\w./-]{1,100}))?", re.ASCII
)


def require(url: str) -> None:
    """Raises RecipeError for what is no place to push to, before anything is made."""
    protocol = url.partition("://")[0]
    if protocol == "hf" and _REPOSITORY.fullmatch(url):
        return
    if "://" not in url or "::" in url or protocol not in STORES or (protocol == "hf"):
        raise RecipeError(
            f"`{url}` is no place an export is sent to",
            where="--push",
            hint=f"hf://owner/name, or a folder of {', '.join(f'{name}://' for name in STORES if name != 'memory')}",
        )
    if urlsplit(url).password is not None:
        raise RecipeError(
            "a password in an address ends in logs", where="--push", hint="leave it to the store's own configuration"
        )


def push(folder: Path, url: str, tell: Callable[[int, int], None]) -> str:
    """Sends the files; where they are now. Raises EngineError where the other side refuses, DependencyError without its package."""
    require(url)
    if url.startswith("hf://"):
        return _to_hub(folder, url)
    try:
        return _to_store(folder, url, tell)
    except ImportError as error:
        raise DependencyError(
            f"`{url}` needs another package: {error}", where="--push", hint="pip install 'tunedock[object-stores]'"
        ) from None
    except TunedockError:
        raise
    except Exception as error:
        # Policy: what fails behind a URL is the store's answer (denied, no bucket, time-out), and each store's client has
        # exception classes of its own.
        raise EngineError(
            f"the store did not take it: {type(error).__name__}: {error}",
            where=url,
            hint=f"the export is whole in {folder}",
        ) from error


def _to_hub(folder: Path, url: str) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError
    from requests import RequestException

    found = _REPOSITORY.fullmatch(url)
    assert found is not None  # noqa: S101 - required above
    api = HfApi()
    try:
        api.create_repo(found["id"], private=True, exist_ok=True)
        if found["branch"]:
            api.create_branch(found["id"], branch=found["branch"], exist_ok=True)
        done = api.upload_folder(
            repo_id=found["id"], folder_path=folder, revision=found["branch"], commit_message="Exported by tunedock"
        )
    except (HfHubHTTPError, RequestException, OSError, ValueError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise EngineError(
            f"the hub did not take it: {first}", where=url, hint=f"`hf auth login`; the export is whole in {folder}"
        ) from error
    return str(done.commit_url)


def _to_store(folder: Path, url: str, tell: Callable[[int, int], None]) -> str:
    store, place = fsspec.url_to_fs(url)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    files.sort(key=lambda path: path.name == RECORD)
    if store.exists(f"{place}/{RECORD}"):
        raise EngineError("another export is there already", where=url, hint="give another place, or remove it")
    for number, path in enumerate(files):
        tell(number, len(files))
        target = f"{place}/{path.relative_to(folder).as_posix()}"
        store.makedirs(target.rpartition("/")[0], exist_ok=True)
        store.put_file(str(path), target)
    tell(len(files), len(files))
    return url
