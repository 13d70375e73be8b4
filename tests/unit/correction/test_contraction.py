"""Spectral norms of Jacobians compared with the exact singular values of the full matrix, in float64."""

import pytest
import torch

from iec_core.correction.contraction import (
    LAMBDAS,
    METHODS,
    Linearization,
    iteration_pair,
    lipschitz,
    spectral_norms,
    step_pair,
    suggested_lambda,
)

A, B = 1.3, -0.8
PAIRS = [step_pair(A, B), *(iteration_pair(lambda_, B) for lambda_ in LAMBDAS)]
IMAGES, SHAPE = 3, (2, 4, 4)


class Matrices:
    """A linear map of every image, [B, n, n], with its Jacobian-vector products."""

    def __init__(self, matrices):
        self._matrices = matrices

    def jvp(self, v):
        return (self._matrices @ v.flatten(1)[..., None]).reshape(v.shape)

    def vjp(self, w):
        return (self._matrices.mT @ w.flatten(1)[..., None]).reshape(w.shape)


class Network(torch.nn.Module):
    """Convolutions with a residual and a normalization, which changes its own tensors in place, like the host's networks."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.first = torch.nn.Conv2d(2, 8, 3, padding=1, dtype=torch.float64)
        self.last = torch.nn.Conv2d(8, 2, 3, padding=1, dtype=torch.float64)
        for parameter in self.parameters():
            parameter.data.copy_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
            parameter.requires_grad_(False)

    def forward(self, x):
        h = torch.nn.functional.silu(self.first(x))
        h += torch.tanh(h)
        h = torch.nn.functional.group_norm(h, 2)
        h.mul_(1.5)
        return self.last(h) + 0.3 * x


def point(seed=0):
    return torch.randn(IMAGES, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def full_jacobian(function, x):
    """Return the Jacobian [B, n, n] of each image separately."""
    rows = [torch.autograd.functional.jacobian(lambda one: function(one[None])[0], item) for item in x]
    return torch.stack([matrix.reshape(x[0].numel(), -1) for matrix in rows])


def exact(matrices, pairs=PAIRS):
    """Return [P, B]: the largest singular value of alpha I + beta J."""
    identity = torch.eye(matrices.shape[-1], dtype=matrices.dtype)
    return torch.stack([torch.linalg.svd(alpha * identity + beta * matrices)[1][:, 0] for alpha, beta in pairs])


@pytest.mark.parametrize("method", [None, *METHODS])
def test_norms_of_a_network_equal_those_of_its_full_jacobian(method):
    network, x = Network(), point()
    with Linearization(network, x, method) as jacobian:
        found = spectral_norms(jacobian, x, PAIRS, iterations=200, tolerance=1e-3)
        assert torch.equal(jacobian.value, network(x))
        assert jacobian.method == (method or "forward")
    torch.testing.assert_close(found.norms, exact(full_jacobian(network, x)), rtol=1e-3, atol=0)
    assert found.converged.all() and found.products < 32 * 3


def test_one_subspace_serves_all_dampings():
    """All together take fewer products than 0.6 times the sum of the separate ones."""
    network, x = Network(), point()
    with Linearization(network, x) as jacobian:
        alone = [spectral_norms(jacobian, x, [pair], iterations=200) for pair in PAIRS]
        together = spectral_norms(jacobian, x, PAIRS, iterations=200)
    torch.testing.assert_close(together.norms, torch.cat([one.norms for one in alone]), rtol=1e-3, atol=0)
    assert together.products < 0.6 * sum(one.products for one in alone)


def test_the_found_vectors_attain_the_norms():
    network, x = Network(), point()
    with Linearization(network, x) as jacobian:
        found = spectral_norms(jacobian, x, PAIRS, iterations=200)
        for (alpha, beta), norm, vector in zip(PAIRS, found.norms, found.vectors):
            stretched = alpha * vector + beta * jacobian.jvp(vector)
            torch.testing.assert_close(stretched.flatten(1).norm(dim=1), norm, rtol=1e-6, atol=0)
            torch.testing.assert_close(vector.flatten(1).norm(dim=1), torch.ones(IMAGES, dtype=torch.float64))


def non_normal():
    """Return matrices whose eigenvalues do not determine their norms: one is nilpotent, with only zero eigenvalues."""
    generator = torch.Generator().manual_seed(2)
    nilpotent = torch.triu(torch.randn(32, 32, generator=generator, dtype=torch.float64), 1)
    jordan = 0.5 * torch.eye(32, dtype=torch.float64) + torch.diag(torch.full((31,), 2.0, dtype=torch.float64), 1)
    general = torch.randn(32, 32, generator=generator, dtype=torch.float64)
    return torch.stack([nilpotent, jordan, general])


def test_non_normal_matrices():
    matrices = non_normal()
    found = spectral_norms(Matrices(matrices), point(), PAIRS, iterations=100)
    torch.testing.assert_close(found.norms, exact(matrices), rtol=1e-3, atol=0)


def test_wrong_formulas_differ_by_far_more_than_the_tolerance():
    """Possible mistakes: eigenvalues instead of singular values, B missing, lambda on one term only, one norm for the batch."""
    matrices, x = non_normal(), point()
    right = spectral_norms(Matrices(matrices), x, PAIRS, iterations=100).norms
    identity = torch.eye(32, dtype=torch.float64)
    eigen = torch.stack([torch.linalg.eigvals(a * identity + b * matrices).abs().amax(1) for a, b in PAIRS])
    assert ((eigen - right).abs() > 0.01 * right).all()
    lost_b = exact(matrices, [(1 - lambda_, lambda_) for lambda_ in LAMBDAS])
    on_one_term = exact(matrices, [(1 - lambda_, B) for lambda_ in LAMBDAS])
    on_the_other = exact(matrices, [(1, lambda_ * B) for lambda_ in LAMBDAS])
    for wrong in (lost_b, on_one_term, on_the_other, right[1:].amax(1, keepdim=True).expand_as(lost_b)):
        assert ((wrong - right[1:]).abs() > 0.01 * right[1:]).any(1).all()


def test_images_of_a_batch_are_independent():
    network, x = Network(), point()
    with Linearization(network, x) as jacobian:
        together = spectral_norms(jacobian, x, PAIRS, iterations=200, tolerance=1e-5).norms
    for number in range(IMAGES):
        one = x[number : number + 1]
        with Linearization(network, one) as jacobian:
            alone = spectral_norms(jacobian, one, PAIRS, iterations=200, tolerance=1e-5).norms
        torch.testing.assert_close(alone[:, 0], together[:, number], rtol=1e-4, atol=0)


def test_too_few_iterations_give_a_reported_lower_bound():
    matrices = non_normal()
    found = spectral_norms(Matrices(matrices), point(), PAIRS, iterations=3)
    assert found.products == 3 and not found.converged.all()
    assert (found.norms <= exact(matrices) * (1 + 1e-12)).all()


def test_multiples_of_the_identity_and_zero():
    """One product determines everything, and nothing is divided by zero."""
    identity = torch.eye(32, dtype=torch.float64).expand(IMAGES, -1, -1)
    for share in (0.0, -0.4):
        found = spectral_norms(Matrices(share * identity), point(), PAIRS)
        expected = torch.tensor([abs(alpha + beta * share) for alpha, beta in PAIRS], dtype=torch.float64)
        torch.testing.assert_close(found.norms, expected[:, None].expand(-1, IMAGES))
        assert found.converged.all() and found.products == 1


def test_a_function_without_derivative_is_refused():
    x = point()
    with pytest.raises(ValueError, match="has no derivative with respect"), Linearization(lambda x: x.detach().round(), x):
        pass


def test_straight_through_rounding_uses_forward_mode():
    """With a straight-through estimate, forward-mode products are consistent, so that finite differences are not used."""

    def rounding(x):
        return 2 * (x + (x.round() - x).detach())

    with Linearization(rounding, point()) as jacobian:
        assert jacobian.method == "forward"
        found = spectral_norms(jacobian, point(), [(0, 1)])
    torch.testing.assert_close(found.norms, torch.full((1, IMAGES), 2.0, dtype=torch.float64))


def test_lipschitz_estimate_of_a_linear_map_is_exact():
    matrices, x = non_normal(), point()
    linear = Matrices(matrices)
    found = spectral_norms(linear, x, PAIRS, iterations=100)
    for number, pair in enumerate(PAIRS):
        seen = lipschitz(linear.jvp, x, [found.vectors[number]], [1e-3, 0.1], [pair])
        torch.testing.assert_close(seen[0], found.norms[number], rtol=1e-6, atol=0)
    random = lipschitz(linear.jvp, x, [point(5)], [0.1], PAIRS)
    assert (random < found.norms).all()


def test_lipschitz_estimate_includes_rounding_unlike_the_derivative():
    """A map that rounds to a grid of 1/8 has derivative 0 or none, and resembles the identity only over large distances."""

    def rounded(x):
        return (8 * x).round() / 8

    x, directions = point(), [point(3), point(4)]
    far, near = (lipschitz(rounded, x, directions, [size]) for size in (10.0, 1e-4))
    assert ((far - 1).abs() < 0.05).all()
    assert ((near - 1).abs() > 0.05).all()
    largest, rms = (lipschitz(rounded, x, directions, [0.01, 0.03], reduce=how) for how in ("max", "rms"))
    assert (rms <= largest).all() and (rms > 0).any()
    with pytest.raises(ValueError, match="reduce: 'mean' is none of max, rms"):
        lipschitz(rounded, x, directions, [0.1], reduce="mean")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms_and_stretches_of_16_bits_do_not_overflow(dtype):
    """The map is x -> 3 x at a latent whose norm is above float16's largest number."""
    x = (600 * torch.ones(2, 16384)).to(dtype)
    assert x.double().norm(dim=1).min() > torch.finfo(torch.float16).max
    directions = [torch.ones_like(x)]
    stretched = lipschitz(lambda u: 3 * u, x, directions, [0.25], pairs=[(0.0, 1.0), (1.0, 1.0)])
    torch.testing.assert_close(stretched, torch.tensor([[3.0, 3.0], [4.0, 4.0]]).double(), rtol=0.05, atol=0)
    with Linearization(lambda u: 3 * u, x, "double") as jacobian:
        found = spectral_norms(jacobian, x, [(0.0, 1.0), (1.0, 1.0)])
    torch.testing.assert_close(found.norms, torch.tensor([[3.0, 3.0], [4.0, 4.0]]).double(), rtol=0.05, atol=0)


def test_suggested_lambda_minimizes_the_worst_images_norm():
    norms = torch.full((9, 2), 0.9)
    norms[2, 0] = 0.1  # the other image is at 0.9
    norms[6] = 0.5
    assert suggested_lambda(norms) == 0.7
    norms[3] = 0.5
    assert suggested_lambda(norms) == 0.4  # the smallest of equal ones
    norms[0, 0] = torch.nan
    with pytest.raises(ValueError, match="finite"):
        suggested_lambda(norms)


def test_suggestion_for_a_known_map():
    """B J = s I: |1 - lam (1 - s)| is smallest at 1 / (1 - s)."""
    identity = torch.eye(32, dtype=torch.float64).expand(IMAGES, -1, -1)
    for slope, best in ((-4.0, 0.2), (-1.0, 0.5), (0.5, 0.9)):
        pairs = [iteration_pair(lambda_, slope) for lambda_ in LAMBDAS]
        assert suggested_lambda(spectral_norms(Matrices(identity), point(), pairs).norms) == best
