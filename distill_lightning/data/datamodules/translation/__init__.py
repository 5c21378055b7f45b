"""Parallel text from files of several kinds, and what makes batches of it."""

from distill_lightning.data.datamodules.translation.catalogues import GettextCatalogues
from distill_lightning.data.datamodules.translation.corpus import Corpus, Faults, Pair
from distill_lightning.data.datamodules.translation.dataset import TranslationDataset
from distill_lightning.data.datamodules.translation.length_sampler import LengthSampler
from distill_lightning.data.datamodules.translation.libreoffice import LibreOfficeHelp
from distill_lightning.data.datamodules.translation.module import TranslationDataModule
from distill_lightning.data.datamodules.translation.pair_options import PairOptions
from distill_lightning.data.datamodules.translation.parallel_text import ParallelText
from distill_lightning.data.datamodules.translation.tokenizer import BytePairTokenizer

__all__ = [
    "BytePairTokenizer",
    "Corpus",
    "Faults",
    "GettextCatalogues",
    "LengthSampler",
    "LibreOfficeHelp",
    "Pair",
    "PairOptions",
    "ParallelText",
    "TranslationDataModule",
    "TranslationDataset",
]
