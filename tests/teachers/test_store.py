"""TeacherStore: a run that reads is the run that asks, and what is kept belongs to what made it."""

import pickle
import shutil
from functools import cache, partial

import pytest
import pytorch_lightning as pl
import torch
from torch.nn import functional as F

from distill_lightning import (
    AttentionDistance,
    Batch,
    CutMixSampler,
    DigitsDataModule,
    EmpiricalSampler,
    EqualSizes,
    ExtracurricularModule,
    FEEDModule,
    FixedDiscriminator,
    GeneratorSampler,
    HintDistance,
    InputError,
    KDModule,
    LogitTerm,
    MEALV2Module,
    MixupSampler,
    NoDiscriminator,
    PooledSize,
    StudentSize,
    TeacherEnsemble,
    UnlabelledSampler,
)
from distill_lightning.errors import NonFiniteError
from distill_lightning.layers import Paraphraser
from distill_lightning.teachers import TeacherStore
from distill_lightning.testing import TinyDataModule, TinyNet, tiny_trainer

sgd = partial(torch.optim.SGD, lr=0.05, momentum=0.9)


def kd(teachers, **options):
    return KDModule(TinyNet(), teachers, num_classes=3, optimizer=sgd, **({"temperature": 2.0} | options))


def meal(teachers, **options):
    options = {"discriminator": FixedDiscriminator(), "hard_label_weight": 0.1} | options
    return MEALV2Module(TinyNet(), teachers, num_classes=3, optimizer=sgd, **options)


def feed(teachers, **options):
    options = {"student_layer": "features", "beta": 10.0, "input_shape": (1, 8, 8)} | options
    return FEEDModule(TinyNet(), teachers, num_classes=3, optimizer=sgd, **options)


def factor_transfer(teachers):
    networks = teachers.networks if isinstance(teachers, TeacherStore) else teachers
    torch.manual_seed(3)
    paraphrasers = None if networks is None else [Paraphraser(16) for _ in networks]
    torch.manual_seed(0)
    return feed(teachers, paraphrasers=paraphrasers)


def xcl(teachers, **options):
    options = {"samplers": [MixupSampler()], "label_weight": 0.1} | options
    return ExtracurricularModule(TinyNet(), teachers, num_classes=3, optimizer=sgd, **options)


def several(teachers):
    torch.manual_seed(4)
    decoder = torch.nn.Sequential(torch.nn.Linear(3, 64), torch.nn.Unflatten(1, (1, 8, 8)))
    torch.manual_seed(0)
    return xcl(teachers, samplers=[MixupSampler(), CutMixSampler(), GeneratorSampler(decoder, 3)], extra_ratio=3)


METHODS = {
    "xcl": xcl,
    "xcl_twice": partial(xcl, extra_ratio=2, temperature=3.0),
    "xcl_empirical": partial(xcl, samplers=[EmpiricalSampler()]),
    "xcl_several": several,
    "xcl_unlabelled": lambda teachers: xcl(
        teachers, samplers=[UnlabelledSampler(DigitsDataModule(subset=100, image_size=8))]
    ),
    "kd": kd,
    "meal": meal,
    "meal_alone": partial(meal, discriminator=NoDiscriminator()),
    "meal_probabilities": partial(meal, discriminator=FixedDiscriminator(shown="probabilities")),
    "feed": feed,
    "feed_kd": partial(feed, logit_term=LogitTerm(weight=0.5)),
    "hint": partial(feed, distance=HintDistance(), beta=0.1),
    "factor_transfer": factor_transfer,
    "reduced": partial(feed, sizes=PooledSize(2)),
    "reduced_hint": partial(feed, sizes=PooledSize(2), distance=HintDistance(), beta=0.1),
    "reduced_attention": partial(feed, sizes=PooledSize(2), distance=AttentionDistance(), beta=1.0),
}


def teachers_of(count=2, seed=5):
    torch.manual_seed(seed)
    networks = [TinyNet(width=8) for _ in range(count)]
    for network in networks:
        # Far enough from uniform that rounding could be seen.
        torch.nn.init.normal_(network.head.weight)
    return networks


class Steps(pl.Callback):
    """The loss of every step."""

    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))


def fitted(module, *, epochs=4, views=2, data=None, **options):
    steps = Steps()
    trainer = tiny_trainer(max_epochs=epochs, callbacks=[steps, *options.pop("callbacks", [])], **options)
    trainer.fit(module, datamodule=data or with_partners(views=views))
    return steps.losses


