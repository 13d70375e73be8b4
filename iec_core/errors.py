"""The errors that `iec_core` raises by itself. Each message names what was wrong; most also say what is accepted.

All are ValueErrors, so that a caller who does not need to distinguish them can catch ValueError.
"""


class IECError(ValueError):
    """Base class of the errors below."""


class SettingsError(IECError):
    """A setting is not of a known form, is out of its range, or does not fit the run."""


class ProfileError(IECError):
    """A calibration was made for another model, layer or schedule than the one it is used on."""


class FileError(IECError):
    """A file is damaged, was not written by this pack, or has a version that this pack cannot read."""


class ModelError(IECError):
    """A network or a tensor cannot be processed: non-finite values, no derivative, shapes that do not fit."""
