"""The nodes that write files: file names, protection of the user's files, and failed writes."""

import errno
import os
import stat
import threading

import pytest
import safetensors
import safetensors.torch
import torch
from pack import pack_module

pytestmark = pytest.mark.fast

# For each node that writes: the folder's key, and the metadata of a file of its kind.
WRITERS = {
    "IECSaveCacheProfile": ("iec_profiles", {"format": "iec_cache_profile", "version": "1"}),
    "IECSaveQuantizationProfile": ("iec_profiles", {"format": "iec_quantization_profile", "version": "1"}),
    "IECSaveQuantizedModel": ("diffusion_models", {"iec.quantized": "{}"}),
}
KINDS = dict(zip(WRITERS, ("cache profile", "quantization profile", "quantized model")))


def weights(path, metadata=None):
    """Write a .safetensors file, by default one like a user's own."""
    safetensors.torch.save_file({"weight": torch.ones(3)}, path, metadata)


@pytest.fixture
def models(host, tmp_path, monkeypatch):
    """Return the folder that replaces the host's models; diffusion models have two folders in it, as in the host."""
    import folder_paths

    folders = {"iec_profiles": ["iec_profiles"], "diffusion_models": ["unet", "diffusion_models"]}
    for key, names in folders.items():
        for name in names:
            (tmp_path / "models" / name).mkdir(parents=True)
        paths = [str(tmp_path / "models" / name) for name in names]
        monkeypatch.setitem(folder_paths.folder_names_and_paths, key, (paths, {".safetensors"}))
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    return tmp_path / "models"


@pytest.fixture(scope="module")
def contents(host):
    """Return {node: the value of its first input, which it writes}."""
    cached, scales = (pack_module(f"iec_core.{name}") for name in ("caching.cachequant", "quantization.activation_scales"))
    sigmas, some = torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64), torch.ones(4)
    model = host.run("IECLoadBuiltinModel", precision="float16")[0]
    settings = {"weight_bits": "8", "activation_bits": "8", "keep_sensitive_layers": True, "include": "middle_block.*"}
    return {
        "IECSaveCacheProfile": {"profile": cached.CacheProfile({"model": "a"}, some, sigmas, (0,), 0, {})},
        "IECSaveQuantizationProfile": {
            "profile": scales.ActivationScales({"quantization": "W8A8"}, some, ("a",), sigmas[:1], torch.ones(1, 1))
        },
        "IECSaveQuantizedModel": {"model": host.run("IECQuantizeModel", model=model, **settings)[0]},
    }


@pytest.fixture
def save(host, contents):
    """Return save(node, name), which gives what the node shows on itself."""
    return lambda node, name: host.nodes[node].execute(**contents[node], name=name).ui["text"]


def content_of(path):
    """Return the tensors' bytes and the metadata of a .safetensors file, whose order varies."""
    with safetensors.safe_open(path, "pt") as file:
        return {key: file.get_tensor(key).numpy().tobytes() for key in file.keys()} | file.metadata()  # noqa: SIM118


def state(folder):
    """Return the contents of a folder: {path: its type and mode, and a file's bytes or a link's target}."""

    def content(path):
        if path.is_symlink():
            return os.readlink(path)
        return path.read_bytes() if path.is_file() else None

    return {path: (stat.filemode(path.lstat().st_mode), content(path)) for path in folder.rglob("*")}


def test_the_list_has_every_node_that_writes_files(host):
    """The nodes are found as output nodes with a text input for a name."""
    outputs = [cls.GET_SCHEMA() for name, cls in host.nodes.items() if name.startswith("IEC")]
    texts = {one.node_id: [each.id for each in one.inputs if each.io_type == "STRING"] for one in outputs if one.is_output_node}
    assert {node: inputs for node, inputs in texts.items() if inputs} == {node: ["name"] for node in WRITERS}


# Existing files


def users_weights(path, own):
    weights(path, {"format": "pt"})
    return "is not a file of this pack"


def no_metadata(path, own):
    weights(path)
    return "is not a file of this pack"


def junk(path, own):
    path.write_bytes(b"\xff" * 100)
    return "is not a file of this pack"