def with_partners(**options):
    data = TinyDataModule(**options)
    data.partners = True
    return data


def run(method, teachers, **options):
    torch.manual_seed(0)
    module = method(teachers)
    return fitted(module, **options), module


def calls_of(networks):
    calls = []
    for network in networks:
        network.register_forward_hook(lambda *_: calls.append(1))
    return calls


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# A stored run is the online run


@cache
def online_losses(name):
    return run(METHODS[name], teachers_of())[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 2e-3)])
def test_a_stored_run_is_the_online_run_loss_for_loss(tmp_path, name, dtype, tolerance):
    method, online = METHODS[name], online_losses(name)
    filling, module = run(method, TeacherStore(tmp_path, teachers_of(), dtype=dtype))
    assert filling == pytest.approx(online, rel=tolerance)
    assert module.teachers.store.is_complete
    alone, module = run(method, TeacherStore(tmp_path, dtype=dtype, fill="never"))
    # Whoever asks goes on with what is kept: whether a batch was asked about or read, nothing differs.
    assert alone == filling
    assert len(module.teachers) == 0


@pytest.mark.slow
def test_a_complete_store_leaves_the_teachers_alone(tmp_path):
    networks = teachers_of()
    run(kd, TeacherStore(tmp_path, networks))
    calls = calls_of(networks)
    run(kd, TeacherStore(tmp_path, networks), limit_val_batches=0)
    assert calls == []


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "numbers"), [(EqualSizes(), 256), (PooledSize(2), 64)])
def test_reduced_feature_maps_take_fewer_bytes(tmp_path, sizes, numbers):
    store = TeacherStore(tmp_path, teachers_of(), shard_size=24)
    run(partial(feed, sizes=sizes), store, epochs=2)
    assert store.nbytes == 2 * 2 * numbers
    # A page says what the file holds; a byte for each sample tells whether it is known; four are the checksum.
    assert (tmp_path / "view_00000/00000.shard").stat().st_size == 4096 + 24 * (2 * 2 * numbers + 1) + 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("teachers", "sizes", "message"),
    [
        (True, EqualSizes(), "feature_size is 2, not None"),
        (True, PooledSize(4), "feature_size is 2, not 4"),
        (False, PooledSize(1), "feature_size is 2, not 1"),
        (False, StudentSize(), "feature_size is 2, not None"),
        (False, PooledSize(4), r"teacher 0's 'feature in the store' gives \(16, 2, 2\).*at least as large"),
        (False, EqualSizes(), r"teacher 0's 'feature in the store' gives \(16, 2, 2\)"),
    ],
)
def test_a_store_of_otherwise_reduced_maps_is_refused(tmp_path, teachers, sizes, message):
    run(partial(feed, sizes=PooledSize(2)), TeacherStore(tmp_path, teachers_of()), epochs=2)
    with pytest.raises(InputError, match=message):
        run(partial(feed, sizes=sizes), TeacherStore(tmp_path, teachers_of() if teachers else None))


def test_the_first_views_epochs_ask_and_the_others_read(tmp_path):
    networks = teachers_of(1)
    calls = calls_of(networks)
    run(kd, TeacherStore(tmp_path, networks), epochs=5, views=2, limit_val_batches=0)
    # Three batches an epoch, two epochs.
    assert len(calls) == 6


@pytest.mark.slow
def test_in_training_only_the_training_images_are_kept_and_validation_asks_the_teachers(tmp_path):
    networks = teachers_of(1)
    _, module = run(kd, TeacherStore(tmp_path, networks), epochs=2)
    trainer = tiny_trainer()
    live = trainer.validate(module, datamodule=TinyDataModule(), verbose=False)[0]
    torch.manual_seed(0)
    without = kd(networks)
    without.load_state_dict(module.state_dict())
    assert trainer.validate(without, datamodule=TinyDataModule(), verbose=False)[0] == live
    # Without teachers there is nobody to agree with.
    alone = kd(TeacherStore(tmp_path))
    alone.student.load_state_dict(module.student.state_dict())
    metrics = trainer.validate(alone, datamodule=TinyDataModule(), verbose=False)[0]
    assert {name: live[name] for name in metrics} == metrics
    assert "val/agreement" not in metrics


