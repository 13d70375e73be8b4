"""Weights rounded so that what a layer puts out is kept, with a low-rank branch for what no rounding can keep.

With H the mean of x x^T over a layer's inputs x, and H = R R^T with R upper triangular, weights Q in place of W cost

    mean ||(W - Q) x||^2 = ||(W - Q) R||^2.

Column k of (W - Q) R has (W - Q)_k R_kk and what the columns before k add. GPTQ (arXiv 2210.17323), here in the form of LDLQ
(arXiv 2307.13304), rounds the columns in turn, each after adding sum_{j<k} (W - Q)_j R_jk / R_kk: then all that is left in
column k is R_kk times the rounding error of what was rounded. The columns of the largest inputs come first, for the others can
take up what they leave. In the same metric the best matrix of rank r is what the first r singular vectors span: that of W goes
ahead, so that smaller numbers are to be rounded, and that of W - Q takes its place (SVDQuant, arXiv 2411.05007, with GPTQ).
"""

import torch

from . import two_scales
from .low_rank import balanced
from .packing import fitting_scales, in_groups, rounded_in, stood_for

# Shares of the mean of H's diagonal that are added to it: always, and times the inputs over how many samples there are of
# them, for few samples go together as others do not.
DAMPING, DAMPING_OF_FEW = 0.01, 1.0
# Shares of the largest magnitude that are tried as clipping range. To clip pays where there are few steps.
SHARES = {"int4": torch.linspace(1, 0.5, 11).tolist(), "int8": [1.0], "fp8": [1.0]}
COLUMNS = 128  # that are rounded one by one, before the others take up what these leave in one product
LEAST_ELEMENTS = 2**24  # of the rows that are rounded at once; beside a larger metric, half as many as that has


