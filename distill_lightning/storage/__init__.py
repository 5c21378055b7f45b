"""Rows by sample index, in memory and in files that are written whole or not at all."""

from distill_lightning.storage.files import (
    CHECKSUM_BYTES,
    checksum_fits,
    free_path,
    sweep_partial,
    whole_file,
    with_checksum,
    write_tensors,
    write_whole,
)
from distill_lightning.storage.header import FORMAT, read_header
from distill_lightning.storage.lock import FillingLock
from distill_lightning.storage.prediction import PredictionStore
from distill_lightning.storage.rows import Field, Rows
from distill_lightning.storage.shards import ShardedRecords, read_fields, sweep_records
from distill_lightning.storage.sidecar import Sidecar
from distill_lightning.storage.top_k import largest, spread_rest

__all__ = [
    "CHECKSUM_BYTES",
    "FORMAT",
    "Field",
    "FillingLock",
    "PredictionStore",
    "Rows",
    "ShardedRecords",
    "Sidecar",
    "checksum_fits",
    "free_path",
    "largest",
    "read_fields",
    "read_header",
    "spread_rest",
    "sweep_partial",
    "sweep_records",
    "whole_file",
    "with_checksum",
    "write_tensors",
    "write_whole",
]