def test_answers_are_those_of_the_teachers_about_the_very_view(tmp_path):
    networks, data = teachers_of(), with_partners(views=3)
    _, module = run(kd, TeacherStore(tmp_path, networks, dtype="float32"), epochs=3, views=3)
    dataset = data.dataset("train", augment=True)
    keys = [(index, view) for index in (0, 7, 23) for view in range(3)]
    batch = dataset.__getitems__(keys)
    told = module.teachers.store.read_or_ask(batch, None, device="cpu")
    with torch.no_grad():
        expected = torch.stack([F.softmax(network.eval()(batch.input) / 2, dim=1) for network in networks]).mean(0)
    assert told.keys() == {"probabilities"}
    assert torch.allclose(told["probabilities"], expected, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_the_largest_probabilities_are_kept_and_the_rest_spread(tmp_path, top_k):
    networks, data = teachers_of(), with_partners(views=1)
    _, module = run(kd, TeacherStore(tmp_path, networks, top_k=top_k), epochs=1, views=1)
    batch = data.dataset("train", augment=True).__getitems__([(index, 0) for index in range(24)])
    told = module.teachers.store.read_or_ask(batch, None, device="cpu")["probabilities"]
    exact = TeacherEnsemble(networks).probabilities(batch.input, temperature=2.0)
    for row, expected in zip(told.tolist(), exact.tolist(), strict=True):
        kept = sorted(range(3), key=lambda k, expected=expected: -expected[k])[:top_k]
        rest = 1 - sum(expected[k] for k in kept)
        naive = [expected[k] if k in kept else rest / (3 - top_k) for k in range(3)]
        assert row == pytest.approx(naive, abs=2e-3)
        assert sum(row) == pytest.approx(1, abs=1e-6)
    assert module.teachers.store.nbytes == top_k * (2 + 2)


def test_ten_of_a_thousand_classes_take_forty_bytes(tmp_path):
    store = TeacherStore(tmp_path, top_k=10)
    store.begin(samples=4, views=1, made_by={"num_classes": 1000})
    probs = torch.softmax(torch.randn(4, 1000), dim=1)
    batch = Batch(torch.zeros(4, 1), None, torch.arange(4), torch.zeros(4, dtype=torch.long))
    store.read_or_ask(batch, lambda: {"probabilities": probs}, device="cpu")
    assert store.nbytes == 40
    store.finish()
    store.refresh()
    assert store.shapes() == {"probabilities": (1000,)}
    told = store.read_or_ask(batch, None, device="cpu")["probabilities"]
    assert torch.equal(told.topk(10).indices, probs.topk(10).indices)
    assert store.is_complete


def regression(teachers):
    student = TinyNet(None, num_targets=2)
    return ExtracurricularModule(student, teachers, num_targets=2, optimizer=partial(torch.optim.SGD, lr=0.01))


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 5e-3)])
def test_a_regressions_distributions_are_kept_too(tmp_path, dtype, tolerance):
    def data():
        return with_partners(views=2, num_targets=2)

    torch.manual_seed(5)
    networks = [TinyNet(None, num_targets=2) for _ in range(2)]
    online, _ = run(regression, networks, data=data())
    filling, module = run(regression, TeacherStore(tmp_path, networks, dtype=dtype), data=data())
    assert filling == pytest.approx(online, rel=tolerance)
    assert module.teachers.store.shapes() == {"gaussian": (4,), "gaussian_mixup_0": (4,)}
    alone, _ = run(regression, TeacherStore(tmp_path, dtype=dtype), data=data())
    assert alone == pytest.approx(online, rel=tolerance)


def test_mixtures_whose_partners_depend_on_the_batch_are_refused(tmp_path):
    with pytest.raises(InputError, match="MixupSampler finds a row's partner in its batch.* partners=True"):
        fitted(xcl(TeacherStore(tmp_path, teachers_of())), data=TinyDataModule(views=2))


def test_samplers_with_some_rows_alone_are_refused(tmp_path):
    with pytest.raises(InputError, match="mixup makes 4 of 8: set extra_ratio to the number of samplers"):
        fitted(xcl(TeacherStore(tmp_path, teachers_of()), extra_ratio=0.5))


def test_other_samplers_are_refused(tmp_path):
    run(xcl, TeacherStore(tmp_path, teachers_of()), epochs=2)
    with pytest.raises(InputError, match="samplers is "):
        fitted(xcl(TeacherStore(tmp_path, teachers_of()), samplers=[MixupSampler(0.5)]))


