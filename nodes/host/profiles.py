"""Cache profiles in the host's model folders."""

import os
import uuid

import folder_paths

from ...iec_core.cachequant import CacheProfile

FOLDER = "iec_profiles"
SUFFIX = ".safetensors"

folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))


def profile_names():
    """Return the names of the profiles that there are."""
    return [name for name in folder_paths.get_filename_list(FOLDER) if name.endswith(SUFFIX)]


def profile_path(name):
    """Return where a profile of this name is, or is to be. Raises ValueError where that would be outside the folder."""
    known = folder_paths.get_full_path(FOLDER, name)
    if known is not None:
        return known
    folder = os.path.realpath(folder_paths.get_folder_paths(FOLDER)[0])
    path = os.path.realpath(os.path.join(folder, name.removesuffix(SUFFIX) + SUFFIX))
    base = os.path.basename(name.removesuffix(SUFFIX))
    if not base or base.startswith(".") or os.path.commonpath([folder, path]) != folder:
        raise ValueError(f"name: '{name}' is no name for a file in models/{FOLDER}; write one such as sd15_20_steps.")
    return path


def save_profile(profile, name):
    """Write a profile and return its path. An older one is replaced at once, and stays if that fails."""
    path = profile_path(name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    half = f"{path}.{uuid.uuid4().hex}.part"
    try:
        profile.save(half)
        os.replace(half, path)
    finally:
        if os.path.exists(half):
            os.remove(half)
    return path


def load_profile(name):
    """Read a profile. Raises ValueError, with a sentence, where there is none, or none that can be read."""
    try:
        return CacheProfile.load(profile_path(name))
    except ValueError as error:
        raise ValueError(f"profile_name: '{name}' is of no use: {error}.") from error
