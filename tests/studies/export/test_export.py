"""What is exported is the student alone, computes what it does, and says where it comes from."""

import copy
import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from distill_lightning import (
    CompressionBaseline,
    DigitsDataModule,
    ExtracurricularModule,
    FEEDModule,
    IndexedDataModule,
    InputError,
    KDModule,
    MEALV2Module,
    MixupSampler,
    Pretrained,
    SelfKDModule,
    SmallCNN,
    SmallTransformer,
    SupervisedModule,
    TranslationModule,
    export_checkpoint,
    load_exported,
    translation_transformer,
)
from distill_lightning.cli import main
from distill_lightning.compression import PruneUnits, PruneWeights, Quantize
from distill_lightning.compression.onnx.session import OnnxNetwork
from distill_lightning.networks.provenance import recipe_of
from distill_lightning.studies.export import formats
from distill_lightning.studies.export.citations import CITATIONS
from distill_lightning.testing import TinyDataModule, tiny_trainer

SHAPE = (1, 8, 8)
pytestmark = pytest.mark.filterwarnings("ignore:the last step of the compression is over")


def small(width=8):
    return SmallCNN(num_classes=3, width=width)


def teachers():
    return [small(12), small(16)]


METHODS = {
    "supervised": lambda: SupervisedModule(small(), num_classes=3, input_shape=SHAPE),
    "kd": lambda: KDModule(small(), teachers(), num_classes=3, input_shape=SHAPE, temperature=3.0),
    "feed": lambda: FEEDModule(
        small(), teachers(), num_classes=3, input_shape=SHAPE, student_layer="features", beta=2.0
    ),
    "self_kd": lambda: SelfKDModule(small(), num_classes=3, input_shape=SHAPE),
    "meal_v2": lambda: MEALV2Module(small(), teachers(), num_classes=3, input_shape=SHAPE),
    "extracurricular": lambda: ExtracurricularModule(
        small(), teachers(), num_classes=3, input_shape=SHAPE, samplers=[MixupSampler()]
    ),
    "pruned": lambda: CompressionBaseline(
        small(), num_classes=3, input_shape=SHAPE, steps=[PruneWeights(amount=0.5, finetune_epochs=1)]
    ),
    "narrow_and_quantized": lambda: CompressionBaseline(
        small(), num_classes=3, input_shape=SHAPE,
        steps=[
            PruneUnits(amount=0.5, unit="channel", finetune_epochs=1), Quantize(weight_bits=4, finetune_epochs=1),
        ],
    ),
}  # fmt: skip


def trained(module, folder, **data):
    """The checkpoint of a short training, and its Trainer."""
    trainer = tiny_trainer(default_root_dir=folder, max_epochs=2 if isinstance(module, CompressionBaseline) else 1)
    trainer.fit(module, TinyDataModule(**data))
    trainer.save_checkpoint(folder / "run.ckpt")
    return folder / "run.ckpt", trainer


def card_of(folder):
    """The header of a card, its parts by title, and the values in those that are YAML."""
    _, header, body = (folder / "README.md").read_text().split("---\n", 2)
    parts = dict(part.split("\n\n", 1) for part in body.split("\n## ")[1:])
    found = {name: part.split("```yaml\n")[1].split("```")[0] for name, part in parts.items() if "```yaml" in part}
    return yaml.safe_load(header), parts, {name: yaml.safe_load(text) for name, text in found.items()}


def outputs(network, inputs):
    network.eval()
    with torch.no_grad():
        return network(inputs)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*discriminator")
