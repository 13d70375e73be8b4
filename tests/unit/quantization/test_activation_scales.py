"""Calibrated activations: interpolation compared with NumPy's, statistics with their definition in float64, and files."""

import numpy as np
import pytest
import torch
from meta_device import Copies

from iec_core.quantization.activation_scales import ActivationScales, ScaleStatistics

SHARES = [1 - 0.02 * number for number in range(31)]  # of the largest magnitude, down to 0.4


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scales(steps=5, layers=3):
    sigmas = torch.tensor([14.6146, 7.25, 2.5, 0.875, 0.0292], dtype=torch.float64)[:steps]
    table = normal(steps, layers).exp()
    facts = {"quantization": "W8A8", "steps": str(steps)}
    return ActivationScales(facts, normal(8, seed=1), tuple(f"block.{n}" for n in range(layers)), sigmas, table)


def interpolated(profile, sigma):
    """Return the scales at sigma in float64."""
    sigmas, table = profile.sigmas.numpy()[::-1], profile.table.double().numpy()[::-1]
    return torch.tensor([np.interp(sigma, sigmas, table[:, layer]) for layer in range(table.shape[1])])


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("sigma", [14.6146, 14.0, 7.2500001, 7.2499, 5.0, 1.7, 0.9, 0.3, 0.03, 100.0, 0.029, 0.0])
def test_scales_between_sigmas_are_on_the_line(sigma, shape):
    profile = scales()
    found = profile.at(torch.tensor(sigma).reshape(shape))
    assert found.shape == (3,) and found.dtype == torch.float32
    torch.testing.assert_close(found.double(), interpolated(profile, sigma), rtol=1e-5, atol=0)


def test_scales_at_a_calibrated_sigma_are_bit_identical():
    profile = scales()
    for sigma, row in zip(profile.sigmas.float(), profile.table):
        assert torch.equal(profile.at(sigma), row)


@pytest.mark.parametrize("sigma", [100.0, 14.6146, 1.0, 0.0])
def test_one_row_of_scales_applies_to_all_sigmas(sigma):
    profile = scales(steps=1)
    assert torch.equal(profile.at(torch.tensor(sigma)), profile.table[0])


@pytest.mark.parametrize("rows", [1, 3])
def test_scales_move_to_a_device_once_without_waiting(rows):
    profile, sigma = scales(steps=rows), torch.tensor(1.5, device="meta")
    with Copies() as copies:
        assert profile.at(sigma).device == sigma.device and copies.count == 2
        assert profile.at(sigma).shape == (3,) and copies.count == 2
    torch.testing.assert_close(profile.at(torch.tensor(1.5)).double(), interpolated(profile, 1.5), rtol=1e-5, atol=0)


def test_profile_survives_its_file(tmp_path):
    before, path = scales(), tmp_path / "p.safetensors"
    before.save(path)
    after = ActivationScales.load(path)
    assert (after.facts, after.names) == (before.facts, before.names)
    for name in ("fingerprint", "sigmas", "table"):
        assert torch.equal(getattr(after, name), getattr(before, name))
        assert getattr(after, name).dtype == getattr(before, name).dtype


def put(tensors, **values):
    tensors.update(values)


