"""LoRAs and other patches after a quantized MODEL: they are computed next to its weights, and none of them is rounded."""

import copy
import json

import pytest
import torch
from pack import pack_module

LINEAR, WINDOWS = "middle_block.1.transformer_blocks.0.attn1.to_q", "middle_block.0.in_layers.2"
LAYERS = LINEAR, WINDOWS, "middle_block.1.proj_in", "middle_block.1.transformer_blocks.0.ff.net.2"
FORMATS = {
    "W4A16": {"weight_bits": "4", "activation_bits": "16"},
    "W4A8, groups, rotated": {"weight_bits": "4", "activation_bits": "8", "group_size": "16", "rotate": True},
    "W4A16, groups": {"weight_bits": "4", "activation_bits": "16", "group_size": "32"},
    "fp8": {"weight_bits": "fp8", "activation_bits": "8"},
    "W8A8": {"weight_bits": "8", "activation_bits": "8"},
}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(small_model):
    return small_model


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def quantize(host, model):
    def run(name="W4A16", source=None):
        settings = {"keep_sensitive_layers": True, **FORMATS[name]}
        return host.run("IECQuantizeModel", model=source or model, **settings)[0]

    return run


@pytest.fixture
def lora(model):
    """Return lora(size), which gives a LoRA of rank 4 on four layers; a change's norm is `size` times its weight's norm."""

    def make(size=0.01, seed=0):
        found = {}
        for number, name in enumerate(LAYERS):
            weight = model.model.get_parameter(f"diffusion_model.{name}.weight")
            out, into = noise(len(weight), 4, seed=seed + number), noise(4, *weight.shape[1:], seed=seed + number + 10)
            out = out * (size * weight.norm() / (out @ into.flatten(1)).norm())
            key = f"diffusion_model.{name}"
            out = out[..., None, None] if weight.ndim == 4 else out
            found |= {f"{key}.lora_up.weight": 2 * out, f"{key}.lora_down.weight": into, f"{key}.alpha": torch.tensor(2.0)}
        return found

    return make


def change_of(lora, name):
    """Return what a LoRA adds to a weight, by its definition, in float64."""
    out, into, alpha = (lora[f"diffusion_model.{name}.{part}"] for part in ("lora_up.weight", "lora_down.weight", "alpha"))
    product = out.double().flatten(1) @ into.double().flatten(1)
    return product.view(len(out), *into.shape[1:]) * alpha.item() / len(into)


def with_lora(source, lora, strength=1.0):
    import comfy.sd

    return comfy.sd.load_lora_for_models(source, None, lora, strength, 0.0)[0]


def layer_of(model, name):
    return model.model.get_submodule(f"diffusion_model.{name}")


def put_in(layer):
    """Return inputs for a layer."""
    shape = layer.packing.shape
    return noise(*((2, 16, shape[1]) if len(shape) == 2 else (2, shape[1], 6, 6)), seed=3)


def outputs(model):
    return {name: layer_of(model, name)(put_in(layer_of(model, name))) for name in LAYERS}


def loaded(model):
    model.load(CPU, full_load=True)
    try:
        return outputs(model)
    finally:
        model.detach()


def offloaded(model):
    model.load(CPU, lowvram_model_memory=1)
    try:
        patched = [f"diffusion_model.{name}.weight" in model.patches for name in LAYERS]
        assert [len(layer_of(model, name).weight_function) for name in LAYERS] == patched
        first = outputs(model)
        again = outputs(model)
        assert all(torch.equal(first[name], again[name]) for name in LAYERS)
        return first
    finally:
        model.detach()


def added(layer, change):
    """Return what a change of a layer's weight adds to the layer's output, in float64."""
    x = put_in(layer).double()
    if change.ndim == 2:
        return x @ change.t()
    return torch.nn.functional.conv2d(x, change, None, layer.stride, layer.padding)


def check_kept(before, after, model, lora, strength=1.0):
    """Check that the outputs differ by the whole LoRA and by nothing else."""
    for name in LAYERS:
        wanted = strength * added(layer_of(model, name), change_of(lora, name))
        left = after[name].double() - before[name].double()
        share = (wanted * left).sum() / wanted.square().sum()
        assert 0.998 < share < 1.002, (name, share)
        assert (left - wanted).norm() < 3e-3 * wanted.norm() + 1e-6 * before[name].norm(), name


