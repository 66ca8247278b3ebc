"""GGUF, the file llama.cpp and Ollama read: a model's shape, its vocabulary and its tensors in one file."""

TOKENIZER = "tokenizer"
"""The folder beside a file with its tokenizer as transformers reads it: llama.cpp has its own, a gateway wants this."""
