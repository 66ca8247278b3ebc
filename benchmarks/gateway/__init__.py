"""What the gateway costs, beside LiteLLM's proxy, in front of an engine that answers at once."""
