"""Where profiles are, of caches and of quantizations: a model folder of ours."""

from .folders import ModelFolder

PROFILES = ModelFolder("iec_profiles", own=True)