@pytest.mark.fast
@pytest.mark.parametrize("size", [0.002, 0.05])
@pytest.mark.parametrize("name", FORMATS)
def test_a_lora_after_quantization_has_its_full_effect(quantize, lora, name, size):
    """The outputs of loaded layers contain the whole LoRA; those of offloaded layers are the same, bit for bit."""
    base, patches = quantize(name), lora(size)
    patched, packed = with_lora(base, patches, 0.7), {name: layer_of(base, name).weight.clone() for name in LAYERS}
    before, after = loaded(base), loaded(patched)
    check_kept(before, after, base, patches, 0.7)
    again = offloaded(patched)
    assert all(torch.equal(after[name], again[name]) for name in LAYERS)
    assert all(torch.equal(layer_of(base, name).weight, packed[name]) for name in LAYERS)
    assert all(torch.equal(*pair) for pair in zip(loaded(base).values(), before.values()))


def test_a_patch_leaves_integers_and_scales_unchanged(quantize, lora):
    base = quantize()
    before = {name: layer_of(base, name).packing.stored(layer_of(base, name).weight.clone()) for name in LAYERS}
    patched = with_lora(with_lora(base, lora()), lora(seed=40))
    patched.load(CPU, full_load=True)
    try:
        for name in LAYERS:
            layer = layer_of(patched, name)
            assert all(torch.equal(*pair) for pair in zip(layer.packing.stored(layer.weight), before[name]))
            assert layer.packing.rank(layer.weight) == 8 and layer.packing.factors(layer.weight)[0].dtype == torch.float16
    finally:
        patched.detach()


def test_patches_of_an_offloaded_layer_are_computed_once(quantize, lora, monkeypatch):
    module, calls = pack_module("nodes.host.quantization.quantized_layers"), []
    factors = module.lora_factors
    monkeypatch.setattr(module, "lora_factors", lambda *given: calls.append(1) or factors(*given))
    base = quantize()
    for strength in (1.0, 0.5):  # other patches, other strengths
        patched, calls[:] = with_lora(base, lora(), strength), []
        check_kept(loaded(base), offloaded(patched), base, lora(), strength)
        assert len(calls) == len(LAYERS)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusion_models", ([str(tmp_path)], {".safetensors"}))
    return tmp_path


@pytest.mark.parametrize("name", ["W4A16", "fp8"])
def test_a_saved_file_includes_the_lora_after_quantization(host, sample, quantize, lora, folder, caplog, name):
    """The result is the same bit for bit, without a warning; the loaded model accepts another LoRA."""
    patched = with_lora(quantize(name), lora())
    expected = sample(patched)
    host.run("IECSaveQuantizedModel", model=patched, name="q")
    (path,) = folder.iterdir()
    size = int.from_bytes(path.read_bytes()[:8], "little")
    about = json.loads(json.loads(path.read_bytes()[8 : 8 + size])["__metadata__"]["iec.quantized"])
    assert about["version"] == 3
    assert {key for key, layer in about["layers"].items() if layer["format"]["rank"] == 4} == set(LAYERS)
    again = host.run("IECLoadQuantizedModel", model_name=path.name)[0]
    assert torch.equal(sample(again), expected)
    before = loaded(again)
    check_kept(before, loaded(with_lora(again, lora(seed=60))), again, lora(seed=60))
    assert "keeps a share" not in caplog.text


def hooked(lora, *conditionings, strength=1.0):
    """Return the conditionings with one and the same LoRA as hooks, so that they are evaluated together."""
    import comfy.hooks

    hooks = comfy.hooks.create_hook_lora(lora, strength, 0.0)
    return [comfy.hooks.set_hooks_for_conditioning(conditioning, hooks) for conditioning in conditionings]


@pytest.mark.parametrize("name", ["W4A8, groups, rotated", "fp8"])
def test_a_hook_lora_equals_a_lora_after_quantization(sample, quantize, lora, conditioning, name):
    base, patches = quantize(name), lora(0.05)
    plain, packed = sample(base), {name: layer_of(base, name).weight.clone() for name in LAYERS}
    both = dict(zip(("positive", "negative"), hooked(patches, *conditioning)))
    expected = sample(with_lora(base, patches))
    assert torch.equal(sample(base, **both), expected) and not torch.equal(expected, plain)
    assert all(layer_of(base, name).hooked is None for name in LAYERS)
    assert all(torch.equal(layer_of(base, name).weight, packed[name]) for name in LAYERS)
    assert torch.equal(sample(base), plain)


