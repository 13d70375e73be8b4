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
    """Return where a profile of this name is. Raises ValueError where there is none."""
    path = folder_paths.get_full_path(FOLDER, name) if name in profile_names() else None
    if path is None:
        raise ValueError(f"there is no such file in models/{FOLDER}")
    return path


def path_to_write(name):
    """Return where a profile of this name is to be written. Raises ValueError where that would not be a file in the folder."""
    folder = os.path.realpath(folder_paths.get_folder_paths(FOLDER)[0])
    plain = name.removesuffix(SUFFIX)
    parts = plain.replace("\\", "/").split("/")
    if any(not part.strip() or part.startswith(".") or len(part) > 200 or not part.isprintable() for part in parts):
        raise ValueError(f"name: '{name}' is no name for a file in models/{FOLDER}; write one such as sd15_20_steps.")
    return os.path.join(folder, *parts) + SUFFIX


def save_profile(profile, name):
    """Write a profile and return its path. An older one is replaced at once, and stays if that fails. Raises ValueError, with a
    sentence, where it cannot be written.
    """
    path = path_to_write(name)
    half = f"{path}.{uuid.uuid4().hex}.part"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        profile.save(half)
        os.replace(half, path)
    except OSError as error:
        raise ValueError(f"name: '{name}' cannot be written to models/{FOLDER} ({error}).") from error
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
