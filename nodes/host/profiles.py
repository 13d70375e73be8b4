"""Profiles, of caches and of quantizations, in a model folder of ours."""

from ...iec_core.activation_scales import ActivationScales
from ...iec_core.cachequant import CacheProfile
from .folders import ModelFolder

PROFILES = ModelFolder("iec_profiles", own=True)


def save_profile(profile, name):
    """Write a profile and return its path. Raises ValueError, with a sentence, where it cannot be written."""
    return PROFILES.write(name, profile.save)


def load_profile(kind, name):
    """Read a profile of a kind, CacheProfile or ActivationScales. Raises ValueError, with a sentence, where there is none, or
    none that can be read.
    """
    try:
        return kind.load(PROFILES.path(name))
    except ValueError as error:
        raise ValueError(f"profile_name: '{name}' is of no use: {error}.") from error


def load_cache_profile(name):
    """As `load_profile`, for a CacheProfile."""
    return load_profile(CacheProfile, name)


def load_activation_scales(name):
    """As `load_profile`, for ActivationScales."""
    return load_profile(ActivationScales, name)
