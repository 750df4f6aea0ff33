"""Models of upstream, loading the same state dicts."""