def empty(path, own):
    path.touch()
    return "is not a file of this pack"


def read_only(path, own):
    weights(path, own)
    path.chmod(0o444)
    return "is read-only"


def link_to_a_file(path, own):
    weights(path.parent.parent / "elsewhere", own)
    path.symlink_to(path.parent.parent / "elsewhere")
    return "is a link"


def dangling_link(path, own):
    path.symlink_to(path.parent.parent / "nowhere")
    return "is a link"


def folder(path, own):
    path.mkdir()
    return "is a folder"


def pipe(path, own):
    os.mkfifo(path)
    return "is not a file of this pack"


TAKEN = [users_weights, no_metadata, junk, empty, read_only, link_to_a_file, dangling_link, folder, pipe]


def refused(host, save, node, name, fragment, models):
    """Check that both validation and the run refuse a name with one sentence; nothing is changed, nothing is left."""
    before = state(models)
    sentence = host.nodes[node].validate_inputs(name=name)
    assert isinstance(sentence, str) and fragment in sentence and str(models) not in sentence
    with pytest.raises(ValueError) as raised:
        save(node, name)
    assert str(raised.value) == sentence and state(models) == before
    return sentence


@pytest.mark.parametrize("made", TAKEN)
@pytest.mark.parametrize("node", WRITERS)
def test_existing_files_of_another_origin_or_kind_are_not_replaced(host, models, save, node, made):
    key, own = WRITERS[node]
    what = made(models / key / "taken.safetensors", own)
    expected = f"name: 'taken' is taken: models/{key}/taken.safetensors {what} and is not replaced; choose another name."
    assert refused(host, save, node, "taken", what, models) == expected


@pytest.mark.parametrize("other", WRITERS)
@pytest.mark.parametrize("node", WRITERS)
def test_another_kind_of_file_of_the_pack_is_not_replaced(host, models, save, node, other):
    key = WRITERS[node][0]
    weights(models / key / "taken.safetensors", WRITERS[other][1])
    if node != other:
        refused(host, save, node, "taken", f"is a {KINDS[other]} and is not replaced", models)
    else:
        assert host.nodes[node].validate_inputs(name="taken") is True
        told = save(node, "taken.safetensors")
        assert told[0] == f"models/{key}/taken.safetensors"  # the same on any machine, without this machine's path
        assert str(models) not in "".join(told)
        save(node, "taken")  # the node's own earlier file
        assert [path.name for path in (models / key).iterdir()] == ["taken.safetensors"]


@pytest.mark.parametrize("node", WRITERS)
def test_a_file_in_the_place_of_a_folder_is_not_replaced(host, models, save, node):
    (models / WRITERS[node][0] / "sub").write_text("mine")
    refused(host, save, node, "sub/net", f"models/{WRITERS[node][0]}/sub is not a folder", models)


def test_a_name_of_the_hosts_other_folder_is_refused(host, models, save):
    """The node would write one file, and the loader would load the other."""
    weights(models / "unet/net.safetensors", WRITERS["IECSaveQuantizedModel"][1])
    refused(host, save, "IECSaveQuantizedModel", "net", "is taken: models/unet/net.safetensors exists", models)


# A failed write


@pytest.mark.parametrize("node", WRITERS)
@pytest.mark.parametrize("there", [False, True])
def test_a_full_disk_leaves_existing_files_unchanged(host, models, save, monkeypatch, node, there):
    key = WRITERS[node][0]
    if there:
        save(node, "net")
    before = state(models)

    def full(_):
        assert len(list((models / key).glob("*.part"))) == 1  # the write is in progress
        raise OSError(errno.ENOSPC, "No space left on device", str(models))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError) as raised:
        save(node, "net")
    assert str(raised.value) == f"name: 'net' cannot be written to models/{key} (No space left on device)."
    assert state(models) == before


@pytest.mark.parametrize("node", WRITERS)
def test_an_interrupt_leaves_existing_files_unchanged(models, save, monkeypatch, node):
    def interrupt(_):
        raise KeyboardInterrupt

    before = state(models)
    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(node, "net")
    assert state(models) == before


