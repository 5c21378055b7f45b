"""Packed storage: bytes for quantized, shared and sparse tensors, and one file for all of them."""

from distill_lightning.compression.packing.bits import (
    huffman_decode,
    huffman_encode,
    huffman_lengths,
    pack_bits,
    unpack_bits,
)
from distill_lightning.compression.packing.codebook import (
    Clusters,
    Codebook,
    bake_shared,
    codebooks,
    describe_shared,
    freeze_shared,
    kmeans,
    rebuild_shared,
    share_weights,
)
from distill_lightning.compression.packing.file import read_packed, read_parts, write_packed
from distill_lightning.compression.packing.packed import (
    Packed,
    Part,
    encode,
    pack_bitmask,
    pack_codebook,
    pack_codes,
    pack_csr,
    pack_dense,
    pack_shared,
    unpack,
    unpack_codes,
)

__all__ = [
    "Clusters", "Codebook", "Packed", "Part", "bake_shared", "codebooks", "describe_shared", "encode", "freeze_shared",
    "huffman_decode", "huffman_encode", "huffman_lengths", "kmeans", "pack_bitmask", "pack_bits", "pack_codebook",
    "pack_codes", "pack_csr", "pack_dense", "pack_shared", "read_packed", "read_parts", "rebuild_shared",
    "share_weights", "unpack", "unpack_bits", "unpack_codes", "write_packed",
]  # fmt: skip
