"""The model card of an exported student: what it is, and how it came to be, in Markdown."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from torch import nn

import distill_lightning
from distill_lightning.pages import machine, markdown_table
from distill_lightning.studies.export.citations import CITATIONS
from distill_lightning.studies.export.formats import Exported

_UNKNOWN = "The checkpoint does not say."


def rows_of(files: Sequence[Exported]) -> list[list[str]]:
    """The files as a table: a header, and a row for each."""
    header = ["format", "file", "bytes", "largest difference", "ms, batch 1", "ms of the network"]
    rows = [
        [
            file.format,
            file.path.name,
            f"{file.nbytes:,}",
            f"{file.difference:.1g}",
            *("-" if time is None else f"{time:.3f}" for time in (file.milliseconds, file.of_network)),
        ]
        for file in files
    ]
    return [header, *rows]


def data_of(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint tells of the data that it was trained on; empty: nothing."""
    return dict((checkpoint.get("circumstances") or {}).get("data") or {})


def model_card(
    network: nn.Module, checkpoint: Mapping[str, Any], description: Mapping[str, Any], files: Sequence[Exported]
) -> str:
    """The card, with the header that the Hugging Face Hub reads.

    Args:
        network: the student.
        checkpoint: that it is from.
        description: what ``config.json`` says.
        files: that were written.
    """
    options = {name: value for name, value in checkpoint["hyper_parameters"].items() if name != "_class_path"}
    method = str(checkpoint["hyper_parameters"].get("_class_path", "")).rpartition(".")[2]
    circumstances = checkpoint.get("circumstances") or {}
    metrics = circumstances.get("metrics") or {}
    parts = {
        "Files": _files(files),
        "Use": _usage(description, checkpoint, files),
        "Recipe": _block(
            {
                "student": description["recipe"],
                "method": method,
                "options": options,
                "training": circumstances.get("training"),
            }
        ),
        "Teachers": _teachers(checkpoint),
        "Data": _block(data_of(checkpoint)) if data_of(checkpoint) else _UNKNOWN,
        "Metrics": _metrics(metrics, checkpoint),
        "Versions": _versions(checkpoint),
    }
    if method in CITATIONS:
        parts["Citation"] = f"```bibtex\n{CITATIONS[method]}\n```"
    size = sum(parameter.numel() for parameter in network.parameters())
    begin = [
        f"# {description['class']}, trained with {method or 'an unknown method'}",
        f"A network of {size:,} parameters, for {_inputs(description)}, without what it was trained with. Written by "
        f"`distill-lightning export` on {datetime.datetime.now(datetime.UTC).date()}.",
    ]
    body = [f"## {title}\n\n{text.strip()}" for title, text in parts.items()]
    return "\n\n".join([_header(method, description, metrics), *begin, *body]) + "\n"


def _header(method: str, description: Mapping[str, Any], metrics: Mapping[str, float]) -> str:
    told: dict[str, Any] = {"library_name": "distill_lightning", "tags": ["distill_lightning", "pytorch"]}
    if method:
        told["tags"].append(method)
    if description["input_shape"] is None:
        told["pipeline_tag"] = "translation"
    elif description.get("num_classes") and len(description["input_shape"]) == 3:
        told["pipeline_tag"] = "image-classification"
    if "val/accuracy" in metrics or "test/accuracy" in metrics:
        told["metrics"] = ["accuracy"]
    return f"---\n{yaml.safe_dump(told, sort_keys=False)}---"


def _inputs(description: Mapping[str, Any]) -> str:
    shape = description["input_shape"]
    if isinstance(shape, Mapping):
        return " and ".join(f"`{name}` of shape {tuple(part)}" for name, part in shape.items())
    return "sentences of token ids" if shape is None else f"inputs of shape {tuple(shape)}"


def _files(files: Sequence[Exported]) -> str:
    if any(file.milliseconds is None for file in files):
        told = "Each file was read back and holds the network's very weights; it was not run."
        return f"{markdown_table(rows_of(files))}\n{told}"
    return (
        f"{markdown_table(rows_of(files))}\n"
        "Each file was read back and run. The difference is the largest of any output from the network's in PyTorch, "
        "at batches of 1 and 3 of random inputs; times are medians of 50 runs in turns, on one thread of the CPU."
    )


