"""Caches: which steps are evaluated in full, kept features, their forecasts, and the maps that a calibration fits."""
