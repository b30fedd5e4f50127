"""The control server's gRPC side: nothing else of kvtier but the client imports gRPC."""
