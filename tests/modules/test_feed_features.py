"""Features that FEED compares: as their layers gave them, with a graph, and with the channels in their place."""

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint_sequential

from distill_lightning import (
    AttentionDistance,
    Batch,
    Conv1x1Translator,
    FactorDistance,
    FEEDModule,
    FunctionTranslator,
    HintDistance,
    InputError,
    NoTranslator,
    ParaphraserModule,
    StudentSize,
    TeacherStore,
)
from distill_lightning.callbacks import ReconstructionErrorProbe
from distill_lightning.testing import TinyDataModule, TinyNet, tiny_trainer

# Of an 8x8 image, features have as many rows and columns as channels.
SIZE = 4


class Net(nn.Module):
    """``body`` gives ``(N, C, H, W)``, or with ``last`` ``(N, H, W, C)``, with C = H = W; ``wild``: nothing tells."""

    def __init__(self, *, last=False, wild=False, seed=0, width=SIZE):
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Conv2d(1, width, 3, stride=2, padding=1)
        self.body, self.head = nn.Identity(), nn.Linear(width, 3)
        self.last, self.wild = last, wild

    def forward(self, inputs):
        features = self.stem(inputs)
        if self.wild:
            features = features[:, list(range(len(self.stem.bias)))]
        features = self.body(features.permute(0, 2, 3, 1) if self.last else features)
        pooled = features.flatten(1, 2).mean(1) if self.last else features.flatten(2).mean(2)
        return self.head(pooled)


def batch_of(count=4):
    generator = torch.Generator().manual_seed(3)
    return Batch(torch.rand(count, 1, 8, 8, generator=generator), torch.arange(count) % 3)


def feed(student, teacher, distance, **options):
    torch.manual_seed(5)
    return FEEDModule(
        student, teacher, num_classes=3, student_layer="body", distance=distance, input_shape=(1, 8, 8), **options
    )


DISTANCES = {
    "feed": FactorDistance(),
    "feed per channel": FactorDistance(normalize="channel", translator=Conv1x1Translator()),
    "hint": HintDistance(translator=NoTranslator()),
    "attention": AttentionDistance(),
}


@pytest.mark.parametrize("distance", DISTANCES.values(), ids=DISTANCES.keys())
@pytest.mark.parametrize("told", [False, True])
def test_channels_last_features_are_compared_as_the_same_ones_with_channels_first(distance, told):
    plain = feed(Net(), Net(seed=1), distance)
    expected = plain.terms(plain.prepared(batch_of()))
    sum(expected.values()).backward()
    for last_student, last_teacher in ((True, True), (True, False), (False, True)):
        options = {}
        if told:
            layouts = {True: "last", False: "first"}
            options = {"channels": [layouts[last_student], layouts[last_teacher]]}
        networks = Net(last=last_student, wild=told), Net(last=last_teacher, wild=told, seed=1)
        module = feed(*networks, distance, **options)
        terms = module.terms(module.prepared(batch_of()))
        assert terms.keys() == expected.keys()
        for name, value in terms.items():
            torch.testing.assert_close(value, expected[name])
        sum(terms.values()).backward()
        torch.testing.assert_close(module.student.stem.weight.grad, plain.student.stem.weight.grad)


def test_channels_that_may_be_anywhere_are_refused():
    message = r"Net: nothing tells which dimension of 'body' \(1, 4, 4, 4\) holds its channels: say so with channels="
    for networks in ((Net(wild=True), Net()), (Net(), Net(wild=True))):
        with pytest.raises(InputError, match=message):
            feed(*networks, HintDistance())
    with pytest.raises(InputError, match="channels of 2 features for 1 teachers"):
        feed(Net(), Net(), HintDistance(), channels=["first", "last", "first"])
    with pytest.raises(InputError, match="FEED: channels is empty"):
        feed(Net(), Net(), HintDistance(), channels=[])
    module = feed(Net(last=True, wild=True), Net(last=True, wild=True, seed=1), HintDistance(), channels="last")
    assert module._channels == SIZE


def test_a_transformers_map_has_the_channels_that_it_has():
    swin = torchvision.models.swin_t(num_classes=3)
    module = FEEDModule(
        swin, TinyNet(in_channels=3, width=384), num_classes=3, student_layer="features.7", teacher_layers="features",
        distance=HintDistance(translator=NoTranslator()), sizes=StudentSize(), input_shape=(3, 64, 64),
    )  # fmt: skip
    assert module._shapes(module.teachers.questions[0])[0] == (1, 768, 2, 2)


