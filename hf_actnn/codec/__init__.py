"""A tensor in a few bits per element, and back. Knows torch; knows nothing of modules or of autograd."""

from hf_actnn.codec.backward import mask_part
from hf_actnn.codec.buffers import dropped, release, settle
from hf_actnn.codec.inplace import channel_affine, channel_affine_, normalize_, scale_by_mask_
from hf_actnn.codec.ops import pack_mask, pack_uint, unpack_mask, unpack_uint
from hf_actnn.codec.packed import CODES, Code, PackedTensor, default_row_length, packed_nbytes, quantize
from hf_actnn.codec.variance import rounding_correlation, rounding_variance, sample_spread

__all__ = [
    "CODES",
    "Code",
    "PackedTensor",
    "channel_affine",
    "channel_affine_",
    "default_row_length",
    "dropped",
    "mask_part",
    "normalize_",
    "pack_mask",
    "pack_uint",
    "packed_nbytes",
    "quantize",
    "release",
    "rounding_correlation",
    "rounding_variance",
    "sample_spread",
    "scale_by_mask_",
    "settle",
    "unpack_mask",
    "unpack_uint",
]
