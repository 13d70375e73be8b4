"""Whether a step's errors grow, and whether its correction converges: spectral norms of a network's Jacobian.

The paper (arXiv 2511.06250, section 3.2) takes a step x' = A x + B eps(x, t) and its correction
x'_{k+1} = (1 - lam) x'_k + lam (A x + B eps(x'_k, t)) by their Jacobians, for J = d eps / dx:

- A + B J, at x: by how much the plain step multiplies an error of x;
- (1 - lam) I + lam B J, at x'_k: by how much an iteration multiplies the distance of two iterates. Below 1 it contracts there,
  and what is a contraction everywhere has one fixed point, to which it converges (Banach).

Both are K = alpha I + beta J, for which `spectral_norms` finds ||K|| from products with J and its transpose. Nothing is taken
together over a batch: each image has its own norms. `Linearization` has these products of a function in PyTorch, `lipschitz`
the ratios that a function without a derivative really shows.
"""

import math
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch.autograd import forward_ad

from ..autograd import saved_apart
from ..vectors import dots, norms, widened

# The dampings that are compared.
LAMBDAS = tuple(number / 10 for number in range(1, 10))

METHODS = ("forward", "double", "differences")


def step_pair(a, b):
    """Return (alpha, beta) with alpha I + beta J = A + B J."""
    return a, b


def iteration_pair(lambda_, b):
    """Return (alpha, beta) with alpha I + beta J = (1 - lam) I + lam B J."""
    return 1 - lambda_, lambda_ * b


def _over(value, like):
    """Reshape a [B] tensor so that it broadcasts over `like` [B, ...]."""
    return value.to(like).reshape(-1, *[1] * (like.ndim - 1))


def _unit(x):
    """x [B, ...] with norm 1 in every item; zeros stay zeros."""
    wide = widened(x)
    return (wide / _over(norms(x).clamp(min=torch.finfo(wide.dtype).tiny), wide)).to(x)


def _in_short(error):
    return str(error).strip().partition("\n")[0][:200].rstrip(".")


def random_direction(like, generator):
    """Return Gaussian noise of norm 1 in every item, of the shape, dtype and device of `like` [B, ...]; the same on each.

    generator: a torch.Generator on the CPU.
    """
    return _unit(torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like))


class Linearization:
    """The Jacobian J of a function at a point, by its products: jvp(v) = J v, vjp(w) = J^T w. To be used in a `with` block.

    function: from [B, ...] to the same shape, each item for itself; it may change its own tensors in place. method: how J v is
    computed, one of METHODS, or None for the first of them that is possible and agrees with the transpose. "forward": in
    forward mode. "double": as derivative of J^T w, which is linear, in w. "differences": by central differences, which see a
    function's roundings. J^T w is always by autograd.

    value: the function's at the point. Raises ValueError where the function cannot be differentiated.
    """

    def __init__(self, function, x, method=None):
        self._function, self._point, self.method = function, x.detach().clone(), method
        self._stack = ExitStack()

    def __enter__(self):
        try:
            self._stack.enter_context(saved_apart())
            self._record()
            if not self._y.requires_grad:
                raise ValueError("the function's result does not depend on its input by anything that has a derivative")
            self.value = self._y.detach()
            self.method = self.method or self._first_that_agrees()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, *_):
        self._close()

    def _record(self):
        try:
            with torch.enable_grad():
                self._x = self._point.clone().requires_grad_()
                self._y = self._function(self._x.clone())  # a leaf could not be changed in place
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # of an operation without a derivative
            raise ValueError(_in_short(error)) from error

    def _close(self):
        self._x = self._y = None
        self._stack.close()

    def vjp(self, w):
        """Return J^T w [B, ...]."""
        with torch.enable_grad():
            return torch.autograd.grad(self._y, self._x, w.to(self._y), retain_graph=True)[0]

    def jvp(self, v):
        """Return J v [B, ...]."""
        return getattr(self, f"_{self.method}")(v)

    def _forward(self, v):
        with torch.no_grad(), forward_ad.dual_level():
            result = self._function(forward_ad.make_dual(self._point.clone(), v.to(self._point)))
            tangent = forward_ad.unpack_dual(result).tangent
            return torch.zeros_like(self._point) if tangent is None else tangent.clone()

    def _double(self, v):
        with torch.enable_grad():
            w = torch.zeros_like(self._y).requires_grad_()
            (product,) = torch.autograd.grad(self._y, self._x, w, create_graph=True)
            return torch.autograd.grad(product, w, v.to(product))[0]

    def _differences(self, v):
        reach = torch.finfo(self._point.dtype).eps ** (1 / 3) * norms(self._point).clamp(min=1e-6)
        step = _over(reach, self._point) * _unit(v)
        with torch.no_grad():
            change = self._function(self._point + step) - self._function(self._point - step)
        return change * _over(norms(v) / (2 * reach), change)

    def _first_that_agrees(self):
        """Return the first of METHODS by which J v and J^T w are of one J: <J v, J v> = <J^T J v, v>."""
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
            reasons.append(f"{method}: J and its transpose do not agree")
        raise ValueError("; ".join(reasons))


@dataclass(frozen=True)
class SpectralNorms:
    """For each of P pairs and B images: norms [P, B], those found; converged [P, B], whether each is within the tolerance of a
    singular value; vectors [P, B, ...], the unit vectors that are stretched that much. products: how many J v and J^T w, each,
    were computed.
    """

    norms: torch.Tensor
    converged: torch.Tensor
    vectors: torch.Tensor
    products: int


