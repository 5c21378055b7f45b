"""Going on in the middle of an epoch of sentences: in other batches or another order it is refused."""

import pytest
import pytorch_lightning as pl
import torch

from distill_lightning import InputError, NoSearch, TranslationDataModule, TranslationModule, translation_transformer
from distill_lightning.testing import tiny_trainer
from distill_lightning.testing.processes import LeaveTheGroup, process_strategy

pytestmark = [pytest.mark.slow, pytest.mark.lightning(since=(2, 5))]

WORDS = ("a dog", "two cats", "the house", "a red ball", "some man")


class Save(pl.callbacks.Checkpoint):
    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 3:
            trainer.save_checkpoint(self.path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    lines = [f"{WORDS[number % 5]} {' '.join(WORDS[: 1 + number // 5 % 5])} {number}." for number in range(60)]
    for language in ("en", "de"):
        (folder / f"train.{language}").write_text("\n".join(lines))
    return folder


def fit(folder, *, ckpt_path=None, trainer=(), **options):
    torch.manual_seed(0)
    network = translation_transformer(
        280, width=8, encoder_depth=1, decoder_depth=1, heads=2, feedforward=8, dropout=0.0
    )
    module = TranslationModule(network, num_classes=280, pad_id=0, beam=NoSearch(), optimizer=torch.optim.SGD)
    options = {"max_tokens": 400, "vocab_size": 280, "val_size": 5, "test_size": 5} | options
    data = TranslationDataModule(data_dir=folder, **options)
    options = {"max_epochs": 2, "limit_val_batches": 0, "callbacks": [Save(folder / "middle.ckpt")]} | dict(trainer)
    is_saved = any(isinstance(one, Save) for one in options["callbacks"])
    tiny_trainer(enable_checkpointing=is_saved, **options).fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module.state_dict()


@pytest.fixture(scope="module")
def whole(folder):
    return fit(folder)


@pytest.mark.usefixtures("whole")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order_seed": 1}, "of data with seed=0, order_seed=0, and now they have seed=0, order_seed=1"),
        ({"seed": 1}, "of data with seed=0, order_seed=0, and now they have seed=1, order_seed=1"),
        ({"max_tokens": 200}, r"batches of max_tokens=400 of all processes together, .* of max_tokens=200 of all"),
    ],
)
def test_other_batches_and_another_order_are_refused(folder, options, message):
    options |= {"trainer": {"callbacks": []}}
    with pytest.raises(InputError, match=message) as error:
        fit(folder, ckpt_path=folder / "middle.ckpt", **options)
    assert "\n" not in str(error.value)


def test_two_processes_go_on_where_one_was(folder, whole):
    several = {"devices": 2, "strategy": process_strategy(), "callbacks": [LeaveTheGroup()]}
    resumed = fit(folder, ckpt_path=folder / "middle.ckpt", max_tokens=200, trainer=several)
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=1e-4, atol=1e-5)