def test_what_another_process_has_kept_is_finished_too(tmp_path):
    def begun(rank):
        store = TeacherStore(tmp_path)
        store.begin(samples=4, views=2, made_by={"num_classes": 3}, rank=rank)
        return store

    first, second = begun(0), begun(1)
    probs = torch.softmax(torch.randn(2, 3), dim=1)
    for store, rows, view in ((first, [0, 1], 0), (second, [2, 3], 1)):
        batch = Batch(torch.zeros(2, 1), None, torch.tensor(rows), torch.full((2,), view))
        store.read_or_ask(batch, lambda: {"probabilities": probs}, device="cpu")
    first.finish()
    for store in (first, second):
        store.refresh()
        batch = Batch(torch.zeros(2, 1), None, torch.tensor([2, 3]), torch.tensor([1, 1]))
        told = store.read_or_ask(batch, None, device="cpu")["probabilities"]
        assert torch.allclose(told, probs, atol=1e-3)


# What a store belongs to


def changed_weights():
    networks = teachers_of()
    next(networks[1].parameters()).data[0] += 1e-6
    return networks


@pytest.mark.slow
@pytest.mark.parametrize(
    ("teachers", "options", "store", "data", "message"),
    [
        (changed_weights, {}, {}, {}, "teachers is "),
        (lambda: teachers_of(3), {}, {}, {}, "teachers is "),
        (lambda: teachers_of()[::-1], {}, {}, {}, "teachers is "),
        (lambda: TeacherEnsemble(teachers_of(), weights=[1, 2]), {}, {}, {}, "ensemble is "),
        (lambda: TeacherEnsemble(teachers_of(), combine="logits"), {}, {}, {}, "ensemble is .*probabilities.*logits"),
        (teachers_of, {"temperature": 4.0}, {}, {}, "temperature is 2.0, not 4.0"),
        (teachers_of, {}, {}, {"seed": 1}, "data has other labels and contents; transform is "),
        (teachers_of, {}, {}, {"samples": 20}, "samples is 24, not 20. Go on"),
        (teachers_of, {}, {}, {"views": 3}, "views is 2, not 3"),
        (teachers_of, {}, {"top_k": 2}, {}, "top_k is None, not 2"),
        (teachers_of, {}, {"dtype": "float32"}, {}, "dtype is float16, not float32"),
    ],
)
def test_a_store_of_something_else_is_refused_with_what_differs(tmp_path, teachers, options, store, data, message):
    run(kd, TeacherStore(tmp_path, teachers_of()), epochs=2)
    other = kd(TeacherStore(tmp_path, teachers(), **store), **options)
    with pytest.raises(InputError, match=message):
        fitted(other, data=with_partners(**({"views": 2} | data)))


def test_another_transform_is_refused(tmp_path):
    run(kd, TeacherStore(tmp_path, teachers_of()), epochs=2)
    data = with_partners(views=2)
    data.padding = 2
    with pytest.raises(InputError, match="transform is "):
        fitted(kd(TeacherStore(tmp_path, teachers_of())), data=data)


