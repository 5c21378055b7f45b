"""Networks that return more than a tensor, and batches whose keys are the names of a network's arguments."""

from collections import OrderedDict, namedtuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, default_collate

from distill_lightning import (
    Batch,
    CompressionBaseline,
    ExtracurricularModule,
    FEEDModule,
    KDModule,
    MEALV2Module,
    NoDiscriminator,
    PastModel,
    SelfKDModule,
    SupervisedModule,
    TeacherEnsemble,
)
from distill_lightning.errors import InputError
from distill_lightning.layers import call, only_output
from distill_lightning.testing import TinyNet, tiny_trainer

CLASSES = 3
INPUTS = torch.rand(24, 1, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(24) % CLASSES
LOADER = DataLoader(TensorDataset(INPUTS, LABELS), batch_size=8)

WithLogits = namedtuple("WithLogits", ["features", "logits"])


class Returning(TinyNet):
    """Returns what ``wrap`` makes of the logits."""

    def __init__(self, wrap):
        super().__init__()
        self.wrap = wrap

    def forward(self, inputs):
        return self.wrap(super().forward(inputs), inputs)


UNAMBIGUOUS = {
    "one tensor in a tuple": lambda logits, inputs: (logits,),
    "the only tensor in a tuple": lambda logits, inputs: [None, logits],
    "the only tensor in a dict": lambda logits, inputs: {"loss": None, "out": logits},
    "logits in a dict": lambda logits, inputs: OrderedDict(loss=logits.mean(), logits=logits),
    "logits in a NamedTuple": lambda logits, inputs: WithLogits(inputs, logits),
}


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


METHODS = {
    "supervised": lambda student, teacher: SupervisedModule(student, num_classes=CLASSES, optimizer=sgd),
    "kd": lambda student, teacher: KDModule(student, teacher, num_classes=CLASSES, optimizer=sgd),
    "self_kd": lambda student, teacher: SelfKDModule(student, num_classes=CLASSES, past=PastModel(), optimizer=sgd),
    "meal_v2": lambda student, teacher: MEALV2Module(
        student, teacher, num_classes=CLASSES, discriminator=NoDiscriminator(), optimizer=sgd
    ),
    "xcl": lambda student, teacher: ExtracurricularModule(student, teacher, num_classes=CLASSES, optimizer=sgd),
    "compression": lambda student, teacher: CompressionBaseline(
        student, num_classes=CLASSES, teacher=teacher, optimizer=sgd
    ),
    "feed": lambda student, teacher: FEEDModule(
        student,
        teacher,
        num_classes=CLASSES,
        student_layer="features",
        teacher_layers="features",
        input_shape=(1, 8, 8),
        optimizer=sgd,
    ),
}


def trained(method, student, teacher):
    module = METHODS[method](student, teacher)
    trainer = tiny_trainer(max_epochs=2)
    torch.manual_seed(0)
    trainer.fit(module, LOADER, LOADER)
    return {**trainer.callback_metrics, **module.student.state_dict()}


@pytest.mark.parametrize("wrap", UNAMBIGUOUS.values(), ids=UNAMBIGUOUS)
@pytest.mark.parametrize("method", METHODS)
def test_training_is_that_of_networks_that_return_the_logits_alone(method, wrap):
    def pair(make):
        torch.manual_seed(1)
        return make(), make()

    plain = trained(method, *pair(TinyNet))
    wrapped = trained(method, *pair(lambda: Returning(wrap)))
    assert plain.keys() == wrapped.keys()
    assert all(torch.equal(torch.as_tensor(plain[name]), torch.as_tensor(wrapped[name])) for name in plain)


@pytest.mark.parametrize(
    ("wrap", "told"),
    [
        (lambda logits, inputs: (logits, inputs), "Returning returns tuple of 2 tensors"),
        (lambda logits, inputs: {"main": logits, "aux": inputs}, "Returning returns dict of main, aux"),
        (lambda logits, inputs: None, "Returning returns NoneType, and"),
        (lambda logits, inputs: "text", "Returning returns str, and"),
        (lambda logits, inputs: {"logits": [logits]}, "Returning returns dict of logits, and"),
    ],
)
def test_an_output_that_could_be_several_things_is_refused_with_network_and_type(wrap, told):
    for student, teacher in ((Returning(wrap), TinyNet()), (TinyNet(), Returning(wrap))):
        with pytest.raises(InputError, match=told):
            trained("kd", student, teacher)


def test_auxiliary_outputs_in_train_mode_are_left_out():
    from torchvision.models import googlenet

    torch.manual_seed(0)
    network = googlenet(weights=None, aux_logits=True, init_weights=False, num_classes=CLASSES)
    module = KDModule(network, TinyNet(), num_classes=CLASSES, hard_label_weight=1.0, temperature=1.0)
    batch = Batch(torch.rand(2, 3, 64, 64), torch.tensor([0, 2]))
    module.teachers[0].forward = lambda inputs: torch.zeros(len(inputs), CLASSES)
    network.train()
    torch.manual_seed(0)
    terms = module.terms(batch)
    torch.manual_seed(0)
    assert torch.equal(terms["ce"], F.cross_entropy(network(batch.input).logits, batch.target))
    assert TeacherEnsemble(network).logits(batch.input).shape == (1, 2, CLASSES)


def test_only_output_of_auxiliary_outputs_is_that_of_the_main_head():
    from torchvision.models.inception import InceptionOutputs

    main, auxiliary = torch.rand(2, 3), torch.rand(2, 3)
    assert only_output(nn.Identity(), InceptionOutputs(main, auxiliary)) is main


# Batches of keyword inputs


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 4), nn.Linear(4, CLASSES)

    def forward(self, input_ids, attention_mask):
        hidden = self.embed(input_ids) * attention_mask[..., None]
        return {"logits": self.head(hidden.sum(dim=1) / attention_mask.sum(dim=1, keepdim=True))}


