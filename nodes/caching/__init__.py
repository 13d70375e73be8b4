"""The nodes that put a cache on a MODEL, and that calibrate, save and load cache profiles."""
