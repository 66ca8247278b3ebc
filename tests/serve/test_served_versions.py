"""Versions that change while they are served: the real gateway, real engines, a real registry, the real client."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from gateway_bed import Bed, gateway_of
from registry_of_models import Place, a_registry, adapter_on, audit_of, register, whole_model
from tunedock.errors import CheckError, EngineError, RecipeError, RunError
from tunedock.events import Emitter
from tunedock.recipe.serving import ServeOrder
from tunedock.registry.acts import Acts
from tunedock.registry.canary import is_in
from tunedock.registry.record import source_of
from tunedock.serve.versions import computed
from tunedock.serve.versions.follow import Follow, loaded

MESSAGES: Any = [{"role": "user", "content": "What is the capital of France?"}]
COUNT = 24


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place.made(tmp_path_factory.mktemp("models"))


class Told:
    """What the gateway says while it serves."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def write(self, text: str) -> int:
        self.events += [json.loads(line) for line in text.splitlines()]
        return len(text)

    def flush(self) -> None: ...

    def all(self, kind: str) -> list[str]:
        return [event["message"] for event in self.events if event["kind"] == kind]


@dataclass
class Served:
    acts: Acts
    bed: Bed
    follow: Follow
    told: Told

    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.bed.url}/v1", api_key="none", max_retries=0)

    def version(self, name: str = "support") -> str:
        return str(httpx.get(f"{self.bed.url}/v1/models/{name}").json()["version"])

    def answer(self, name: str = "support") -> tuple[str, str]:
        """(version, text)."""
        body = {"model": name, "messages": MESSAGES, "temperature": 0, "max_tokens": COUNT}
        found = httpx.post(f"{self.bed.url}/v1/chat/completions", json=body, timeout=60)
        assert found.status_code == 200, found.text
        return found.headers["x-tunedock-model-version"], found.json()["choices"][0]["message"]["content"]

    def here(self) -> set[str]:
        assert self.follow.versions is not None
        return {number for _, number in self.follow.versions._shelf._here}


def until(true: Callable[[], bool], seconds: float = 30.0) -> float:
    """How long it took."""
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < seconds
        time.sleep(0.01)
    return time.monotonic() - began


@contextmanager
def served(acts: Acts, folder: Path, *places: str, **fields: Any) -> Iterator[Served]:
    backends = [
        {"name": name, "kind": "version", "place": text} for name, _, text in (p.partition("=") for p in places)
    ]
    told = Told()
    emit = Emitter(told)  # type: ignore[arg-type]
    order = ServeOrder.model_validate(
        {"backends": backends, "registry": str(acts.registry.file), "longest": 256, "max_running": 16, **fields}
    )
    follow, models = loaded(order, emit)
    try:
        with gateway_of(folder, models) as bed:
            follow.begin(bed.gateway.models, bed.gateway.metrics)
            yield Served(acts, bed, follow, told)
    finally:
        follow.close()


@pytest.fixture
def acts(tmp_path: Path) -> Acts:
    return a_registry(tmp_path)


def three_adapters(acts: Acts, place: Place) -> None:
    for folder in place.adapters:
        register(acts, "support", folder)
    acts.promote("support", "1", "production")


PRODUCTION = "support=models:/support@production"


def test_promoted_and_rolled_back_while_many_are_answered(acts: Acts, place: Place, tmp_path: Path) -> None:
    """Adapters on one base. No stream is dropped, and each is its version's own from the first token to the last."""
    three_adapters(acts, place)
    with served(acts, tmp_path, PRODUCTION, "two=models:/support/2", "three=models:/support/3") as here:
        texts = {"1": here.answer()[1], "2": here.answer("two")[1], "3": here.answer("three")[1]}
        assert len(set(texts.values())) == 3
        seen: Counter[str] = Counter()
        wrong: list[Any] = []
        over = threading.Event()

        def talk() -> None:
            with here.client() as client:
                while not over.is_set():
                    try:
                        raw = client.chat.completions.with_raw_response.create(
                            model="support", messages=MESSAGES, temperature=0, max_tokens=COUNT, stream=True
                        )
                        version = raw.headers["x-tunedock-model-version"]
                        text = "".join(c.choices[0].delta.content or "" for c in raw.parse() if c.choices)
                    except Exception as error:  # noqa: BLE001 - all of them are told
                        wrong.append(error)
                        return
                    seen[version] += 1
                    if text != texts[version]:
                        wrong.append((version, text))

        threads = [threading.Thread(target=talk) for _ in range(6)]
        for thread in threads:
            thread.start()
        for number in ("2", "3", "1", "2"):
            before = seen.total()
            acts.promote("support", number, "production")
            until(lambda number=number: here.version() == number)  # type: ignore[misc]
            until(lambda before=before: seen.total() > before + 6)  # type: ignore[misc]
        acts.roll_back("support", "production")
        took = until(lambda: here.version() == "1")
        over.set()
        for thread in threads:
            thread.join(60)
        assert not wrong
        assert set(seen) == {"1", "2", "3"}
        print(f"rolled back {took:.3f} s after the registry was changed, under 6 streams; answered: {dict(seen)}")
        engines = {id(one.engine.generator) for one in here.bed.gateway.models.all()}  # type: ignore[attr-defined]
        assert len(engines) == 1, "adapters of one base are on one engine"


