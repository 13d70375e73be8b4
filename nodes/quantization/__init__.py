"""The nodes that quantize a MODEL, calibrate, save and load it, and report the error that quantization causes."""
