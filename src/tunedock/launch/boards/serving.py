"""What a gateway looks like: figures of `tunedock serve`, a row for each thing one may want to know."""

from __future__ import annotations

from collections.abc import Sequence

from tunedock.launch.boards.queries import ASKED, HERE, MODEL, quantile, rate, share
from tunedock.launch.boards.shape import Board, Panel, Query, Row, Unit, Variable

QUANTILES = (0.5, 0.95, 0.99)


def _spread(title: str, histogram: str, where: str = MODEL, *, about: str = "", width: int = 8) -> Panel:
    """How long, as a half, nineteen of twenty and all but one of a hundred have it."""
    queries = [Query(quantile(which, histogram, where=where), f"p{which * 100:g}") for which in QUANTILES]
    return Panel(title, queries, "s", width=width, about=about)


def _lines(
    title: str,
    expr: str | Sequence[Query],
    legend: str = "{{model}}",
    unit: Unit = "",
    *,
    width: int = 8,
    about: str = "",
    stacked: bool = False,
    between: tuple[float, float] | None = None,
) -> Panel:
    queries = [Query(expr, legend)] if isinstance(expr, str) else expr
    return Panel(title, queries, unit, width=width, about=about, stacked=stacked, between=between)


def _now(title: str, expr: str, unit: Unit = "", *, legend: str = "", named: bool = False) -> Panel:
    return Panel(title, [Query(expr, legend)], unit, "stat", width=4, height=4, text="name" if named else "value")


REQUESTS = "tunedock_requests_total"
SERVER_ERROR = 'status=~"5.."'
ANSWERER = "model, adapter, version"
NAMED = "{{model}} {{adapter}} {{version}}"

