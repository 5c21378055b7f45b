"""Teachers that are no plain float networks, or are wrapped."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

from distill_lightning import FEEDModule, InputError, KDModule, SupervisedModule, TeacherStore
from distill_lightning.testing import TinyDataModule, TinyNet, tiny_trainer

# Of torch, about what is tried here.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.ao.quantization.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions:UserWarning"),
]


def net(seed=0, **options):
    torch.manual_seed(seed)
    return TinyNet(**options)


def quantized():
    return torch.ao.quantization.quantize_dynamic(net(1).eval(), {nn.Linear})


def exported(network=None):
    batches = torch.export.Dim("batch")
    example = (torch.zeros(2, 1, 8, 8),)
    network = net(1).eval() if network is None else network
    return torch.export.export(network, example, dynamic_shapes=({0: batches},)).module()


def normed(*, removed=False):
    network = net(1)
    weight_norm(network.head)
    if removed:
        parametrize.remove_parametrizations(network.head, "weight")
    return network


def fitted(module, **options):
    trainer = tiny_trainer(**({"max_epochs": 2} | options))
    trainer.fit(module, datamodule=TinyDataModule(views=2))
    return trainer


@pytest.mark.parametrize("make", [quantized, exported, normed])
def test_a_teacher_of_any_kind_teaches_what_it_says(make, tmp_path):
    module = KDModule(net(), make(), num_classes=3, hard_label_weight=0.0, temperature=2.0)
    trainer = fitted(module)
    batch = module.prepared((torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64)))
    says = make().eval() if make is not exported else net(1).eval()
    probs = torch.softmax(says(batch.input) / 2, dim=1)
    log_probs = torch.log_softmax(module.student(batch.input) / 2, dim=1)
    expected = 4 * (probs * (probs.log() - log_probs)).sum(dim=1).mean()
    assert torch.allclose(module.terms(batch)["kd"], expected, atol=1e-6)
    # Another module with the same teacher takes the checkpoint without a warning, and resumes.
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = KDModule(net(), make(), num_classes=3, hard_label_weight=0.0, temperature=2.0)
    tiny_trainer(max_epochs=3).fit(again, datamodule=TinyDataModule(views=2), ckpt_path=tmp_path / "last.ckpt")


@pytest.mark.slow
@pytest.mark.parametrize("make", [quantized, exported])
def test_a_store_knows_a_teacher_of_any_kind_again(make, tmp_path):
    fitted(KDModule(net(), TeacherStore(tmp_path, make()), num_classes=3))
    fitted(KDModule(net(), TeacherStore(tmp_path, make()), num_classes=3))
    other = net(2).eval()
    other = exported(other) if make is exported else torch.ao.quantization.quantize_dynamic(other, {nn.Linear})
    with pytest.raises(InputError, match="was made by something else: teachers is"):
        fitted(KDModule(net(), TeacherStore(tmp_path, other), num_classes=3))


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        nn.SyncBatchNorm.convert_sync_batchnorm,
        lambda network: torch.compile(network, backend="eager"),
    ],
    ids=["data parallel", "sync batch norm", "compiled"],
)
def test_a_store_takes_a_teacher_in_a_wrapper_for_what_it_is(wrap, tmp_path):
    fitted(KDModule(net(), TeacherStore(tmp_path, net(1)), num_classes=3))
    store = TeacherStore(tmp_path, wrap(net(1)))
    fitted(KDModule(net(), store, num_classes=3))
    assert store.is_complete


@pytest.mark.slow
def test_a_store_takes_a_weight_for_what_its_parametrization_gives(tmp_path):
    fitted(KDModule(net(), TeacherStore(tmp_path, normed()), num_classes=3))
    fitted(KDModule(net(), TeacherStore(tmp_path, normed(removed=True)), num_classes=3))


@pytest.mark.slow
def test_batch_norms_that_are_converted_later_are_tapped_as_before(tmp_path):
    def feed(teacher):
        return FEEDModule(net(), teacher, num_classes=3, student_layer="features.4", teacher_layers="features.4")

    batch = (torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64))
    plain = feed(net(1, width=8))
    module = copy.deepcopy(plain)
    # What Trainer(sync_batchnorm=True) does after the module was made.
    module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    assert isinstance(module.student.features[4], nn.SyncBatchNorm)
    terms, expected = module.terms(module.prepared(batch)), plain.terms(plain.prepared(batch))
    assert terms.keys() == expected.keys()
    assert all(torch.equal(terms[name], expected[name]) for name in terms)


@pytest.mark.slow
@pytest.mark.parametrize("wrap", [lambda network: network, lambda network: nn.Sequential(nn.Identity(), network)])
def test_an_exported_network_is_no_student(wrap):
    with pytest.raises(InputError, match=r"SupervisedModule: the student.* was made by torch\.export") as caught:
        SupervisedModule(wrap(exported()), num_classes=3)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_teacher_that_was_exported_in_train_mode_is_refused():
    with pytest.raises(InputError, match="was exported in train mode"):
        KDModule(net(), exported(net(1).train()), num_classes=3)
