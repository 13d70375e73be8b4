"""Fixtures that the tests of both kinds of profile share. All tests of this folder are fast, except those that compile
kernels.
"""

import pathlib

import pytest
import safetensors
import safetensors.torch


def pytest_collection_modifyitems(items):
    for item in items:
        if pathlib.Path(__file__).parent in item.path.parents and item.path.name != "test_compiled_kernels.py":
            item.add_marker(pytest.mark.fast)


@pytest.fixture
def spoiled(tmp_path):
    """Return spoiled(profile, spoil), which gives the path of the profile's file after spoil(tensors, about) has changed its
    contents.
    """

    def write(profile, spoil):
        profile.save(tmp_path / "whole.safetensors")
        with safetensors.safe_open(tmp_path / "whole.safetensors", "pt") as file:
            tensors, about = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
        spoil(tensors, about)
        safetensors.torch.save_file(tensors, tmp_path / "spoiled.safetensors", about)
        return tmp_path / "spoiled.safetensors"

    return write