NOW = Row(
    "Now",
    [
        _now("Gateways that answer", f"count(tunedock_build_info{{{HERE}}})"),
        _now("Engines that do not answer", f"count(tunedock_engine_up{{{MODEL}}} == 0) or vector(0)"),
        _now("Requests a second", f"sum(rate({REQUESTS}{{{ASKED}}}[$__rate_interval]))", "reqps"),
        _now("At work", f"sum(tunedock_num_requests_running{{{MODEL}}})"),
        _now("Waiting", f"sum(tunedock_num_requests_waiting{{{MODEL}}})"),
        _now(
            "Version of tunedock",
            f"count by (version) (tunedock_build_info{{{HERE}}})",
            legend="{{version}}",
            named=True,
        ),
    ],
)
TRAFFIC = Row(
    "Traffic",
    [
        _lines("Requests by status", rate(REQUESTS, "status", ASKED), "{{status}}", "reqps", stacked=True),
        _lines("Requests by model, adapter and version", rate(REQUESTS, ANSWERER, ASKED), NAMED, "reqps", stacked=True),
        _lines("Requests by path", rate(REQUESTS, "path", ASKED), "{{path}}", "reqps"),
        _lines(
            "Share of server errors",
            share(REQUESTS, SERVER_ERROR, "model"),
            unit="percentunit",
            about="5xx of all that was answered; an error in the middle of a stream counts as one.",
        ),
        _lines(
            "Clients that went away",
            rate(REQUESTS, "model", f'{ASKED},status="499"'),
            unit="reqps",
            about="Before the answer's end; what was made until then is charged.",
        ),
        _lines("Requests in the gateway", f"sum by (model) (tunedock_gateway_requests{{{MODEL}}})"),
    ],
)
LATENCY = Row(
    "Latency",
    [
        _spread(
            "Time to first token",
            "tunedock_time_to_first_token_seconds",
            about="From a request's arrival to the first piece of its answer, streamed or not.",
        ),
        _spread("Between two pieces", "tunedock_inter_token_latency_seconds"),
        _spread("To the end of the answer", "tunedock_e2e_request_latency_seconds"),
        _lines(
            "Time to first token by model (p95)",
            quantile(0.95, "tunedock_time_to_first_token_seconds", ANSWERER),
            NAMED,
            "s",
        ),
        _lines(
            "Between two pieces by model (p95)",
            quantile(0.95, "tunedock_inter_token_latency_seconds", ANSWERER),
            NAMED,
            "s",
        ),
        _spread(
            "Until let in",
            "tunedock_admission_seconds",
            HERE,
            about="Body read, key looked up, limits counted: the gateway's own part.",
        ),
    ],
)
QUEUE = Row(
    "Queue",
    [
        _lines(
            "Running and waiting",
            [
                Query(f"sum by (model) (tunedock_num_requests_running{{{MODEL}}})", "{{model}}", "at work"),
                Query(f"sum by (model) (tunedock_num_requests_waiting{{{MODEL}}})", "{{model}}", "waiting"),
            ],
        ),
        _spread(
            "Time in the queue",
            "tunedock_request_queue_time_seconds",
            about="Until the engine computed; of engines of the gateway's own process.",
        ),
        _lines(
            "Memory for keys and values",
            f"max by (model) (tunedock_kv_cache_usage_perc{{{MODEL}}})",
            unit="percentunit",
            between=(0, 1),
            about="Full: requests wait, or give way and are computed again.",
        ),
    ],
)
TOKENS = Row(
    "Tokens",
    [
        _lines("Tokens read a second", rate("tunedock_prompt_tokens_total", ANSWERER), NAMED, "ops"),
        _lines("Tokens made a second", rate("tunedock_generation_tokens_total", ANSWERER), NAMED, "ops"),
        _lines(
            "Tokens of a request",
            [
                Query(
                    f"{rate('tunedock_prompt_tokens_total', 'model')}"
                    f" / ({rate('tunedock_e2e_request_latency_seconds_count', 'model')} > 0)",
                    "{{model}}",
                    "read",
                ),
                Query(
                    f"{rate('tunedock_generation_tokens_total', 'model')}"
                    f" / ({rate('tunedock_e2e_request_latency_seconds_count', 'model')} > 0)",
                    "{{model}}",
                    "made",
                ),
            ],
            about="On average.",
        ),
    ],
)
REFUSALS = Row(
    "Refused",
    [
        _lines(
            "Refused by status",
            rate(REQUESTS, "status", f'{HERE},status=~"4..",status!="499"'),
            "{{status}}",
            "reqps",
            about="401: no valid key; 403: not this model; 429: over a limit.",
        ),
        _lines("Refused by reason", rate("tunedock_refused_total", "code", HERE), "{{code}}", "reqps"),
        _lines(
            "Connections ended by the gateway",
            rate("tunedock_connections_dropped_total", "why", HERE),
            "{{why}}",
            "ops",
        ),
    ],
)
ENGINES = Row(
    "Engines",
    [
        _lines(
            "Engines that answer",
            f"min by (instance, model) (tunedock_engine_up{{{MODEL}}})",
            "{{instance}} {{model}}",
            between=(0, 1),
        ),
        _lines(
            "Starts again",
            f"sum by (instance, model) (increase(tunedock_engine_restarts_total{{{MODEL}}}[$__rate_interval]))",
            "{{instance}} {{model}}",
            about="Of engines that are programs; what they were answering was lost each time.",
        ),
    ],
)
STORE = Row(
    "Keys, limits and records",
    [
        _lines(
            "The store of keys and limits answers",
            f"tunedock_access_store_up{{{HERE}}}",
            "{{instance}}",
            between=(0, 1),
            about="While it does not, nobody is let in. An open gateway has none.",
        ),
        _lines(
            "Answered 503 for it",
            rate(
                "tunedock_refused_total",
                "code",
                f'{HERE},code=~"access_store_unavailable|token_keys_unavailable"',
            ),
            "{{code}}",
            "reqps",
        ),
        _lines(
            "Keys of JSON Web Tokens can be had",
            f"tunedock_token_keys_up{{{HERE}}}",
            "{{instance}}",
            between=(0, 1),
            about="When they were last asked for; those that are known hold for a day.",
        ),
        _lines(
            "Until the certificate ends",
            f"tunedock_tls_certificate_expires_timestamp_seconds{{{HERE}}} - time()",
            "{{instance}}",
            "s",
        ),
        _lines(
            "Lines of the access log that were lost",
            rate("tunedock_access_log_lost_lines_total", "instance", HERE),
            "{{instance}}",
            "ops",
        ),
    ],
)
MEMORY = Row(
    "Memory",
    [
        _lines(
            "Memory",
            [
                Query(f"tunedock_process_resident_bytes{{{HERE}}}", "{{instance}}", "the gateway's process"),
                Query(f"tunedock_memory_free_bytes{{{HERE}}}", "{{instance}}", "free"),
                Query(f"tunedock_memory_limit_bytes{{{HERE}}}", "{{instance}}", "in all"),
            ],
            unit="bytes",
            about="Free and in all: of the machine, or of the container where that has less.",
        ),
        _lines(
            "GPU memory",
            f"tunedock_gpu_memory_used_bytes{{{HERE}}} / tunedock_gpu_memory_total_bytes{{{HERE}}}",
            "{{instance}} {{gpu}}",
            "percentunit",
            between=(0, 1),
            about="Of all processes together; GPUs that the gateway itself computes on.",
        ),
        _lines(
            "How busy the GPU is",
            f"tunedock_gpu_utilisation_ratio{{{HERE}}}",
            "{{instance}} {{gpu}}",
            "percentunit",
            between=(0, 1),
        ),
        _lines(
            "Connections and open files",
            [
                Query(f"tunedock_connections{{{HERE}}}", "{{instance}}", "connections"),
                Query(f"tunedock_process_open_files{{{HERE}}}", "{{instance}}", "files and sockets"),
            ],
        ),
    ],
)
VERSIONS = Row(
    "Versions side by side",
    [
        _lines(
            "Share of the callers",
            f"avg by (model, version) (tunedock_version_share{{{MODEL}}})",
            "{{model}} {{version}}",
            "percentunit",
            stacked=True,
            between=(0, 1),
            about="Of models of a registry: a canary has a part of them.",
        ),
        _lines(
            "Requests by version",
            rate(REQUESTS, "model, version", ASKED),
            "{{model}} {{version}}",
            "reqps",
            stacked=True,
        ),
        _lines(
            "Share of server errors by version",
            share(REQUESTS, SERVER_ERROR, "model, version"),
            "{{model}} {{version}}",
            "percentunit",
        ),
        _lines(
            "Time to first token by version (p95)",
            quantile(0.95, "tunedock_time_to_first_token_seconds", "model, version"),
            "{{model}} {{version}}",
            "s",
        ),
        _lines(
            "Tokens of an answer by version",
            f"{rate('tunedock_generation_tokens_total', 'model, version')}"
            f" / ({rate('tunedock_e2e_request_latency_seconds_count', 'model, version')} > 0)",
            "{{model}} {{version}}",
            about="On average: a version that says much more or much less than the one before has changed.",
        ),
        _lines(
            "Registry and versions that fail",
            [
                Query(f"min by (registry) (tunedock_registry_up{{{HERE}}})", "{{registry}}", "answers"),
                Query(
                    f"max by (model, version) (tunedock_version_failed{{{MODEL}}})",
                    "{{model}} {{version}}",
                    "cannot be loaded",
                ),
            ],
            between=(0, 1),
        ),
    ],
)

BOARD = Board(
    uid="tunedock-serving",
    title="tunedock: serving",
    refresh="15s",
    variables=[
        Variable("instance", "Gateway", "label_values(tunedock_build_info, instance)"),
        Variable("model", "Model", "label_values(tunedock_requests_total, model)"),
    ],
    rows=[NOW, TRAFFIC, LATENCY, QUEUE, TOKENS, REFUSALS, VERSIONS, ENGINES, STORE, MEMORY],
)