@pytest.mark.parametrize("node", WRITERS)
def test_a_file_created_during_the_write_is_not_replaced(models, save, monkeypatch, node):
    key, path = WRITERS[node][0], models / WRITERS[node][0] / "net.safetensors"
    monkeypatch.setattr(os, "fsync", lambda _: weights(path))
    with pytest.raises(ValueError, match=rf"^name: 'net' is taken: models/{key}/net\.safetensors is not a file of this pack"):
        save(node, "net")
    assert [one.name for one in path.parent.iterdir()] == ["net.safetensors"]
    assert torch.equal(safetensors.torch.load_file(path)["weight"], torch.ones(3))


@pytest.mark.parametrize("node", WRITERS)
def test_two_concurrent_writers_leave_one_complete_file(models, save, monkeypatch, node):
    both, told = threading.Barrier(2, timeout=20), []
    save(node, "alone")
    monkeypatch.setattr(os, "fsync", lambda _: both.wait())

    def write():
        with torch.inference_mode():
            told.append(save(node, "net"))

    threads = [threading.Thread(target=write) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    folder = models / WRITERS[node][0]
    assert len(told) == 2 and {path.name for path in folder.iterdir()} == {"alone.safetensors", "net.safetensors"}
    assert content_of(folder / "net.safetensors") == content_of(folder / "alone.safetensors")


# Names

NO_NAMES = {
    "part of it is empty": ["", "/net", "sub/", "a//b", "a\\\\b", "\\net", ".safetensors"],
    "begins with a dot": ["..", "../net", "../net.safetensors", "a/../../net", "a\\..\\net", ".hidden", "./net", "a/.b"],
    "ends with a dot or a space": ["net.", "net ", "sub /net", "sub./net", "net .safetensors"],
    "contains one of": ["C:net", "C:/net", "a*", "what?", "<a>", 'a"b', "a|b", "net:stream"],
    "cannot be shown": ["n\0", "a\nb", "a\x1b[2Jb", "a\x7f", "a\u202eb", "a\tb", "\ud800"],
    "is the name of a device on Windows": [
        *("con", "NUL", "Aux", "prn", "com1", "LPT9", "COM0", "com¹", "conin$"),
        *("nul.txt", "con.safetensors", "CON .a.b", "sub/nul", "aux/net"),
    ],
    "has more than 200 bytes": ["x" * 300, "模" * 67, "sub/" + "x" * 201],
    "has more than 1000 bytes": ["a/" * 600 + "net", "x" * 100_000],
}  # fmt: skip


@pytest.mark.parametrize("node", WRITERS)
@pytest.mark.parametrize("why", NO_NAMES)
def test_names_that_are_not_valid_on_every_system_are_refused(host, models, save, node, why):
    for name in NO_NAMES[why]:
        sentence = refused(host, save, node, name, why, models)
        assert f"is not a valid name for a file in models/{WRITERS[node][0]}: " in sentence and len(sentence) < 300, name
        assert sentence.startswith("name: '") and sentence.isprintable() and "\n" not in sentence, name


NAMES = [
    "sd15/w8a8_20", "sub\\net", "a.b", "com10", "console", "nul_", "null", "none", "-", "a b", "x" * 200, "模型", "모델",
    "モデル", "Модель", "नमूना", "نمونه", "می\u200cشود", "🚀", "👩\u200d🚀", "模" * 66, "é",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_names_of_every_script_are_written_and_listed(host, models, save, name):
    node, load = "IECSaveQuantizationProfile", "IECLoadQuantizationProfile"
    assert host.nodes[node].validate_inputs(name=name) is True
    assert save(node, name) == [f"models/iec_profiles/{name}.safetensors".replace("\\", "/")]
    (listed,) = host.nodes[load].define_schema().inputs[0].options
    assert listed == f"{name}.safetensors".replace("\\", "/").replace("/", os.sep)
    assert host.run(load, profile_name=listed)[0].names == ("a",)


def test_a_linked_name_is_checked_by_the_run(host, models):
    assert [host.nodes[node].validate_inputs(name=None) for node in WRITERS] == [True] * len(WRITERS)
