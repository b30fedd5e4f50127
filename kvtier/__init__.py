"""kvtier: decides where an agent's KV cache waits while its tools run."""

__version__ = "0.1.0"
