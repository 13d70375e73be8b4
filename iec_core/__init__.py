"""Iterative Error Correction (IEC, arXiv 2511.06250) and the efficiency methods that it corrects, without any host.

The modules know torch alone. `correction`, `caching` and `quantization` are the methods. Beside them is what these share:
`metrics` the error measures, `run_report` what a run did, `profile_file` the file of a calibration, `choices` the sentence for
an unknown word, `devices` what a device can do.
"""