class Moments:
    """Sums of x x^T over what comes into a layer of K inputs, float32 on a device, in blocks of at most `most` inputs where
    that of all of them would be too large: correlations between blocks count as none.
    """

    def __init__(self, inputs, most, device):
        blocks = -(-inputs // most)
        self.parts = [slice(inputs * number // blocks, inputs * (number + 1) // blocks) for number in range(blocks)]
        self.products = [torch.zeros(2 * (part.stop - part.start,), device=device) for part in self.parts]
        self.device, self.count = device, 0

    def take_up(self, rows):
        """Take up rows [N, K] of any floating type."""
        rows = rows.to(self.device, torch.float32)
        for part, product in zip(self.parts, self.products):
            product.addmm_(rows[:, part].t(), rows[:, part])
        self.count += len(rows)

    def to(self, device):
        """Bring the sums to a device."""
        self.products, self.device = [product.to(device) for product in self.products], device
        return self

    @property
    def nbytes(self):
        """Of the sums."""
        return sum(product.nbytes for product in self.products)

    def is_finite(self):
        """Tell whether all that was taken up was finite, and its sums are."""
        return all(bool(product.isfinite().all() and product.diagonal().sum().isfinite()) for product in self.products)


class Metric:
    """The metric of a layer's inputs, from their Moments. parts: [(columns int64 [n] by falling diagonal, R float32 [n, n])]
    of the blocks.
    """

    def __init__(self, moments):
        self.parts = []
        for part, product in zip(moments.parts, moments.products):
            second = product / moments.count
            order = second.diagonal().argsort(descending=True, stable=True)
            damping = DAMPING + DAMPING_OF_FEW * len(order) / moments.count
            self.parts.append((order + part.start, _upper_factor(second[order][:, order], damping)))

    def of(self, rows):
        """Return rows [O, K] times R, whose sum of squares is their mean squared output; columns in the order of the parts."""
        return torch.cat([rows[:, columns] @ factor for columns, factor in self.parts], dim=1)

    def importance(self, group_size):
        """Return float32 [G, n]: what the squared rounding error of each column costs, in groups."""
        weights = [(columns, factor.diagonal().square()) for columns, factor in self.parts]
        columns, squares = (torch.cat(parts) for parts in zip(*weights))
        return squares[columns.argsort()].unflatten(0, (-1, group_size))

    def undone(self, rows):
        """Return the rows [O, K] of which `of` makes these."""
        out, start = torch.empty_like(rows), 0
        for columns, factor in self.parts:
            part = rows[:, start : start + len(columns)]
            out[:, columns] = torch.linalg.solve_triangular(factor, part, upper=True, left=False)
            start += len(columns)
        return out


def _upper_factor(matrix, damping):
    """Return R, upper triangular, of a symmetric positive semidefinite matrix, R R^T = matrix, with that share of the mean of
    its diagonal added to this.
    """
    mean = matrix.diagonal().mean().clamp(min=1e-30)  # of inputs that are all zeros
    while True:
        matrix.diagonal().add_(damping * mean)
        factor, failed = torch.linalg.cholesky_ex(matrix.flip(0, 1))
        if not failed:
            return factor.flip(0, 1)
        damping *= 10  # rounding has made the smallest eigenvalues negative


def gptq(rows, scale, fmt, metric):
    """Return (values float32 [O, K], squared errors float32 [O] in the metric) of rows [O, K] over scales float32 [O, G]."""
    # What lies one after another here is a column, for they are taken one by one.
    columns_of, scales_of, meaning = rows.t().contiguous(), scale.t().contiguous(), _meaning(scale, fmt)
    values, errors = torch.empty_like(columns_of), rows.new_zeros(len(rows))
    group = rows.shape[1] // scale.shape[1]
    for columns, factor in metric.parts:
        diagonal = factor.diagonal()
        fed = (factor / diagonal).t().contiguous()  # [k, j]: what share of column j's error column k takes up
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


def _meaning(scale, fmt):
    """Return what a column's values [O] and the number of its group have to be given to, for what they stand for."""
    if not fmt.two_scales:
        columns = scale.t().contiguous()
        return lambda values, group: values * columns[group]
    shares, channel = (part.t().contiguous() for part in two_scales.numbers(scale))
    return lambda values, group: two_scales.stood_for(values, shares[group], channel[0])


def fitted(rows, fmt, metric):
    """Return (values float32 [O, K], scale float32 [O, G]) of GPTQ, each row at the clipping range of least error. Groups of
    two scales have theirs chosen before, each by itself; ranges of whole rows have nothing to add to that.
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
    return tuple(torch.cat(parts) for parts in zip(*found))


def _best_of(rows, widest, shares, fmt, metric):
    """Return what `fitted` does, of rows that are rounded at once with all scales that are tried."""
    tried = torch.cat([widest * share for share in shares])
    values, errors = gptq(rows.repeat(len(shares), 1), tried, fmt, metric)
    best = errors.view(len(shares), -1).argmin(0) * len(rows) + torch.arange(len(rows), device=rows.device)
    return values[best], tried[best]


def low_rank(rows, metric, rank):
    """Return ([O, rank], [rank, K]) float32, the factors of the product that is nearest to rows [O, K] in the metric."""
    seen = metric.of(rows)
    if seen.shape[0] <= seen.shape[1]:
        out = _leading(seen @ seen.t(), rank)
        into = metric.undone(out.t() @ seen)
    else:
        basis = _leading(seen.t() @ seen, rank)
        out, into = seen @ basis, metric.undone(basis.t())
    return balanced(out, into)


def _leading(gram, rank):
    """Return the eigenvectors [n, rank] of the largest eigenvalues of a symmetric matrix."""
    return torch.linalg.eigh(gram)[1][:, -rank:]


def calibrated_weight(weight, packing, moments):
    """Return a weight in floating point, of `packing`, whose format is calibrated, packed as int8 [nbytes]. moments: of the
    layer's inputs as the format quantizes them (rotated).
    """
    rows, fmt, metric = packing.rotated(packing.matrix(weight.detach().float())), packing.format, Metric(moments)
    if not fmt.rank:
        return packing.packed_rows(*fitted(rows, fmt, metric))
    out, into = low_rank(rows, metric, fmt.rank)
    values, scale = fitted(rows - out @ into, fmt, metric)
    out, into = low_rank(rows - stood_for(values, scale, fmt), metric, fmt.rank)
    return packing.packed_rows(values, scale, (out, packing.rotated(into)))  # the branch takes inputs as they come


def sampled_rows(x, most, generator):
    """Return [N, C] of x [..., C]: all rows, or `most` of them drawn by a generator of the CPU."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if len(rows) <= most else rows[_drawn(len(rows), most, generator).to(x.device)]


def sampled_windows(x, kernel_size, stride, padding, dilation, most, generator):
    """Return [N, kh * kw * C] of what comes into a convolution (zero padding), x [B, C, H, W]: the windows at all places, or at
    `most` of them drawn by a generator of the CPU, channels last as `Packing` has them.
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


def _drawn(count, most, generator):
    """Return int64 [most] of places below `count`, with repetition."""
    return torch.randint(count, (most,), generator=generator)
