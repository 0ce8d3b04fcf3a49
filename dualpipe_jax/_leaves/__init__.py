"""Records of each leaf of the parameters: its sharding, its rule, and its gradient's sums."""
