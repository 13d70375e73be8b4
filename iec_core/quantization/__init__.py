"""Quantization: weight formats, packing, integer arithmetic, kernels, calibration of weights and activations, and files."""
