"""GGUF, the file llama.cpp and Ollama read: a model's shape, its vocabulary and its tensors in one file."""