def sentences(count=24, length=6):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(11, (count, length), generator=generator)
    mask = torch.arange(length) < torch.randint(1, length + 1, (count, 1), generator=generator)
    return [
        {"input_ids": one, "attention_mask": kept.long(), "labels": one[0] % CLASSES, "text": "words"}
        for one, kept in zip(ids, mask, strict=True)
    ]


def test_a_dict_reaches_the_network_by_keyword():
    torch.manual_seed(0)
    student, teacher = Tokens(), Tokens()
    loader = DataLoader(sentences(), batch_size=8)
    batch = next(iter(loader))
    read = Batch.of(batch)
    assert read.input.keys() == {"input_ids", "attention_mask"}
    module = KDModule(student, teacher, num_classes=CLASSES, temperature=2.0, hard_label_weight=0.5)
    terms = module.terms(read)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert torch.equal(terms["ce"], F.cross_entropy(student(ids, mask)["logits"], batch["labels"]))
    trainer = tiny_trainer(max_epochs=1)
    trainer.fit(module, loader, loader)
    predicted = trainer.predict(module, loader)
    with torch.no_grad():
        assert torch.equal(predicted[0], student.eval()(ids, mask)["logits"])


def test_names_that_a_network_has_no_argument_for_are_told():
    with pytest.raises(InputError, match="TinyNet takes images, and the batch gives it picture by keyword"):
        call(TinyNet(), Batch.of({"picture": INPUTS, "label": LABELS}).input)
    with pytest.raises(InputError, match=r"missing a required argument: 'attention_mask'"):
        call(Tokens(), {"input_ids": torch.zeros(1, 1, dtype=torch.int64)})


def test_a_type_error_of_the_network_itself_stays_one():
    class Broken(nn.Module):
        def forward(self, inputs):
            return inputs + "text"

    with pytest.raises(TypeError):
        call(Broken(), {"inputs": torch.zeros(1)})


def test_a_dict_without_tensors_is_no_batch():
    with pytest.raises(InputError, match=r"got \['text', 'label'\]"):
        Batch.of({"text": ["a", "b"], "label": torch.tensor([0, 1])})


