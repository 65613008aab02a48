"""Code shared by all experiments: kept results, tracking."""
