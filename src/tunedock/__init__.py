"""tunedock: from raw data to a served, fine-tuned language model, with one recipe."""

__version__ = "0.1.0"
