"""Quantization: formats and packed weights, their arithmetic and kernels, calibrated weights and activations, and the file."""
