"""The control plane: the host's control server, its link to engines, and what speaks to it."""
