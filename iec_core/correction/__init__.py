"""The correction: which steps are corrected, the fixed-point iteration, what `auto` chooses, and how far it contracts."""
