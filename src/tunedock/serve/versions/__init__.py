"""Versions of a registry, served: each loaded beside the one before, put in its place, and let go of after its last request.

registry ── watch: what should be served ── shelf: what is in memory ── load: files, checked, as an engine
                    │                              │
                 models: what is served now     warm: the one before, for a rollback
"""