@pytest.mark.parametrize("name", METHODS)
def test_the_student_of_every_method_is_exported_from_its_checkpoint_alone(name, tmp_path):
    module = METHODS[name]()
    checkpoint, _ = trained(module, tmp_path)
    images = torch.rand(5, *SHAPE)
    export = export_checkpoint(checkpoint, tmp_path / "out")
    wanted = outputs(module.student, images)
    assert torch.equal(outputs(export.student, images), wanted)
    assert torch.equal(outputs(load_exported(tmp_path / "out"), images), wanted)
    # The student alone: its own names, and nothing of teachers, discriminators or adaptors.
    held = load_file(tmp_path / "out/model.safetensors")
    assert held.keys() == export.student.state_dict().keys()
    assert sum(value.numel() for value in held.values()) <= sum(v.numel() for v in small().state_dict().values())
    (file,) = export.files
    assert (file.difference, file.nbytes) == (0, (tmp_path / "out/model.safetensors").stat().st_size)
    _, parts, blocks = card_of(tmp_path / "out")
    citation = CITATIONS.get(type(module).__name__)
    assert ("Citation" in parts) == (citation is not None)
    assert citation is None or citation in parts["Citation"]
    told = {name: of["fingerprint"] for name, of in blocks.get("Teachers", {}).items()}
    assert told == module.fingerprints()


