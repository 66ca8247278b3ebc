"""`python -m tunedock` is the `tunedock` command."""

from tunedock.cli.app import main

main()
