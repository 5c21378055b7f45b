"""Packed storage: the bytes of quantized, shared and sparse tensors, and one file for all of them."""

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
from distill_lightning.compression.packing.hashed import (
    Hashed,
    bake_hashed,
    describe_hashed,
    hash_weights,
    hashed,
    rebuild_hashed,
)
from distill_lightning.compression.packing.packed import (
    Packed,
    Part,
    encode,
    has_one_zero,
    pack_bitmask,
    pack_codebook,
    pack_codes,
    pack_csr,
    pack_dense,
    pack_hashed,
    pack_shared,
    unpack,
    unpack_codes,
)

__all__ = [
    "Clusters", "Codebook", "Hashed", "Packed", "Part", "bake_hashed", "bake_shared", "codebooks", "describe_hashed",
    "describe_shared", "encode", "freeze_shared", "has_one_zero", "hash_weights", "hashed", "huffman_decode",
    "huffman_encode", "huffman_lengths", "kmeans", "pack_bitmask", "pack_bits", "pack_codebook", "pack_codes",
    "pack_csr", "pack_dense", "pack_hashed", "pack_shared", "read_packed", "read_parts", "rebuild_hashed",
    "rebuild_shared", "share_weights", "unpack", "unpack_bits", "unpack_codes", "write_packed",
]  # fmt: skip
