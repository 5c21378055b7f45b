"""A compression on the command line: its checkpoints are tested and resumed as those of any other module."""

import pytest
import torch
import yaml

from distill_lightning import SmallCNN, cli
from distill_lightning.callbacks import CompressionCallback
from distill_lightning.compression.costs.parameters import count_parameters

# A configuration may be resumed without the callbacks that have written its checkpoints, and into their folder.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path."),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]

STEPS = [
    {"class_path": "PruneUnits", "init_args": {"amount": 0.5, "unit": "channel", "finetune_epochs": 2}},
    {"class_path": "Quantize", "init_args": {"weight_bits": 4}},
]


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Writes a short compression under its dense teacher into the working folder."""
    monkeypatch.chdir(tmp_path)
    network = {"class_path": "SmallCNN", "init_args": {"num_classes": 10, "width": 2}}
    kept = {"dirpath": "kept", "filename": "{epoch}", "save_top_k": -1}
    content = {
        "trainer": {
            "max_epochs": 3, "accelerator": "cpu", "logger": False,
            "enable_progress_bar": False, "enable_model_summary": False,
            "callbacks": [{"class_path": "ModelCheckpoint", "init_args": kept}],
        },
        "model": {
            "class_path": "CompressionBaseline",
            "init_args": {
                "network": network, "dense_epochs": 1, "teacher": "dense", "steps": STEPS,
                "report": {"class_path": "Measurements", "init_args": {"batch_sizes": []}},
            },
        },
        "data": {"class_path": "DigitsDataModule", "init_args": {"subset": 64, "val_size": 32, "image_size": 8}},
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    return "config.yaml"


@pytest.mark.slow
def test_a_compression_with_a_dense_teacher_is_tested_and_resumed(config, tmp_path, monkeypatch):
    callbacks = []
    setup = CompressionCallback.setup

    def watching(self, trainer, pl_module, stage):
        callbacks.append(self)
        setup(self, trainer, pl_module, stage)

    monkeypatch.setattr(CompressionCallback, "setup", watching)
    assert cli.main(["fit", "--config", config]) == 0
    whole = callbacks[-1]
    expected = torch.load("kept/compressed.ckpt", weights_only=True)["state_dict"]
    # In the middle of a phase, and after the last epoch.
    for name in ("epoch=1", "epoch=2"):
        assert cli.main(["fit", "--config", config, "--ckpt_path", f"kept/{name}.ckpt"]) == 0
        resumed = callbacks[-1]
        assert resumed is not whole
        assert not resumed.compressor.waiting
        assert count_parameters(resumed.compressor.dense) == count_parameters(SmallCNN(10, width=2))
        assert [stage.as_plain() for stage in resumed.stages] == [stage.as_plain() for stage in whole.stages]
        state = {f"student.{name}": value for name, value in resumed.compressor.network.state_dict().items()}
        assert state.keys() == expected.keys()
        assert not [name for name, value in expected.items() if not torch.equal(value, state[name])]
    assert cli.main(["test", "--config", config, "--ckpt_path", "kept/compressed.ckpt"]) == 0
