"""RunKeeper: history, the selected epoch, and files that are whole."""

import pytest
import torch
from safetensors.torch import load_file

from distill_lightning import SupervisedModule
from distill_lightning.callbacks import RunKeeper
from distill_lightning.errors import InputError
from distill_lightning.testing import TinyDataModule, TinyNet, tiny_trainer

NAN = float("nan")


class Scripted(SupervisedModule):
    """Validates to what the script says, and remembers its weights."""

    script = (0.5, 0.8, 0.8, 0.6)

    def on_validation_epoch_end(self):
        if self.trainer.sanity_checking:
            return
        self.log("val/accuracy", self.script[self.current_epoch])
        self.remembered = [*getattr(self, "remembered", []), self.student.head.weight.detach().clone()]

    def validation_step(self, batch, batch_idx):
        pass


@pytest.fixture
def kept(tmp_path):
    module, keeper = Scripted(TinyNet(), num_classes=3), RunKeeper(tmp_path, seed=3)
    tiny_trainer(max_epochs=4, callbacks=[keeper], enable_checkpointing=True).fit(module, datamodule=TinyDataModule())
    return module, keeper, tmp_path


def test_the_first_of_the_best_epochs_is_selected(kept):
    module, keeper, folder = kept
    assert keeper.selected_epoch == 2
    assert torch.equal(load_file(folder / "selected.safetensors")["head.weight"], module.remembered[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "selected"),
    [((NAN, 0.5, 0.8, 0.6), 3), ((0.5, NAN, 0.8, 0.6), 3), ((0.8, 0.5, NAN, NAN), 1), ((NAN, NAN, NAN, NAN), 1)],
)
@pytest.mark.parametrize("mode", ["max", "min"])
def test_an_epoch_without_a_number_hides_no_other(tmp_path, script, selected, mode):
    sign = 1 if mode == "max" else -1
    module, keeper = Scripted(TinyNet(), num_classes=3), RunKeeper(tmp_path, seed=3, mode=mode)
    module.script = tuple(sign * value for value in script)
    tiny_trainer(max_epochs=4, callbacks=[keeper], enable_checkpointing=True).fit(module, datamodule=TinyDataModule())
    assert keeper.selected_epoch == selected
    weight = load_file(tmp_path / "selected.safetensors")["head.weight"]
    assert torch.equal(weight, module.remembered[selected - 1])


def test_a_metric_that_is_not_logged_is_named(tmp_path):
    keeper = RunKeeper(tmp_path, seed=3, monitor="val/acuracy")
    trainer = tiny_trainer(max_epochs=1, callbacks=[keeper], enable_checkpointing=True)
    with pytest.raises(InputError, match=r"val/acuracy was not logged .* one of .*val/accuracy"):
        trainer.fit(Scripted(TinyNet(), num_classes=3), datamodule=TinyDataModule())


@pytest.mark.slow
def test_the_history_has_a_line_per_epoch(kept):
    _, keeper, _ = kept
    assert [line["epoch"] for line in keeper.history] == [1, 2, 3, 4]
    assert [line["val/accuracy"] for line in keeper.history] == pytest.approx(Scripted.script)
    assert all(line["seconds"] > 0 and line["train/loss"] > 0 for line in keeper.history)


@pytest.mark.slow
def test_only_whole_files_are_left_and_the_checkpoint_is_safe(kept):
    _, keeper, folder = kept
    assert {path.name for path in folder.iterdir()} == {"last.ckpt", "selected.safetensors"}
    state = torch.load(folder / "last.ckpt", weights_only=True)["callbacks"]["RunKeeper"]
    assert state["selected_epoch"] == 2
    assert state["history"] == keeper.history


@pytest.mark.slow
def test_random_numbers_depend_on_seed_and_epoch_alone(tmp_path):
    drawn = []

    class Drawing(SupervisedModule):
        def on_train_batch_start(self, batch, batch_idx):
            drawn.append((self.current_epoch, float(torch.rand(()))))

    for spoil in (0, 1):
        torch.manual_seed(spoil)
        keeper = RunKeeper(tmp_path, seed=3)
        trainer = tiny_trainer(max_epochs=2, callbacks=[keeper], enable_checkpointing=True)
        trainer.fit(Drawing(TinyNet(), num_classes=3), datamodule=TinyDataModule())
    assert drawn[:6] == drawn[6:]
    assert len({value for _, value in drawn[:6]}) == 6
