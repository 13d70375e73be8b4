"""The code that relies on the internals of ComfyUI, called the host here.

The other modules of `nodes` import only these parts of the host: its node API, the lists of samplers and schedulers,
`common_ksampler`, and `get_executing_context`.
"""
