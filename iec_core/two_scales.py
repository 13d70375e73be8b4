"""Scales of groups of 4-bit integers over scales of output channels, so that 8-bit products serve.

A scale for each group of inputs keeps more of a weight than one for a whole output channel, but a sum over inputs of several
scales is no product of integers. So a group's scale is a share, a float8 e4m3 number of at most 18, of its channel's: an
integer q of +-7 stands for round(q * share), which is an int8, times the channel's scale. This is progressive group
quantization (QServe, arXiv 2405.04532), and what comfy-kitchen's `asym_w4a8_int8` has without a codebook.

Shares lie as their bits, uint8, for not every device has float8.
"""

import torch

LARGEST = 18  # share: 7 * 18 is within int8, e4m3 has it exactly, and dividing by it and multiplying undo each other exactly
LARGEST_BITS = 0x59  # of 18
LEAST = 2**-9  # share, the least number of e4m3: of groups that are zeros beside the others
ROUNDING = 1e-6  # of float32, by which a share may have become more than it was


def snapped(scale):
    """Return the least scales float32 [O, G] of this kind that are none of them less than those of groups, [O, G], which may
    be 0.
    """
    channel = scale.amax(1, keepdim=True) / LARGEST
    channel = torch.where(channel > 0, channel, torch.ones_like(channel))
    shares = (scale / channel).clamp(LEAST, LARGEST)
    bits = _bits(shares)
    is_less = _of_bits(bits) < shares * (1 - ROUNDING)
    return _of_bits(bits + is_less) * channel  # the bits of positive numbers rise as they do


def split(scale):
    """Return (shares uint8 [O, G], scales of channels float32 [O, 1]) of scales [O, G] that `snapped` has made, which may have
    been multiplied by one number a channel since.
    """
    channel = scale.amax(1, keepdim=True) / LARGEST
    return _bits(scale / channel), channel


def joined(shares, channel):
    """Return the scales of which `split` makes these."""
    return _of_bits(shares) * channel


def integers(values, shares):
    """Return int8 [O, K], for which values within +-7 [O, K] stand; shares uint8 [O, G]."""
    dtype = torch.float32 if values.device.type == "cpu" else torch.float16  # either has all of it exactly
    groups = values.to(dtype).unflatten(1, (shares.shape[1], -1))
    return groups.mul_(_of_bits(shares).to(dtype)[..., None]).round_().to(torch.int8).flatten(1)


def numbers(scale):
    """Return what `split` does, with the shares in float32 too."""
    bits, channel = split(scale)
    return _of_bits(bits), channel


def stood_for(values, shares, channel):
    """Return in float32 what values within +-7 stand for, over shares and scales of channels that broadcast over them."""
    return (values * shares).round_() * channel


def _bits(shares):
    return shares.cpu().to(torch.float8_e4m3fn).view(torch.uint8).to(shares.device)


def _of_bits(bits):
    """Return float32 of the bits of e4m3 numbers that are not negative: those of a float16, but for the exponent's bias."""
    return (bits.to(torch.int16) << 7).view(torch.float16).float() * 256
