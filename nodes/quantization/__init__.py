"""The nodes that quantize a MODEL, calibrate, save and load it, and report what it costs."""
