"""The specification itself, against independent scalar code and published vectors."""

import math

import pytest
import torch

from hf_actnn.codec import reference


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # known answers of Random123, the authors' own library
        ((0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**64 - 1, 2**64 - 1), 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x85A308D3243F6A88, 0x0370734413198A2E),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox(counter, key, words):
    q = counter[0] - 2**64 if counter[0] >= 2**63 else counter[0]
    assert tuple(int(w) for w in reference.philox(torch.tensor([q]), key, counter[1])) == words


def test_dither_positions():
    u = reference.dither(1000, 5, 6)
    for p in (0, 1, 63, 64, 255, 256, 700, 999):  # first and last of words, calls and superblocks
        e = p & 255
        words = reference.philox(torch.tensor([(p >> 8) * 16 + ((e & 63) >> 2)]), 5, 6)
        byte = int(words[e >> 6]) >> (8 * (e & 3)) & 255
        assert u[p] == (byte + 0.5) / 256


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("group", [1, 7, 8, 31, 256, 257])  # less than a byte, odd sizes, full groups
def test_planes(bits, group):
    codes = (torch.arange(group) * 91 % 2**bits).to(torch.uint8)
    out, shift = [], 0
    for width in (w for w in (8, 4, 2, 1) if bits & w):
        n = math.ceil(group * width / 8)
        plane = [0] * n
        for e in range(group):
            plane[e % n] |= (int(codes[e]) >> shift & (2**width - 1)) << (width * (e // n))
        out += plane
        shift += width
    got = reference.pack_planes(codes, bits)
    assert got.tolist() == out
    assert len(out) == reference.group_bytes(group, bits)
    assert torch.equal(reference.unpack_planes(got, bits, group), codes)


def test_layout_cuts_rows_evenly():
    at = reference.layout(3 * 257, 257, 2, 256)
    assert (at.groups_per_row, at.group, at.tail) == (2, 129, 128)
    # Three groups of at most 2 elements cover 5; sizes are never more than one apart unless the rest demands it.
    at = reference.layout(5, 5, 2, 2)
    assert (at.groups_per_row, at.group, at.tail) == (3, 2, 1)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("sign", ["mixed", "positive"])  # a minimum of 0 leaves subnormal ranges as small as they are
def test_metadata_is_rounded_outwards(sign, bits):
    x = torch.randn(1000, 64, generator=torch.Generator().manual_seed(1))
    x *= 10 ** torch.linspace(-44, 37, 1000).unsqueeze(-1)
    if sign == "positive":
        x = x.abs()
        x[:, 0] = 0.0
    m, step = reference._metadata(x, bits, *(torch.zeros(1000, dtype=torch.bool) for _ in "ab"))
    m, step, x64 = m.double(), step.double(), x.double()
    assert (m <= x64.amin(-1)).all()
    top = (2**bits - 1) * step
    assert (top * (1 + 2**-21) >= x64.amax(-1) - m).all()
    # No wider than needed: within bf16's spacing, which is 2^-133 at the bottom.
    assert (step <= (x64.amax(-1) - m) / (2**bits - 1) * (1 + 2**-6) + 2.0**-132).all()


def test_error_is_below_a_step():
    x = torch.randn(64, 256)
    for bits in range(1, 9):
        codes, meta, _ = reference.quantize(x.view(-1), bits, 256, 256, 1, 2)
        y = reference.dequantize(codes, meta, bits, 256, 256, x.numel(), torch.float64).view_as(x)
        assert ((y - x).abs() <= meta[:, 1:].double() * (1 + 1e-6)).all()