def test_a_whole_model_gives_way_and_is_closed_after_its_last_request(acts: Acts, place: Place, tmp_path: Path) -> None:
    for folder in place.wholes:
        register(acts, "support", folder)
    acts.promote("support", "1", "production")
    with served(acts, tmp_path, PRODUCTION, keep_warm=0) as here:
        first = here.bed.gateway.models.get("support").engine
        text = here.answer()[1]
        going = held_up(first)
        body = {"model": "support", "messages": MESSAGES, "temperature": 0, "max_tokens": 200, "stream": True}
        with httpx.stream("POST", f"{here.bed.url}/v1/chat/completions", json=body, timeout=60) as stream:
            lines = stream.iter_lines()
            got = [next(lines)]
            going.clear()
            acts.promote("support", "2", "production")
            until(lambda: here.version() == "2")
            assert here.answer()[0] == "2"
            assert first.generator.load().more["gone"] is None, "a request is with it"  # type: ignore[attr-defined]
            going.set()
            got += [line for line in lines if line]
            assert stream.headers["x-tunedock-model-version"] == "1"
        assert got[-1] == "data: [DONE]" and "error" not in " ".join(got)
        said = [json.loads(line[6:]) for line in got if line.startswith("data: {")]
        assert "".join(c["choices"][0]["delta"].get("content") or "" for c in said if c["choices"]).startswith(text)
        until(lambda: first.generator.load().more["gone"] is not None)  # type: ignore[attr-defined]
        assert here.here() == {"2"}


def test_the_version_before_stays_warm(acts: Acts, place: Place, tmp_path: Path) -> None:
    for folder in place.wholes:
        register(acts, "support", folder)
    acts.promote("support", "1", "production")
    with served(acts, tmp_path, PRODUCTION) as here:
        first = here.bed.gateway.models.get("support").engine
        acts.promote("support", "2", "production")
        until(lambda: here.version() == "2")
        shutil.rmtree(tmp_path / "gone", ignore_errors=True)
        acts.roll_back("support", "production")
        took = until(lambda: here.version() == "1")
        assert here.bed.gateway.models.get("support").engine is first
        assert took < 2.0, "it was there"
        print(f"rolled back to a warm engine of its own after {took:.3f} s")


def held_up(engine: Any) -> threading.Event:
    """An engine that computes only while the event is set, as it is at first."""
    compute, going = engine.generator._compute, threading.Event()
    step = compute.step
    going.set()
    compute.step = lambda *given: step(*given) if going.wait(60) else None
    return going


