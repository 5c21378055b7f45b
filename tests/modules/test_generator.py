"""GeneratorModule: the bound against a naive one, exact resuming, two processes, and samples worth the name."""

import math
from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from distill_lightning import Batch, DigitsDataModule, GeneratorModule, GeneratorSampler, InputError, OneCycle
from distill_lightning.data.views import Draws
from distill_lightning.layers import ImageDecoder, ImageEncoder
from distill_lightning.testing import TinyDataModule, tiny_trainer

# A process that has used a GPU cannot be forked; where it can, its imports need not be made again.
PROCESSES = "ddp_spawn" if torch.cuda.is_available() else "ddp_fork"
RANGE = ((0 - 0.4) / 0.25, (1 - 0.4) / 0.25)


def generator_of(**options):
    torch.manual_seed(options.pop("init", 0))
    return GeneratorModule(**({"input_shape": (1, 8, 8), "latent_dim": 3, "output_range": RANGE, "width": 4} | options))


def fitted(module=None, **options):
    module = module or generator_of()
    trainer = tiny_trainer(**options)
    trainer.fit(module, datamodule=TinyDataModule())
    return module, trainer


def test_the_loss_is_the_negative_evidence_lower_bound():
    module, _ = fitted(max_epochs=1)
    with torch.no_grad():
        module.pixel_log_var.fill_(-0.3)
    data = TinyDataModule()
    batch = next(iter(data.train_dataloader()))
    logged = {}
    module.log_dict = lambda values, **_: logged.update(values)
    loss = float(module.training_step(batch, 0))
    draws = Draws(module.seed + 0x47454E, batch.index, batch.view).normal(3)
    reconstruction = kl = 0.0
    with torch.no_grad():
        codes = module.encoder(batch.input)
        for row in range(len(batch.input)):
            mean, log_var = codes[row, :3], codes[row, 3:]
            image = module.generator((mean + torch.exp(log_var) ** 0.5 * draws[row])[None])[0]
            for pixel, target in zip(image.flatten().tolist(), batch.input[row].flatten().tolist(), strict=True):
                density = math.exp(-((target - pixel) ** 2) / (2 * math.exp(-0.3)))
                reconstruction -= math.log(density / math.sqrt(2 * math.pi * math.exp(-0.3)))
            for m, s in zip(mean.tolist(), log_var.tolist(), strict=True):
                kl += (math.exp(s) + m**2 - 1 - s) / 2
    count = len(batch.input)
    assert float(logged["train/reconstruction"]) == pytest.approx(reconstruction / count, rel=1e-4)
    assert float(logged["train/kl"]) == pytest.approx(kl / count, rel=1e-3)
    assert loss == pytest.approx((reconstruction + kl) / count, rel=1e-4)


def test_everything_learns():
    before = {name: value.clone() for name, value in generator_of().named_parameters()}
    module, _ = fitted(max_epochs=2)
    assert all(not torch.equal(value, before[name]) for name, value in module.named_parameters())


