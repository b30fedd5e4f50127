"""What `copy_engine` is made of: memory layouts, runs of contiguous bytes, and the calls that copy them."""
