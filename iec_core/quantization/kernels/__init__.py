"""8-bit activations and convolutions on a GPU, in Triton. Each activation is converted to int8 once, and int8 is multiplied.

activations.py and products.py have the kernels, tiles.py chooses the tiles of a product, launch.py launches the kernels, and
operators.py has the function that layers call. With TRITON_INTERPRET=1 in the environment, Triton's interpreter runs the
kernels on the CPU.
"""
