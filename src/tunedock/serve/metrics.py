"""What Prometheus is told of the gateway, per model and adapter: how many, how long, how much, and what waits.

Names follow vLLM's where it has them, so that a dashboard of one reads the other.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from tunedock.serve.access import Access
from tunedock.serve.gauges import Gauges
from tunedock.serve.models import Models
from tunedock.serve.readiness import Readiness
from tunedock.serve.records import AccessLog

BY = ("model", "adapter", "version")
"""`version` is that of the registry; empty where the model is none of its."""
SHORT_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
LONG_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
KNOWN_CODES = (
    "access_store_unavailable",
    "engine_unavailable",
    "engine_broken",
    "insufficient_quota",
    "internal_error",
    "invalid_api_key",
    "model_not_allowed",
    "model_not_found",
    "rate_limit_exceeded",
    "timeout",
    "token_keys_unavailable",
)
MOST_CODES = 64


class Metrics:
    """One gateway's own, in a registry of its own."""

    def __init__(self, models: Models) -> None:
        self.registry = CollectorRegistry()
        own = self.registry
        self.requests = Counter(
            "tunedock_requests", "Requests answered", ("path", "status", *BY), registry=own
        )  # fmt: skip
        self.refused = Counter(
            "tunedock_refused", "Requests refused before an engine was asked", ("code",), registry=own
        )
        self.prompt = Counter("tunedock_prompt_tokens", "Tokens read", BY, registry=own)
        self.completion = Counter("tunedock_generation_tokens", "Tokens made", BY, registry=own)
        self.first = Histogram(
            "tunedock_time_to_first_token_seconds", "To the first piece of an answer", BY, buckets=SHORT_S, registry=own
        )
        self.between = Histogram(
            "tunedock_inter_token_latency_seconds", "Between two pieces", BY, buckets=SHORT_S, registry=own
        )
        self.admission = Histogram(
            "tunedock_admission_seconds",
            "From a request's arrival until it was let in: its body, its key, its limits",
            buckets=SHORT_S,
            registry=own,
        )
        self.queued = Histogram(
            "tunedock_request_queue_time_seconds",
            "From when the engine was asked until it computed; of engines of this process",
            BY,
            buckets=LONG_S,
            registry=own,
        )
        self.whole = Histogram(
            "tunedock_e2e_request_latency_seconds", "To the end of an answer", BY, buckets=LONG_S, registry=own
        )
        self.running = Gauge("tunedock_gateway_requests", "Requests in the gateway now", BY, registry=own)
        self.dropped = Counter(
            "tunedock_connections_dropped", "Connections ended by the gateway, and why", ("why",), registry=own
        )
        self.registry_up = Gauge(
            "tunedock_registry_up",
            "Whether a registry of models answered when it was asked last",
            ("registry",),
            registry=own,
        )
        self.version_failed = Gauge(
            "tunedock_version_failed", "A version that is to be served and cannot be loaded", ("model", "version"),
            registry=own,
        )  # fmt: skip
        self.connections = Gauge("tunedock_connections", "Connections that are open", registry=own)
        for code in KNOWN_CODES:  # a counter that begins at its first event tells Prometheus of no change
            self.refused.labels(code)
        self._codes = set(KNOWN_CODES)
        self._models = models

    def watch(self, readiness: Readiness, gate: Access, log: AccessLog) -> None:
        """Once, when all that is to be asked is there."""
        self.registry.register(Gauges(self._models, readiness, gate, lambda: log.lost))

    def certificate(self, end: float) -> None:
        """Once, where TLS is spoken. `end`: in seconds since 1970."""
        name, says = "tunedock_tls_certificate_expires_timestamp_seconds", "When the certificate ends"
        Gauge(name, says, registry=self.registry).set(end)

    def refuse(self, code: str) -> None:
        """Counts one. An engine's own codes are no more than it is thought to have."""
        if code not in self._codes and len(self._codes) >= MOST_CODES:
            code = "other"
        self._codes.add(code)
        self.refused.labels(code).inc()

    def text(self) -> bytes:
        return generate_latest(self.registry)