def test_hooks_of_one_conditioning_together_with_a_lora_after_quantization(
    sample, model, quantize, lora, conditioning, relative
):
    """The reference is the host's result with the same MODEL in full precision, with the dequantized weights."""
    base = quantize()
    layers = {name: layer for name, layer in base.model.diffusion_model.named_modules() if hasattr(layer, "packing")}
    values = {
        f"diffusion_model.{name}.weight": ("set", (layer.convert_weight(layer.weight),)) for name, layer in layers.items()
    }
    reference = model.clone()
    assert len(reference.add_patches(values)) == len(values)
    given = {"positive": hooked(lora(0.1), conditioning[0], strength=0.6)[0]}
    of_both = [sample(with_lora(source, lora(0.05, seed=40)), **given) for source in (base, reference)]
    without = sample(with_lora(reference, lora(0.05, seed=40)))
    assert relative(of_both[0], of_both[1]) < 0.01 * relative(without, of_both[1])


def test_hooks_on_an_offloaded_layer(quantize, lora):
    """This holds for a layer with patches and for one without."""
    base, one, other = quantize(), lora(), lora(seed=40)
    layer, key = layer_of(base, LINEAR), f"diffusion_model.{LINEAR}.weight"
    by_hooks = with_lora(base, other).patches
    before = loaded(base)
    for source in (base, with_lora(base, one)):
        source.load(CPU, lowvram_model_memory=1)
        source.patch_hook_weight_to_device(None, by_hooks, key, None, None)
        found = layer(put_in(layer)).double()
        source.unpatch_hooks()
        wanted = change_of(other, LINEAR) + (change_of(one, LINEAR) if source is not base else 0)
        assert ((found - before[LINEAR]) - added(layer, wanted)).norm() < 3e-3 * added(layer, wanted).norm()
        again = layer(put_in(layer)).double() - before[LINEAR]
        expected = added(layer, change_of(one, LINEAR)) if source is not base else torch.zeros(())
        assert (again - expected).norm() <= 3e-3 * expected.norm()
        source.detach()


def test_a_failed_run_with_hooks_leaves_the_layers_unchanged(sample, quantize, lora, conditioning, monkeypatch):
    base = quantize()
    plain = sample(base)
    layer = layer_of(base, "middle_block.1.transformer_blocks.0.ff.net.2")

    def fail(*_):
        assert layer.hooked is not None
        raise RuntimeError("interrupted")

    handle = layer.register_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="interrupted"):
            sample(base, positive=hooked(lora(), conditioning[0])[0])
    finally:
        handle.remove()
    assert all(layer_of(base, name).hooked is None for name in LAYERS) and torch.equal(sample(base), plain)


def patched_outputs(base, patches):
    """Return the outputs of layers with patches, {name: [a patch in the host's form]}; check loaded and offloaded layers are
    equal.
    """
    patched = base.clone()
    for name, found in patches.items():
        patched.patches[f"diffusion_model.{name}.weight"] = found
    expected = loaded(patched)
    again = offloaded(patched)
    assert all(torch.equal(expected[name], again[name]) for name in LAYERS)
    return expected


def patch(out, into, strength=1.0, alpha=None, magnitudes=None, of_weight=1.0, part=None, function=None):
    """Return a LoRA's patch in the host's form."""
    import comfy.weight_adapter

    return (
        strength,
        comfy.weight_adapter.LoRAAdapter(set(), (out, into, alpha, None, magnitudes, None)),
        of_weight,
        part,
        function,
    )


