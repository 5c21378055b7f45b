"""The time of an ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from torch import nn

from distill_lightning.compression.access.calibration import inputs_of, tensors_in
from distill_lightning.compression.costs.latency import Latency, compare_latency
from distill_lightning.compression.onnx.session import OnnxNetwork, as_array
from distill_lightning.layers import eval_mode


def onnx_latency(
    compressed: Path, dense: Path, network: nn.Module, example_inputs: Any, *, rounds: int = 50, seed: int = 0
) -> dict[Literal["onnxruntime", "torch"], Latency]:
    """The time of an ONNX file in ONNX Runtime against two baselines, because the runtime itself saves time, too.

    Args:
        compressed: the file, quantized for example.
        dense: the dense network's file in float32.
        network: the dense network.
        example_inputs: a tensor, or a tuple of arguments.
        rounds: number of turns, see `compare_latency`.
        seed: seed of the bootstrap.

    Returns:
        ``"onnxruntime"``: the comparison with the dense file; ``"torch"``: with the dense network in PyTorch.

    Raises:
        InputError: a file cannot be read, or the arguments do not suit `compare_latency`.
    """
    arguments = inputs_of(example_inputs)
    ours, theirs = OnnxNetwork(compressed), OnnxNetwork(dense)
    arrays = [as_array(value) for value in tensors_in(arguments)]
    with eval_mode(network):
        return {
            "onnxruntime": compare_latency(lambda: theirs(*arrays), lambda: ours(*arrays), rounds=rounds, seed=seed),
            "torch": compare_latency(lambda: network(*arguments), lambda: ours(*arrays), rounds=rounds, seed=seed),
        }
