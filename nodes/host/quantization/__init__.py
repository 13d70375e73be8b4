"""Quantized MODELs: their layers, and code to make, calibrate, measure, save and load them."""