def piped(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


BAD: list[tuple[str, Callable[[Path], object], str]] = [
    ("changed", lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x" * 100), "adapter_model.safetensors changed"),
    ("missing", lambda folder: (folder / "adapter_model.safetensors").unlink(), "adapter_model.safetensors missing"),
    ("gone", lambda folder: shutil.rmtree(folder), "is not there"),
    ("added", lambda folder: (folder / "model.safetensors").write_bytes(b"x"), "model.safetensors added"),
    ("a pipe", lambda folder: piped(folder / "tokenizer.json"), "no plain file"),
]  # fmt: skip


def test_versions_that_cannot_be_served_leave_what_serves(acts: Acts, place: Place, tmp_path: Path) -> None:
    register(acts, "support", place.adapters[0], alias="production")
    copies = []
    for name, _, _ in BAD:
        copies.append(shutil.copytree(place.adapters[1], tmp_path / name))
        register(acts, "support", copies[-1])
    damaged = shutil.copytree(place.adapters[1], tmp_path / "damaged")
    (damaged / "adapter_model.safetensors").write_bytes(b"\x08" * 64)  # as registered, and no weights
    register(acts, "support", damaged)
    other = whole_model(tmp_path / "other-base", 9)
    wrong = adapter_on(other, tmp_path / "wrong-base", 5)
    register(acts, "support", wrong)
    (other / "model.safetensors").write_bytes((place.base / "model.safetensors").read_bytes())
    client: Any = acts.registry._client
    good = acts.registry.version("support", "1").record.to_tags()
    client.create_model_version("support", "s3://bucket/model", tags=good)
    bad = [(str(number), says) for number, (_, _, says) in enumerate(BAD, 2)]
    bad += [
        ("7", "damaged"),
        ("8", "the base of support version 8 is not what was registered: model.safetensors changed"),
    ]
    bad += [("9", "nothing is fetched")]
    for (_, change, _), folder in zip(BAD, copies, strict=True):
        change(folder)
    with served(acts, tmp_path, PRODUCTION) as here:
        text = here.answer()[1]
        for number, says in bad:
            client.set_registered_model_alias("support", "production", number)
            until(lambda says=says: any(says in told for told in here.told.all("warning")))  # type: ignore[misc]
            assert here.answer() == ("1", text)
            assert httpx.get(f"{here.bed.url}/ready").status_code == 200
            metrics = httpx.get(f"{here.bed.url}/metrics").text
            assert f'tunedock_version_failed{{model="support",version="{number}"}} 1.0' in metrics
        acts.promote("support", "1", "production")
        until(lambda: "tunedock_version_failed{" not in httpx.get(f"{here.bed.url}/metrics").text)
        failed = [line for line in audit_of(acts) if line["act"] == "serve-version-failed"]
        assert [line["version"] for line in failed] == [number for number, _ in bad]


def test_a_canary_by_subject(acts: Acts, place: Place, tmp_path: Path) -> None:
    three_adapters(acts, place)
    subjects = [f"subject {number}" for number in range(400)]
    with served(acts, tmp_path, PRODUCTION) as here:
        models = here.bed.gateway.models

        def inside() -> set[str]:
            return {subject for subject in subjects if models.get("support", subject).version == "2"}

        assert inside() == set()
        before: set[str] = set()
        for percent in (10.0, 50.0):
            acts.promote("support", "2", "production", percent)
            until(lambda percent=percent: models.shares()[-1][1] == percent)  # type: ignore[misc]
            now = inside()
            assert now == {subject for subject in subjects if is_in(subject, "support", percent)}
            assert before < now
            before = now
        assert 'tunedock_version_share{model="support",version="2"} 0.5' in httpx.get(f"{here.bed.url}/metrics").text
        expected = "2" if is_in("anonymous", "support", 50) else "1"
        assert here.answer()[0] == expected == here.version()
        acts.promote("support", "2", "production")
        until(lambda: inside() == set(subjects))


def test_a_canary_answers_its_callers_from_the_first_request_of_a_start_on(
    acts: Acts, place: Place, tmp_path: Path
) -> None:
    three_adapters(acts, place)
    acts.promote("support", "2", "production", 50.0)
    with served(acts, tmp_path, PRODUCTION) as here:
        for subject in (f"subject {number}" for number in range(50)):
            version = here.bed.gateway.models.get("support", subject).version
            assert version == ("2" if is_in(subject, "support", 50.0) else "1")
    assert [(line["from"], line["to"]) for line in audit_of(acts) if line["act"] == "serve-version"] == [
        (None, "1"), ("1", "1"),
    ]  # fmt: skip


def test_a_version_that_does_not_fit_beside_what_serves_is_not_loaded(
    acts: Acts, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what its weights take in memory; the version that was kept warm gives way to it first."""
    for folder in place.wholes:
        register(acts, "support", folder)
    register(acts, "support", place.adapters[0])
    acts.promote("support", "1", "production")
    weights = sum(file.stat().st_size for file in place.wholes[0].glob("*.safetensors"))
    with served(acts, tmp_path, PRODUCTION, dtype="float32") as here:
        acts.promote("support", "2", "production")
        until(lambda: here.version() == "2")
        assert here.here() == {"1", "2"}
        monkeypatch.setattr(computed, "_free", lambda: weights)
        acts.promote("support", "3", "production")
        until(lambda: any("bytes of memory beside what is there" in told for told in here.told.all("warning")))
        assert here.answer()[0] == "2" and here.here() == {"2"}
        monkeypatch.undo()
        here.follow.look_again()
        until(lambda: here.version() == "3")


def test_two_of_one_name_are_refused_before_anything_is_loaded(acts: Acts, place: Place, tmp_path: Path) -> None:
    three_adapters(acts, place)
    with (
        pytest.raises(RecipeError, match="two models are called `a`"),
        served(acts, tmp_path, "a=models:/support/1", "a=models:/support/2"),
    ):
        pass


def test_a_canary_that_cannot_be_loaded_lets_production_answer_all(acts: Acts, place: Place, tmp_path: Path) -> None:
    copy = shutil.copytree(place.adapters[1], tmp_path / "copy")
    register(acts, "support", place.adapters[0], alias="production")
    register(acts, "support", copy)
    acts.promote("support", "2", "production", 50.0)
    (copy / "adapter_config.json").write_text("{}")
    with served(acts, tmp_path, PRODUCTION) as here:
        until(lambda: any("adapter_config.json changed" in told for told in here.told.all("warning")))
        assert all(here.bed.gateway.models.get("support", f"s{n}").version == "1" for n in range(50))
        shutil.copy(place.adapters[1] / "adapter_config.json", copy)
        here.follow.look_again()
        until(lambda: any(here.bed.gateway.models.get("support", f"s{n}").version == "2" for n in range(50)))


def test_a_registry_that_is_locked_or_gone_changes_nothing(acts: Acts, place: Place, tmp_path: Path) -> None:
    import sqlite3

    three_adapters(acts, place)
    file = acts.registry.file
    assert file is not None
    with served(acts, tmp_path, PRODUCTION) as here:
        text = here.answer()[1]
        file.rename(tmp_path / "aside.db")
        file.write_bytes(b"no database" * 1000)
        until(lambda: any("cannot be asked" in told for told in here.told.all("warning")))
        assert "tunedock_registry_up" in httpx.get(f"{here.bed.url}/metrics").text
        assert here.answer() == ("1", text)
        (tmp_path / "aside.db").replace(file)
        until(lambda: any("answers again" in told for told in here.told.all("note")))
        with sqlite3.connect(file) as held:
            held.execute("BEGIN EXCLUSIVE")
            assert here.answer() == ("1", text)
            held.rollback()
        acts.promote("support", "2", "production")
        until(lambda: here.version() == "2")


def test_an_alias_that_is_dropped_leaves_what_serves_and_a_new_start_says_so(
    acts: Acts, place: Place, tmp_path: Path
) -> None:
    register(acts, "support", place.adapters[0], alias="production")
    with served(acts, tmp_path, PRODUCTION) as here:
        acts.drop_alias("support", "production")
        until(lambda: any("any more; what serves goes on" in told for told in here.told.all("warning")))
        assert here.answer()[0] == "1"
    with pytest.raises(RecipeError, match="has no alias `production`"), served(acts, tmp_path, PRODUCTION):
        pass


def test_a_start_serves_what_the_registry_says_now_or_says_why_not(acts: Acts, place: Place, tmp_path: Path) -> None:
    copy = shutil.copytree(place.adapters[1], tmp_path / "copy")
    register(acts, "support", place.adapters[0])
    register(acts, "support", copy, alias="production")
    with served(acts, tmp_path, PRODUCTION) as here:
        assert here.version() == "2"
        entry = httpx.get(f"{here.bed.url}/v1/models").json()["data"][0]
        assert (entry["id"], entry["version"], entry["lineage"]["kind"]) == ("support", "2", "adapter")
        assert entry["lineage"]["base"] == str(place.base) and len(entry["lineage"]["digest"]) == 64
    (copy / "tokenizer.json").write_text("{}")
    for place_, error, says in (
        (PRODUCTION, CheckError, "tokenizer.json changed"),
        ("x=models:/nothere@production", RecipeError, "has no model `nothere`"),
        ("x=models:/support@staging", RecipeError, "has no alias `staging`"),
        ("x=models:/support/9", RecipeError, "no version 9"),
    ):
        with pytest.raises(error, match=says), served(acts, tmp_path, place_):
            pass
    acts.registry._client.create_model_version("support", source_of(tmp_path))
    with pytest.raises(RunError, match="not registered by tunedock"), served(acts, tmp_path, "x=models:/support/3"):
        pass
    with pytest.raises(EngineError, match="cannot be asked"):
        loaded(
            ServeOrder.model_validate(
                {
                    "backends": [{"name": "x", "kind": "version", "place": "models:/a/1"}],
                    "registry": "http://127.0.0.1:9",
                }
            ),
            Emitter(None),
        )