def _usage(description: Mapping[str, Any], checkpoint: Mapping[str, Any], files: Sequence[Exported]) -> str:
    argument = "" if description["recipe"] is not None else ", network"
    hint = "" if not argument else "`network` is built as it was before its training, and must be given.\n\n"
    given, fed = "`inputs` is a NumPy array", "{session.get_inputs()[0].name: inputs}"
    if isinstance(description["input_shape"], Mapping):
        given, fed = "`inputs` holds a NumPy array for each name", "inputs"
    ways = {
        ("safetensors", "hub"): f"{hint}```python\nfrom distill_lightning import load_exported\n\n"
        f'student = load_exported("."{argument})  # the folder of config.json and model.safetensors\n```',
        ("torch_export",): '```python\nimport torch\n\nstudent = torch.export.load("model.pt2").module()\n```',
        ("onnx",): f"{given}:\n\n"
        '```python\nimport onnxruntime\n\nsession = onnxruntime.InferenceSession("model.onnx")\n'
        f"(outputs,) = session.run(None, {fed})\n```",
    }
    written = {file.format for file in files}
    return "\n\n".join([_meaning(description, checkpoint), *(way for of, way in ways.items() if written & set(of))])


def _batch_of(shape: Sequence[int]) -> str:
    return f"`(N, {', '.join(map(str, shape))})`"


def _meaning(description: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> str:
    """What goes in, and what comes out."""
    if description["input_shape"] is None:
        return (
            "It reads `input_ids` and `attention_mask` `(N, S)` and `decoder_input_ids` `(N, T)`, and gives logits "
            f"`(N, T, {description['num_classes']})`; its `generate` translates."
        )
    shape = description["input_shape"]
    lines = [f"Inputs have the shape {_batch_of(shape)}."]
    if isinstance(shape, Mapping):
        parts = " and ".join(f"`{name}` {_batch_of(part)}" for name, part in shape.items())
        lines = [f"It reads {parts}, by these names or in the order of its arguments."]
    data = data_of(checkpoint)
    if {"mean", "std"} <= data.keys():
        # Of a class of the user's own it is not known what its attributes mean.
        ours = data["class"].startswith("distill_lightning.")
        how = "`(pixel / 255 - mean) / std`" if ours else "normalised as the data module does it"
        lines.append(f"Images are float32, {how}, by channel with mean {data['mean']} and std {data['std']}.")
    names = data.get("class_names", ())
    if names:
        first = ", ".join(f"{number} {name}" for number, name in enumerate(names[:10]))
        more = ", ... (all are in config.json)" if len(names) > 10 else ""
        lines.append(f"Outputs are logits `(N, {len(names)})` of the classes {first}{more}.")
    return " ".join(lines)


def _teachers(checkpoint: Mapping[str, Any]) -> str:
    marks, recipes = checkpoint.get("fingerprints") or {}, checkpoint["recipes"]
    if not marks:
        return "None."
    return _block({name: {"fingerprint": mark, "recipe": recipes.get(name)} for name, mark in marks.items()})


def _metrics(metrics: Mapping[str, float], checkpoint: Mapping[str, Any]) -> str:
    if not metrics:
        return _UNKNOWN
    units = {name: " ‰" for name in metrics if name.endswith("aurc")}
    rows = [["metric", "value"], *([name, f"{metrics[name]:.6g}{units.get(name, '')}"] for name in sorted(metrics))]
    return (
        f"{markdown_table(rows)}\nOf the last validation before the checkpoint, which was written in epoch "
        f"{checkpoint['epoch']} after {checkpoint['global_step']} optimiser steps."
    )


def _versions(checkpoint: Mapping[str, Any]) -> str:
    return _block(
        {
            "trained with": {
                "pytorch-lightning": checkpoint["pytorch-lightning_version"],
                **(checkpoint.get("circumstances") or {}).get("versions", {}),
            },
            "exported with": {"distill_lightning": distill_lightning.__version__, **machine("safetensors")},
        }
    )


def _block(value: Any) -> str:
    # Plain values of their own: neither subclasses of text, nor references between equal parts.
    value = json.loads(json.dumps(value, default=str))
    return f"```yaml\n{yaml.safe_dump(value, sort_keys=False, default_flow_style=None, width=110)}```"
