"""What kvtier adds to vLLM's API process; the front module is `kvtier.middleware`."""
