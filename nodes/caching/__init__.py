"""The nodes of the caches."""
