"""Versions of models by name: which run, export or file each is, what stands behind an alias, and how it came to.

The registry is MLflow's (names, versions, aliases, tags), so that its own page and clients show the same. Torch-free, and without
MLflow until a registry is opened. What the gateway makes of it is `tunedock.serve.versions`.
"""

DEFAULT_REGISTRY = "models.db"
"""Where commands and gateways look for it, unless they are told otherwise."""

PRODUCTION = "production"
"""The alias that is meant where none is named."""
