"""The pack's own model folder, for the profiles of caches and of quantizations."""

from .folders import ModelFolder

PROFILES = ModelFolder("iec_profiles", own=True)
