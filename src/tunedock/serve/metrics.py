"""What Prometheus is told of the gateway, per model and adapter: how many, how long, how much, and what waits.

Names follow vLLM's where it has them, so that a dashboard of one reads the other.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from tunedock.serve.models import Models

BY = ("model", "adapter", "version")
"""`version` is that of the registry; empty where the model is none of its."""
SHORT_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
LONG_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


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
        self.whole = Histogram(
            "tunedock_e2e_request_latency_seconds", "To the end of an answer", BY, buckets=LONG_S, registry=own
        )
        self.running = Gauge("tunedock_gateway_requests", "Requests in the gateway now", BY, registry=own)
        self.log_lost = Gauge(
            "tunedock_access_log_lost_lines", "Lines of the access log that were not written", registry=own
        )
        self.dropped = Counter(
            "tunedock_connections_dropped", "Connections ended by the gateway, and why", ("why",), registry=own
        )
        own.register(_Engines(models))

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _Engines:
    """Asked when Prometheus asks."""

    def __init__(self, models: Models) -> None:
        self._models = models

    def collect(self) -> Iterator[Metric]:
        running = GaugeMetricFamily(
            "tunedock_num_requests_running", "Requests that an engine works on", labels=["model"]
        )
        waiting = GaugeMetricFamily(
            "tunedock_num_requests_waiting", "Requests that wait for an engine", labels=["model"]
        )
        cache = GaugeMetricFamily(
            "tunedock_kv_cache_usage_perc", "Share of the memory for keys and values", labels=["model"]
        )
        seen: set[int] = set()
        for served in self._models.all():
            if id(served.engine) in seen:
                continue
            seen.add(id(served.engine))
            load = served.engine.load()
            running.add_metric([served.name], load.running)
            waiting.add_metric([served.name], load.waiting)
            cache.add_metric([served.name], load.cache_used)
        yield from (running, waiting, cache)
        memory = GaugeMetricFamily("tunedock_process_resident_bytes", "Memory of the gateway's process")
        memory.add_metric([], psutil.Process().memory_info().rss)
        yield memory
        yield from _cards()


def _cards() -> Iterator[Metric]:
    """Memory of each GPU that PyTorch computes on in this process; a program behind the gateway tells of its own."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return
    used = GaugeMetricFamily("tunedock_gpu_memory_used_bytes", "Of a GPU, by all processes", labels=["gpu"])
    total = GaugeMetricFamily("tunedock_gpu_memory_total_bytes", "Of a GPU", labels=["gpu"])
    for number in range(torch.cuda.device_count()):
        free, whole = torch.cuda.mem_get_info(number)
        used.add_metric([str(number)], whole - free)
        total.add_metric([str(number)], whole)
    yield from (used, total)
