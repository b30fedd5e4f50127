"""What `kvtier.turns.prefetch` is made of."""
