"""Which program a request belongs to, and what is remembered of programs."""
