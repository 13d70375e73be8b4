"""Quantization: weight formats and packing, integer arithmetic and kernels, calibration of weights and activations, and
files.
"""
