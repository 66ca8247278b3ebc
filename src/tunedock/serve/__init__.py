"""The gateway: an OpenAI-compatible service in front of engines, and who may use it."""
