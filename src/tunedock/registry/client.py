"""A registry of MLflow's, opened: a SQLite file, a PostgreSQL database, or MLflow's server at an address.

What it says is another's word and is held to its form (`record`, `names`, `history`); what it cannot say is an error of ours that
names it. MLflow is imported here alone, when a registry is opened.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from tunedock.errors import DependencyError, DiskError, EngineError, RecipeError, RunError
from tunedock.registry.history import Standing, standing
from tunedock.registry.names import model_name
from tunedock.registry.record import Record, Version, place_of, read_record, source_of

T = TypeVar("T")

ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # seconds; MLflow's own default is 120, seven times over
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SQLALCHEMYSTORE_POOLCLASS": "NullPool",  # a connection kept open would go on with a file that was replaced
}
WAIT_S = 5.0
AGAIN_S = 0.05
MOST_VERSIONS = 1000
"""Of a model, in a list."""

_MISSING = "RESOURCE_DOES_NOT_EXIST"
_THERE = "RESOURCE_ALREADY_EXISTS"
_BUSY = ("TEMPORARILY_UNAVAILABLE", "RESOURCE_CONFLICT")


class RegistryUnavailableError(EngineError):
    """The registry was locked, gone or unreachable for longer than is waited for."""


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """A model as the registry has it: where its aliases point, and the tags that histories and canaries are kept in."""

    name: str
    aliases: Mapping[str, str]
    tags: Mapping[str, str]
    note: str = ""

    def standing(self, alias: str) -> Standing:
        return standing(alias, self.aliases, self.tags)

    def aliases_of(self, version: str) -> list[str]:
        return sorted(alias for alias, number in self.aliases.items() if number == version)


class Registry:
    """Safe to use from several threads, as MLflow's client is."""

    def __init__(self, client: Any, name: str, file: Path | None) -> None:
        self._client = client
        self.name = name
        self.file = file
        """Of a registry in a file: the file."""

    @classmethod
    def open(cls, place: str, *, create: bool = False) -> Registry:
        """Raises RecipeError for what is no registry, DependencyError without MLflow, DiskError where the file cannot be made."""
        url, file = _address(place)
        if file is not None:
            _require_file(file, create)
        for package in ("mlflow", *(() if url.startswith("http") else ("sqlalchemy", "alembic"))):
            if find_spec(package) is None:
                raise _missing("mlflow-skinny" if package == "mlflow" else package)
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        try:
            from mlflow.tracking import MlflowClient
        except ImportError as error:
            raise _missing(error.name or "mlflow-skinny") from error
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.ERROR)
        opened = cls(None, place, file)
        opened._client = opened._ask(lambda _: MlflowClient(tracking_uri=url, registry_uri=url))
        if file is not None:
            opened._ask(lambda client: client.search_registered_models(max_results=1))  # makes or checks the tables
        return opened

    def stamp(self) -> object:
        """Of a registry in a file: another value after every change, without opening it. None elsewhere."""
        if self.file is None:
            return None
        found: list[tuple[int, int, int] | None] = []
        for path in (self.file, self.file.with_name(f"{self.file.name}-wal")):
            try:
                stat = path.stat()
                found.append((stat.st_ino, stat.st_size, stat.st_mtime_ns))
            except OSError:
                found.append(None)
        return tuple(found)

    # -- read ------------------------------------------------------------------------------------------------------------

    def entry(self, model: str) -> ModelEntry:
        """Raises RecipeError where there is no such model, RegistryUnavailableError."""
        found = self._ask(lambda client: client.get_registered_model(model_name(model)))
        if found is None:
            raise RecipeError(
                f"the registry has no model `{model}`",
                where=self.name,
                hint="`tunedock models list` lists those it has; `tunedock models register` makes one",
            )
        return _entry(found)

    def entries(self) -> list[ModelEntry]:
        """Every model, by name. Those whose names we would not take are passed over."""
        found: list[ModelEntry] = []
        token: str | None = None
        while True:
            page = self._ask(partial(_page, token))
            found += [_entry(one) for one in page]
            token = page.token
            if not token:
                return sorted((one for one in found if _is_name(one.name)), key=lambda one: one.name)

    def version(self, model: str, number: str) -> Version:
        """Raises RecipeError where there is no such version, RunError for one that is not ours."""
        found = self._ask(lambda client: client.get_model_version(model_name(model), number))
        if found is None:
            raise RecipeError(
                f"`{model}` has no version {number}",
                where=self.name,
                hint=f"`tunedock models list {model}` lists those it has",
            )
        return _version(found)

    def has(self, model: str, number: str) -> bool:
        return self._ask(lambda client: client.get_model_version(model, number)) is not None

    def versions(self, model: str) -> list[Version | str]:
        """Newest first; of those that tunedock did not register, the number alone."""
        self.entry(model)
        text = f"name='{model_name(model)}'"
        found = self._ask(lambda client: client.search_model_versions(text, max_results=MOST_VERSIONS)) or []
        versions: list[Version | str] = []
        for one in sorted(found, key=lambda one: -int(one.version)):
            try:
                versions.append(_version(one))
            except RunError:
                versions.append(str(one.version))
        return versions

    # -- written ---------------------------------------------------------------------------------------------------------

    def add(self, model: str, place: Path, record: Record, note: str) -> Version:
        """A new version of a model, which is made where it is not there."""
        tags = record.to_tags()
        self._ask(lambda client: client.create_registered_model(model_name(model)), there=True)
        made = self._ask(
            lambda client: client.create_model_version(
                model, source_of(place), tags=tags, description=note or None, await_creation_for=0
            )
        )
        return _version(made)

    def set_alias(self, model: str, alias: str, number: str) -> None:
        self._ask(lambda client: client.set_registered_model_alias(model, alias, number), done=True)

    def drop_alias(self, model: str, alias: str) -> None:
        self._ask(lambda client: client.delete_registered_model_alias(model, alias), done=True)

    def set_tag(self, model: str, key: str, value: str) -> None:
        self._ask(lambda client: client.set_registered_model_tag(model, key, value), done=True)

    def drop_version(self, model: str, number: str) -> None:
        self._ask(lambda client: client.delete_model_version(model, number))

    def drop_tag(self, model: str, key: str) -> None:
        """One that another process has dropped already is dropped."""
        self._ask(lambda client: client.delete_registered_model_tag(model, key))

    def _ask(self, question: Callable[[Any], T], *, there: bool = False, done: bool = False) -> Any:
        """What MLflow answers; None where what is asked for is not there. `there`: it may be there already; `done`: it must be.

        A registry that is locked is asked again for `WAIT_S`. Raises RegistryUnavailableError, RecipeError.
        """
        from mlflow.exceptions import MlflowException

        if (
            self.file is not None and self._client is not None and not self.file.exists()
        ):  # SQLite would make an empty one
            raise self._gone(FileNotFoundError("its file is gone"))
        until = time.monotonic() + WAIT_S
        while True:
            try:
                return question(self._client)
            except MlflowException as error:
                code = error.error_code
                if code == _MISSING and not done:
                    return None
                if code == _THERE and there:
                    return None
                if code in ("INVALID_PARAMETER_VALUE", _MISSING):
                    raise RecipeError(f"the registry refuses it: {_first_line(error)}", where=self.name) from error
                if code not in _BUSY or time.monotonic() + AGAIN_S >= until:
                    raise self._gone(error) from error
            except ImportError as error:
                raise _missing(error.name or "sqlalchemy") from error
            except _of_databases() as error:
                raise self._gone(error) from error
            time.sleep(AGAIN_S)

    def _gone(self, error: Exception) -> RegistryUnavailableError:
        return RegistryUnavailableError(
            f"the registry cannot be asked: {_reason(error)}",
            where=self.name,
            hint="is it a registry of MLflow's, and does its server run?",
        )