def test_without_teachers_the_data_are_still_held_against_the_store(tmp_path):
    run(kd, TeacherStore(tmp_path, teachers_of()), epochs=2)
    with pytest.raises(InputError, match="data has other labels and contents"):
        fitted(kd(TeacherStore(tmp_path)), data=with_partners(views=2, seed=1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arranged", "message"),
    [
        (lambda index: index.flip(0), "by something else: data has another order"),
        (lambda index: index[torch.randperm(len(index))], "by something else: data has another order"),
        (lambda index: torch.cat([index[1:2], index[:1], index[2:]]), "by something else: data has another order"),
        (lambda index: torch.cat([index[:-1], index[:1]]), "by something else: data has other labels and contents"),
        (lambda index: index[:-1], "samples is 24, not 23"),
        (lambda index: index[::2], "samples is 24, not 12"),
    ],
    ids=["reversed", "shuffled", "two_swapped", "one_replaced", "all_but_one", "every_other"],
)
def test_data_in_another_order_and_parts_of_them_are_refused(tmp_path, arranged, message):
    class Other(TinyDataModule):
        def samples(self, images, index, *, part):
            return super().samples(images, index if part else arranged(index), part=part)

    run(kd, TeacherStore(tmp_path, teachers_of()), epochs=2)
    with pytest.raises(InputError, match=message):
        fitted(kd(TeacherStore(tmp_path, teachers_of())), data=Other(views=2))


# Gaps


@pytest.mark.slow
@pytest.mark.parametrize("fill", ["online", "never"])
def test_without_teachers_a_gap_is_named(tmp_path, fill):
    run(kd, TeacherStore(tmp_path, teachers_of()), epochs=1)
    with pytest.raises(
        InputError, match=r"does not know view 1 of sample \d+ \(00000.shard is missing\): fill it with"
    ):
        fitted(kd(TeacherStore(tmp_path, fill=fill)))


@pytest.mark.slow
def test_never_filling_does_not_ask_the_teachers_that_are_there(tmp_path):
    run(kd, TeacherStore(tmp_path, teachers_of()), epochs=1)
    before = files_of(tmp_path)
    with pytest.raises(InputError, match="does not know view 1"):
        fitted(kd(TeacherStore(tmp_path, teachers_of(), fill="never")))
    assert files_of(tmp_path) == before


@pytest.mark.slow
def test_a_damaged_file_is_filled_again_and_alone(tmp_path):
    run(kd, TeacherStore(tmp_path, teachers_of(), shard_size=10), epochs=2)
    before = files_of(tmp_path)
    path = tmp_path / "view_00001/00001.shard"
    path.write_bytes(path.read_bytes()[:-9])
    stamps = {name: (tmp_path / name).stat().st_mtime_ns for name in before}
    with pytest.raises(InputError, match=r"view 1 of sample \d+ \(00001.shard is damaged\)"):
        fitted(kd(TeacherStore(tmp_path, shard_size=10)))
    run(kd, TeacherStore(tmp_path, teachers_of(), shard_size=10), epochs=2)
    assert files_of(tmp_path) == before
    changed = [name for name, stamp in stamps.items() if (tmp_path / name).stat().st_mtime_ns != stamp]
    assert changed == ["view_00001/00001.shard"]


def test_a_store_that_is_to_be_read_must_be_there(tmp_path):
    with pytest.raises(InputError, match="there is no store in"):
        fitted(kd(TeacherStore(tmp_path, teachers_of(), fill="never")))


def test_who_finds_no_answer_says_the_way_out(tmp_path):
    store = TeacherStore(tmp_path)
    store.begin(samples=4, views=2, made_by={"num_classes": 3})
    batch = Batch(torch.zeros(4, 1, 8, 8), None, torch.arange(4))
    with pytest.raises(InputError, match=r"give the data module views=1, or yield Batch\(..., view=...\)"):
        store.read_or_ask(batch, None, device="cpu")
    with pytest.raises(InputError, match="no teachers to fill it: give networks, or the path of a filled store"):
        store.read_or_ask(batch.replace(view=torch.zeros(4, dtype=torch.long)), None, device="cpu")


# Data that cannot be told apart


def test_endless_views_are_refused(tmp_path):
    with pytest.raises(InputError, match="a TeacherStore keeps a number of views"):
        fitted(kd(TeacherStore(tmp_path, teachers_of())), data=TinyDataModule())


# Interruptions


class Kill(pl.Callback):
    """Stops the run at a step, as a kill would: nothing is finished."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            raise RuntimeError("killed")


@pytest.mark.slow
@pytest.mark.parametrize("step", range(1, 7))
def test_a_store_whose_filling_was_killed_is_the_undisturbed_one(tmp_path, step):
    run(kd, TeacherStore(tmp_path / "whole", teachers_of(), shard_size=7), epochs=2)
    with pytest.raises(RuntimeError, match="killed"):
        run(kd, TeacherStore(tmp_path / "killed", teachers_of(), shard_size=7), epochs=2, callbacks=[Kill(step)])
    run(kd, TeacherStore(tmp_path / "killed", teachers_of(), shard_size=7), epochs=2)
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("method", [kd, feed, partial(xcl, temperature=3.0), meal], ids=["kd", "feed", "xcl", "meal"])
def test_a_checkpoint_that_is_older_than_the_store_is_continued_as_if_nothing_had_been_kept(tmp_path, method):
    steps = [1, 2, 4, 5, 7]

    class Save(pl.callbacks.Checkpoint):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step in steps:
                trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    def fit(callbacks, **options):
        torch.manual_seed(0)
        module = method(TeacherStore(tmp_path / "store", teachers_of()))
        trainer = tiny_trainer(max_epochs=4, enable_checkpointing=True, callbacks=callbacks)
        trainer.fit(module, datamodule=with_partners(views=2), **options)
        return module.state_dict()

    whole = fit([Save()])
    before = files_of(tmp_path / "store")
    for step in steps:
        resumed = fit([pl.callbacks.Checkpoint()], ckpt_path=tmp_path / f"{step}.ckpt")
        assert all(torch.equal(whole[name], resumed[name]) for name in whole), step
        assert files_of(tmp_path / "store") == before, step


def test_what_a_process_was_writing_first_is_removed(tmp_path):
    run(kd, TeacherStore(tmp_path / "whole", teachers_of()), epochs=2)
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed/partial.7.header.json").write_text("{")
    run(kd, TeacherStore(tmp_path / "killed", teachers_of()), epochs=2)
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")


@pytest.mark.slow
def test_a_training_that_only_reads_leaves_what_another_is_writing(tmp_path):
    run(kd, TeacherStore(tmp_path, teachers_of()), epochs=2)
    (tmp_path / "partial.7.header.json").write_text("{")
    before = files_of(tmp_path)
    for store in (TeacherStore(tmp_path), TeacherStore(tmp_path, teachers_of(), fill="never")):
        assert not store.fills
        run(kd, store, epochs=2)
        assert files_of(tmp_path) == before


def test_a_store_is_sent_to_other_processes_without_what_is_in_its_files(tmp_path):
    _, module = run(kd, TeacherStore(tmp_path, teachers_of()), epochs=2)
    store = module.teachers.store
    batch = with_partners(views=2).dataset("train", augment=True).__getitems__([(3, 1), (20, 0)])
    told = store.read_or_ask(batch, None, device="cpu")["probabilities"]
    assert store._records._open
    sent = pickle.loads(pickle.dumps(store))
    assert not sent._records._open
    assert torch.equal(sent.read_or_ask(batch, None, device="cpu")["probabilities"], told)
    assert store._records._open


@pytest.mark.slow
def test_the_order_of_the_batches_does_not_matter(tmp_path):
    # In float16 the last bits of a batch's arithmetic are gone.
    for name, seed in (("one", 1), ("two", 2)):
        data = with_partners(views=2)
        data.order_seed = seed
        run(kd, TeacherStore(tmp_path / name, teachers_of()), epochs=2, data=data)
    one, two = (files_of(tmp_path / name) for name in ("one", "two"))
    assert one.keys() == two.keys()
    shutil.rmtree(tmp_path / "two/view_00001")
    shutil.copytree(tmp_path / "one/view_00001", tmp_path / "two/view_00001")
    losses, _ = run(kd, TeacherStore(tmp_path / "two", fill="never"), epochs=2)
    expected, _ = run(kd, teachers_of(), epochs=2)
    assert losses == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fill": "later"}, "fill must be one of online, never, got 'later'"),
        ({"dtype": "int8"}, "dtype must be one of float16, float32, got 'int8'"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"shard_size": 0}, "shard_size must be at least 1, got 0"),
    ],
)
def test_options_out_of_range_are_refused(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        TeacherStore(tmp_path, **options)


def test_more_of_a_rows_largest_than_there_are_classes_is_refused(tmp_path):
    with pytest.raises(InputError, match="top_k=4 of 3 classes: lower it"):
        fitted(kd(TeacherStore(tmp_path, teachers_of(), top_k=4)))


class Infinite(TinyNet):
    def forward(self, images):
        return super().forward(images) + torch.where(images.amax(dim=(1, 2, 3)) > 1e6, torch.inf, 0.0)[:, None]


@pytest.mark.parametrize("keep", ["answers", "logits"])
def test_answers_that_are_not_finite_are_not_kept(tmp_path, keep):
    store = TeacherStore(tmp_path, Infinite(), keep=keep, dtype="float32")
    images = torch.zeros(4, 1, 8, 8)
    images[2] = 1e7
    module = kd(store)
    store.begin(samples=24, views=1, made_by={"num_classes": 3})
    batch = Batch(images, torch.zeros(4, dtype=torch.int64), index=torch.arange(10, 14), view=torch.zeros(4).long())
    with pytest.raises(NonFiniteError, match=r"of 1 samples \(12\) hold nan or inf, and a store would keep them"):
        module.terms(batch)
    assert not files_of(tmp_path)
