"""The gateway's OpenAPI document, and the gateway held against it by Schemathesis: requests of all kinds, none a fault of ours."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import (
    content_type_conformance,
    not_a_server_error,
    response_schema_conformance,
    status_code_conformance,
)

from access_bed import issued, opened
from gateway_bed import Bed, gateway
from serving_bed import serving
from tunedock.serve.access import AccessSettings
from tunedock.serve.app import create_app
from tunedock.serve.document import REFUSED, document
from tunedock.serve.surface import ChatRequest
from tunedock.serve.turn import Bounds

CHECKS = (not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance)
BOUNDS = Bounds(body_bytes=1 << 20, body_s=5.0, request_s=20.0)
OPERATIONS = {(path, method) for path, methods in document()["paths"].items() for method in methods}


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Bed, str]]:
    """(a gateway with keys, a key)."""
    folder = tmp_path_factory.mktemp("document")
    key = issued(folder / "access.db", "tester")
    with (
        opened(AccessSettings(store=str(folder / "access.db"))) as access,
        gateway(folder, gate=access, bounds=BOUNDS) as made,
    ):
        made.generator.longest = 96  # so that no answer takes long
        yield made, key


def test_the_document_is_one_and_knows_what_there_is(bed: tuple[Bed, str]) -> None:
    made = document()
    json.dumps(made, allow_nan=False)
    app = create_app(bed[0].gateway)
    assert app.openapi() == made
    routes = {
        (route.path.replace(":path", ""), method.lower())  # type: ignore[attr-defined]
        for route in app.routes
        for method in route.methods  # type: ignore[attr-defined]
    }
    assert routes == OPERATIONS
    for reference in set(_references(made)):
        assert reference.startswith("#/components/schemas/")
        assert reference.rpartition("/")[2] in made["components"]["schemas"], reference
    for schema in made["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    for path, method in OPERATIONS:
        operation = made["paths"][path][method]
        assert (operation.get("security") == []) == (path in ("/health", "/ready")), path
    assert made["components"]["securitySchemes"]["bearer"] == {"type": "http", "scheme": "bearer"}
    assert set(made["components"]["schemas"]["ChatRequest"]["properties"]) == set(ChatRequest.model_fields)
    chat = made["paths"]["/v1/chat/completions"]["post"]["responses"]
    assert set(chat) == {"200", *map(str, REFUSED)}
    assert set(chat["200"]["content"]) == {"application/json", "text/event-stream"}


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for one in value.values():
            yield from _references(one)
    elif isinstance(value, list):
        for one in value:
            yield from _references(one)


def test_it_is_served_at_no_path(bed: tuple[Bed, str]) -> None:
    for path in ("/openapi.json", "/docs", "/redoc", "/v1/openapi.json", "/swagger.json"):
        assert httpx.get(f"{bed[0].url}{path}").status_code == 404


@pytest.mark.parametrize("keyed", [True, False])
@pytest.mark.parametrize(("path", "method"), sorted(OPERATIONS))
def test_a_few_requests_of_each_kind(bed: tuple[Bed, str], path: str, method: str, keyed: bool) -> None:
    _held(bed[0].url, bed[1], path, method, keyed, 12 if keyed and method == "post" else 4)


@pytest.mark.long
def test_many_requests_of_each_kind_to_a_process(tmp_path: Path) -> None:
    """None of them leaves a line of a mistake on standard error, nor a line in the log that is none."""
    key = issued(tmp_path / "access.db", "tester")
    more = ("--store", "access.db", "--max-length", "96", "--access-log", "log.jsonl")
    with serving(tmp_path, *more) as gateway:
        for path, method in sorted(OPERATIONS):
            for keyed in (True, False):
                _held(gateway.url, key, path, method, keyed, 400 if keyed and method == "post" else 60)
        assert httpx.get(f"{gateway.url}/ready").json() == {"status": "ready"}
    assert "Traceback" not in "".join(gateway.said)
    assert len([json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]) > 1000


def _held(url: str, key: str, path: str, method: str, keyed: bool, examples: int) -> None:
    """Requests by the document, and against it; half of those with a model name one that is there."""
    schema = schemathesis.openapi.from_dict(document())
    schema.config.update(base_url=url)
    operation = schema[path][method]
    cases = st.one_of(*(operation.as_strategy(generation_mode=mode) for mode in GenerationMode))

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.explicit, Phase.generate),
    )
    @given(case=cases, known=st.booleans())
    def held(case: schemathesis.Case, known: bool) -> None:
        if known and isinstance(case.body, dict) and "model" in case.body:
            case.body["model"] = "tiny"
        headers = {**(case.headers or {})}
        headers.pop("Authorization", None)
        case.headers = {**headers, **({"Authorization": f"Bearer {key}"} if keyed else {})}
        response = case.call(session=session)
        case.validate_response(response, checks=CHECKS)
        if not keyed and path not in ("/health", "/ready"):
            assert response.status_code in (401, 404, 405), response.text

    with requests.Session() as session:
        held()
