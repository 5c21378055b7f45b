"""A network in ONNX Runtime.

Needs the extra ``onnx``: ``pip install 'distill-lightning[onnx]'``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from distill_lightning.compression.access.calibration import inputs_of, tensors_in
from distill_lightning.compression.access.outputs import in_structure, outputs_of
from distill_lightning.errors import InputError, in_a_line
from distill_lightning.layers import eval_mode
from distill_lightning.libraries import package

Array = NDArray[Any]


class OnnxNetwork:
    """A network in ONNX Runtime, on the CPU.

    Args:
        path: path of the ONNX file.
        threads: number of threads that one operation may use; with 1 everything is computed in the calling thread,
            whose processor time is then the whole cost.
    """

    def __init__(self, path: Path, *, threads: int = 1) -> None:
        runtime = package("onnxruntime", extra="onnx")
        if not path.is_file():
            raise InputError(f"there is no file {path}: give the path of an ONNX file")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Errors only: its warnings bypass Python on their way to stderr, and are about its own optimiser.
        options.log_severity_level = 3
        try:
            self.session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime has its own exception for each kind of damage
            raise InputError(f"{path} cannot be read by ONNX Runtime: {in_a_line(error, at_most=300)}") from error
        self.path = path
        self.inputs = [entry.name for entry in self.session.get_inputs()]

    def __call__(self, *inputs: Tensor | Array) -> Any:
        """The outputs: one tensor, or a tuple of all tensors (`outputs_of`).

        Args:
            inputs: all inputs of the network, tensors or arrays.

        Raises:
            InputError: the number of inputs is wrong, or the file does not accept their shapes or types.
        """
        if len(inputs) != len(self.inputs):
            raise InputError(
                f"{self.path} takes {len(self.inputs)} inputs ({', '.join(self.inputs)}), got {len(inputs)}"
            )
        arrays = [as_array(value) for value in inputs]
        try:
            outputs = self.session.run(None, dict(zip(self.inputs, arrays, strict=True)))
        except Exception as error:  # as above
            raise InputError(f"{self.path} does not take these inputs: {in_a_line(error, at_most=300)}") from error
        tensors = tuple(torch.from_numpy(output) for output in outputs)
        return tensors[0] if len(tensors) == 1 else tensors


class NetworkInOnnx(nn.Module):
    """An ONNX file in the place of the network that it was made of, on the CPU: it takes and returns the same.

    Args:
        session: the file.
        network: the network, on the CPU; its outputs' structure is the file's.
        example_inputs: a tensor, or a tuple of arguments.
    """

    def __init__(self, session: OnnxNetwork, network: nn.Module, example_inputs: Any) -> None:
        super().__init__()
        self.session = session
        with eval_mode(network), torch.inference_mode():
            self.like = network(*inputs_of(example_inputs))

    def forward(self, *inputs: Any) -> Any:
        """Run the file; the outputs are on the device of the inputs."""
        tensors = tensors_in(inputs)
        found = iter(outputs_of(self.session(*tensors)))
        return in_structure(self.like, (output.to(tensors[0].device) for output in found))


def as_array(value: Tensor | Array) -> Array:
    """A tensor as the array that ONNX Runtime takes."""
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else value
