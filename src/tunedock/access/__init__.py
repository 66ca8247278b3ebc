"""What the gateway and the command line both need to say who may call: keys, policies, and the store they are kept in.

Torch-free and without a web framework, so that `tunedock token` works where no model is. The gateway's own part, which judges each
request by it, is `tunedock.serve.access`.
"""

DEFAULT_STORE = "access.db"
"""Where both look for the store, unless they are told otherwise."""
