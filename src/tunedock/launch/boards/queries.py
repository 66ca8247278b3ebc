"""Prometheus' queries for figures of a gateway, as a dashboard asks them: of the gateways and models that are chosen above it.

Rates are taken over `$__rate_interval`, which Grafana makes of the time shown and of how often Prometheus scrapes. A share of
nothing is left out, not drawn as a number.
"""

from __future__ import annotations

HERE = 'instance=~"$instance"'
MODEL = f'{HERE},model=~"$model"'
ASKED = f'{MODEL},path=~"/v1/.+"'
"""Without those of Prometheus itself."""


def rate(metric: str, by: str, where: str = MODEL) -> str:
    """A second, in sum, by these labels."""
    return f"sum by ({by}) (rate({metric}{{{where}}}[$__rate_interval]))"


def share(metric: str, part: str, by: str) -> str:
    """Of the requests of each group, how many are such; 0 where none is, nothing where there are no requests."""
    some, every = rate(metric, by, f"{ASKED},{part}"), rate(metric, by, ASKED)
    return f"({some} or 0 * {every}) / ({every} > 0)"


def quantile(which: float, histogram: str, by: str = "", where: str = MODEL) -> str:
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({which}, {rate(f'{histogram}_bucket', labels, where)})"
