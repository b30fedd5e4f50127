"""Machines to replay on: models, GPUs and links that are known by name, and what is made of them."""
