"""Spectral norms of a network's Jacobian: whether a step lets errors grow, and whether its correction converges.

The paper (arXiv 2511.06250, section 3.2) has the step x' = A x + B eps(x, t) and its correction
x'_{k+1} = (1 - lam) x'_k + lam (A x + B eps(x'_k, t)). Their Jacobians, with J = d eps / dx, say how they treat errors:

- A + B J, at x: its norm is the largest factor by which the plain step multiplies an error of x;
- (1 - lam) I + lam B J, at x'_k: its norm is the largest factor by which an iteration multiplies the distance of two iterates.
  Below 1 the iteration contracts there. A map that contracts everywhere converges to its only fixed point (Banach).

Both have the form K = alpha I + beta J. `spectral_norms` finds ||K|| from products with J and its transpose, for each image of
a batch by itself. `Linearization` gives these products for a function in PyTorch. `lipschitz` measures the same factors from
differences, for functions without a derivative.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.autograd import forward_ad

from ..autograd import saved_apart
from ..errors import ModelError, SettingsError
from ..vectors import dots, norms, widened

LAMBDAS = tuple(number / 10 for number in range(1, 10))

METHODS = ("forward", "double", "differences")

Function = Callable[[torch.Tensor], torch.Tensor]
Pair = tuple[float, float]  # (alpha, beta) of alpha I + beta J


class Jacobian(Protocol):
    """A linear map J, given by its products with tensors [B, ...], for each item by itself."""

    def jvp(self, v: torch.Tensor) -> torch.Tensor:
        """Return J v [B, ...]."""

    def vjp(self, w: torch.Tensor) -> torch.Tensor:
        """Return J^T w [B, ...]."""


def step_pair(a: float, b: float) -> Pair:
    """Return (alpha, beta) with alpha I + beta J = A + B J."""
    return a, b


def iteration_pair(lambda_: float, b: float) -> Pair:
    """Return (alpha, beta) with alpha I + beta J = (1 - lam) I + lam B J."""
    return 1 - lambda_, lambda_ * b


def _over(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Reshape a [B] tensor so that it broadcasts over `like` [B, ...]."""
    return value.to(like).reshape(-1, *[1] * (like.ndim - 1))


def _unit(x: torch.Tensor) -> torch.Tensor:
    """Return x [B, ...] scaled to norm 1 in each item; zeros stay zeros."""
    wide = widened(x)
    return (wide / _over(norms(x).clamp(min=torch.finfo(wide.dtype).tiny), wide)).to(x)


def _in_short(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200].rstrip(".")