def spectral_norms(jacobian, like, pairs, iterations=30, tolerance=1e-3, generator=None):
    """Return the SpectralNorms of alpha I + beta J for every (alpha, beta) of `pairs`.

    jacobian: has jvp and vjp, as `Linearization`. like: a tensor [B, ...] of the shape, dtype and device of the vectors.
    iterations: products with J, and with its transpose, at most. tolerance: relative, of the norms. generator: of the vector to
    begin with, on the CPU.

    Rayleigh-Ritz on K^T K over one subspace V for all pairs. With V and J V at hand, ||K v||^2 on the subspace is a quadratic
    form for whatever alpha and beta, so that a product serves all of them. V grows by the residual r = K^T K v - theta v of one
    pair after the other. For one pair that is the Lanczos process on K^T K with all vectors kept, as bidiagonalization in exact
    arithmetic (Golub and Kahan 1965; Golub and Van Loan, Matrix Computations, section 10.4), which takes the square root of
    the power iteration's number of products. The norms are bounds from below. As K^T K is symmetric, one of its eigenvalues is
    within ||r|| of theta: a norm counts as converged where ||r|| <= 2 tolerance theta.
    """
    search = _Subspace(jacobian, like, random_direction(like, generator or torch.Generator().manual_seed(0)))
    converged = torch.zeros(len(pairs), like.shape[0], dtype=torch.bool)
    waiting = list(range(len(pairs)))
    while waiting and search.products < iterations:
        number = waiting.pop(0)
        theta, residual = search.residual(*pairs[number])
        bound = norms(residual).cpu().double()
        if not bool(bound.isfinite().all()):
            raise ValueError("the products with the Jacobian are not finite")
        converged[number] = bound <= 2 * tolerance * theta
        if not bool(converged[number].all()):
            waiting.append(number)
            search.add(residual)
    found = [search.largest(*pair) for pair in pairs]
    largest, vectors = (torch.stack(of_pairs) for of_pairs in zip(*[(theta.sqrt(), vector) for theta, vector, _ in found]))
    return SpectralNorms(largest, converged, vectors, search.products)


class _Subspace:
    """Orthonormal vectors V of every image, J V, and their inner products in float64 on the CPU: [B, m, m]."""

    def __init__(self, jacobian, like, start):
        self._jacobian = jacobian
        self._v, self._jv = [], []
        self._vv = self._vj = self._jj = torch.zeros(like.shape[0], 0, 0, dtype=torch.float64)
        self.products = 0
        self.add(start)

    def add(self, vector):
        """Take up a direction; an image in which nothing of it is new gets zeros."""
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
    def _grown(gram, left, right):
        """Return the inner products <left_i, right_j> from those without the last of each."""
        size = len(left)
        column = torch.stack([dots(one, right[-1]) for one in left], 1).cpu().double()
        row = torch.stack([dots(left[-1], one) for one in right], 1).cpu().double()
        grown = gram.new_zeros(gram.shape[0], size, size)
        grown[:, :-1, :-1], grown[:, :, -1], grown[:, -1, :] = gram, column, row
        return grown

    def largest(self, alpha, beta):
        """Return theta [B], the largest ||K v||^2 over unit vectors v of the subspace, that v and K v, both [B, ...]."""
        form = alpha**2 * self._vv + alpha * beta * (self._vj + self._vj.mT) + beta**2 * self._jj
        values, vectors = torch.linalg.eigh(form)
        weights = vectors[..., -1]
        v = sum(one * _over(weight, one) for one, weight in zip(self._v, weights.unbind(1)))
        jv = sum(one * _over(weight, one) for one, weight in zip(self._jv, weights.unbind(1)))
        return values[:, -1].clamp(min=0), v, alpha * v + beta * jv

    def residual(self, alpha, beta):
        """Return (theta [B], K^T K v - theta v [B, ...]) for the v of `largest`."""
        theta, v, kv = self.largest(alpha, beta)
        return theta, alpha * kv + beta * self._jacobian.vjp(kv).to(kv) - v * _over(theta, v)


def lipschitz(function, x, directions, sizes, pairs=((0.0, 1.0),), value=None, reduce="max"):
    """Return [P, B]: what ||alpha d + beta (f(x + d) - f(x))|| / ||d|| is over all directions and sizes, for every pair.

    By it a function without a derivative, such as one that rounds, shows how it really stretches distances of these sizes: an
    estimate from below of its Lipschitz constant for "max", the root of the mean square for "rms". directions: tensors
    [B, ...]. sizes: of d, as shares of ||x||. value: f(x), where it is known.
    """
    if reduce not in ("max", "rms"):
        raise ValueError(f"reduce: '{reduce}' is none of max, rms.")
    value = function(x) if value is None else value
    ratios = []
    for size in sizes:
        for direction in directions:
            d = _unit(direction) * _over(size * norms(x), x)
            change = function(x + d) - value
            ratios.append(torch.stack([norms(alpha * d + beta * change) / norms(d) for alpha, beta in pairs]).cpu().double())
    ratios = torch.stack(ratios)
    return ratios.amax(0) if reduce == "max" else ratios.square().mean(0).sqrt()


def suggested_lambda(norms, lambdas=LAMBDAS):
    """Return the lam whose ||(1 - lam) I + lam B J|| is least. norms: [L, B], of each lam and image.

    The rule: a lam counts by its largest norm over the images, since one lam serves them all; of equal ones the smallest, which
    is closest to the plain step. The bound ||x'_k - x*|| <= norm^k ||x'_0 - x*|| falls fastest with it (the contraction that
    the paper's section 3.2 asks for). That is how fast the iteration converges, not how good what it converges to is. Where
    even the least norm is 1 or more, no lam is known to contract.
    """
    worst = norms.amax(1).tolist()
    if not all(math.isfinite(value) for value in worst):
        raise ValueError("norms: not all of them are finite.")
    return lambdas[worst.index(min(worst))]
