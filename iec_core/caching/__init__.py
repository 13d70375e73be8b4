"""Caches: the schedule of full steps, kept features, their forecasts, and the maps that a calibration fits."""