OUT, INTO = noise(64, 3) / 9, noise(3, 64, seed=1) / 9
KINDS = {
    "a LoRA": lambda: patch(OUT, INTO, 0.6, 1.5),
    "of no alpha": lambda: patch(OUT, INTO, 0.6),
    "of strength 0": lambda: patch(OUT, INTO, 0.0, 1.5),
    "of some rows": lambda: patch(OUT[:32], INTO, -2.0, 2.0, part=(0, 32, 32)),
    "of some inputs": lambda: patch(OUT, INTO[:, :32], -2.0, 2.0, part=(1, 32, 32)),
    "of magnitudes": lambda: patch(OUT, INTO, 1.0, 3.0, noise(64, 1, seed=2).abs() + 1),
    "with a smaller weight": lambda: patch(OUT, INTO, of_weight=0.9),
    "with a function": lambda: patch(OUT, INTO, function=lambda change: change / 2),
    "a difference": lambda: (0.5, ("diff", (noise(64, 64) / 90,)), 1.0, None, None),
    "another weight": lambda: (1.0, ("set", (noise(64, 64) / 9,)), 1.0, None, None),
}
OF_FACTORS = {"a LoRA", "of no alpha", "of some rows", "of strength 0"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_patch_agrees_with_the_host(quantize, monkeypatch, kind):
    """Each kind is tested alone and together with a LoRA. Here the branch accepts any rank, and no change is stored in the
    integers alone.
    """
    import comfy.lora

    module = pack_module("iec_core.quantization.packing")
    monkeypatch.setattr(module.Packing, "most_rank_found", 64)
    monkeypatch.setattr(module, "ENOUGH", 2)
    base = quantize()
    layer = layer_of(base, LINEAR)
    assert layer.packing.shape == (64, 64)
    weight, before = layer.convert_weight(layer.weight).double(), loaded(base)[LINEAR].double()
    for patches in ([KINDS[kind]()], [KINDS["a LoRA"](), KINDS[kind]()]):
        wanted = comfy.lora.calculate_weight(patches, weight.clone(), "key", intermediate_dtype=torch.float64) - weight
        found = patched_outputs(base, {LINEAR: patches})[LINEAR].double() - before
        expected = put_in(layer).double() @ wanted.t()
        assert (found - expected).norm() <= 3e-3 * expected.norm()
        factors = pack_module("nodes.host.quantization.weights").lora_factors(patches, (64, 64), CPU)
        assert (factors is None) == (kind not in OF_FACTORS)
        if factors:
            torch.testing.assert_close((factors[0] @ factors[1]).double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["a difference", "of magnitudes"])
def test_changes_of_alternating_hooks_are_computed_once(quantize, monkeypatch, kind):
    """Two conditionings alternate like this in every step; the computed changes are dropped at the end of the run."""
    packing, calls = pack_module("iec_core.quantization.packing").Packing, []
    changed = packing.changed
    monkeypatch.setattr(packing, "changed", lambda *given: calls.append(1) or changed(*given))
    base, key = quantize(), f"diffusion_model.{LINEAR}.weight"
    layer, found = layer_of(base, LINEAR), []
    base.load(CPU, full_load=True)
    groups = [{key: [KINDS[kind]()]}, {key: [KINDS["another weight"]()]}]
    for _ in range(3):
        for patches in groups:
            base.patch_hook_weight_to_device(None, patches, key, None, None)
            found.append(layer(put_in(layer)))
            base.unpatch_hooks()
    assert len(calls) == 2
    assert torch.equal(found[0], found[4]) and torch.equal(found[1], found[5]) and not torch.equal(found[0], found[1])
    assert base.model.iec_hook_changes
    base.clear_cached_hook_weights()
    assert not hasattr(base.model, "iec_hook_changes")
    base.detach()


def test_patches_of_an_offloaded_model_are_computed_once_despite_hooks(quantize, monkeypatch, lora):
    """The hooks' LoRA is put on and removed again; the LoRA of the MODEL is computed once nevertheless."""
    packing, calls = pack_module("iec_core.quantization.packing").Packing, []
    changed = packing.changed
    monkeypatch.setattr(packing, "changed", lambda *given: calls.append(1) or changed(*given))
    base, key = quantize(), f"diffusion_model.{LINEAR}.weight"
    patched, layer = base.clone(), layer_of(base, LINEAR)
    patched.patches[key] = [KINDS["of magnitudes"]()]
    patched.load(CPU, lowvram_model_memory=1)
    for _ in range(3):
        patched.patch_hook_weight_to_device(None, with_lora(base, lora()).patches, key, None, None)
        layer(put_in(layer))
        patched.unpatch_hooks()
        layer(put_in(layer))
    patched.detach()
    assert len(calls) == 1


def test_a_model_as_a_hook_lora(sample, model, quantize, conditioning, relative):
    """The hooks are those of ComfyUI's "Create Hook Model as LoRA", whose weights are taken as differences to the
    MODEL's own.
    """
    import comfy.hooks

    names = [f"diffusion_model.{name}.weight" for name in LAYERS]
    other = {name: model.model.get_parameter(name) * 3 for name in names}
    hooks = comfy.hooks.create_hook_model_as_lora(other, None, 1.0, 0.0)
    given = {"positive": comfy.hooks.set_hooks_for_conditioning(conditioning[0], hooks)}
    base = quantize("W8A8")
    expected, effect = sample(model, **given), relative(sample(model, **given), sample(model))
    assert relative(sample(base, **given), expected) < 0.5 * effect < relative(sample(base), expected)


def test_a_model_is_saved_while_the_lora_of_another_clone_is_loaded(host, sample, quantize, lora, folder):
    """The clones share their weights. The same holds for a saved clone whose own LoRA is on fewer layers."""
    base = quantize()
    some = {key: value for key, value in lora().items() if LINEAR in key}
    expected = [sample(one) for one in (base, with_lora(base, some))]
    sample(with_lora(base, lora()))
    for number, one in enumerate((base, with_lora(base, some))):
        host.run("IECSaveQuantizedModel", model=one, name=f"q{number}")
        again = host.run("IECLoadQuantizedModel", model_name=f"q{number}.safetensors")[0]
        assert torch.equal(sample(again), expected[number])


def test_a_lora_of_higher_rank_than_its_weight_is_saved(host, sample, quantize, folder, relative):
    import comfy.sd

    key, base = f"diffusion_model.{LINEAR}", quantize()
    lora = {f"{key}.lora_up.weight": noise(64, 80) / 90, f"{key}.lora_down.weight": noise(80, 64, seed=1) / 9}
    patched = comfy.sd.load_lora_for_models(base, None, lora, 1.0, 0.0)[0]
    expected = sample(patched)
    host.run("IECSaveQuantizedModel", model=patched, name="q")
    again = host.run("IECLoadQuantizedModel", model_name="q.safetensors")[0]
    assert layer_of(again, LINEAR).packing.format.rank == 64
    assert relative(sample(again), expected) < 0.01 * relative(sample(base), expected)


def test_the_host_counts_the_growth_of_patched_weights(quantize, lora):
    import comfy.model_management

    base = quantize()
    patched = with_lora(base, lora())
    patched.load(CPU, full_load=True)
    size = comfy.model_management.module_size(patched.model)
    assert patched.loaded_size() == size > base.model_size()
    left = []
    for source in (base, patched):
        source.load(CPU, full_load=True)
        source.partially_unload(CPU, size)
        left.append(source.loaded_size())
        source.detach()
    assert left[0] == left[1]
    patched.load(CPU, lowvram_model_memory=int(0.8 * base.model_size()))  # in part, then completely
    patched.load(CPU, full_load=True)
    assert patched.loaded_size() == size
    patched.detach()
    base.load(CPU, full_load=True)
    assert base.loaded_size() == comfy.model_management.module_size(base.model) == base.model_size()
    base.detach()


@pytest.mark.parametrize("share", [0.6, 0.7, 0.8, 0.9])
def test_layers_of_a_partly_loaded_model_are_patched_once(builtin_model, quantize, share):
    """Loaded layers have become larger, and may not fit into the same memory a second time."""
    base = quantize(source=builtin_model)
    names = [name for name, layer in base.model.diffusion_model.named_modules() if hasattr(layer, "packing")]
    patched = base.clone()
    for name in names:
        shape = layer_of(base, name).packing.shape
        patched.patches[f"diffusion_model.{name}.weight"] = [patch(noise(shape[0], 16), noise(16, *shape[1:], seed=1) / 99)]
    memory = int(share * base.model_size())  # the host keeps some of it for layers that are being moved
    patched.load(CPU, lowvram_model_memory=memory)
    expected, before = outputs(patched), loaded_layers(patched, names)
    assert 0 < len(before) < len(names)
    for _ in range(3):
        patched.load(CPU, lowvram_model_memory=memory)
        assert all(torch.equal(expected[name], out) for name, out in outputs(patched).items())
        now = loaded_layers(patched, names)
        sizes = [sum(layer_of(patched, name).weight.nbytes for name in some) for some in (before, now)]
        assert before <= now and sizes[1] < 1.05 * sizes[0]  # only few more, replacing those that have become larger
        assert patched.loaded_size() >= sizes[1]
    patched.detach()


def loaded_layers(model, names):
    """Return the layers that are patched in place."""
    return {name for name in names if f"diffusion_model.{name}.weight" in model.backup}


def test_hooks_of_another_packs_patcher_are_rounded_in_place(quantize, lora):
    """The other pack's patcher uses the same network as the host's own class."""
    import comfy.model_patcher

    base, key = quantize("W8A8"), f"diffusion_model.{LINEAR}.weight"
    other = comfy.model_patcher.ModelPatcher(base.model, CPU, CPU)
    other.set_hook_mode(base.hook_mode)
    layer, before, packed = layer_of(base, LINEAR), loaded(base)[LINEAR], layer_of(base, LINEAR).weight.clone()
    other.patch_hook_weight_to_device(None, with_lora(base, lora(0.05)).patches, key, other.get_key_patches(), None)
    left = layer(put_in(layer)).double() - before
    wanted = added(layer, change_of(lora(0.05), LINEAR))
    assert 0.9 < (wanted * left).sum() / wanted.square().sum() < 1.1
    other.unpatch_hooks()
    assert torch.equal(layer.weight, packed)


def test_a_lora_in_training_gets_no_gradients(quantize, lora):
    base = quantize()
    patched = with_lora(base, {key: value.requires_grad_(value.numel() > 1) for key, value in lora().items()})
    found = offloaded(patched)
    assert not any(out.requires_grad for out in found.values())


def test_a_lora_that_does_not_fit_the_weight_is_left_to_the_host(quantize, caplog):
    """The host logs the LoRA and continues without it."""
    base = quantize()
    found, before = patched_outputs(base, {LINEAR: [patch(OUT[:32], INTO)]}), loaded(base)
    assert torch.equal(found[LINEAR], before[LINEAR]) and "ERROR lora" in caplog.text


def test_a_change_of_too_high_rank_is_approximated_well(quantize, monkeypatch):
    packing = pack_module("iec_core.quantization.packing").Packing
    monkeypatch.setattr(packing, "most_rank", 6)
    monkeypatch.setattr(packing, "most_rank_found", 6)
    base = quantize()
    layer, before = layer_of(base, LINEAR), loaded(base)[LINEAR].double()
    large, small = (OUT / 50, INTO), (noise(64, 5, seed=5) / 45000, noise(5, 64, seed=6) / 9)
    patches = [patch(*large), patch(*small)]
    change = (large[0] @ large[1] + small[0] @ small[1]).double()
    found = patched_outputs(base, {LINEAR: patches})[LINEAR].double() - before
    expected = put_in(layer).double() @ change.t()
    assert (found - expected).norm() < 0.02 * expected.norm()  # two of eight directions are lost, 1/100 in size


def test_weight_wrappers_get_the_unrounded_patched_weight(quantize, lora):
    """These are ComfyUI's weight wrappers, together with a LoRA, also one of hooks."""
    base, key = quantize(), f"diffusion_model.{LINEAR}.weight"
    patched = with_lora(base, lora())
    layer = layer_of(base, LINEAR)
    weight = layer.convert_weight(layer.weight).double() + change_of(lora(), LINEAR)
    patched.add_weight_wrapper(key, lambda weight: weight * 1.001 + 1e-4)
    for how, other in (({"full_load": True}, None), ({"lowvram_model_memory": 1}, lora(seed=40))):
        patched.load(CPU, **how)
        if other:
            patched.patch_hook_weight_to_device(None, with_lora(base, other).patches, key, None, None)
        found = layer(put_in(layer))
        patched.unpatch_hooks()
        patched.detach()
        wanted = (weight + (change_of(other, LINEAR) if other else 0)) * 1.001 + 1e-4
        expected = put_in(layer).double() @ wanted.t() + (0 if layer.bias is None else layer.bias.double())
        assert (found.double() - expected).norm() < 1e-4 * expected.norm()


def test_a_copied_layer_has_no_hooks_or_patches(quantize, lora):
    base = quantize()
    patched, layer = with_lora(base, lora()), layer_of(base, LINEAR)
    patched.load(CPU, lowvram_model_memory=1)
    patched.patch_hook_weight_to_device(None, patched.patches, f"diffusion_model.{LINEAR}.weight", None, None)
    layer(put_in(layer))
    twin = copy.deepcopy(layer)
    assert layer.hooked is not None and layer._laid_on is not None
    assert twin.hooked is None and twin._laid_on is None
    patched.unpatch_hooks()
    patched.detach()
    assert layer._laid_on is None  # released when the layer is unloaded


def test_a_source_that_patches_in_place(model, quantize, lora, sample):
    source = model.clone()
    source.weight_inplace_update = True
    base = quantize(source=source)
    plain = sample(base)
    assert torch.equal(sample(with_lora(base, lora())), sample(with_lora(quantize(), lora())))
    assert torch.equal(sample(base), plain)


def test_clones_keep_their_class_and_remain_the_hosts(quantize):
    import comfy.model_patcher

    base = quantize()
    kind = type(base)
    assert kind is type(base.clone()) is type(quantize("fp8")) and kind.__name__ == "ModelPatcher"
    assert isinstance(base, comfy.model_patcher.ModelPatcher) and base.is_clone(base.clone())
