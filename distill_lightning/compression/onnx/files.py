"""The content of ONNX files."""

from __future__ import annotations

from typing import Any


def stripped(model: Any) -> Any:
    """A file's content without stack traces and types of intermediate values, which keep ONNX Runtime from quantizing.

    It is changed in place.
    """
    graph = model.graph
    del graph.value_info[:], model.metadata_props[:], graph.metadata_props[:]
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        part.ClearField("doc_string")
        del part.metadata_props[:]
    return model
