"""What `ttl_controller` is made of: how long tools take, what holding memory costs, the operator's overrides."""
