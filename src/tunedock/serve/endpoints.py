"""What is behind each path of OpenAI's interface: a request checked, the job it makes, and how its answer is written."""

from __future__ import annotations

from typing import Any

from fastapi.responses import JSONResponse, Response

from tunedock import __version__
from tunedock.serve import replies, response_replies
from tunedock.serve.answers import answer, until_gone
from tunedock.serve.body import checked, read
from tunedock.serve.errors import ApiError
from tunedock.serve.jobs import Usage
from tunedock.serve.models import Served
from tunedock.serve.requests import as_chat, chat_job, text_jobs
from tunedock.serve.surface import ChatRequest, CompletionRequest, EmbeddingRequest, ResponsesRequest
from tunedock.serve.turn import Turn

FINGERPRINT = f"tunedock-{__version__}"


async def list_models(turn: Turn) -> Response:
    gate, subject = turn.gateway.gate, turn.request.state.subject
    models = turn.gateway.models
    names = gate.allowed(subject, [one.name for one in models.all()])
    seen = [models.get(name, subject.name).to_json() for name in names]
    return JSONResponse({"object": "list", "data": seen})


async def one_model(turn: Turn) -> Response:
    name, subject = turn.request.path_params["name"], turn.request.state.subject
    turn.gateway.gate.require_model(subject, name)
    return JSONResponse(turn.gateway.models.get(name, subject.name).to_json())


async def metrics(turn: Turn) -> Response:
    await turn.gateway.readiness.look()
    return Response(turn.gateway.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def chat_completions(turn: Turn) -> Response:
    request = checked(await _body(turn), ChatRequest)
    served = _served(turn, request.model)
    id_ = f"chatcmpl-{turn.id}"
    job = chat_job(request, served.engine, id_=id_, model=served.model, adapter=served.adapter)
    with_usage = request.stream_options is not None and request.stream_options.include_usage
    return await answer(
        turn,
        job,
        lambda job: served.engine.chat(job),
        bool(request.stream),
        lambda events: replies.chat_stream(
            id_, served.name, events, job.n, with_usage=with_usage, fingerprint=FINGERPRINT
        ),
        lambda answers, usage: replies.chat_json(id_, served.name, answers, usage, FINGERPRINT),
    )


async def completions(turn: Turn) -> Response:
    request = checked(await _body(turn), CompletionRequest)
    served = _served(turn, request.model)
    id_ = f"cmpl-{turn.id}"
    jobs = text_jobs(request, served.engine, id_=id_, model=served.model, adapter=served.adapter)
    if len(jobs) > 1:
        raise ApiError(
            400, "several prompts in one request are not supported", param="prompt", code="unsupported_parameter"
        )
    with_usage = request.stream_options is not None and request.stream_options.include_usage
    return await answer(
        turn,
        jobs[0],
        lambda job: served.engine.complete(job),
        bool(request.stream),
        lambda events: replies.text_stream(id_, served.name, events, with_usage=with_usage, fingerprint=FINGERPRINT),
        lambda answers, usage: replies.text_json(id_, served.name, answers, usage, FINGERPRINT),
    )


async def responses(turn: Turn) -> Response:
    value = await _body(turn)
    request = as_chat(checked(value, ResponsesRequest))
    served = _served(turn, request.model)
    id_ = f"resp_{turn.id}"
    job = chat_job(request, served.engine, id_=id_, model=served.model, adapter=served.adapter)
    return await answer(
        turn,
        job,
        lambda job: served.engine.chat(job),
        bool(request.stream),
        lambda events: response_replies.response_stream(id_, value, events),
        lambda answers, usage: response_replies.response_json(id_, value, answers[0], usage, "completed"),
    )


async def embeddings(turn: Turn) -> Response:
    request = checked(await _body(turn), EmbeddingRequest)
    served = _served(turn, request.model)
    if "embeddings" not in served.engine.can:
        raise ApiError(
            400, f"the model `{served.name}` makes no embeddings", param="model", code="unsupported_parameter"
        )
    given = request.input
    texts: list[Any] = [given] if isinstance(given, str) or isinstance(given[0], int) else list(given)
    tokens = sum(len(text) for text in texts)
    gate = turn.gateway.gate.admitted(turn.request.state.subject, served.name, tokens)
    async with gate as ticket:
        work = served.engine.embed(served.model, texts)
        vectors, read_tokens = await until_gone(turn.request, work, turn.gateway.bounds.request_s)
        ticket.used(read_tokens, 0)
        turn.usage = Usage(read_tokens, 0)
    return JSONResponse(replies.embeddings_json(served.name, vectors, read_tokens, request.encoding_format))


async def _body(turn: Turn) -> Any:
    bounds = turn.gateway.bounds
    value = await read(turn.request, turn.take, most_bytes=bounds.body_bytes, limit_s=bounds.body_s)
    if turn.gateway.log_bodies:
        turn.asked = value
    return value


def _served(turn: Turn, name: str) -> Served:
    """Raises what the gate raises, before it says whether there is such a model."""
    subject = turn.request.state.subject
    turn.gateway.gate.require_model(subject, name)
    turn.served = turn.gateway.models.take(name, subject.name)
    return turn.served
