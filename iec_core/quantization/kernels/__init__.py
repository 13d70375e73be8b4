"""8-bit activations and convolutions on a GPU, in Triton: an activation becomes int8 once, and int8 is what is multiplied.

activations.py and products.py have the kernels, tiles.py says in which tiles a product is computed, launch.py launches them,
and operators.py has what the layers call. With TRITON_INTERPRET=1 in the environment Triton's interpreter runs them on the CPU.
"""
