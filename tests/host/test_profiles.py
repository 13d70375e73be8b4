"""Files of profiles, for the nodes of both kinds: names, files that are not profiles, overwriting."""

import os

import pytest

pytestmark = pytest.mark.fast

pytestmark = pytest.mark.parametrize("kind", ["CacheProfile", "QuantizationProfile"])


def test_a_file_that_is_not_a_profile_is_refused(host, profile_folder, kind):
    (profile_folder / "junk.safetensors").write_bytes(b"junk")
    load = host.nodes[f"IECLoad{kind}"]
    assert load.validate_inputs(profile_name="junk.safetensors") is True
    assert load.validate_inputs(profile_name="none.safetensors").startswith("profile_name: there is no file 'none.safetensors'")
    for name, why in (
        ("junk", r"'junk\.safetensors' cannot be used: it cannot be read"),
        ("none", r"there is no file 'none\.safetensors' in models/iec_profiles; there are: junk\.safetensors\."),
    ):
        with pytest.raises(ValueError, match=f"^profile_name: {why}"):
            host.run(f"IECLoad{kind}", profile_name=f"{name}.safetensors")


def test_a_rewritten_file_is_read_again(host, profile_folder, kind):
    path, load = profile_folder / "net.safetensors", host.nodes[f"IECLoad{kind}"]
    path.touch()
    told = []
    for time in (1000, 1000, 2000):
        os.utime(path, (time, time))
        told.append(load.fingerprint_inputs(profile_name="net.safetensors"))
    assert told[0] == told[1] != told[2]