@pytest.mark.slow
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path):
    whole, _ = fitted(max_epochs=3)
    first, trainer = fitted(max_epochs=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    resumed = generator_of(init=9)
    tiny_trainer(max_epochs=3).fit(resumed, datamodule=TinyDataModule(), ckpt_path=str(tmp_path / "one.ckpt"))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert torch.load(tmp_path / "one.ckpt", weights_only=True)["hyper_parameters"]["latent_dim"] == 3
    loaded = GeneratorModule.load_from_checkpoint(tmp_path / "one.ckpt")
    codes = torch.randn(2, 3)
    assert torch.equal(loaded(codes), first(codes))


@pytest.mark.slow
def test_two_processes_equal_one():
    single, double = generator_of(), generator_of()
    tiny_trainer(max_epochs=2).fit(single, datamodule=TinyDataModule(batch_size=8))
    trainer = tiny_trainer(max_epochs=2, devices=2, strategy=PROCESSES)
    trainer.fit(double, datamodule=TinyDataModule(batch_size=4))
    for name, value in single.state_dict().items():
        assert torch.allclose(value, double.state_dict()[name], rtol=1e-4, atol=1e-5), name


def test_draws_differ_without_indices_too():
    module = generator_of()

    class Plain(TinyDataModule):
        def train_dataloader(self):
            loader = super().train_dataloader()
            return DataLoader([(batch.input, batch.target) for batch in loader], batch_size=None)

    seen = []
    original = module._draws
    module._draws = lambda batch, number: seen.append(original(batch, number)) or original(batch, number)
    tiny_trainer(max_epochs=2, limit_val_batches=0).fit(module, datamodule=Plain())
    drawn = torch.stack([draws.normal(2) for draws in seen])
    assert len(drawn.flatten().unique()) == drawn.numel()


@pytest.mark.slow
def test_schedules_are_stepped_as_in_every_module():
    rates = []

    class Rates(pl.Callback):
        def on_train_batch_start(self, trainer, *args):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    fitted(generator_of(lr_scheduler=OneCycle), max_epochs=2, callbacks=[Rates()])
    assert len(set(rates)) == 6
    assert rates[-1] == pytest.approx(1e-3 * 1e-4)
    reduced, _ = fitted(generator_of(lr_scheduler=partial(ReduceLROnPlateau, patience=0, threshold=1e9)), max_epochs=3)
    assert reduced.trainer.optimizers[0].param_groups[0]["lr"] < 1e-3


def test_images_stay_in_their_range_and_have_their_shape():
    decoder = ImageDecoder((2, 7, 10), 5, output_range=(-1.0, 3.0), width=4)
    images = decoder(100 * torch.randn(64, 5))
    assert images.shape == (64, 2, 7, 10)
    assert float(images.min()) >= -1
    assert float(images.max()) <= 3
    assert ImageEncoder((2, 7, 10), 5, width=4)(images).shape == (64, 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latent_dim": 0}, "sizes must be positive"),
        ({"input_shape": (8, 8)}, "sizes must be positive"),
        ({"output_range": (1.0, 1.0)}, "output_range must be"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(InputError, match=message):
        generator_of(**options)


def test_images_outside_the_range_are_refused():
    with pytest.raises(InputError, match=r"output_range is \(0.000, 1.000\), but the images go from -1.6"):
        fitted(generator_of(output_range=(0.0, 1.0)))


def test_the_exported_generator_is_a_plain_decoder(tmp_path):
    module = generator_of()
    plain = ImageDecoder((1, 8, 8), 3, output_range=RANGE, width=4)
    plain.load_state_dict(load_file(module.export_generator(tmp_path / "generator.safetensors")), strict=True)
    codes = torch.randn(4, 3)
    assert torch.equal(plain(codes), module(codes))
    with pytest.raises(InputError, match="weights are written as"):
        module.export_generator(tmp_path / "generator.npz")


@pytest.mark.slow
def test_samples_of_digits_are_nearer_to_digits_than_noise_or_an_untrained_generator():
    data = DigitsDataModule(image_size=8, padding=0)
    low, high = (0 - data.mean) / data.std, (1 - data.mean) / data.std
    options = {"input_shape": (1, 8, 8), "latent_dim": 8, "output_range": (low, high), "width": 16}
    untrained, module = generator_of(**options), generator_of(**options)
    tiny_trainer(max_epochs=25).fit(module, datamodule=data)
    real = torch.cat([Batch.of(batch).input for batch in data.val_dataloader()]).flatten(1)

    def distance(samples):
        return float(torch.cdist(samples.flatten(1), real).min(dim=1).values.mean())

    codes = torch.randn(256, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        trained, fresh = distance(module(codes)), distance(untrained(codes))
    noise = distance(torch.rand(256, 64, generator=torch.Generator().manual_seed(0)) * (high - low) + low)
    assert trained < 0.7 * min(fresh, noise)
    # Not one picture again and again.
    with torch.no_grad():
        spread = float(torch.pdist(module(codes).flatten(1)).mean())
    assert spread > 0.5 * float(torch.pdist(real).mean())


def test_a_sampler_takes_it():
    module = generator_of()
    sampler = GeneratorSampler(module.generator, 3)
    index = torch.arange(4)
    images = sampler(torch.zeros(4, 1, 8, 8), Draws(0, index, index))
    assert images.shape == (4, 1, 8, 8)
    assert not any(parameter.requires_grad for parameter in sampler.parameters())
    assert isinstance(sampler.generator, nn.Module)


# What the contract asks of a method, and a generator without a student must keep, too


def test_a_step_in_bf16_and_a_batch_of_one_are_finite():
    module, trainer = fitted(precision="bf16-mixed")
    assert torch.isfinite(trainer.callback_metrics["train/loss"])
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())
    module = generator_of()
    trainer = tiny_trainer()
    trainer.fit(module, datamodule=TinyDataModule(samples=3, batch_size=1))
    assert torch.isfinite(trainer.callback_metrics["train/loss"])


def test_the_optimiser_holds_exactly_what_learns():
    module = generator_of()
    optimizer = module.configure_optimizers()
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in module.parameters()}
    _, trainer = fitted(module, accumulate_grad_batches=2, gradient_clip_val=1e-3)
    assert trainer.global_step == 2


def test_a_step_does_not_wait_for_the_device_after_the_first():
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._local_scalar_dense.default:
                waits.append(func)
            return func(*args, **(kwargs or {}))

    waits, steps, module = [], [], generator_of(optimizer=partial(torch.optim.SGD, lr=1e-3))
    step = module.optimizer_step

    def watched(*args, **options):
        with Watch():
            step(*args, **options)
        steps.append(len(waits))

    module.optimizer_step = watched
    fitted(module, max_epochs=2)
    # The first one looks at the range of the pixels.
    assert steps == [steps[0]] * 6
