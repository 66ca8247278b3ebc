"""A run, a folder or a file that another program computes: what it is to be told is read, and the program made ready to start.

Neither PyTorch nor transformers is needed here: the program has its own.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jwt

from tunedock.errors import ModelError, RecipeError
from tunedock.export.gguf import TOKENIZER
from tunedock.model.chat_facts import ChatFacts
from tunedock.recipe.schema import Recipe
from tunedock.recipe.serving import Backend, Program, ServeOrder, Start
from tunedock.run.record import Run, read_json
from tunedock.serve.engines.child import ChildEngine, Tell, require_program
from tunedock.serve.engines.commands import AUDIENCE, BASE, ISSUER, EngineModel, Wishes, command, contained
from tunedock.serve.engines.remote import Trained
from tunedock.serve.lineage import answering, of_export, of_run
from tunedock.serve.models import Served

KEY_S = 10 * 365 * 86400
"""How long a gateway that was started here takes our token; it ends with us."""

WAYS: Mapping[Program, str] = {
    "vllm": "`pip install vllm` in an environment of its own, its bin folder on PATH; or name the address of one that runs",
    "sglang": "`pip install sglang` in an environment of its own, its bin folder on PATH; or name the address of one that runs",
    "llama-server": "put llama.cpp's llama-server on PATH (https://github.com/ggml-org/llama.cpp/releases); without --engine "
    "the file is computed here",
    "ollama": "install Ollama (https://ollama.com/download); without --engine the file is computed here",
    "tunedock": "install tunedock",
}

GGUF_ONLY: frozenset[Program] = frozenset({"llama-server", "ollama"})
LORAS: frozenset[Program] = frozenset({"vllm", "sglang", "tunedock"})


def started(backend: Backend, start: Start, order: ServeOrder, tell: Tell, warn: Tell) -> list[Served]:
    """Nothing is started before the gateway listens. Raises RecipeError, RunError, ModelError for what the program cannot compute,
    DependencyError where it is not here."""
    model, trained, lineage = _read(backend, start.program)
    key = secrets.token_urlsafe(32)
    wishes = Wishes(
        longest=order.longest,
        running=order.max_running,
        tensor_parallel_size=start.tensor_parallel_size,
        arguments=tuple(start.arguments),
        host="127.0.0.1" if start.container is None else "0.0.0.0",  # noqa: S104 - of the container
    )
    made = command(start.program, replace(model, dtype=order.dtype), wishes, key)
    if start.container is not None:
        made = contained(made, model, start.container)
    require_program(made, backend.name, WAYS[start.program])
    engine = ChildEngine(
        start.program,
        made,
        name=backend.name,
        key=_bearer(start.program, key),
        secret=key,
        start_s=start.start_s,
        trained=trained,
        tell=tell,
        warn=warn,
        log=_log_of(backend, start),
    )
    own = backend.name if backend.name in model.adapters else None
    name = BASE if model.adapters and start.program != "tunedock" else model.name
    served = Served(backend.name, engine, name, own, lineage=lineage)
    others = [replace(served, name=one, adapter=one, lineage={**lineage, "adapter": one}) for one in backend.adapters]
    return [served, *others]


def _bearer(program: Program, key: str) -> str | None:
    """What the engine wants to see. Ollama knows no keys."""
    if program == "ollama":
        return None
    if program != "tunedock":
        return key
    claims = {"sub": "gateway", "aud": AUDIENCE, "iss": ISSUER, "exp": int(time.time()) + KEY_S}
    return jwt.encode(claims, key, "HS256")


def _log_of(backend: Backend, start: Start) -> Path | None:
    if start.logs is None:
        return None
    folder = Path(start.logs)
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{quote(backend.name, safe='')[:200]}.log"


# -- what is to be computed --------------------------------------------------------------------------------------------

Found = tuple[EngineModel, Trained | None, dict[str, Any]]


def _read(backend: Backend, program: Program) -> Found:
    if program in GGUF_ONLY and backend.kind != "gguf":
        raise RecipeError(
            f"{program} computes GGUF files",
            where=backend.place,
            hint="`tunedock export RUN --format gguf --to DIR`, and serve that",
        )
    if program not in GGUF_ONLY and backend.kind == "gguf" and program != "tunedock":
        raise RecipeError(
            f"{program} computes no GGUF file here", where=backend.place, hint="serve the run or a merged export of it"
        )
    if backend.adapters and program not in LORAS:
        raise RecipeError(f"{program} is started without adapters", where="--adapter", hint="export them merged")
    for name in (backend.name, *backend.adapters):
        if not name[0].isalnum() or "=" in name:
            raise RecipeError(
                f"`{name}` is no name for {program}",
                where="serve",
                hint="a name begins with a letter or a digit, and has no =",
            )
    if program == "tunedock":
        lineage = of_export(_folder_of(backend)) if backend.kind != "run" else of_run(Run.open(Path(backend.place)))
        return EngineModel(backend.place, backend.name, adapters=backend.adapters), None, lineage
    return _KINDS[backend.kind](backend, program)


def _run(backend: Backend, program: Program) -> Found:
    run, recipe = answering(backend.place)
    facts, lineage = ChatFacts.read(run.model), of_run(run)
    settings: dict[str, Any] = {"template": _template(run.model), "thinking": facts.thinking}
    settings |= {"trust_remote_code": recipe.model.trust_remote_code}
    if not (run.model / "adapter_config.json").is_file():
        model = EngineModel(str(run.model), backend.name, **_with_adapters(backend.adapters), **settings)
        return model, _trained(facts, model), lineage
    if recipe.model.adapters or recipe.model.new_tokens:
        raise _other("its adapter sits on a model that was changed before it", run.model)
    base, revision = _base_of(run, recipe)
    if recipe.quantize == "nf4":
        settings["quantization"] = "bitsandbytes"
    adapters = {backend.name: str(run.model), **backend.adapters}
    model = EngineModel(
        base, backend.name, revision=revision, tokenizer=str(run.model), **_with_adapters(adapters), **settings
    )
    return model, _trained(facts, model), lineage


def _folder(backend: Backend, program: Program) -> Found:
    folder = Path(backend.place)
    facts = ChatFacts.read(folder) if (folder / "chat.json").is_file() else None
    model = EngineModel(
        str(folder),
        backend.name,
        template=_template(folder),
        thinking=facts is not None and facts.thinking,
        **_with_adapters(backend.adapters),
    )
    return model, _trained(facts, model), of_export(folder)


def _gguf(backend: Backend, program: Program) -> Found:
    place = Path(backend.place)
    found = [place] if place.is_file() else sorted(place.glob("*.gguf"))
    if len(found) != 1:
        raise ModelError(f"there are {len(found)} GGUF files here", where=str(place), hint="name the file")
    folder = found[0].parent
    facts = ChatFacts.read(folder) if (folder / "chat.json").is_file() else None
    model = EngineModel(
        str(found[0]),
        backend.name,
        template=_template(folder / TOKENIZER),
        thinking=facts is not None and facts.thinking,
    )
    if program == "ollama":
        own = folder / "Modelfile"
        return replace(model, name="served", modelfile=str(own) if own.is_file() else None), None, of_export(folder)
    return model, Trained(system=facts.system if facts else None), of_export(folder)


_KINDS: Mapping[str, Callable[[Backend, Program], Found]] = {"run": _run, "folder": _folder, "gguf": _gguf}


def _folder_of(backend: Backend) -> Path:
    place = Path(backend.place)
    return place if place.is_dir() else place.parent


def _base_of(run: Run, recipe: Recipe) -> tuple[str, str | None]:
    """(folder, None), or (hub id, commit) where the folder the run was trained from is not here."""
    lineage = run.state().lineage
    folder = Path(str(lineage.get("folder") or recipe.model.path))
    if folder.is_dir():
        return str(folder.absolute()), None
    if Path(recipe.model.path).is_absolute():
        raise ModelError("the base of the run's adapter is not here", where=str(folder), hint="bring it back")
    return recipe.model.path, lineage.get("commit") or recipe.model.revision


def _trained(facts: ChatFacts | None, model: EngineModel) -> Trained | None:
    if facts is None:
        return None
    switch = "enable_thinking" in (model.template or "")
    return Trained(facts.system, facts.thinking if switch else None, tuple(facts.stop_ids))


def _template(folder: Path) -> str | None:
    """The chat template of a tokenizer's folder, in text; of several the one that is used."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    file = folder / "tokenizer_config.json"
    found = read_json(file).get("chat_template") if file.is_file() else None
    return found if isinstance(found, str) else json.dumps(found) if found else None