SPOILED = {
    "no sigmas": lambda tensors, about: tensors.pop("sigmas"),
    "no fingerprint": lambda tensors, about: tensors.pop("fingerprint"),
    "no table": lambda tensors, about: tensors.pop("table"),
    "no facts": lambda tensors, about: about.pop("facts"),
    "facts that are no JSON": lambda tensors, about: about.update(facts="{"),
    "facts that are no object": lambda tensors, about: about.update(facts="[1]"),
    "facts without the quantization": lambda tensors, about: about.update(facts='{"steps": "5"}'),
    "names that are no names": lambda tensors, about: about.update(names="[1, 2, 3]"),
    "a name too few": lambda tensors, about: about.update(names='["block.0", "block.1"]'),
    "a number for names": lambda tensors, about: about.update(names="3"),
    "deep names": lambda tensors, about: about.update(names="[" * 100_000),
    "a table of fewer steps": lambda tensors, about: put(tensors, table=tensors["table"][:3].clone()),
    "a table in float64": lambda tensors, about: put(tensors, table=tensors["table"].double()),
    "a scale of zero": lambda tensors, about: tensors["table"][1].zero_(),
    "a negative scale": lambda tensors, about: tensors["table"][1].neg_(),
    "NaN": lambda tensors, about: tensors["table"].fill_(float("nan")),
    "infinity": lambda tensors, about: tensors["table"].fill_(float("inf")),
    "sigmas that rise": lambda tensors, about: put(tensors, sigmas=tensors["sigmas"].flip(0).contiguous()),
    "sigmas that float32 cannot tell": lambda tensors, about: put(tensors, sigmas=2 - 1e-12 * torch.arange(5.0).double()),
    "a sigma that is none": lambda tensors, about: tensors["sigmas"][0].fill_(float("inf")),
    "no step": lambda tensors, about: put(tensors, sigmas=torch.zeros(0).double(), table=torch.zeros(0, 3)),
    "no layer": lambda tensors, about: (about.update(names="[]"), put(tensors, table=torch.zeros(5, 0))),
    "sigmas in float8": lambda tensors, about: put(tensors, sigmas=tensors["sigmas"].to(torch.float8_e4m3fn)),
    "a fingerprint in float8": lambda tensors, about: put(tensors, fingerprint=torch.zeros(4).to(torch.float8_e5m2)),
    "a fingerprint in two dimensions": lambda tensors, about: put(tensors, fingerprint=torch.zeros(2, 4)),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_a_damaged_profile_is_refused(spoiled, kind):
    path = spoiled(scales(), SPOILED[kind])
    with pytest.raises(ValueError, match=r"^its content is not that of a quantization profile; calibrate again$"):
        ActivationScales.load(path)


def heavy(seed):
    """Return uniform activations [2, 100, 150] within +-1, with an outlier; the best clipping range depends on the seed."""
    x = torch.rand(2, 100, 150, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    x[0, 0, 0] = 1 + 0.1 * (seed % 4)
    return x


def float8(x):
    """Round float64 to e4m3 (three bits of mantissa, exponents from -6, largest 448) by its definition."""
    step = torch.exp2(torch.floor(torch.log2(x.abs().clamp(min=2.0**-6))) - 3)
    return ((x / step).round() * step).clamp(-448, 448)


ROUNDED = {"int8": (127, torch.round), "fp8": (448, float8)}


def squared_error(xs, scale, kind):
    limit, rounded = ROUNDED[kind]
    return sum((rounded((x.double() / scale).clamp(-limit, limit)) * scale - x.double()).square().sum().item() for x in xs)


def gathered(kinds, steps, is_timestep_wise, what=("largest", "search")):
    """Return the statistics of two runs, and {name: the inputs at each step}."""
    statistics, seen = ScaleStatistics(kinds, steps, is_timestep_wise), {name: [[] for _ in range(steps)] for name in kinds}
    for method in what:
        for run in range(2):
            for step in range(steps):
                statistics.step = step
                for number, name in enumerate(kinds):
                    x = heavy(100 * run + 10 * step + number) * (1 + number) / (1 + step)
                    getattr(statistics, method)(name, x)
                    if method == what[0]:
                        seen[name][step].append(x)
    return statistics, seen


KINDS = {"a": "int8", "b": "int8", "c": "fp8", "d": "int8"}


def test_absmax_scales_are_largest_per_step_and_static_ones_largest_overall():
    by_step, seen = gathered(KINDS, 3, True, ["largest"])
    static, _ = gathered(KINDS, 3, False, ["largest"])
    names, table = by_step.scales(searched=False)
    assert names == ("a", "b", "c", "d") == static.scales(searched=False)[0]
    expected = [
        [max(x.abs().max().item() for x in seen[name][step]) / ROUNDED[KINDS[name]][0] for name in names] for step in range(3)
    ]
    torch.testing.assert_close(table, torch.tensor(expected), rtol=1e-6, atol=0)
    row = static.scales(searched=False)[1]
    torch.testing.assert_close(row, torch.tensor(expected).amax(0, keepdim=True), rtol=1e-6, atol=0)


@pytest.mark.parametrize("is_timestep_wise", [True, False])
def test_searched_scales_minimize_the_squared_error(is_timestep_wise):
    statistics, seen = gathered(KINDS, 3, is_timestep_wise)
    names, table = statistics.scales(searched=True)
    shares = set()
    for column, name in enumerate(names):
        parts = seen[name] if is_timestep_wise else [[x for xs in seen[name] for x in xs]]
        assert len(parts) == len(table)
        for row, xs in enumerate(parts):
            widest = max(x.abs().max().double().item() for x in xs) / ROUNDED[KINDS[name]][0]
            errors = {share: squared_error(xs, widest * share, KINDS[name]) for share in SHARES}
            taken = min(SHARES, key=lambda share: abs(share - table[row, column].item() / widest))
            assert table[row, column].item() == pytest.approx(widest * taken, rel=1e-6)
            assert errors[taken] <= min(errors.values()) * (1 + 1e-5), (name, row)
            shares.add(taken)
    assert len(shares) > 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_refused(value):
    with pytest.raises(
        ValueError, match=r"^model: the input of its layer a\.b contains NaN or infinity in a calibration run\. L"
    ):
        ScaleStatistics({"a.b": "int8"}, 2, True).largest("a.b", torch.tensor([1.0, value]))


def test_a_step_without_a_layers_run_uses_its_previous_scale():
    statistics = ScaleStatistics({"a": "int8", "never": "int8", "zeros": "int8"}, 6, True)
    for step, value in ((1, 127.0), (4, 254.0)):
        statistics.step = step
        statistics.largest("a", torch.tensor([0.5, -value]))
        statistics.largest("zeros", torch.zeros(3))
    names, table = statistics.scales(searched=False)
    assert names == ("a",) and table[:, 0].tolist() == [1.0, 1.0, 1.0, 1.0, 2.0, 2.0]
