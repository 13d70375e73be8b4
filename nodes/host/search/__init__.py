"""Measure how fast and how exact the settings of a search are."""