# -- adapters ----------------------------------------------------------------------------------------------------------


def _with_adapters(adapters: Mapping[str, str]) -> dict[str, Any]:
    return {"adapters": dict(adapters), "rank": max((_rank(Path(path)) for path in adapters.values()), default=0)}


def _rank(folder: Path) -> int:
    """Raises ModelError for an adapter that these engines compute otherwise than it was trained, or not at all."""
    file = folder / "adapter_config.json"
    if not file.is_file():
        raise ModelError("there is no adapter here", where=str(folder), hint="name a folder with adapter_config.json")
    settings = read_json(file)
    if settings.get("peft_type") != "LORA":
        raise _other(f"it is a {settings.get('peft_type')} and no LoRA", folder)
    for key in (
        "use_dora",
        "modules_to_save",
        "trainable_token_indices",
        "target_parameters",
        "rank_pattern",
        "alpha_pattern",
    ):
        if settings.get(key):
            raise _other(f"engines of other programs do not compute `{key}`", folder)
    if settings.get("bias", "none") != "none":
        raise _other("it has biases", folder)
    return int(settings["r"])


def _other(why: str, folder: Path) -> ModelError:
    return ModelError(
        f"this adapter cannot stand beside others: {why}",
        where=str(folder),
        hint="`tunedock export RUN --to DIR` merges it into its base; serve that folder",
    )