class Tokens(nn.Module):
    """``body`` gives ``(N, L, C)``, or ``(N, C, L)`` with ``first``, both of length 8."""

    def __init__(self, *, first=False, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.stem, self.body, self.head, self.first = nn.Conv1d(8, 8, 1), nn.Identity(), nn.Linear(8, 3), first

    def forward(self, inputs):
        tokens = self.stem(inputs[:, 0])
        tokens = self.body(tokens if self.first else tokens.mT)
        return self.head(tokens.mean(2) if self.first else tokens.mean(1))


@pytest.mark.parametrize("normalize", ["sample", "channel"])
def test_features_of_sequences_are_compared_channel_by_channel(normalize):
    networks = Tokens(), Tokens(seed=1)
    student, teacher = (network.stem(batch_of().input[:, 0]) for network in networks)
    dim = 2 if normalize == "channel" else (1, 2)
    one, other = (x / torch.linalg.vector_norm(x, dim=dim, keepdim=True) for x in (student, teacher))
    expected = (one - other).abs().mean()
    for first in (False, True):
        distance = FactorDistance(normalize=normalize, translator=NoTranslator())
        module = feed(Tokens(first=first), Tokens(first=first, seed=1), distance)
        torch.testing.assert_close(module.terms(module.prepared(batch_of()))["feed"], expected)
    # A translator of tokens reads their channels last, whatever the network's own layout.
    translated = FactorDistance(translator=FunctionTranslator(nn.Linear))
    values = []
    for first in (False, True):
        module = feed(Tokens(first=first), Tokens(seed=1), translated)
        values.append(module.terms(module.prepared(batch_of()))["feed"])
    torch.testing.assert_close(*values)


@pytest.mark.slow
def test_a_store_keeps_features_with_their_channels_in_their_place(tmp_path):
    def trained(teachers):
        module = feed(Net(last=True), teachers, HintDistance(translator=NoTranslator()))
        tiny_trainer(max_epochs=2).fit(module, datamodule=TinyDataModule(views=1))
        return module.student.stem.weight

    live = trained(Net(last=True, seed=1))
    store = TeacherStore(tmp_path, Net(last=True, seed=1), dtype="float32")
    torch.testing.assert_close(trained(store), live, rtol=1e-4, atol=1e-5)
    assert store.is_complete
    torch.testing.assert_close(trained(TeacherStore(tmp_path, dtype="float32")), live, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_paraphrasers_and_probes_read_the_channels_where_they_are():
    wide = Net(last=True, seed=1, width=8)
    assert ParaphraserModule(wide, layers="body", input_shape=(1, 8, 8)).paraphrasers[0].channels == 8
    wild = Net(last=True, wild=True, width=8)
    stage = ParaphraserModule(wild, layers="body", channels="last", input_shape=(1, 8, 8))
    assert stage.paraphrasers[0].channels == 8
    tables = []
    for last, wild in ((False, False), (True, False), (True, True)):
        options = {"channels": "last"} if wild else {}
        probe = ReconstructionErrorProbe("body", epochs=1, **options)
        data = TinyDataModule()
        data.setup()
        loaders = data.val_dataloader(), data.val_dataloader()
        tables.append(probe.measure({"student": Net(last=last, wild=wild)}, *loaders)[-1])
    assert tables[0]["relative"] == pytest.approx(tables[1]["relative"], rel=1e-4)
    assert tables[0]["relative"] == pytest.approx(tables[2]["relative"], rel=1e-4)


# What is written into a feature later, and its graph


class Dropping(nn.Module):
    """Drops out in place what ``body`` gives, in train mode."""

    def __init__(self, *, inplace=True):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.body = nn.Conv2d(1, SIZE, 3, stride=2, padding=1), nn.BatchNorm2d(SIZE)
        self.drop, self.head = nn.Dropout(0.5, inplace=inplace), nn.Linear(SIZE, 3)

    def forward(self, inputs):
        return self.head(self.drop(self.body(self.stem(inputs))).mean((2, 3)))


def test_a_hint_is_what_it_would_be_without_the_dropout_in_place_behind_it():
    expected = torch.tensor(0.0)
    for inplace in (False, True):
        module = feed(Dropping(inplace=inplace), Net(seed=1), HintDistance(translator=NoTranslator()))
        module.student.train()
        batch = module.prepared(batch_of())
        for _ in range(2):
            module.zero_grad()
            torch.manual_seed(7)
            terms = module.terms(batch)
            terms["hint"].backward()
            found = terms["hint"].item(), module.student.stem.weight.grad.clone()
            feature = module.student.body(module.student.stem(batch.input))
            naive = F.mse_loss(feature, module.teachers[0].stem(batch.input))
            assert found[0] == pytest.approx(naive.item(), rel=1e-5)
        expected = found if not inplace else expected
    torch.testing.assert_close(found[1], expected[1])


class Checkpointed(nn.Module):
    """Three blocks inside of an activation checkpoint."""

    def __init__(self, *, reentrant):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head, self.reentrant = nn.Conv2d(1, SIZE, 3, stride=2, padding=1), nn.Linear(SIZE, 3), reentrant
        self.blocks = nn.Sequential(*(nn.Conv2d(SIZE, SIZE, 3, padding=1) for _ in range(3)), nn.ReLU())

    def forward(self, inputs):
        return self.head(
            checkpoint_sequential(self.blocks, 2, self.stem(inputs), use_reentrant=self.reentrant).mean((2, 3))
        )


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_students_feature_inside_a_reentrant_checkpoint_is_refused_in_fit():
    def module(*, reentrant):
        return FEEDModule(
            Checkpointed(reentrant=reentrant), Net(), num_classes=3, student_layer="blocks.0", teacher_layers="body",
            distance=AttentionDistance(),
        )  # fmt: skip

    with pytest.raises(InputError, match=r"'blocks\.0' has no graph.*use_reentrant=False"):
        tiny_trainer().fit(module(reentrant=True), datamodule=TinyDataModule())
    trained = module(reentrant=False)
    terms = trained.terms(trained.prepared(batch_of()))
    terms["attention"].backward()
    assert trained.student.stem.weight.grad.abs().sum() > 0
    tiny_trainer().fit(trained, datamodule=TinyDataModule())
