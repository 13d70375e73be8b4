"""The experiment that separates the effects of a correction: its controls do what they claim."""

import effects
import pytest
import separate_effects
import torch


@pytest.fixture(scope="module")
def experiment(host):
    return separate_effects.Experiment(host.nodes)


def test_stochastic_rounding_has_no_bias_and_its_name():
    x = torch.full((200_000,), -1.3)
    with effects.StochasticRounding(seed=0):
        rounded = x.clone().round_()
    assert set(rounded.tolist()) == {-2.0, -1.0}
    assert abs(rounded.mean() + 1.3) < 5 * (0.3 * 0.7 / len(x)) ** 0.5
    assert set(x.clone().round_().tolist()) == {-1.0}


def test_terms_are_an_identity(experiment):
    """noise + shift is the error of the corrected noise prediction, written out with the paper's coordinates."""
    sampling = experiment.full.model.model_sampling
    sigma, sigma_next = 2.0, 1.5
    x = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * (1 + sigma**2) ** 0.5
    found = separate_effects.terms(experiment, "W4A8", "paper", x, sigma, sigma_next)
    full, quantized = (experiment.eps(bits, x, sigma) for bits in ("full precision", "W4A8"))
    moved = x + (sigma_next - sigma) * full
    x_in = moved * ((sigma**2 + 1) / (sigma_next**2 + 1)) ** 0.5  # VP: c_in = (sigma^2 + 1)^-1/2
    assert torch.allclose(sampling.calculate_input(torch.tensor(sigma), torch.ones(1)), torch.tensor((sigma**2 + 1) ** -0.5))
    corrected = (quantized + experiment.eps("W4A8", x_in, sigma)) / 2
    assert found["total"] == pytest.approx(separate_effects.norm_share(corrected - full, full), rel=1e-3)
    assert found["single"] == pytest.approx(separate_effects.norm_share(quantized - full, full), rel=1e-3)


def test_averaging_at_the_same_point_lowers_independent_noise(experiment):
    """The mean of n stochastically rounded evaluations approaches the unrounded one about as 1 / sqrt(n)."""
    full, model = experiment.full, experiment.models["W8A8"]
    x, sigma = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)), torch.full((4,), 1.0)
    label = torch.eye(28)[:4]

    def network(base):
        return base.diffusion_model(x, sigma * 100, context=label[:, None], y=label)

    rounding = effects.Rounding(model, full, seed=0)
    before = {name: value.clone() for name, value in model.model.diffusion_model.state_dict().items()}
    errors = []
    for _ in range(16):
        with rounding.evaluation():
            errors.append(network(model.model) - network(full.model))
    rounding.round_weights()
    single, mean = torch.stack([error.norm() for error in errors]).mean(), (sum(errors) / 16).norm()
    assert 0.2 < mean / single < 0.4  # 1/4, plus the network's nonlinear response to the mean rounding
    after = model.model.diffusion_model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
