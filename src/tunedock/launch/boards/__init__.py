"""Grafana's dashboards, described once and written as Grafana's own JSON in English and Chinese.

    training.py                ──► shape.py ──► launch/monitoring/grafana/*.json
    queries.py ──► serving.py         ▲
                                 titles.json

`make boards` writes the files; a test fails while a committed one differs from what is described.
"""
