"""4-bit groups with two scales. They expand to int8, so that int8 matrix products compute with them.

One scale per group of inputs keeps more of a weight than one scale per output channel. But a sum over inputs with different
scales is not an integer product. Therefore the scale of a group is the scale of its channel times a share, a float8 e4m3
number of at most 128. A stored number q from -8 to 7 represents the int8 number round(level(q) * share), times the scale of
the channel (progressive group quantization: QServe, arXiv 2405.04532). The int8 numbers need not be evenly spaced. So the
sixteen levels are those with the least error: they are closer together where weights are more frequent. This is
comfy-kitchen's `asym_w4a8_int8`, which accepts any sixteen levels.

Shares are stored as the bits of their e4m3 numbers, in uint8, because not every device supports float8.

Shapes in this file: O output channels, K inputs, G groups per channel, n = K / G inputs per group.
"""

import torch

# Lloyd-Max levels for normally distributed numbers, divided by the largest magnitude in their group of 16.
_POSITIVE = (0.0529, 0.1597, 0.2696, 0.3850, 0.5089, 0.6451, 0.7995, 0.9815)
LEVELS = torch.tensor([*(-level for level in reversed(_POSITIVE)), *_POSITIVE])

LARGEST = 128  # the largest share: times the largest level it fits int8, and division by it is exact
LARGEST_BITS = 0x70  # the bits of 128
LEAST = 2**-9  # the smallest share, e4m3's smallest positive number; groups that are almost zero next to the others have it
TINY = 1e-30  # scale of a channel of zeros, which needs a scale because no level is zero
RANGES = torch.linspace(1.1, 0.5, 13).tolist()  # fractions of the largest magnitude that a search tries as scale
AT_ONCE = 2**22  # weights that are processed at once; each needs several temporary 32-bit numbers

_on_device: dict[torch.device, "_Constants"] = {}  # a copy to the device in every call would wait for the device


class _Constants:
    """Constants on a device. levels: float32 [16]. middles: float32 [15], the midpoints between levels. integers: int8
    [128 * 16], for each bit pattern of a share the int8 numbers of the sixteen levels.
    """

    def __init__(self, device: torch.device) -> None:
        shares = _of_bits(torch.arange(128, dtype=torch.uint8))
        integers = (LEVELS * shares[:, None]).round().nan_to_num().clamp(-127, 127).to(torch.int8)
        self.levels, self.middles = LEVELS.to(device), ((LEVELS[1:] + LEVELS[:-1]) / 2).to(device)
        self.integers = integers.flatten().to(device)


def _on(device: torch.device) -> _Constants:
    if device not in _on_device:
        _on_device[device] = _Constants(device)
    return _on_device[device]


def nearest(x: torch.Tensor) -> torch.Tensor:
    """Return the numbers -8 to 7 whose levels are nearest to x, as float32 in the shape of x."""
    return torch.bucketize(x, _on(x.device).middles, out_int32=True).float() - 8


def levels(values: torch.Tensor) -> torch.Tensor:
    """Return the levels, float32, of values -8 to 7, of any dtype and shape."""
    return _on(values.device).levels[values.to(torch.int32, copy=True).add_(8)]


def quantized(rows: torch.Tensor, group_size: int, search: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (values int8 [O, K], scales float32 [O, G]) of rows [O, K] rounded to nearest. search: whether scales are
    those with the least squared error, instead of those that fit the largest magnitude.
    """
    found = [_quantized(part, group_size, search) for part in rows.split(max(1, AT_ONCE // rows.shape[1]))]
    values, scales = (torch.cat(parts) for parts in zip(*found))
    return values, scales


def _quantized(rows: torch.Tensor, group_size: int, search: bool) -> tuple[torch.Tensor, torch.Tensor]:
    groups = rows.unflatten(1, (-1, group_size))
    scale = searched(groups) if search else fitting(groups)
    return nearest(groups / scale[..., None]).to(torch.int8).flatten(1), scale


def fitting(groups: torch.Tensor) -> torch.Tensor:
    """Return scales [O, G] with which the largest magnitude of each of groups [O, G, n] gets about the largest level."""
    return snapped(groups.abs().amax(-1))


def searched(groups: torch.Tensor, importance: float | torch.Tensor = 1.0) -> torch.Tensor:
    """Return the scales [O, G] with the least squared error of groups [O, G, n]. importance: weights of the squared errors; it
    broadcasts over the groups.
    """
    widest = groups.abs().amax(-1)
    best, least = widest, torch.full_like(widest, torch.inf)
    for share in RANGES:
        scale = (widest * share).clamp(min=TINY)[..., None]
        error = ((levels(nearest(groups / scale)) * scale - groups).square() * importance).sum(-1)
        best, least = torch.where(error < least, scale[..., 0], best), torch.minimum(error, least)
    return snapped(best)


def snapped(scale: torch.Tensor) -> torch.Tensor:
    """Return scales [O, G], which may be 0, rounded to the nearest that this format can store. The largest scale of each
    channel stays unchanged.
    """
    channel = scale.amax(1, keepdim=True) / LARGEST
    channel = channel.clamp(min=TINY)
    return _of_bits(_bits((scale / channel).clamp(LEAST, LARGEST))) * channel


def split(scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (shares uint8 [O, G], scales of channels float32 [O, 1]) of scales [O, G] from `snapped`.

    The scales of a channel may have been multiplied by one factor since. The largest share of a channel is always 128.
    """
    channel = scale.amax(1, keepdim=True) / LARGEST
    return _bits(scale / channel), channel


def numbers(scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the same as `split`, but with the shares in float32."""
    bits, channel = split(scale)
    return _of_bits(bits), channel


def group_scales(shares: torch.Tensor, channel: torch.Tensor) -> torch.Tensor:
    """Return the scales float32 [O, G] of the groups from shares and scales of channels: the inverse of `split`."""
    return _of_bits(shares) * channel


def integers(values: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Return the int8 numbers [O, K] that values -8 to 7, int8 [O, K], represent with shares uint8 [O, G]."""
    table, out, at_once = _on(values.device).integers, torch.empty_like(values), max(1, AT_ONCE // values.shape[1])
    for place, part, share in zip(out.split(at_once), values.split(at_once), shares.split(at_once)):
        first = share.to(torch.int32).mul_(16).add_(8)
        places = part.unflatten(1, (shares.shape[1], -1)) + first[..., None]
        place.copy_(table.index_select(0, places.flatten()).view(place.shape))
    return out


def stood_for(values: torch.Tensor, shares: torch.Tensor, channel: torch.Tensor) -> torch.Tensor:
    """Return the weights, float32, that values -8 to 7 represent. Shares (float32) and scales of channels broadcast over the
    values.
    """
    return (levels(values) * shares).round_() * channel


def _bits(shares: torch.Tensor) -> torch.Tensor:
    return shares.cpu().to(torch.float8_e4m3fn).view(torch.uint8).to(shares.device)


def _of_bits(bits: torch.Tensor) -> torch.Tensor:
    """Return float32 numbers from the bits of e4m3 numbers that are not negative. These bits, shifted, are those of a float16
    with another exponent bias.
    """
    return (bits.to(torch.int16) << 7).view(torch.float16).float() * 256
