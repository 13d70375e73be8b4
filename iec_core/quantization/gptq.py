"""GPTQ: round a layer's weights so that the layer's output changes least. A low-rank branch holds what rounding cannot keep.

Let H be the mean of x x^T over a layer's inputs x, and H = R R^T with R upper triangular. Weights Q instead of W then have the
error

    mean ||(W - Q) x||^2 = ||(W - Q) R||^2.

Column k of (W - Q) R is the sum of (W - Q)_k R_kk and the terms of the columns before k. GPTQ (arXiv 2210.17323), here in the
form of LDLQ (arXiv 2307.13304), rounds one column after the other. Before column k is rounded,
sum_{j<k} (W - Q)_j R_jk / R_kk is added to it. Then column k of (W - Q) R is only R_kk times the rounding error of column k.
The columns of the largest inputs come first, because the later columns can compensate their errors.

In the same metric, the first r singular vectors give the best matrix of rank r. The best matrix for W is subtracted first, so
that smaller numbers remain to be rounded. After rounding, the best matrix for W - Q replaces it (SVDQuant, arXiv 2411.05007,
with GPTQ).

Shapes in this file: O output channels, K inputs, G groups per output channel, N samples of inputs.
"""

from collections.abc import Callable, Sequence

import torch

from . import two_scales
from .low_rank import Factors, balanced
from .packing import Packing, WeightFormat, fitting_scales, in_groups, rounded_in, stood_for

# Fractions of the mean of H's diagonal that are added to the diagonal: DAMPING always, and DAMPING_OF_FEW times the number of
# inputs over the number of samples, because few samples have correlations that other samples do not have.
DAMPING, DAMPING_OF_FEW = 0.01, 1.0
# Fractions of the largest magnitude that are tried as clipping range. Clipping only helps formats with few steps.
SHARES = {"int4": torch.linspace(1, 0.5, 11).tolist(), "int8": [1.0], "fp8": [1.0]}
COLUMNS = 128  # columns that are rounded one by one, before one product adds their errors to the later columns
LEAST_ELEMENTS = 2**24  # elements of the rows that are rounded at once; for a larger metric, half the metric's elements