@pytest.mark.slow
def test_bert_is_distilled_from_a_larger_one():
    transformers = pytest.importorskip("transformers")

    def bert(width, layers):
        return transformers.BertForSequenceClassification(
            transformers.BertConfig(
                vocab_size=11,
                hidden_size=width,
                num_hidden_layers=layers,
                num_attention_heads=2,
                intermediate_size=2 * width,
                max_position_embeddings=8,
                num_labels=CLASSES,
            )
        )

    torch.manual_seed(0)
    teacher, student = bert(32, 2), bert(8, 1)
    loader = DataLoader(sentences(96), batch_size=16)

    def adam(parameters):
        return torch.optim.Adam(parameters, lr=5e-3)

    tiny_trainer(max_epochs=15).fit(SupervisedModule(teacher, num_classes=CLASSES, optimizer=adam), loader, loader)
    module = KDModule(student, teacher, num_classes=CLASSES, temperature=2.0, hard_label_weight=0.0, optimizer=adam)
    batch = Batch.of(next(iter(loader)))
    with torch.no_grad():
        expected = teacher.eval()(**batch.input).logits
    assert torch.allclose(module.teachers.distribution(batch), (expected / 2).softmax(dim=1))
    before = float(module.terms(batch)["kd"])
    tiny_trainer(max_epochs=30).fit(module, loader, loader)
    assert float(module.eval().terms(batch)["kd"]) < before / 2


# Unlabelled batches


@pytest.mark.parametrize(
    "batch", [[INPUTS[:4]], (INPUTS[:4],), {"image": INPUTS[:4]}, {"x": INPUTS[:4]}, INPUTS[:4], Batch(INPUTS[:4])]
)
def test_predictions_need_no_labels(batch):
    module = SupervisedModule(TinyNet(), num_classes=CLASSES).eval()
    expected = module.student(INPUTS[:4])
    assert torch.equal(module(batch), expected)
    assert torch.equal(module.predict_step(batch), expected)


def test_a_loader_of_unlabelled_samples_is_predicted():
    module = SupervisedModule(TinyNet(), num_classes=CLASSES)
    outputs = tiny_trainer().predict(module, DataLoader(TensorDataset(INPUTS), batch_size=8))
    with torch.no_grad():
        assert torch.equal(torch.cat(outputs), module.student.eval()(INPUTS))


def test_methods_without_hard_labels_train_on_unlabelled_samples():
    def weights(loader):
        torch.manual_seed(0)
        module = METHODS["meal_v2"](TinyNet(), TinyNet())
        tiny_trainer(max_epochs=1).fit(module, loader, LOADER)
        return module.student.state_dict()

    labelled, unlabelled = weights(LOADER), weights(DataLoader(TensorDataset(INPUTS), batch_size=8))
    assert all(torch.equal(labelled[name], unlabelled[name]) for name in labelled)


@pytest.mark.parametrize("method", ["supervised", "kd", "self_kd"])
def test_methods_that_read_labels_say_that_there_are_none(method):
    module = METHODS[method](TinyNet(), TinyNet())
    with pytest.raises(InputError, match="label"):
        tiny_trainer(max_epochs=1).fit(module, DataLoader(TensorDataset(INPUTS), batch_size=8), LOADER)


@pytest.mark.parametrize("kind", ["MixUp", "CutMix"])
def test_self_kd_trains_on_what_torchvision_has_mixed(kind):
    from torchvision.transforms import v2

    mix = getattr(v2, kind)(num_classes=CLASSES)
    mixed = DataLoader(
        TensorDataset(INPUTS, LABELS), batch_size=8, collate_fn=lambda samples: mix(*default_collate(samples))
    )
    torch.manual_seed(0)
    module = METHODS["self_kd"](TinyNet(), None)
    batch = Batch.of(next(iter(mixed)))
    assert batch.target.shape == (8, CLASSES)
    trainer = tiny_trainer(max_epochs=2)
    trainer.fit(module, mixed, LOADER)
    assert trainer.callback_metrics["train/known_fraction"] == 1
    # Of the first epoch there is no past: its loss is the cross entropy to the mixed labels.
    fresh = METHODS["self_kd"](TinyNet(), None)
    fresh.trainer = tiny_trainer(max_epochs=2)
    logits = fresh.student(batch.input)
    assert torch.allclose(fresh.terms(batch)["self_kd"], F.cross_entropy(logits, batch.target), atol=1e-6)
