"""tunedock beside its peers: the same rows, the same optimizer, one command. `docs/performance.md` says how to read it."""