class Moments:
    """Sums of x x^T over the inputs x of a layer, float32 on a device.

    inputs: K. most: largest number of inputs in a block; a layer with more inputs has several blocks, and correlations between
    blocks are ignored. parts: slices of the inputs, one per block. products: the sums [n, n] of the blocks. count: number of
    samples.
    """

    def __init__(self, inputs: int, most: int, device: torch.device | str) -> None:
        blocks = -(-inputs // most)
        self.parts = [slice(inputs * number // blocks, inputs * (number + 1) // blocks) for number in range(blocks)]
        self.products = [torch.zeros(2 * (part.stop - part.start,), device=device) for part in self.parts]
        self.device, self.count = device, 0

    def take_up(self, rows: torch.Tensor) -> None:
        """Add samples, rows [N, K] of any floating-point dtype, to the sums."""
        rows = rows.to(self.device, torch.float32)
        for part, product in zip(self.parts, self.products):
            product.addmm_(rows[:, part].t(), rows[:, part])
        self.count += len(rows)

    def to(self, device: torch.device | str) -> "Moments":
        """Move the sums to a device, in place, and return self."""
        self.products, self.device = [product.to(device) for product in self.products], device
        return self

    @property
    def nbytes(self) -> int:
        """Size of the sums in bytes."""
        return sum(product.nbytes for product in self.products)

    def is_finite(self) -> bool:
        """Return whether all samples and their sums are finite."""
        return all(bool(product.isfinite().all() and product.diagonal().sum().isfinite()) for product in self.products)


class Metric:
    """The metric R of a layer's inputs, from their Moments. parts: [(columns int64 [n], R float32 [n, n])], one per block. The
    columns are sorted by descending diagonal of H.
    """

    def __init__(self, moments: Moments) -> None:
        self.parts: list[tuple[torch.Tensor, torch.Tensor]] = []
        for part, product in zip(moments.parts, moments.products):
            second = product / moments.count
            order = second.diagonal().argsort(descending=True, stable=True)
            damping = DAMPING + DAMPING_OF_FEW * len(order) / moments.count
            self.parts.append((order + part.start, _upper_factor(second[order][:, order], damping)))

    def of(self, rows: torch.Tensor) -> torch.Tensor:
        """Return rows [O, K] times R, with the columns in the order of the parts. The sum of squares of the result is the mean
        squared output of a layer with these rows as weights.
        """
        return torch.cat([rows[:, columns] @ factor for columns, factor in self.parts], dim=1)

    def importance(self, group_size: int) -> torch.Tensor:
        """Return the weight of each column's squared rounding error in the metric, R_kk^2, float32 [G, n] by groups."""
        weights = [(columns, factor.diagonal().square()) for columns, factor in self.parts]
        columns, squares = (torch.cat(parts) for parts in zip(*weights))
        return squares[columns.argsort()].unflatten(0, (-1, group_size))

    def undone(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the inverse of `of`: rows [O, K] for which `of` returns the given ones."""
        out, start = torch.empty_like(rows), 0
        for columns, factor in self.parts:
            part = rows[:, start : start + len(columns)]
            out[:, columns] = torch.linalg.solve_triangular(factor, part, upper=True, left=False)
            start += len(columns)
        return out


def _upper_factor(matrix: torch.Tensor, damping: float) -> torch.Tensor:
    """Return R, upper triangular, with R R^T = matrix, which is symmetric positive semidefinite. `damping` times the mean of
    the diagonal is added to the diagonal first, in place.
    """
    mean = matrix.diagonal().mean().clamp(min=1e-30)  # the mean is 0 if all inputs are zeros
    while True:
        matrix.diagonal().add_(damping * mean)
        factor, failed = torch.linalg.cholesky_ex(matrix.flip(0, 1))
        if not failed:
            return factor.flip(0, 1)
        damping *= 10  # rounding errors have made the smallest eigenvalues negative


def gptq(rows: torch.Tensor, scale: torch.Tensor, fmt: WeightFormat, metric: Metric) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (values float32 [O, K], squared errors float32 [O] in the metric) of rows [O, K] rounded by GPTQ with scales
    float32 [O, G].
    """
    # Transposed, so that each column is contiguous: columns are processed one by one.
    columns_of, scales_of, meaning = rows.t().contiguous(), scale.t().contiguous(), _meaning(scale, fmt)
    values, errors = torch.empty_like(columns_of), rows.new_zeros(len(rows))
    group = rows.shape[1] // scale.shape[1]
    for columns, factor in metric.parts:
        diagonal = factor.diagonal()
        fed = (factor / diagonal).t().contiguous()  # [k, j]: factor of column j's error that is added to column k
        target, places = columns_of[columns], columns.tolist()
        for start in range(0, len(places), COLUMNS):
            stop = min(start + COLUMNS, len(places))
            left = rows.new_zeros(stop - start, len(rows))  # W - Q of these columns
            for k in range(start, stop):
                place, of_group = places[k], places[k] // group
                wanted = torch.addmv(target[k], left[: k - start].t(), fed[k, start:k])
                values[place] = rounded_in(wanted, scales_of[of_group], fmt)
                found = meaning(values[place], of_group)
                torch.sub(columns_of[place], found, out=left[k - start])
                errors += ((wanted - found) * diagonal[k]).square_()
            target[stop:].addmm_(fed[stop:, start:stop], left)
    return values.t().contiguous(), errors


def _meaning(scale: torch.Tensor, fmt: WeightFormat) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """Return a function of a column's values [O] and the index of its group. It returns the weights [O] that they represent."""
    if not fmt.two_scales:
        columns = scale.t().contiguous()
        return lambda values, group: values * columns[group]
    shares, channel = (part.t().contiguous() for part in two_scales.numbers(scale))
    return lambda values, group: two_scales.stood_for(values, shares[group], channel[0])


def fitted(rows: torch.Tensor, fmt: WeightFormat, metric: Metric) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (values float32 [O, K], scale float32 [O, G]) of rows [O, K] rounded by GPTQ, each row with the clipping range of
    least error. With two scales, each group's range is chosen before GPTQ; a further range for the whole row does not help.
    """
    shares = [1.0] if fmt.two_scales else SHARES[fmt.kind]
    elements = sum(factor.numel() for _, factor in metric.parts)
    at_once = max(1, max(elements // 2, LEAST_ELEMENTS) // (rows.shape[1] * len(shares)))
    if fmt.two_scales:
        importance = metric.importance(fmt.group_size)
        widest = (two_scales.searched(in_groups(part, fmt.group_size), importance) for part in rows.split(at_once))
    else:
        widest = fitting_scales(rows, fmt).split(at_once)
    found = [_best_of(*parts, shares, fmt, metric) for parts in zip(rows.split(at_once), widest)]
    values, scale = (torch.cat(parts) for parts in zip(*found))
    return values, scale


def _best_of(
    rows: torch.Tensor, widest: torch.Tensor, shares: list[float], fmt: WeightFormat, metric: Metric
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round all these rows at once with each share of `widest`, and return (values, scale) with the least error per row."""
    tried = torch.cat([widest * share for share in shares])
    values, errors = gptq(rows.repeat(len(shares), 1), tried, fmt, metric)
    best = errors.view(len(shares), -1).argmin(0) * len(rows) + torch.arange(len(rows), device=rows.device)
    return values[best], tried[best]


def low_rank(rows: torch.Tensor, metric: Metric, rank: int) -> Factors:
    """Return factors ([O, rank], [rank, K]), float32, whose product is nearest to rows [O, K] in the metric."""
    seen = metric.of(rows)
    if seen.shape[0] <= seen.shape[1]:
        out = _leading(seen @ seen.t(), rank)
        into = metric.undone(out.t() @ seen)
    else:
        basis = _leading(seen.t() @ seen, rank)
        out, into = seen @ basis, metric.undone(basis.t())
    return balanced(out, into)


def _leading(gram: torch.Tensor, rank: int) -> torch.Tensor:
    """Return the eigenvectors [n, rank] of the largest eigenvalues of a symmetric matrix."""
    return torch.linalg.eigh(gram)[1][:, -rank:]


def calibrated_weight(weight: torch.Tensor, packing: Packing, moments: Moments) -> torch.Tensor:
    """Return a floating-point weight quantized by GPTQ and packed, int8 [nbytes]. packing: of the weight's shape and of a
    calibrated format. moments: of the layer's inputs, rotated if the format is.
    """
    rows, fmt, metric = packing.rotated(packing.matrix(weight.detach().float())), packing.format, Metric(moments)
    if not fmt.rank:
        return packing.packed_rows(*fitted(rows, fmt, metric))
    out, into = low_rank(rows, metric, fmt.rank)
    values, scale = fitted(rows - out @ into, fmt, metric)
    out, into = low_rank(rows - stood_for(values, scale, fmt), metric, fmt.rank)
    return packing.packed_rows(values, scale, (out, packing.rotated(into)))  # the branch's inputs are not rotated


def sampled_rows(x: torch.Tensor, most: int, generator: torch.Generator) -> torch.Tensor:
    """Return rows [N, C] of x [..., C]: all rows, or `most` rows drawn with a CPU generator if there are more."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if len(rows) <= most else rows[_drawn(len(rows), most, generator).to(x.device)]


def sampled_windows(
    x: torch.Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    most: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """Return input windows [N, kh * kw * C] of a convolution with zero padding, for x [B, C, H, W]: all windows, or `most`
    windows drawn with a CPU generator if there are more. Channels come last within a window, as in a packed weight.
    """
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = kernel_size, stride, padding, dilation
    x = torch.nn.functional.pad(x.permute(0, 2, 3, 1), (0, 0, pw, pw, ph, ph))
    height, width = (x.shape[1] - dh * (kh - 1) - 1) // sh + 1, (x.shape[2] - dw * (kw - 1) - 1) // sw + 1
    count = len(x) * height * width
    places = torch.arange(count) if count <= most else _drawn(count, most, generator)
    item, row, column = places // (height * width), places // width % height, places % width
    rows = (row * sh)[:, None, None] + dh * torch.arange(kh)[:, None]
    columns = (column * sw)[:, None, None] + dw * torch.arange(kw)
    item, rows, columns = (index.to(x.device) for index in (item[:, None, None], rows, columns))
    return x[item, rows, columns].flatten(1)


def _drawn(count: int, most: int, generator: torch.Generator) -> torch.Tensor:
    """Return random indices below `count`, int64 [most], with repetition."""
    return torch.randint(count, (most,), generator=generator)