@pytest.mark.parametrize("kind", ["safetensors", "hub"])
def test_a_network_that_translates_is_its_weights(kind, tmp_path, capsys):
    pytest.importorskip({"hub": "huggingface_hub"}.get(kind, "transformers"))
    network = translation_transformer(20, width=8, encoder_depth=1, decoder_depth=1, heads=2, feedforward=8)
    module, trainer = TranslationModule(network, num_classes=20, pad_id=0), tiny_trainer()
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    assert main(["export", str(tmp_path / "run.ckpt"), "--output", str(tmp_path / "out"), "--to", kind]) == 0
    loaded = load_exported(tmp_path / "out")
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in network.state_dict().items())
    source, first = torch.full((2, 3), 5), torch.full((2, 1), 1)
    with torch.no_grad():
        found = [one.eval()(input_ids=source, decoder_input_ids=first).logits for one in (network, loaded)]
    assert torch.equal(*found)
    header, parts, _ = card_of(tmp_path / "out")
    assert header["pipeline_tag"] == "translation"
    assert "decoder_input_ids" in parts["Use"]
    assert "was not run" in parts["Files"]
    with pytest.raises(InputError, match=r"MarianMTModel translates step by step.*give --to safetensors"):
        export_checkpoint(tmp_path / "run.ckpt", tmp_path / "other", to=["onnx"])
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_a_network_that_reads_tokens(tmp_path):
    network = SmallTransformer(3, length=6, vocabulary=11, width=8, heads=2, feedforward=8)
    module, trainer = SupervisedModule(network, num_classes=3, input_shape=(6,)), tiny_trainer()
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    export_checkpoint(tmp_path / "run.ckpt", tmp_path / "out", to=["safetensors", "torch_export"])
    tokens = torch.randint(11, (5, 6))
    program = torch.export.load(tmp_path / "out/model.pt2").module()
    torch.testing.assert_close(program(tokens), outputs(network, tokens), atol=1e-5, rtol=0)
    _, parts, _ = card_of(tmp_path / "out")
    assert "does not say" in parts["Metrics"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kd", "narrow_and_quantized"])
def test_other_runtimes_compute_the_same_at_every_batch_size(name, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    module = METHODS[name]()
    checkpoint, _ = trained(module, tmp_path)
    export = export_checkpoint(checkpoint, tmp_path / "out", to=["torch_export", "onnx"])
    assert [file.path.name for file in export.files] == ["model.pt2", "model.onnx"]
    for count in (1, 4):
        images = torch.rand(count, *SHAPE)
        wanted = outputs(module.student, images)
        program = torch.export.load(tmp_path / "out/model.pt2").module()
        torch.testing.assert_close(program(images), wanted, atol=1e-5, rtol=0)
        torch.testing.assert_close(OnnxNetwork(tmp_path / "out/model.onnx")(images), wanted, atol=1e-5, rtol=0)
    assert all(file.milliseconds > 0 and file.of_network > 0 for file in export.files)


@pytest.mark.slow
def test_the_card_says_what_is_known(tmp_path):
    module = METHODS["kd"]()
    checkpoint, trainer = trained(module, tmp_path, samples=40)
    export_checkpoint(checkpoint, tmp_path / "out")
    header, parts, blocks = card_of(tmp_path / "out")
    assert header == {
        "library_name": "distill_lightning",
        "tags": ["distill_lightning", "pytorch", "KDModule"],
        "pipeline_tag": "image-classification",
        "metrics": ["accuracy"],
    }
    assert blocks["Recipe"]["student"] == recipe_of(small())
    assert blocks["Recipe"]["options"]["temperature"] == 3.0
    assert blocks["Recipe"]["training"]["optimizers"][0]["lr"] == trainer.optimizers[0].defaults["lr"]
    assert blocks["Teachers"]["teachers"]["fingerprint"] == module.fingerprints()["teachers"]
    assert [told["arguments"]["width"] for told in blocks["Teachers"]["teachers"]["recipe"]["networks"]] == [12, 16]
    assert blocks["Data"]["class"].endswith("TinyDataModule")
    assert blocks["Data"]["subset"] == 40
    accuracy = float(trainer.callback_metrics["val/accuracy"])
    assert f"| val/accuracy | {accuracy:.6g} |" in parts["Metrics"]
    assert f"| val/aurc | {float(trainer.callback_metrics['val/aurc']):.6g} ‰ |" in parts["Metrics"]
    assert blocks["Versions"]["trained with"]["torch"] == str(torch.__version__)
    assert "@misc{hinton2015distilling" in parts["Citation"]


@pytest.mark.slow
def test_the_folder_says_what_goes_in_and_what_comes_out(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    data = DigitsDataModule(subset=64, val_size=32, image_size=8)
    module = SupervisedModule(SmallCNN(num_classes=10, width=4), num_classes=10, input_shape=data.input_shape)
    trainer = tiny_trainer(default_root_dir=tmp_path, max_epochs=1)
    # Indices are for the training; the data are those inside.
    trainer.fit(module, IndexedDataModule(data))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    export_checkpoint(tmp_path / "run.ckpt", tmp_path / "out", to=["safetensors", "torch_export", "onnx"])
    told = json.loads((tmp_path / "out/config.json").read_text())
    assert (told["class_names"], told["mean"], told["std"]) == (list("0123456789"), [data.mean], [data.std])
    _, parts, blocks = card_of(tmp_path / "out")
    assert blocks["Data"]["class"].endswith("DigitsDataModule")
    assert "shape `(N, 1, 8, 8)`" in parts["Use"]
    assert "`(pixel / 255 - mean) / std`" in parts["Use"]
    assert "logits `(N, 10)` of the classes 0 0, 1 1, 2 2" in parts["Use"]
    # Every way that the card names works, in its folder.
    monkeypatch.chdir(tmp_path / "out")
    images = torch.rand(3, *data.input_shape)
    wanted = outputs(module.student, images)
    ways = re.findall(r"```python\n(.*?)```", parts["Use"], flags=re.DOTALL)
    assert len(ways) == 3
    for way in ways:
        found = {"inputs": images.numpy()}
        exec(way, found)
        given = found["student"](images) if "student" in found else torch.from_numpy(found["outputs"])
        torch.testing.assert_close(given, wanted, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_the_hub_reads_the_folder_and_nothing_is_sent(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def refuse(*_, **__):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    module = METHODS["supervised"]()
    checkpoint, _ = trained(module, tmp_path)
    export = export_checkpoint(checkpoint, tmp_path / "out", to=["hub"])
    assert export.files[0].difference == 0
    card = hub.ModelCard.load(tmp_path / "out/README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("distill_lightning", "image-classification")
    fresh = small()
    hub.load_torch_model(fresh, tmp_path / "out", strict=True)
    images = torch.rand(2, *SHAPE)
    assert torch.equal(outputs(fresh, images), outputs(module.student, images))


def test_missing_packages_are_named(tmp_path, monkeypatch):
    checkpoint, _ = trained(METHODS["supervised"](), tmp_path)
    for kind, package in (("hub", "huggingface_hub"), ("onnx", "onnxruntime")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(
                InputError, match=rf"{package} is not installed: pip install 'distill-lightning\[{kind}"
            ):
                export_checkpoint(checkpoint, tmp_path / "out", to=[kind])


# What cannot be


class Own(nn.Sequential):
    """A network of nobody's factory."""

    def __init__(self, width=4):
        super().__init__(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 3))


@pytest.mark.slow
def test_a_network_of_ones_own_is_given_in_a_configuration_or_in_python(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    module = SupervisedModule(Own(), num_classes=3, input_shape=SHAPE)
    checkpoint, _ = trained(module, tmp_path)
    with pytest.raises(InputError, match=r"run\.ckpt does not tell how its student was built.* --config FILE, or in"):
        export_checkpoint(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    images = torch.rand(2, *SHAPE)
    export = export_checkpoint(checkpoint, tmp_path / "out", student=Own(), to=["safetensors", "torch_export"])
    assert torch.equal(outputs(export.student, images), outputs(module.student, images))
    assert torch.equal(outputs(load_exported(tmp_path / "out", Own()), images), outputs(module.student, images))
    with pytest.raises(InputError, match=r"config\.json does not tell how the network was built: give load_exported"):
        load_exported(tmp_path / "out")
    with pytest.raises(InputError, match="another architecture than Own"):
        export_checkpoint(checkpoint, tmp_path / "out", student=Own(5))
    config = {
        "model": {
            "class_path": "SupervisedModule",
            "init_args": {"student": {"class_path": f"{__name__}.Own"}, "num_classes": 3},
        },
        "data": {"class_path": "distill_lightning.testing.TinyDataModule"},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["export", str(checkpoint), "--config", "config.yaml"]) == 0
    assert "run_export/model.safetensors" in capsys.readouterr().out


def test_the_shape_of_the_inputs_is_asked_for_where_it_is_not_known(tmp_path):
    checkpoint, _ = trained(SupervisedModule(small(), num_classes=3), tmp_path)
    with pytest.raises(InputError, match=r"run\.ckpt does not say what shape its inputs have: give --input_shape"):
        export_checkpoint(checkpoint, tmp_path / "out")
    with pytest.raises(InputError, match=r"SmallCNN does not take an input of shape \(3, 8, 8\)"):
        export_checkpoint(checkpoint, tmp_path / "out", input_shape=(3, 8, 8))
    assert not (tmp_path / "out").exists()
    export_checkpoint(checkpoint, tmp_path / "out", input_shape=(1, 10, 10))
    assert json.loads((tmp_path / "out/config.json").read_text())["input_shape"] == [1, 10, 10]


def test_files_that_are_no_checkpoint_of_a_method_are_refused(tmp_path):
    torch.save(small().state_dict(), tmp_path / "weights.pt")
    torch.save({"state_dict": {"a": torch.ones(1)}, "pytorch-lightning_version": "2.0.0"}, tmp_path / "other.ckpt")
    for name, words in (
        ("nowhere.ckpt", "no checkpoint at"), ("weights.pt", "is not a checkpoint of a training"),
        ("other.ckpt", "of another kind of module, which has no student"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            export_checkpoint(tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_names_no_code_and_no_file(tmp_path):
    network = Pretrained(small(), SupervisedModule(small(), num_classes=3).export_student(tmp_path / "w.safetensors"))
    checkpoint, _ = trained(SupervisedModule(network, num_classes=3, input_shape=SHAPE), tmp_path)
    (tmp_path / "w.safetensors").unlink()
    export_checkpoint(checkpoint, tmp_path / "out")
    assert "w.safetensors" not in (tmp_path / "out/config.json").read_text()
    content = torch.load(checkpoint, weights_only=True)
    content["recipes"]["student"] = {"factory": "os.system", "arguments": {"command": "touch here"}}
    torch.save(content, checkpoint)
    with pytest.raises(InputError, match=r"unknown network factory 'os\.system'"):
        export_checkpoint(checkpoint, tmp_path / "out")
    told = json.loads((tmp_path / "out/config.json").read_text())
    (tmp_path / "out/config.json").write_text(json.dumps({**told, "recipe": content["recipes"]["student"]}))
    with pytest.raises(InputError, match=r"unknown network factory 'os\.system'"):
        load_exported(tmp_path / "out")
    for damaged in ("{", "[]", "{}"):
        (tmp_path / "out/config.json").write_text(damaged)
        with pytest.raises(InputError, match=r"config\.json is damaged"):
            load_exported(tmp_path / "out")


class Moody(nn.Linear):
    """Gives something else every time."""

    def forward(self, inputs):
        return super().forward(inputs.flatten(1)) + torch.rand(())


def test_a_file_that_gives_something_else_is_refused(tmp_path, monkeypatch):
    checkpoint, _ = trained(SupervisedModule(Moody(64, 3), num_classes=3, input_shape=SHAPE), tmp_path)
    with pytest.raises(InputError, match=r"model\.safetensors does not compute what Moody does: with a batch of 1"):
        export_checkpoint(checkpoint, tmp_path / "out", student=Moody(64, 3))
    assert not list((tmp_path / "out").iterdir())


def test_what_is_no_number_equals_itself():
    network = nn.Linear(4, 2)
    with torch.no_grad():
        network.weight[0, 1] = torch.nan
    like, path, inputs = copy.deepcopy(network), Path("model.safetensors"), torch.randn(3, 4)
    formats._check_weights(network, like, path)
    assert formats._gap(network, like, path, inputs, "safetensors") == 0
    with torch.no_grad():
        like.weight[0, 1] = 0
    with pytest.raises(InputError, match=r"does not hold what Linear does: weight differs"):
        formats._check_weights(network, like, path)
    with pytest.raises(InputError, match=r"does not compute what Linear does: .* differ by inf"):
        formats._gap(network, like, path, inputs, "onnx")


def test_a_folder_of_something_else_is_not_touched(tmp_path, capsys):
    checkpoint, _ = trained(METHODS["supervised"](), tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("years")
    assert main(["export", str(checkpoint), "--output", str(tmp_path / "mine")]) == 2
    assert "holds something else: give an empty or new one" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_what_was_exported_before_stays_if_the_next_export_fails(tmp_path, monkeypatch):
    checkpoint, _ = trained(METHODS["supervised"](), tmp_path)
    export_checkpoint(checkpoint, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert before.keys() == {"model.safetensors", "config.json", "README.md"}
    other, _ = trained(SupervisedModule(small(16), num_classes=3, input_shape=SHAPE), tmp_path)
    monkeypatch.setattr(formats, "load_exported", lambda _: small(16))
    with pytest.raises(InputError, match="does not compute what SmallCNN does"):
        export_checkpoint(other, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.slow
def test_the_verb_prints_sizes_differences_and_times(tmp_path, capsys):
    checkpoint, _ = trained(METHODS["kd"](), tmp_path)
    folder = tmp_path / "out"
    assert main(["export", str(checkpoint), "--to", "safetensors", "torch_export", "--output", str(folder)]) == 0
    printed = capsys.readouterr().out
    for name in ("model.safetensors", "model.pt2"):
        assert f"{(folder / name).stat().st_size:,}" in printed
        assert str(folder / name) in printed
    assert "ms, batch 1" in printed
    # Again into the same folder.
    assert main(["export", str(checkpoint), "--output", str(folder)]) == 0
    for arguments, words in (
        ([str(checkpoint), "--to", "keras"], "export: argument --to: invalid choice: 'keras'"),
        ([], "export: the following arguments are required: checkpoint"),
        ([str(tmp_path / "nowhere.ckpt")], "no checkpoint at"),
    ):
        capsys.readouterr()
        assert main(["export", *arguments]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert words in line


def test_options_are_read_without_pytorch():
    code = (
        "import sys; from distill_lightning.studies.export.config import parse_config as p\n"
        "c = p(['a/b.ckpt', '--to', 'onnx', 'hub', 'onnx']); print(c.formats, c.output, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['onnx', 'hub'] a/b_export False"


def test_examples_are_of_the_networks_kind():
    images = formats.example_batch(small().half(), SHAPE, 3)
    assert (images.shape, images.dtype) == ((3, *SHAPE), torch.float16)
    tokens = formats.example_batch(nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(20, 3)), (5,), 9)
    assert (tokens.shape, tokens.dtype) == ((9, 5), torch.int64)
    assert set(tokens.flatten().tolist()) == set(range(7))
