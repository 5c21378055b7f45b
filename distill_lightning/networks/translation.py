"""Encoder-decoder networks for text."""

from __future__ import annotations

from torch import nn

from distill_lightning.errors import InputError
from distill_lightning.libraries import package
from distill_lightning.networks.provenance import factory_with_recipe
from distill_lightning.networks.sizes import check_sizes


@factory_with_recipe
def translation_transformer(
    num_classes: int,
    *,
    width: int = 256,
    encoder_depth: int = 3,
    decoder_depth: int = 3,
    heads: int = 4,
    feedforward: int = 1024,
    dropout: float = 0.1,
    max_length: int = 512,
    pad_id: int = 0,
    bos_id: int = 1,
    eos_id: int = 2,
) -> nn.Module:
    r"""The encoder-decoder Transformer of "Attention Is All You Need", randomly initialised; nothing is downloaded.

    It is ``MarianMTModel`` of the transformers library: sinusoidal positions, layer normalisation after each sublayer,
    ReLU, and one matrix of embeddings for sources, targets and the logits, which are scaled by
    :math:`\sqrt{\text{width}}` where they are read. Weights are drawn from
    :math:`\mathcal{N}(0, 1 / \text{width})`. It is called with ``input_ids`` and ``attention_mask`` ``(N, S)`` and
    ``decoder_input_ids`` ``(N, T)`` and gives ``logits`` ``(N, T, K)``; ``generate`` translates, and names neither
    ``pad_id`` nor ``bos_id``.

    Vaswani et al.: *Attention Is All You Need*, https://arxiv.org/abs/1706.03762

    Args:
        num_classes: ``K``, the number of token ids, of both languages together.
        width: numbers per token, even and a multiple of ``heads``.
        encoder_depth: layers that read the source.
        decoder_depth: layers that write the target.
        heads: attention heads in each layer.
        feedforward: hidden units of the feed-forward network in each layer.
        dropout: the probability of dropout in training, in ``[0, 1)``.
        max_length: the largest number of tokens of a source or a target; each place has a fixed position.
        pad_id: what rows are filled up with.
        bos_id: what a target begins with where the decoder reads it.
        eos_id: what sources and targets end with.

    Raises:
        InputError: a size, probability or id is out of range, or transformers is not installed.

    Example:
        >>> import torch
        >>> from distill_lightning.networks import translation_transformer
        >>> network = translation_transformer(100, width=16, encoder_depth=1, decoder_depth=1, heads=2, feedforward=32)
        >>> source, target = torch.full((2, 7), 3), torch.full((2, 5), 3)
        >>> network(input_ids=source, decoder_input_ids=target).logits.shape
        torch.Size([2, 5, 100])
    """
    who = "translation_transformer"
    sizes = {"num_classes": num_classes, "width": width, "encoder_depth": encoder_depth}
    sizes |= {"decoder_depth": decoder_depth, "heads": heads, "feedforward": feedforward, "max_length": max_length}
    check_sizes(who, sizes)
    if width % heads or width % 2:
        raise InputError(f"{who}: width={width} must be even and a multiple of heads={heads}: change one of them")
    if not 0 <= dropout < 1:
        raise InputError(f"{who}: dropout must be in [0, 1), got {dropout}")
    ids = {"pad_id": pad_id, "bos_id": bos_id, "eos_id": eos_id}
    if len(set(ids.values())) < len(ids) or not all(0 <= one < num_classes for one in ids.values()):
        told = ", ".join(f"{name}={value}" for name, value in ids.items())
        raise InputError(f"{who}: {told} must be three different ids from 0 to {num_classes - 1}: give the tokenizer's")
    transformers = package("transformers", extra="translation")
    config = transformers.MarianConfig(
        vocab_size=num_classes,
        d_model=width,
        encoder_layers=encoder_depth,
        decoder_layers=decoder_depth,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=feedforward,
        decoder_ffn_dim=feedforward,
        dropout=dropout,
        activation_function="relu",
        max_position_embeddings=max_length,
        # So that what is embedded, and the logits, begin with a variance of 1.
        init_std=width**-0.5,
        scale_embedding=True,
        pad_token_id=pad_id,
        bos_token_id=bos_id,
        eos_token_id=eos_id,
        decoder_start_token_id=bos_id,
        forced_eos_token_id=None,
        # A teacher-forced forward keeps nothing for a next token.
        use_cache=False,
    )
    network: nn.Module = transformers.MarianMTModel(config)
    network.generation_config = transformers.GenerationConfig(
        pad_token_id=pad_id,
        bos_token_id=bos_id,
        eos_token_id=eos_id,
        decoder_start_token_id=bos_id,
        suppress_tokens=[pad_id, bos_id],
    )
    return network
