"""A gateway started and watched until it is asked to end."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from tunedock.errors import RecipeError
from tunedock.launch.job import JobSpec, Launcher
from tunedock.launch.shares import choose_gpus
from tunedock.launch.watch import OnEvent
from tunedock.pipeline.jobs import run_job
from tunedock.pipeline.notes import ignore
from tunedock.plan.machine.cards import find as find_cards
from tunedock.recipe.container import Container
from tunedock.recipe.serving import REMOTE, Program, ServeOrder
from tunedock.registry.names import SCHEME, parse
from tunedock.run.store import find

LAUNCHER = [sys.executable, "-P", "-m", "tunedock.launch.engine_container"]
_NAMED = re.compile(r"(?P<name>[^=/\\\s][^=/\\]*)=(?P<place>.+)")
_URL = re.compile(r"https?://[^\s/?#@]+(?:/[^\s?#]*)?")
_SERVER = re.compile(rf"(?P<kind>{'|'.join(map(re.escape, REMOTE))})\+(?=https?://)")


def order_of(
    given: Sequence[str],
    *,
    adapters: Mapping[str, str],
    engine: str | None,
    engine_model: str | None,
    key_env: str | None,
    runs_dir: Path,
    fields: Mapping[str, Any],
    start: Mapping[str, Any] | None = None,
) -> ServeOrder:
    """`start`: how a program is started. Raises RecipeError for what cannot be served, RunError where a name is no run."""
    backends = []
    for number, text in enumerate(given):
        found = _NAMED.fullmatch(text)
        name, place = (found["name"], found["place"]) if found else (None, text)
        backend = _backend(place, engine or "openai", engine_model, key_env, runs_dir)
        if number == 0 and adapters:
            if backend["kind"] not in ("run", "folder"):
                raise RecipeError(
                    "LoRAs are put on models that are computed here",
                    where="--adapter",
                    hint="name a run or a folder first",
                )
            backend["adapters"] = dict(adapters)
        backends.append({**backend, "name": name or backend["name"]})
    _let_compute(backends, given, engine, start or {})
    if fields.get("tls_key") and not fields.get("tls_cert"):
        raise RecipeError("a key without its certificate", where="--tls-key", hint="add --tls-cert")
    if fields.get("dtype", "auto") != "auto" and not any(
        backend["kind"] in ("run", "folder", "version") for backend in backends
    ):
        raise RecipeError(
            "nothing here is computed by PyTorch: a GGUF file has its numbers, and a server its own setting",
            where="--dtype",
            hint="leave it out, or name a run or a folder",
        )
    try:
        return ServeOrder.model_validate(
            {"backends": backends, **{key: value for key, value in fields.items() if value is not None}}
        )
    except ValidationError as error:
        item = error.errors(include_url=False)[0]
        if item["loc"][0] == "cors_origins":
            raise RecipeError(
                f"`{item['input']}` is no origin", where="--cors-origin", hint="write for example https://chat.example"
            ) from None
        place = ".".join(map(str, item["loc"]))
        raise RecipeError(f"`{place}`: {item['msg']}", where="serve") from None


def _backend(place: str, engine: str, model: str | None, key_env: str | None, runs_dir: Path) -> dict[str, Any]:
    if place.startswith(SCHEME):
        return {"name": parse(place).called, "kind": "version", "place": place}
    if "://" in place:
        if kind := _SERVER.match(place):
            engine, place = kind["kind"], place[kind.end() :]
        if not _URL.fullmatch(place):
            raise RecipeError(
                f"`{place[:200]}` is no address of a server",
                where="serve",
                hint="http://host:port/v1; a key goes into a variable that --engine-key-env names",
            )
        address = place.rstrip("/")
        name = model or re.sub(r"^https?://|/v1$", "", address)
        return {"name": name, "kind": engine, "place": address, "model": model, "key_env": key_env}
    path = Path(place).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return {"name": path.stem, "kind": "gguf", "place": str(path.absolute())}
    if path.is_dir() and not (path / "run.json").is_file():
        if next(path.glob("*.gguf"), None) is not None:
            return {"name": path.name, "kind": "gguf", "place": str(path.absolute())}
        if (path / "config.json").is_file():
            return {"name": path.absolute().name, "kind": "folder", "place": str(path.absolute())}
        raise RecipeError(
            "this folder holds no model", where=str(path), hint="a run, a folder of `tunedock export`, or a GGUF file"
        )
    run = find(place, runs_dir)
    return {"name": run.name, "kind": "run", "place": str(run.path.absolute())}


def _let_compute(
    backends: Sequence[dict[str, Any]], given: Sequence[str], engine: str | None, start: Mapping[str, Any]
) -> None:
    """Puts the program that is to compute them beside runs, folders and files. At addresses, `engine` says what is there."""
    here = [backend for backend in backends if backend["kind"] not in REMOTE]
    unsaid = [text for text in given if "://" in text and not _SERVER.search(text)]
    if engine is not None and here and unsaid:
        raise RecipeError(
            f"it could be what is at {unsaid[0][:200]}, or what is to be started for `{here[0]['name']}`",
            where=f"--engine {engine}",
            hint=f"say of the server what it is: {engine}+http://host:port/v1",
        )
    if not here or engine is None:
        if start:
            raise RecipeError(
                "this is for an engine that is started here",
                where=", ".join(start),
                hint="name a run, a folder or a file, and a program: --engine vllm",
            )
        return
    if engine not in get_args(Program):
        raise RecipeError(
            f"`{here[0]['name']}` is no address of a server",
            where=f"--engine {engine}",
            hint=f"engines that can be started are {', '.join(get_args(Program))}; without --engine it is computed in this process",
        )
    version = next((backend["place"] for backend in here if backend["kind"] == "version"), None)
    if version is not None:
        raise RecipeError(
            "versions of a registry are computed in this process, where they can give way to each other",
            where=f"{version}, --engine {engine}",
            hint="leave --engine out; or name the run or the folder, which is then served as it is now",
        )
    image = start.get("image")
    program = {key: value for key, value in start.items() if key != "image"}
    if image is not None:
        program["container"] = {"image": image, "gpus": visible_gpus(), "launcher": LAUNCHER}
    for backend in here:
        backend["start"] = {"program": engine, **program}


def visible_gpus() -> list[str]:
    """Of NVIDIA, those that CUDA_VISIBLE_DEVICES shows; all of them where it is not set."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    cards = [str(index) for index, _ in enumerate(find_cards().of("NVIDIA"))]
    return list(choose_gpus(Container(), cards, [], visible=visible, processes=None))


def serve_models(order: ServeOrder, *, on_event: OnEvent = ignore, launcher: Launcher | None = None) -> None:
    """Serves until Ctrl-C or SIGTERM. Raises what kept the gateway from it."""
    run_job(JobSpec("serve", None, order.model_dump(mode="json")), on_event, launcher)