def _address(place: str) -> tuple[str, Path | None]:
    """(URL for MLflow, the file of a registry in one)."""
    scheme = place.partition("://")[0] if "://" in place else ""
    if scheme in ("http", "https"):
        if "@" in urlsplit(place).netloc:
            raise RecipeError(
                "a password does not belong into the URL, which lists of processes and metrics show",
                where="--registry",
                hint="MLflow takes it from MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
            )
        return place.rstrip("/"), None
    if scheme in ("postgresql", "postgres"):
        if urlsplit(place).password:
            raise RecipeError(
                "a password does not belong into the URL, which lists of processes and recipes show",
                where="--registry",
                hint="put it into the file ~/.pgpass, or name one by PGPASSFILE",
            )
        if find_spec("psycopg") is None:
            raise DependencyError(
                "PostgreSQL's driver is not installed", where="--registry", hint="pip install 'tunedock[postgresql]'"
            )
        return f"postgresql+psycopg://{place.partition('://')[2]}", None
    if scheme not in ("", "sqlite"):
        raise RecipeError(
            f"`{scheme[:20]}` is no registry: it is a file of SQLite, postgresql://..., or http://... of MLflow's server",
            where="--registry",
            hint="write a path, such as models.db",
        )
    text = place.partition(":///")[2] if scheme else place
    if not text:
        raise RecipeError("it names no file", where="--registry", hint="write a path, such as models.db")
    file = Path(text).expanduser().absolute()
    return f"sqlite:///{file}", file


def _require_file(file: Path, create: bool) -> None:
    if file.exists():
        if not file.is_file():
            raise RecipeError("this is no file", where=str(file), hint="a registry is a file of SQLite: models.db")
        return
    if not create:
        raise RecipeError(
            "there is no registry",
            where=str(file),
            hint="`--registry` names another; `tunedock models register` makes one",
        )
    if not file.parent.is_dir():
        raise DiskError("its folder is not there", where=str(file), hint="make it, or name another place by --registry")


def _missing(package: str) -> DependencyError:
    return DependencyError(
        f"the package `{package}` is missing", where="tunedock models", hint="pip install 'tunedock[models]'"
    )


def _of_databases() -> tuple[type[Exception], ...]:
    """What comes through MLflow as it is: of a disk, of a file that is no database, of a server that does not know us."""
    if find_spec("sqlalchemy") is None:
        return (OSError,)
    from sqlalchemy.exc import SQLAlchemyError

    return (OSError, SQLAlchemyError)


def _entry(found: Any) -> ModelEntry:
    aliases = {str(alias): str(number) for alias, number in found.aliases.items()}
    return ModelEntry(
        str(found.name), aliases, {str(k): str(v) for k, v in found.tags.items()}, str(found.description or "")
    )


def _version(found: Any) -> Version:
    where = f"{found.name} version {found.version}"
    return Version(
        str(found.name),
        str(found.version),
        found.creation_timestamp / 1000,
        str(found.description or ""),
        place_of(str(found.source), where),
        read_record(found.tags, where),
    )


def _page(token: str | None, client: Any) -> Any:
    return client.search_registered_models(max_results=100, page_token=token)


def _is_name(text: str) -> bool:
    try:
        return bool(model_name(text))
    except RecipeError:
        return False


def _reason(error: BaseException) -> str:
    """What the system said of a connection, where it is one that failed: MLflow's own words are five layers deep."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, OSError) and found.errno is not None and found.strerror:
            return found.strerror
        found = found.__cause__ or found.__context__
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return "".join(letter for letter in line if letter.isprintable())[:300]