def random_direction(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return Gaussian noise with norm 1 in each item, with the shape, dtype and device of `like` [B, ...].

    generator: on the CPU, so that the noise is the same on every device.
    """
    return _unit(torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like))


class Linearization:
    """The Jacobian J of a function at a point x, given by its products J v and J^T w. It must be used in a `with` block.

    function: from [B, ...] to the same shape, each item by itself; it may change its own tensors in place. method: how J v is
    computed, one of METHODS; None selects the first one that works and agrees with the transpose. "forward": forward-mode
    derivative. "double": derivative of J^T w, which is linear in w, with respect to w. "differences": central differences,
    which include the function's rounding. J^T w always comes from autograd.

    value: the function's value at x. Raises ModelError where the function cannot be differentiated.
    """

    def __init__(self, function: Function, x: torch.Tensor, method: str | None = None) -> None:
        self._function, self._point, self.method = function, x.detach().clone(), method
        self._stack = ExitStack()
        self._x = self._y = self.value = torch.empty(0)

    def __enter__(self) -> "Linearization":
        try:
            self._stack.enter_context(saved_apart())
            self._record()
            if not self._y.requires_grad:
                raise ModelError("the function's result has no derivative with respect to its input")
            self.value = self._y.detach()
            self.method = self.method or self._first_that_agrees()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _record(self) -> None:
        try:
            with torch.enable_grad():
                self._x = self._point.clone().requires_grad_()
                self._y = self._function(self._x.clone())  # a leaf could not be changed in place
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # of an operation without a derivative
            raise ModelError(_in_short(error)) from error

    def _close(self) -> None:
        self._x = self._y = torch.empty(0)  # frees the graph
        self._stack.close()

    def vjp(self, w: torch.Tensor) -> torch.Tensor:
        """Return J^T w [B, ...]."""
        with torch.enable_grad():
            return torch.autograd.grad(self._y, self._x, w.to(self._y), retain_graph=True)[0]

    def jvp(self, v: torch.Tensor) -> torch.Tensor:
        """Return J v [B, ...]."""
        product: torch.Tensor = getattr(self, f"_{self.method}")(v)
        return product

    def _forward(self, v: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), forward_ad.dual_level():
            result = self._function(forward_ad.make_dual(self._point.clone(), v.to(self._point)))
            tangent = forward_ad.unpack_dual(result).tangent
            return torch.zeros_like(self._point) if tangent is None else tangent.clone()

    def _double(self, v: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            w = torch.zeros_like(self._y).requires_grad_()
            (product,) = torch.autograd.grad(self._y, self._x, w, create_graph=True)
            return torch.autograd.grad(product, w, v.to(product))[0]

    def _differences(self, v: torch.Tensor) -> torch.Tensor:
        reach = torch.finfo(self._point.dtype).eps ** (1 / 3) * norms(self._point).clamp(min=1e-6)
        step = _over(reach, self._point) * _unit(v)
        with torch.no_grad():
            change = self._function(self._point + step) - self._function(self._point - step)
        return change * _over(norms(v) / (2 * reach), change)

    def _first_that_agrees(self) -> str:
        """Return the first of METHODS whose J v agrees with J^T w, tested by <J v, J v> = <J^T J v, v>."""
        v = random_direction(self._point, torch.Generator().manual_seed(0))
        reasons = []
        for method in METHODS:
            self.method = method
            try:
                image = self.jvp(v)
                length = norms(image)
                other = dots(self.vjp(_unit(image)), v)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                reasons.append(f"{method}: {_in_short(error)}")
                continue
            if bool(((length - other).abs() <= 0.03 * length + 1e-6).all()):
                return method
            reasons.append(f"{method}: the products with J and with its transpose do not agree")
        raise ModelError("; ".join(reasons))


@dataclass(frozen=True)
class SpectralNorms:
    """The result of `spectral_norms` for P pairs and B images.

    norms: [P, B], float64. converged: [P, B], whether each norm is within the tolerance of a singular value. vectors:
    [P, B, ...], the unit vectors that K stretches by these norms. products: the number of products J v; those with J^T
    are not counted.
    """

    norms: torch.Tensor
    converged: torch.Tensor
    vectors: torch.Tensor
    products: int


def spectral_norms(
    jacobian: Jacobian,
    like: torch.Tensor,
    pairs: Sequence[Pair],
    iterations: int = 30,
    tolerance: float = 1e-3,
    generator: torch.Generator | None = None,
) -> SpectralNorms:
    """Return the SpectralNorms of alpha I + beta J for every (alpha, beta) of `pairs`.

    like: a tensor [B, ...] with the shape, dtype and device of the vectors. iterations: the largest number of products with J;
    there may be more products with its transpose. tolerance: relative, of the norms. generator: of the first vector, on the
    CPU. Raises ModelError where a product is not finite.

    The method is Rayleigh-Ritz on K^T K over one subspace V for all pairs. Once V and J V are known, ||K v||^2 on the subspace
    is a quadratic form for every alpha and beta, so each product serves all pairs. V grows by the residuals
    r = K^T K v - theta v of the pairs in turn. For a single pair this is the Lanczos process on K^T K with all vectors kept
    (bidiagonalization in exact arithmetic: Golub and Kahan 1965; Golub and Van Loan, Matrix Computations, section 10.4), which
    needs about the square root of the power iteration's number of products. The norms are lower bounds. K^T K is symmetric, so
    one of its eigenvalues is within ||r|| of theta; a norm counts as converged where ||r|| <= 2 tolerance theta.
    """
    search = _Subspace(jacobian, like, random_direction(like, generator or torch.Generator().manual_seed(0)))
    converged = torch.zeros(len(pairs), like.shape[0], dtype=torch.bool)
    waiting = list(range(len(pairs)))
    while waiting and search.products < iterations:
        number = waiting.pop(0)
        theta, residual = search.residual(*pairs[number])
        bound = norms(residual).cpu().double()
        if not bool(bound.isfinite().all()):
            raise ModelError("the products with the Jacobian are not finite")
        converged[number] = bound <= 2 * tolerance * theta
        if not bool(converged[number].all()):
            waiting.append(number)
            search.add(residual)
    found = [search.largest(*pair) for pair in pairs]
    largest, vectors = (torch.stack(of_pairs) for of_pairs in zip(*[(theta.sqrt(), vector) for theta, vector, _ in found]))
    return SpectralNorms(largest, converged, vectors, search.products)


class _Subspace:
    """For each image: orthonormal vectors V, J V, and their inner products [B, m, m] in float64 on the CPU."""

    def __init__(self, jacobian: Jacobian, like: torch.Tensor, start: torch.Tensor) -> None:
        self._jacobian = jacobian
        self._v: list[torch.Tensor] = []
        self._jv: list[torch.Tensor] = []
        self._vv = self._vj = self._jj = torch.zeros(like.shape[0], 0, 0, dtype=torch.float64)
        self.products = 0
        self.add(start)

    def add(self, vector: torch.Tensor) -> None:
        """Add a direction to the subspace; zeros for an image whose subspace already contains it."""
        before = norms(vector)
        for _ in range(2):  # twice is enough (Kahan, in Parlett 1980)
            for other in self._v:
                vector = vector - other * _over(dots(other, vector), vector)
        new = norms(vector) > 100 * torch.finfo(vector.dtype).eps * before
        vector = _unit(vector) * _over(new, vector)
        image = self._jacobian.jvp(vector).to(vector)
        self.products += 1
        self._v.append(vector)
        self._jv.append(image)
        self._vv = self._grown(self._vv, self._v, self._v)
        self._vj = self._grown(self._vj, self._v, self._jv)
        self._jj = self._grown(self._jj, self._jv, self._jv)

    @staticmethod
    def _grown(gram: torch.Tensor, left: list[torch.Tensor], right: list[torch.Tensor]) -> torch.Tensor:
        """Return the inner products <left_i, right_j>. gram: the products without the last vector of each list."""
        size = len(left)
        column = torch.stack([dots(one, right[-1]) for one in left], 1).cpu().double()
        row = torch.stack([dots(left[-1], one) for one in right], 1).cpu().double()
        grown = gram.new_zeros(gram.shape[0], size, size)
        grown[:, :-1, :-1], grown[:, :, -1], grown[:, -1, :] = gram, column, row
        return grown

    def largest(self, alpha: float, beta: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return (theta [B], v, K v [B, ...]) for the unit vector v of the subspace with the largest theta = ||K v||^2."""
        form = alpha**2 * self._vv + alpha * beta * (self._vj + self._vj.mT) + beta**2 * self._jj
        values, vectors = torch.linalg.eigh(form)
        weights = vectors[..., -1]
        v = _combined(self._v, weights)
        jv = _combined(self._jv, weights)
        return values[:, -1].clamp(min=0), v, alpha * v + beta * jv

    def residual(self, alpha: float, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (theta [B], K^T K v - theta v [B, ...]) for the v of `largest`."""
        theta, v, kv = self.largest(alpha, beta)
        return theta, alpha * kv + beta * self._jacobian.vjp(kv).to(kv) - v * _over(theta, v)


def _combined(vectors: list[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    """Return the sum of vectors [B, ...] with weights [B, m]."""
    total = torch.zeros_like(vectors[0])
    for one, weight in zip(vectors, weights.unbind(1)):
        total = total + one * _over(weight, one)
    return total


def lipschitz(
    function: Function,
    x: torch.Tensor,
    directions: Sequence[torch.Tensor],
    sizes: Iterable[float],
    pairs: Sequence[Pair] = ((0.0, 1.0),),
    value: torch.Tensor | None = None,
    reduce: str = "max",
) -> torch.Tensor:
    """Return [P, B]: ||alpha d + beta (f(x + d) - f(x))|| / ||d|| for every pair, reduced over all directions and sizes of d.

    This measures a function without a derivative, such as one that rounds, at distances of these sizes. reduce: "max" gives a
    lower bound of the Lipschitz constant, "rms" the root of the mean square. directions: tensors [B, ...]. sizes: ||d|| as
    shares of ||x||. value: f(x), where it is known already.
    """
    if reduce not in ("max", "rms"):
        raise SettingsError(f"reduce: '{reduce}' is none of max, rms.")
    value = function(x) if value is None else value
    ratios: list[torch.Tensor] = []
    for size in sizes:
        for direction in directions:
            d = _unit(direction) * _over(size * norms(x), x)
            change = function(x + d) - value
            ratios.append(torch.stack([norms(alpha * d + beta * change) / norms(d) for alpha, beta in pairs]).cpu().double())
    stacked = torch.stack(ratios)
    return stacked.amax(0) if reduce == "max" else stacked.square().mean(0).sqrt()


def suggested_lambda(norms: torch.Tensor, lambdas: Sequence[float] = LAMBDAS) -> float:
    """Return the lam with the smallest norm ||(1 - lam) I + lam B J||. norms: [L, B], for each lam and image.

    The norm of a lam is its largest over the images, because one lam serves all images. If several lams have the smallest norm,
    the smallest lam is returned, which is closest to the plain step. With the returned lam, the bound ||x'_k - x*|| <= norm^k
    ||x'_0 - x*|| falls fastest (the contraction of the paper's section 3.2). It says how fast the iteration converges, not how
    good its fixed point is. Where even the smallest norm is 1 or more, no lam is known to contract. Raises ModelError where a
    norm is not finite.
    """
    worst = norms.amax(1).tolist()
    if not all(math.isfinite(value) for value in worst):
        raise ModelError("norms: some are not finite.")
    return lambdas[worst.index(min(worst))]
