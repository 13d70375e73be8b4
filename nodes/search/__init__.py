"""The node that finds settings."""
