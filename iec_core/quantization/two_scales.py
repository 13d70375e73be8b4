"""Groups of 4-bit numbers in which a weight is int8 again, so that 8-bit products serve.

A scale for each group of inputs keeps more of a weight than one for a whole output channel, but a sum over inputs of several
scales is no product of integers. So a group's scale is a share, a float8 e4m3 number of at most 128, of its channel's: a number
q from -8 to 7 stands for round(level(q) * share), which is an int8, times the channel's scale (progressive group quantization:
QServe, arXiv 2405.04532). As the int8 need not be evenly apart, the sixteen levels are those that lose least: closer where
there are more weights. This is comfy-kitchen's `asym_w4a8_int8`, which takes any sixteen levels.

Shares lie as their bits, uint8, for not every device has float8.
"""

import torch

# Lloyd and Max's levels for normal numbers over the largest of the 16 of their group.
_POSITIVE = (0.0529, 0.1597, 0.2696, 0.3850, 0.5089, 0.6451, 0.7995, 0.9815)
LEVELS = torch.tensor([*(-level for level in reversed(_POSITIVE)), *_POSITIVE])

LARGEST = 128  # share: the largest level times it is within int8; dividing by it and multiplying undo each other exactly
LARGEST_BITS = 0x70  # of 128
LEAST = 2**-9  # share, the least number of e4m3: of groups that are zeros beside the others
TINY = 1e-30  # scale of a channel of zeros, for there is no level of zero
RANGES = torch.linspace(1.1, 0.5, 13).tolist()  # of the largest magnitude, that a search tries as scale
AT_ONCE = 2**22  # numbers, for each of which several in 32 bits are in between

_on_device = {}  # what is constant: a copy in every call would wait for the device


class _Constants:
    """On a device: the levels, the middles between them, and the int8 for all bits of a share and all levels, [128 * 16]."""

    def __init__(self, device):
        shares = _of_bits(torch.arange(128, dtype=torch.uint8))
        integers = (LEVELS * shares[:, None]).round().nan_to_num().clamp(-127, 127).to(torch.int8)
        self.levels, self.middles = LEVELS.to(device), ((LEVELS[1:] + LEVELS[:-1]) / 2).to(device)
        self.integers = integers.flatten().to(device)


def _on(device):
    if device not in _on_device:
        _on_device[device] = _Constants(device)
    return _on_device[device]


def nearest(x):
    """Return in float32 the numbers of -8 to 7 whose levels are nearest to x, in any shape."""
    return torch.bucketize(x, _on(x.device).middles, out_int32=True).float() - 8


def levels(values):
    """Return the levels float32 of values -8 to 7, of any type and in any shape."""
    return _on(values.device).levels[values.to(torch.int32, copy=True).add_(8)]


def quantized(rows, group_size, search):
    """Return (values int8 [O, K], scales float32 [O, G]) of rows [O, K] rounded to the nearest. search: whether scales are
    those of least squared error.
    """
    found = [_quantized(part, group_size, search) for part in rows.split(max(1, AT_ONCE // rows.shape[1]))]
    return tuple(torch.cat(parts) for parts in zip(*found))


def _quantized(rows, group_size, search):
    groups = rows.unflatten(1, (-1, group_size))
    scale = searched(groups) if search else fitting(groups)
    return nearest(groups / scale[..., None]).to(torch.int8).flatten(1), scale


def fitting(groups):
    """Return scales [O, G] over which the largest of groups [O, G, n] have about the largest level."""
    return snapped(groups.abs().amax(-1))


def searched(groups, importance=1.0):
    """Return scales [O, G] over which groups [O, G, n] have the least squared error, times an importance that broadcasts over
    them.
    """
    widest = groups.abs().amax(-1)
    best, least = widest, torch.full_like(widest, torch.inf)
    for share in RANGES:
        scale = (widest * share).clamp(min=TINY)[..., None]
        error = ((levels(nearest(groups / scale)) * scale - groups).square() * importance).sum(-1)
        best, least = torch.where(error < least, scale[..., 0], best), torch.minimum(error, least)
    return snapped(best)


def snapped(scale):
    """Return the scales [O, G] of this kind that are nearest to those given, which may be 0, and the largest of each channel
    as it is.
    """
    channel = scale.amax(1, keepdim=True) / LARGEST
    channel = channel.clamp(min=TINY)
    return _of_bits(_bits((scale / channel).clamp(LEAST, LARGEST))) * channel


def split(scale):
    """Return (shares uint8 [O, G], scales of channels float32 [O, 1]) of scales [O, G] that `snapped` has made, which may have
    been multiplied by one number a channel since. The largest share of a channel is always the largest there is.
    """
    channel = scale.amax(1, keepdim=True) / LARGEST
    return _bits(scale / channel), channel


def numbers(scale):
    """Return what `split` does, with the shares in float32 too."""
    bits, channel = split(scale)
    return _of_bits(bits), channel


def group_scales(shares, channel):
    """Return the scales of which `split` makes these."""
    return _of_bits(shares) * channel


def integers(values, shares):
    """Return int8 [O, K], for which int8 values -8 to 7 [O, K] stand; shares uint8 [O, G]."""
    table, out, at_once = _on(values.device).integers, torch.empty_like(values), max(1, AT_ONCE // values.shape[1])
    for place, part, share in zip(out.split(at_once), values.split(at_once), shares.split(at_once)):
        first = share.to(torch.int32).mul_(16).add_(8)
        places = part.unflatten(1, (shares.shape[1], -1)) + first[..., None]
        place.copy_(table.index_select(0, places.flatten()).view(place.shape))
    return out


def stood_for(values, shares, channel):
    """Return in float32 what values -8 to 7 stand for, over shares and scales of channels that broadcast over them."""
    return (levels(values) * shares).round_() * channel


def _bits(shares):
    return shares.cpu().to(torch.float8_e4m3fn).view(torch.uint8).to(shares.device)


def _of_bits(bits):
    """Return float32 of the bits of e4m3 numbers that are not negative: those of a float16, but for the exponent's bias."""
    return (bits.to(torch.int16) << 7).view(torch.float16).float() * 256
