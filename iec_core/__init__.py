"""Iterative Error Correction (IEC, arXiv 2511.06250) and the efficiency methods that it corrects, without any host.

The modules know torch alone: `schedule` says which steps are corrected, `correction` is the fixed-point iteration,
`quantization` the integer arithmetic, `caching` the feature cache of DeepCache, `metrics` the error measures, `report` what a
run did, `choices` the sentence for an unknown word, `devices` what a device can do.
"""
