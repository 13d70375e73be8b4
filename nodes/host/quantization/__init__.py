"""Quantized MODELs: their layers, how they are made, calibrated, measured, saved and loaded."""
