"""What Prometheus is told of what is so at the moment it asks: engines, connections, memory, GPUs."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import psutil
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from tunedock import __version__
from tunedock.plan import control_group
from tunedock.serve.access import Access
from tunedock.serve.engines.child import ChildEngine
from tunedock.serve.jobs import Engine
from tunedock.serve.models import Models
from tunedock.serve.readiness import Readiness


@dataclass(frozen=True, slots=True)
class Gauges:
    """A collector of prometheus_client's kind."""

    models: Models
    readiness: Readiness
    gate: Access
    lost_lines: Callable[[], int]

    def collect(self) -> Iterator[Metric]:
        build = GaugeMetricFamily("tunedock_build_info", "What runs here", labels=["version", "python"])
        build.add_metric([__version__, platform.python_version()], 1)
        yield build
        lost = CounterMetricFamily("tunedock_access_log_lost_lines", "Lines of the access log that were not written")
        lost.add_metric([], self.lost_lines())
        yield lost
        yield from self._access()
        yield from self._engines()
        yield from self._versions()
        yield from _memory()
        yield from _cards()

    def _access(self) -> Iterator[Metric]:
        """What nobody has asked yet, and what is not there, is not told."""
        for name, says, answers in (
            ("access_store_up", "Whether the store of keys and limits takes what is written", self.readiness.store),
            ("token_keys_up", "Whether keys of tokens could be had when last asked for", self.gate.token_keys_up),
        ):
            if answers is not None:
                yield GaugeMetricFamily(f"tunedock_{name}", says, value=answers)

    def _engines(self) -> Iterator[Metric]:
        """By the first name of what computes: adapters share what it has, and two versions under one name may be two engines."""
        up, running, waiting, cache = (
            GaugeMetricFamily(f"tunedock_{name}", says, labels=["model"])
            for name, says in (
                ("engine_up", "Whether an engine answers, when it was last asked"),
                ("num_requests_running", "Requests that an engine works on"),
                ("num_requests_waiting", "Requests that wait for an engine"),
                ("kv_cache_usage_perc", "Share of the memory for keys and values"),
            )
        )
        restarts = CounterMetricFamily(
            "tunedock_engine_restarts", "How often an engine that is a program was started again", labels=["model"]
        )
        for name, engines in self._computing().items():
            loads = [engine.load() for engine in engines]
            running.add_metric([name], sum(load.running for load in loads))
            waiting.add_metric([name], sum(load.waiting for load in loads))
            cache.add_metric([name], max(load.cache_used for load in loads))
            answers = [answer for engine in engines if (answer := self.readiness.known(engine)) is not None]
            if answers:
                up.add_metric([name], all(answers))
            programs = [engine for engine in engines if isinstance(engine, ChildEngine)]
            if programs:
                restarts.add_metric([name], sum(max(0, engine.starts - 1) for engine in programs))
        yield from (up, running, waiting, cache, restarts)

    def _computing(self) -> dict[str, list[Engine]]:
        seen: set[int] = set()
        found: dict[str, list[Engine]] = {}
        for served, _ in self.models.shares():
            computing = getattr(served.engine, "generator", served.engine)
            if id(computing) not in seen:
                seen.add(id(computing))
                found.setdefault(served.name, []).append(served.engine)
        return found

    def _versions(self) -> Iterator[Metric]:
        share = GaugeMetricFamily(
            "tunedock_version_share", "Share of the callers that a version answers", labels=["model", "version"]
        )
        for served, percent in self.models.shares():
            if served.version is not None:
                share.add_metric([served.name, served.version], percent / 100)
        yield share


def _memory() -> Iterator[Metric]:
    """Of this process, and of what it lives in: the machine or its control group, whichever ends first."""
    own, groups = psutil.Process(), control_group.groups()
    for name, says, value in (
        ("process_resident_bytes", "Memory of the gateway's process", own.memory_info().rss),
        ("memory_limit_bytes", "What the machine or the container has", control_group.host_bytes(groups)),
        ("memory_free_bytes", "What is left of it", control_group.host_free_bytes(groups)),
    ):
        yield GaugeMetricFamily(f"tunedock_{name}", says, value=value)
    if psutil.POSIX:
        yield GaugeMetricFamily("tunedock_process_open_files", "Files and sockets of the process", value=own.num_fds())


def _cards() -> Iterator[Metric]:
    """Of each GPU that PyTorch computes on in this process; a program behind the gateway tells of its own."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return
    used = GaugeMetricFamily("tunedock_gpu_memory_used_bytes", "Of a GPU, by all processes", labels=["gpu"])
    total = GaugeMetricFamily("tunedock_gpu_memory_total_bytes", "Of a GPU", labels=["gpu"])
    busy = GaugeMetricFamily("tunedock_gpu_utilisation_ratio", "Of the last moments, while it computed", labels=["gpu"])
    for number in range(torch.cuda.device_count()):
        free, whole = torch.cuda.mem_get_info(number)
        used.add_metric([str(number)], whole - free)
        total.add_metric([str(number)], whole)
        try:
            busy.add_metric([str(number)], torch.cuda.utilization(number) / 100)
        except Exception:  # noqa: BLE001, S112 - policy: NVML is not there, or not for this card; what else there is, is told
            continue
    yield from (used, total, busy)
