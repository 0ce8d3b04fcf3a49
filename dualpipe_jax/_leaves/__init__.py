"""Records for each leaf of the parameters: its sharding, its rule, and the way of its gradient."""
