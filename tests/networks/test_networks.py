"""Networks by name, their recipes, and weights from files."""

import contextlib
import json
import os
import pathlib
import pickle
import sys

import pytest
import torch
from pytorchcv.model_provider import get_model as get_pytorchcv_model
from safetensors.torch import save_file
from torch import nn

from distill_lightning import (
    AdaptedInput,
    InputError,
    KDModule,
    ParaphraserModule,
    Pretrained,
    SmallResNet,
    TeacherEnsemble,
    pytorchcv_network,
    timm_network,
    torchvision_network,
)
from distill_lightning.layers import FeatureTap, GaussianHead, Paraphraser
from distill_lightning.networks import (
    build_from,
    likely_input_shape,
    recipe_of,
)
from distill_lightning.networks.weights import check_architecture, load_strictly, read_weights
from distill_lightning.testing import TinyDataModule, TinyNet, tiny_trainer

FACTORIES = [
    (torchvision_network, "resnet18"),
    (torchvision_network, "mobilenet_v3_small"),
    (timm_network, "resnet10t"),
    (pytorchcv_network, "resnet20_cifar10"),
    (pytorchcv_network, "resnet20_cifar100"),
]


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def state_of(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def same_state(network, state):
    own = network.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[name], state[name]) for name in own)


# SmallResNet


def block_parameters(channels_in, channels_out, *, first_of_a_smaller_stage):
    total = 9 * channels_in * channels_out + 2 * channels_out + 9 * channels_out**2 + 2 * channels_out
    if first_of_a_smaller_stage or channels_in != channels_out:
        total += channels_in * channels_out + 2 * channels_out
    return total


@pytest.mark.parametrize("width", [1, 4, 8])
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize(("classes", "channels"), [(10, 1), (3, 3)])
def test_the_parameters_of_a_small_resnet_are_those_counted_by_hand(width, depth, classes, channels):
    expected = 9 * channels * width + 2 * width
    for stage, (wide_in, wide_out) in enumerate([(width, width), (width, 2 * width), (2 * width, 4 * width)]):
        expected += block_parameters(wide_in, wide_out, first_of_a_smaller_stage=stage > 0)
        expected += (depth - 1) * block_parameters(wide_out, wide_out, first_of_a_smaller_stage=False)
    expected += 4 * width * classes + classes
    assert count(SmallResNet(classes, in_channels=channels, width=width, depth=depth)) == expected


def test_the_default_small_resnet_has_19810_parameters():
    # stem 88, stages 1184, 3680 and 14528, head 330.
    assert count(SmallResNet(10)) == 88 + 1184 + 3680 + 14528 + 330


@pytest.mark.parametrize("size", [8, 16, 28, 30])
def test_the_stages_halve_the_image_twice_and_widen_it(size):
    network, seen = SmallResNet(5, in_channels=3, width=4, depth=2).eval(), {}
    for name in ("stem", "stage1", "stage2", "stage3"):
        network.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output, name=name: seen.update({name: output})
        )
    with torch.no_grad():
        assert network(torch.rand(2, 3, size, size)).shape == (2, 5)
    half = (size + 1) // 2
    quarter = (half + 1) // 2
    assert seen["stem"].shape == (2, 4, size, size)
    assert seen["stage1"].shape == (2, 4, size, size)
    assert seen["stage2"].shape == (2, 8, half, half)
    assert seen["stage3"].shape == (2, 16, quarter, quarter)


def test_stage3_is_after_the_relu_and_before_pooling():
    torch.manual_seed(0)
    network, seen = SmallResNet(5, width=4), []
    network.stage3.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    logits = network(torch.randn(8, 1, 16, 16))
    feature = seen[0]
    assert feature.min().item() == 0
    assert 0.05 < (feature == 0).float().mean().item() < 0.95
    pooled = feature.mean(dim=(2, 3))
    assert torch.allclose(pooled @ network.head.weight.T + network.head.bias, logits, atol=1e-5)


def test_the_depth_is_the_number_of_blocks_of_each_stage():
    network = SmallResNet(10, depth=3)
    assert [len(stage) for stage in (network.stage1, network.stage2, network.stage3)] == [3, 3, 3]


@pytest.mark.parametrize("name", ["num_classes", "in_channels", "width", "depth"])
@pytest.mark.parametrize("size", [0, -1])
def test_a_small_resnet_refuses_a_size_that_is_not_positive(name, size):
    arguments = {"num_classes": 10} | {name: size}
    with pytest.raises(InputError, match=f"{name} must be at least 1, got {size}"):
        SmallResNet(**arguments)


# factories


@pytest.mark.slow
@pytest.mark.parametrize(("factory", "name"), FACTORIES)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_factory_gives_three_classes_and_the_channels_asked_for(factory, name, channels):
    network = factory(name, num_classes=3, in_channels=channels).eval()
    with torch.no_grad():
        logits = network(torch.rand(2, channels, 32, 32))
    assert logits.shape == (2, 3)
    assert torch.isfinite(logits).all()


@pytest.mark.slow
def test_replacing_the_first_convolution_of_torchvision_changes_nothing_but_its_input_channels():
    three, one = (torchvision_network("resnet18", num_classes=3, in_channels=channels) for channels in (3, 1))
    different = {
        name: tuple(tensor.shape)
        for name, tensor in one.state_dict().items()
        if tensor.shape != three.state_dict()[name].shape
    }
    assert one.state_dict().keys() == three.state_dict().keys()
    assert different == {"conv1.weight": (64, 1, 7, 7)}
    assert (one.conv1.stride, one.conv1.padding, one.conv1.bias) == (three.conv1.stride, three.conv1.padding, None)


def test_the_last_layer_of_pytorchcv_stays_where_the_classes_fit():
    assert count(pytorchcv_network("resnet20_cifar100", num_classes=100)) == 278_324
    # 64 inputs of the last layer: 97 classes less are 97 * 65 parameters less.
    assert count(pytorchcv_network("resnet20_cifar100", num_classes=3)) == 278_324 - 97 * 65


def test_the_last_layer_of_pytorchcv_keeps_its_weights_where_the_classes_fit():
    torch.manual_seed(0)
    network = pytorchcv_network("resnet20_cifar10", num_classes=10)
    torch.manual_seed(0)
    assert same_state(network, get_pytorchcv_model("resnet20_cifar10").state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["preresnet18", "densenet121"])
def test_a_stem_of_pytorchcv_for_small_images_shrinks_nothing(name):
    network = pytorchcv_network(name, num_classes=7, image_size=32, stem="conv3x3").eval()
    sizes = {}
    for path, module in network.features.named_children():
        module.register_forward_hook(lambda _, __, output, path=path: sizes.__setitem__(path, tuple(output.shape[2:])))
    assert network(torch.rand(1, 3, 32, 32)).shape == (1, 7)
    assert [sizes[f"stage{number}"] for number in (1, 2, 3, 4)] == [(32, 32), (16, 16), (8, 8), (4, 4)]
    own = pytorchcv_network(name, num_classes=7)
    assert count(own) - count(network) == 64 * (3 * 7 * 7 + 2) - 64 * 3 * 3 * 3


def test_pytorchcv_makes_a_resnext_that_has_no_name_there():
    with torch.device("meta"):
        network = pytorchcv_network("resnext29_8x64d_cifar10", num_classes=10)
    assert round(count(network) / 1e6, 1) == 34.4  # what Xie et al. print


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "resnet20_cifar10",
            {"stem": "conv3x3"},
            "'resnet20_cifar10' begins with no convolution that shrinks the image",
        ),
        ("preresnet18", {"stem": "small"}, "stem must be one of own, conv3x3, got 'small'"),
        ("resnext28_8x64d_cifar10", {}, "a ResNeXt for CIFAR has 9 n \\+ 2 layers"),
        ("resnext29_8x64d_cifar10", {"pretrained": True}, "pytorchcv has no weights of 'resnext29_8x64d_cifar10'"),
    ],
)
def test_what_pytorchcv_has_not_is_refused(name, options, message):
    with pytest.raises(InputError, match=message):
        pytorchcv_network(name, num_classes=10, **options)


def test_pytorchcv_takes_another_image_size():
    network = pytorchcv_network("resnet20_cifar10", num_classes=10, in_channels=1, image_size=28).eval()
    assert network.in_size == (28, 28)
    assert network(torch.rand(1, 1, 28, 28)).shape == (1, 10)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (torchvision_network, r"torchvision has no network 'resnet19': similar names: .*resnet18.*; see .*list_models"),
        (timm_network, r"timm has no network 'resnet19': similar names: .*resnet18.*; see .*list_models"),
        (pytorchcv_network, r"pytorchcv has no network 'resnet19'"),
    ],
)
def test_an_unknown_name_is_refused(factory, message):
    with pytest.raises(InputError, match=message):
        factory("resnet19", num_classes=3)


def test_timms_own_refusal_is_one_line():
    with pytest.raises(InputError, match=r"timm_network 'resnet10t.nowhere': .*nowhere"):
        timm_network("resnet10t.nowhere", num_classes=3)


def test_torchvision_networks_that_do_not_classify_are_refused():
    with pytest.raises(InputError, match="torchvision has no network 'fcn_resnet50'"):
        torchvision_network("fcn_resnet50", num_classes=3)


@pytest.mark.parametrize(
    ("factory", "package", "name"),
    [(timm_network, "timm", "resnet10t"), (pytorchcv_network, "pytorchcv", "resnet20_cifar10")],
)
def test_a_missing_package_is_named_with_its_extra(monkeypatch, factory, package, name):
    for module in [module for module in sys.modules if module.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(InputError, match=rf"{package} is not installed: pip install 'distill-lightning\[{package}\]'"):
        factory(name, num_classes=3)


def test_a_package_that_is_there_but_broken_keeps_its_own_error(monkeypatch, tmp_path):
    (tmp_path / "timm.py").write_text("import a_module_that_is_not_there\n")
    for module in [module for module in sys.modules if module.partition(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        timm_network("resnet10t", num_classes=3)


# recipes


def weights_file(network, path):
    torch.save(network.state_dict(), path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    "build",
    [
        lambda: SmallResNet(3),
        lambda: SmallResNet(num_classes=3, in_channels=2, width=2, depth=2),
        lambda: torchvision_network("mobilenet_v3_small", num_classes=3, in_channels=1),
        lambda: timm_network(name="resnet10t", num_classes=3),
        lambda: pytorchcv_network("resnet20_cifar10", num_classes=3, in_channels=1, image_size=28),
    ],
)
def test_a_recipe_written_as_json_builds_the_same_network(build):
    network = build()
    recipe = json.loads(json.dumps(recipe_of(network)))
    again = build_from(recipe)
    shapes = [{name: tensor.shape for name, tensor in built.state_dict().items()} for built in (network, again)]
    assert type(again) is type(network)
    assert shapes[0] == shapes[1]
    assert recipe_of(again) == recipe_of(network)


def test_a_recipe_says_every_argument_given():
    assert recipe_of(SmallResNet(3, width=2)) == {
        "factory": "SmallResNet",
        "arguments": {"num_classes": 3, "in_channels": 1, "width": 2, "depth": 1},
    }
    assert recipe_of(torchvision_network("resnet18", num_classes=3, in_channels=1)) == {
        "factory": "torchvision_network",
        "arguments": {"name": "resnet18", "num_classes": 3, "in_channels": 1},
    }


@pytest.mark.parametrize("as_path", [str, pathlib.Path])
@pytest.mark.parametrize("by_name", [False, True])
def test_the_recipe_of_a_pretrained_network_reads_the_file_again(tmp_path, as_path, by_name):
    path = weights_file(SmallResNet(3, width=2), tmp_path / "weights.pt")
    fresh = SmallResNet(3, width=2)
    given = {"network": fresh, "checkpoint": as_path(path)}
    network = Pretrained(**given) if by_name else Pretrained(*given.values())
    recipe = json.loads(json.dumps(recipe_of(network)))
    assert recipe["factory"] == "Pretrained"
    assert recipe["arguments"]["checkpoint"] == str(path)
    assert recipe["arguments"]["network"]["arguments"]["width"] == 2
    assert same_state(build_from(recipe), network.state_dict())


def test_a_network_built_elsewhere_has_no_recipe(tmp_path):
    network = nn.Sequential(nn.Linear(2, 3))
    assert recipe_of(network) is None
    assert recipe_of(Pretrained(network, weights_file(network, tmp_path / "weights.pt"))) is None


def test_a_recipe_does_not_appear_in_the_state_dict():
    assert all("recipe" not in name for name in SmallResNet(3).state_dict())


@pytest.mark.parametrize("factory", ["os.system", "nn.Linear", "build_from", "_FACTORIES", "", None])
def test_a_recipe_of_an_unknown_factory_is_refused(factory):
    with pytest.raises(
        InputError, match=r"unknown network factory .*: known ones are .*SmallResNet, torchvision_network"
    ):
        build_from({"factory": factory, "arguments": {}})


def test_an_unknown_factory_inside_a_recipe_is_refused(tmp_path):
    inner = {"factory": "os.system", "arguments": {"command": f"touch {tmp_path / 'marker'}"}}
    with pytest.raises(InputError, match=r"unknown network factory 'os\.system'"):
        build_from({"factory": "Pretrained", "arguments": {"network": inner, "checkpoint": "none.pt"}})
    assert not (tmp_path / "marker").exists()


def test_a_recipe_without_a_factory_is_refused():
    with pytest.raises(InputError, match="unknown network factory None"):
        build_from({})


# Pretrained


def prefixed(state, prefix):
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


FILES = {
    "plain.pt": torch.save,
    "plain.pth": torch.save,
    "legacy.pt": lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
    "nested.pt": lambda state, path: torch.save({"state_dict": state, "epoch": 3}, path),
    "student.ckpt": lambda state, path: torch.save(
        {
            "state_dict": prefixed(state, "student.") | prefixed(state, "teachers.networks.0."),
            "hyper_parameters": {"name": "student.", "sizes": [1, 2]},
        },
        path,
    ),
    "student.pt": lambda state, path: torch.save(
        prefixed(state, "student.") | {"adapter.weight": torch.zeros(2)}, path
    ),
    "weights.safetensors": save_file,
    "student.safetensors": lambda state, path: save_file(prefixed(state, "student."), path),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_pretrained_reads_every_kind_of_file(tmp_path, name):
    source, network = SmallResNet(3, width=2), SmallResNet(3, width=2)
    source(torch.rand(4, 1, 8, 8))  # so that BatchNorm's buffers differ from fresh ones
    FILES[name](source.state_dict(), tmp_path / name)
    loaded = Pretrained(network, tmp_path / name)
    assert loaded is network
    assert same_state(network, source.state_dict())


WRAPPED = {
    "data_parallel": (lambda state: prefixed(state, "module."), "without 'module.'$"),
    "another_module": (lambda state: prefixed(state, "model."), "without 'model.'$"),
    "compiled": (lambda state: prefixed(state, "_orig_mod."), "without '_orig_mod.'$"),
    "compiled_within": (
        lambda state: {name.replace("stem.", "stem._orig_mod."): value for name, value in state.items()},
        "without '_orig_mod.'$",
    ),
    "all_of_them": (
        lambda state: prefixed(state, "model._orig_mod.module."),
        r"without '(model\.|module\.|_orig_mod\.){3}'$",
    ),
    "averaged": (
        lambda state: prefixed(state, "module.") | {"n_averaged": torch.tensor(3)},
        "without 'module.', and 1 tensors of something else are left out",
    ),
    "with_a_loss": (
        lambda state: prefixed(state, "model.") | {"loss.weight": torch.ones(2), "teacher.a": torch.ones(2)},
        "without 'model.', and 2 tensors of something else",
    ),
    "a_compiled_student": (
        lambda state: prefixed(state, "student._orig_mod.") | {"adapter.weight": torch.zeros(2)},
        "without '_orig_mod.'$",
    ),
}
KEPT = {
    "model": (lambda state: {"model": state, "epoch": 3, "optimizer": {"state": {}}}, "under 'model' is read"),
    "timm": (lambda state: {"state_dict": state, "state_dict_ema": state}, None),
    "model_ema": (lambda state: {"model": state, "model_ema": prefixed(state, "x")}, "under 'model' is read"),
    "net_of_my_own": (lambda state: {"my_net": state, "accuracy": 0.5}, "under 'my_net' is read"),
}


@pytest.mark.parametrize(("change", "told"), WRAPPED.values(), ids=WRAPPED)
def test_pretrained_reads_names_behind_what_wrappers_put_there_and_says_so(tmp_path, change, told):
    source, network = SmallResNet(3, width=2), SmallResNet(3, width=2)
    torch.save(change(source.state_dict()), tmp_path / "w.pt")
    with pytest.warns(UserWarning, match=rf"w\.pt: the names of its weights are read {told}"):
        Pretrained(network, tmp_path / "w.pt")
    assert same_state(network, source.state_dict())


@pytest.mark.parametrize(("change", "told"), KEPT.values(), ids=KEPT)
def test_pretrained_reads_what_is_kept_under_a_key_and_says_so(tmp_path, change, told):
    source, network = SmallResNet(3, width=2), SmallResNet(3, width=2)
    torch.save(change(source.state_dict()), tmp_path / "w.pt")
    with contextlib.nullcontext() if told is None else pytest.warns(UserWarning, match=rf"w\.pt: what .* {told}"):
        Pretrained(network, tmp_path / "w.pt")
    assert same_state(network, source.state_dict())


def test_a_network_whose_own_names_begin_so_is_read_as_it_is(tmp_path):
    source, network = (nn.ModuleDict({"model": SmallResNet(3, width=2)}) for _ in range(2))
    torch.save(source.state_dict(), tmp_path / "w.pt")
    assert same_state(Pretrained(network, tmp_path / "w.pt"), source.state_dict())
    torch.save(prefixed(source.state_dict(), "model."), tmp_path / "deeper.pt")
    with pytest.warns(UserWarning, match=r"deeper\.pt: .* without 'model\.'$"):
        Pretrained(network, tmp_path / "deeper.pt")


def test_a_compiled_network_takes_the_plain_ones_weights(tmp_path):
    source, network = SmallResNet(3, width=2), SmallResNet(3, width=2)
    torch.save(source.state_dict(), tmp_path / "w.pt")
    compiled = torch.compile(network, backend="eager")
    assert Pretrained(compiled, tmp_path / "w.pt") is compiled
    assert same_state(network, source.state_dict())


def test_of_several_state_dicts_none_is_guessed(tmp_path):
    state = SmallResNet(3, width=2).state_dict()
    torch.save({"ours": state, "theirs": state}, tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"w\.pt holds several state dicts \(ours, theirs\): save the one"):
        read_weights(tmp_path / "w.pt")


def test_another_architecture_is_told_of_by_the_names_that_it_would_have(tmp_path):
    state = prefixed(without(SmallResNet(3, width=2).state_dict(), "head.bias"), "module.")
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"another architecture than SmallResNet: it has no 'head\.bias';"):
        Pretrained(SmallResNet(3, width=2), tmp_path / "w.pt")


class Trap:
    """Unpickling it creates a file."""

    def __init__(self, function, argument):
        self.call = (function, (argument,))

    def __reduce__(self):
        return self.call


def write_trapped_torch_file(trap, path):
    torch.save({"state_dict": {"weight": torch.zeros(1)}, "extra": trap}, path)


def write_trapped_legacy_file(trap, path):
    torch.save({"weight": torch.zeros(1), "extra": trap}, path, _use_new_zipfile_serialization=False)


def write_trapped_pickle(trap, path):
    path.write_bytes(pickle.dumps(trap, protocol=2))


@pytest.mark.slow
@pytest.mark.parametrize("write", [write_trapped_torch_file, write_trapped_legacy_file, write_trapped_pickle])
@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".bin"])
@pytest.mark.parametrize("way", ["system", "touch"])
def test_a_file_that_would_run_code_is_refused_and_runs_none(tmp_path, write, suffix, way):
    marker, path = tmp_path / "marker", tmp_path / f"weights{suffix}"
    write(Trap(os.system, f"touch {marker}") if way == "system" else Trap(pathlib.Path.touch, marker), path)
    network = SmallResNet(3, width=2)
    before = state_of(network)
    with pytest.raises(InputError, match=r"is refused: .*unpickling it could run code") as caught:
        Pretrained(network, path)
    assert "\n" not in str(caught.value)
    assert not marker.exists()
    assert same_state(network, before)


def test_the_trap_of_the_test_above_is_live(tmp_path):
    pickle.loads(pickle.dumps(Trap(os.system, f"touch {tmp_path / 'system'}")))
    pickle.loads(pickle.dumps(Trap(pathlib.Path.touch, tmp_path / "touch")))
    assert (tmp_path / "system").exists()
    assert (tmp_path / "touch").exists()


def test_a_pickle_named_safetensors_runs_no_code(tmp_path):
    write_trapped_torch_file(Trap(os.system, f"touch {tmp_path / 'marker'}"), tmp_path / "weights.safetensors")
    with pytest.raises(InputError, match="cannot be read as weights"):
        read_weights(tmp_path / "weights.safetensors")
    assert not (tmp_path / "marker").exists()


def test_a_missing_file_is_named(tmp_path):
    for path in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(InputError, match=f"no checkpoint at {path}: give the path"):
            Pretrained(SmallResNet(3, width=2), path)


@pytest.mark.slow
@pytest.mark.parametrize("kept", [0.0, 0.001, 0.2, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("name", ["plain.pt", "legacy.pt", "weights.safetensors"])
def test_a_truncated_file_is_refused_and_the_network_unchanged(tmp_path, name, kept):
    network, path = SmallResNet(3, width=2), tmp_path / name
    FILES[name](SmallResNet(3, width=2).state_dict(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    before = state_of(network)
    with pytest.raises(InputError, match=rf"{path} (cannot be read as weights|is refused)") as caught:
        Pretrained(network, path)
    assert "\n" not in str(caught.value)
    assert same_state(network, before)


@pytest.mark.parametrize("end", [60, 160, 163, 200, 300])
def test_a_file_of_the_old_format_cut_within_its_pickle_is_refused(tmp_path, end):
    path = tmp_path / "legacy.pt"
    FILES["legacy.pt"]({"weight": torch.zeros(2), "bias": torch.zeros(3)}, path)
    path.write_bytes(path.read_bytes()[:end])
    with pytest.raises(InputError, match=r"legacy\.pt (cannot be read as weights|is refused)"):
        read_weights(path)


def test_a_text_file_is_refused(tmp_path):
    for name in ("notes.pt", "notes.safetensors"):
        (tmp_path / name).write_text("hello world\n" * 10)
        with pytest.raises(InputError, match=f"{name} (cannot be read as weights|is refused)"):
            read_weights(tmp_path / name)


@pytest.mark.parametrize(
    "content",
    [
        torch.zeros(2),
        [torch.zeros(2)],
        {"epoch": 3},
        {"state_dict": None},
        {"state_dict": {"weight": "text"}},
        {"student.weight": 1.0},
        {0: torch.zeros(2)},
    ],
    ids=str,
)
def test_a_file_without_a_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(InputError, match="holds no state dict"):
        read_weights(tmp_path / "weights.pt")


def without(state, name):
    return {key: value for key, value in state.items() if key != name}


OTHERS = [
    (lambda state: without(state, "head.bias"), r"it has no 'head\.bias';"),
    (lambda state: without(state, "stem.1.running_mean"), r"it has no 'stem\.1\.running_mean';"),
    (lambda state: state | {"tail.weight": torch.zeros(1)}, r"it has an unknown 'tail\.weight';"),
    (lambda state: state | {"head.bias": torch.zeros(4)}, r"it has 'head\.bias' of shape \(4,\) instead of \(3,\);"),
    (lambda state: state | {"head.bias": torch.zeros(1, 3)}, r"'head\.bias' of shape \(1, 3\) instead of \(3,\);"),
    (lambda state: state | {"head.bias": torch.zeros(())}, r"'head\.bias' of shape \(\) instead of \(3,\);"),
    (lambda state: {}, r"it has no 'stem\.0\.weight' \(and \d+ more differences\);"),
    (
        lambda state: without(without(state, "head.bias"), "head.weight") | {"tail": torch.zeros(1)},
        r"it has no 'head\.weight' \(and 2 more differences\);",
    ),
]


@pytest.mark.parametrize(("change", "message"), OTHERS)
def test_weights_of_another_architecture_are_refused_and_the_network_unchanged(tmp_path, change, message):
    network = SmallResNet(3, width=2)
    weights = change(state_of(SmallResNet(3, width=2)))
    before, recipe = state_of(network), recipe_of(network)
    torch.save(weights, tmp_path / "weights.pt")
    with pytest.raises(
        InputError, match=r"weights\.pt is a checkpoint of another architecture than SmallResNet: .*"
    ) as caught:
        Pretrained(network, tmp_path / "weights.pt")
    assert caught.match(message)
    with pytest.raises(InputError, match=message):
        load_strictly(network, weights, source="weights")
    assert same_state(network, before)
    assert recipe_of(network) == recipe


def test_check_architecture_accepts_what_fits_and_changes_nothing():
    network = SmallResNet(3, width=2)
    before = state_of(network)
    check_architecture(network, SmallResNet(3, width=2).state_dict(), source="other")
    assert same_state(network, before)


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_the_likely_input_has_the_channels_of_the_first_convolution(channels):
    assert likely_input_shape(SmallResNet(3, in_channels=channels, width=2)) == (channels, 32, 32)


def test_a_network_without_convolution_does_not_tell_its_input():
    with pytest.raises(
        InputError, match=r"Sequential has no convolution that shows its input's shape: give input_shape"
    ):
        likely_input_shape(nn.Sequential(nn.Linear(2, 3)))


# AdaptedInput


class Seen(nn.Module):
    """Returns what it was given."""

    def forward(self, images):
        return images


def naive_values(images, mean, std, source_mean, source_std):
    """One pixel after the other."""
    values = images.clone().double()
    for n in range(images.shape[0]):
        for c in range(images.shape[1]):
            for i in range(images.shape[2]):
                for j in range(images.shape[3]):
                    pixel = float(images[n, c, i, j]) * source_std[c] + source_mean[c]
                    values[n, c, i, j] = (pixel - mean[c]) / std[c]
    return values


def triangle_weights(length, wanted):
    """Bilinear resizing along one side, ``wanted x length``: triangles of the output's pixel size, cut at the edge."""
    ratio = length / wanted
    support = max(ratio, 1.0)
    rows = []
    for place in range(wanted):
        centre = (place + 0.5) * ratio
        row = [max(0.0, 1 - abs(pixel + 0.5 - centre) / support) for pixel in range(length)]
        rows.append([weight / sum(row) for weight in row])
    return torch.tensor(rows, dtype=torch.float64)


MEANS = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "source_mean": [0.1, 0.2, 0.3], "source_std": [0.5, 2.0, 0.7]}


def test_values_are_those_of_the_loop():
    images = torch.randn(2, 3, 4, 5)
    found = AdaptedInput(Seen(), **MEANS)(images)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), naive_values(images, **MEANS), rtol=1e-5, atol=1e-5)


def test_one_number_counts_for_every_channel():
    images = torch.randn(2, 3, 4, 4)
    one = AdaptedInput(Seen(), mean=0.5, std=[0.2, 0.3, 0.4], source_mean=0.1, source_std=(0.3,))(images)
    each = AdaptedInput(
        Seen(), mean=[0.5] * 3, std=[0.2, 0.3, 0.4], source_mean=[0.1] * 3, source_std=[0.3] * 3
    )(images)  # fmt: skip
    assert torch.equal(one, each)
    assert AdaptedInput(Seen(), mean=0.5, std=0.2)(images).flatten()[0] == pytest.approx(
        (float(images.flatten()[0]) - 0.5) / 0.2, rel=1e-5
    )


@pytest.mark.parametrize("size", [(8, 6), (3, 4), (13, 2), (6, 9), (1, 1)])
def test_the_size_is_made_by_triangles_as_wide_as_the_coarser_pixels(size):
    images = torch.randn(2, 2, 6, 9)
    rows, columns = triangle_weights(6, size[0]), triangle_weights(9, size[1])
    expected = torch.einsum("ih,jw,nchw->ncij", rows, columns, images.double())
    found = AdaptedInput(Seen(), size=size)(images)
    assert found.shape == (2, 2, *size)
    assert torch.allclose(found.double(), expected, atol=1e-5)


def test_values_come_first_and_the_size_then():
    images = torch.randn(2, 3, 6, 6)
    both = AdaptedInput(Seen(), size=[4, 8], **MEANS)(images)
    assert torch.equal(both, AdaptedInput(Seen(), size=[4, 8])(AdaptedInput(Seen(), **MEANS)(images)))


def test_without_options_nothing_changes():
    images = torch.randn(2, 3, 4, 4)
    assert torch.equal(AdaptedInput(Seen())(images), images)
    same = AdaptedInput(Seen(), mean=[0.1, 0.2, 0.3], std=2.0, source_mean=[0.1, 0.2, 0.3], source_std=2.0)
    assert torch.equal(same(images), images)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_resized_in_float32_and_given_back_as_it_came(dtype):
    images = torch.randn(1, 3, 5, 5).to(dtype)
    adapted = AdaptedInput(Seen(), size=(9, 9), **MEANS).to(dtype)
    found = adapted(images)
    assert found.dtype == dtype
    wide = AdaptedInput(Seen(), size=(9, 9), **MEANS)(images.float())
    assert torch.allclose(found.float(), wide, atol=0.1)


def test_a_gradient_comes_through_to_the_images():
    images = torch.randn(1, 3, 4, 4, requires_grad=True)
    AdaptedInput(Seen(), size=(6, 6), **MEANS)(images).sum().backward()
    for channel in range(3):
        # 36 pixels of weights that sum to one each.
        expected = 36 * MEANS["source_std"][channel] / MEANS["std"][channel]
        assert float(images.grad[0, channel].sum()) == pytest.approx(expected, rel=1e-5)


def test_the_state_dict_is_the_networks_behind_a_prefix_and_files_fit_inside_and_out(tmp_path):
    network = SmallResNet(3, in_channels=3, width=2)
    adapted = AdaptedInput(network, size=(8, 8), **MEANS)
    assert list(adapted.state_dict()) == [f"network.{name}" for name in network.state_dict()]
    assert [name for name, _ in adapted.named_parameters()] == [f"network.{n}" for n, _ in network.named_parameters()]
    assert {name for name, _ in adapted.named_buffers()} >= {"scale", "shift"}
    inside = weights_file(network, tmp_path / "inside.pt")
    outside = weights_file(adapted, tmp_path / "outside.pt")
    fresh = [SmallResNet(3, in_channels=3, width=2) for _ in range(2)]
    loaded = [AdaptedInput(Pretrained(fresh[0], inside), **MEANS), Pretrained(AdaptedInput(fresh[1], **MEANS), outside)]
    for one in loaded:
        assert same_state(one, adapted.state_dict())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"size": (8, 6)},
        {"mean": 0.5, "std": 0.25},
        {"size": [4, 4], **MEANS},
        {"mean": (0.1, 0.2, 0.3), "std": 2, "source_std": 3},
    ],
)
def test_the_recipe_of_an_adapted_network_builds_it_again(options, tmp_path):
    inner = SmallResNet(3, in_channels=3, width=2).eval()
    network = AdaptedInput(Pretrained(inner, weights_file(inner, tmp_path / "weights.pt")), **options)
    recipe = json.loads(json.dumps(recipe_of(network)))
    again = build_from(recipe).eval()
    assert recipe_of(again) == recipe_of(network)
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(again(images), network(images))


def test_an_adapted_network_inside_pretrained_has_a_recipe_too(tmp_path):
    def build():
        return AdaptedInput(SmallResNet(3, width=2), size=(6, 6), mean=0.3, std=0.7)

    network = Pretrained(build(), weights_file(build(), tmp_path / "weights.pt")).eval()
    again = build_from(json.loads(json.dumps(recipe_of(network)))).eval()
    images = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(again(images), network(images))


def test_an_adapted_network_from_elsewhere_has_no_recipe():
    assert recipe_of(AdaptedInput(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), mean=0.5, std=0.5)) is None


def test_an_ensemble_of_adapted_teachers_gives_each_its_own_input():
    plain, other = SmallResNet(3, width=2), SmallResNet(3, width=2)
    teachers = TeacherEnsemble([plain, AdaptedInput(other, size=(12, 12), mean=0.2, std=0.5)])
    KDModule(SmallResNet(3, width=2), teachers, num_classes=3, input_shape=(1, 8, 8))
    images = torch.randn(4, 1, 8, 8)
    resized = nn.functional.interpolate((images - 0.2) / 0.5, (12, 12), mode="bilinear", antialias=True)
    with torch.no_grad():
        expected = torch.stack([plain(images), other(resized)])
    assert torch.allclose(teachers.logits(images), expected, atol=1e-6)
    assert not any(parameter.requires_grad for parameter in teachers.parameters())


def test_a_feature_of_an_adapted_network_is_tapped_behind_the_prefix():
    network = AdaptedInput(SmallResNet(3, width=2), size=(16, 16), mean=0.5, std=0.5).eval()
    tap = FeatureTap(network, "network.stage3")
    assert tap.shapes((1, 8, 8))[1]["network.stage3"] == (1, 8, 4, 4)
    logits, features = tap(torch.randn(2, 1, 8, 8))
    assert torch.allclose(network.network.head(features["network.stage3"].mean(dim=(2, 3))), logits, atol=1e-5)
    assert likely_input_shape(network) == (1, 32, 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": (8,)}, r"size must be rows and columns, both at least 1, got \[8\]"),
        ({"size": (8, 0)}, r"size must be rows and columns, both at least 1, got \[8, 0\]"),
        ({"mean": 0.5}, "mean and std belong together, got mean=0.5 and std=None"),
        ({"std": 0.5}, "mean and std belong together, got mean=None and std=0.5"),
        ({"source_mean": 0.5}, "source_mean and source_std need mean and std, the normalisation"),
        ({"source_std": [0.5, 0.5]}, "source_mean and source_std need mean and std, the normalisation"),
        ({"mean": 0.5, "std": 0}, "std must be positive, got 0"),
        ({"mean": 0.5, "std": [1.0, -1.0]}, r"std must be positive, got \[1.0, -1.0\]"),
        ({"mean": 0.5, "std": 1, "source_std": float("nan")}, "source_std must be a finite number, got nan"),
        ({"mean": [0.5] * 3, "std": [1.0] * 2}, r"have \[2, 3\] channels: give equally many"),
    ],
)
def test_an_adaption_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        AdaptedInput(Seen(), **options)


def test_inputs_of_other_channels_are_refused_where_each_has_its_own_numbers():
    with pytest.raises(InputError, match=r"inputs of shape \(2, 1, 4, 4\) do not match the 3 channels of mean"):
        AdaptedInput(Seen(), **MEANS)(torch.randn(2, 1, 4, 4))
    with pytest.raises(InputError, match=r"inputs of shape \(3, 4, 4\) do not match"):
        AdaptedInput(Seen(), **MEANS)(torch.randn(3, 4, 4))
    assert AdaptedInput(Seen(), mean=0.5, std=0.5)(torch.randn(2, 1, 4, 4)).shape == (2, 1, 4, 4)


# SmallResNet for a regression


@pytest.mark.parametrize("targets", [1, 3])
def test_a_small_resnet_for_a_regression_ends_in_a_gaussian_head(targets):
    network = SmallResNet(num_targets=targets, width=2).eval()
    assert type(network.head) is GaussianHead
    assert network.head.num_targets == targets
    with torch.no_grad():
        output = network(torch.randn(5, 1, 8, 8))
    assert output.shape == (5, 2 * targets)
    assert not output[:, targets:].any()
    assert output[:, :targets].any()


def test_a_small_resnet_for_a_regression_differs_in_its_last_layer_alone():
    classes, targets = SmallResNet(6, width=4), SmallResNet(num_targets=3, width=4)
    shapes = [{name: value.shape for name, value in network.state_dict().items()} for network in (classes, targets)]
    assert shapes[0] == shapes[1]
    targets.load_state_dict(classes.state_dict())
    images = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        logits, output = classes.eval()(images), targets.eval()(images)
    assert torch.equal(output, torch.cat([logits[:, :3], logits[:, 3:].clamp(-10, 10)], dim=1))


def test_the_number_of_classes_is_still_the_first_argument():
    assert type(SmallResNet(4, width=2).head) is nn.Linear
    assert SmallResNet(4, width=2).head.out_features == 4


def test_the_recipe_of_a_small_resnet_for_a_regression_builds_it_again():
    network = SmallResNet(num_targets=2, in_channels=3, width=2, depth=2).eval()
    recipe = json.loads(json.dumps(recipe_of(network)))
    assert recipe["arguments"] == {"num_targets": 2, "in_channels": 3, "width": 2, "depth": 2}
    again = build_from(recipe).eval()
    again.load_state_dict(network.state_dict(), strict=True)
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(again(images), network(images))
    assert "num_targets" not in recipe_of(SmallResNet(3))["arguments"]


@pytest.mark.parametrize("arguments", [{}, {"num_classes": 3, "num_targets": 1}, {"num_classes": 0, "num_targets": 1}])
def test_a_small_resnet_classifies_or_regresses_and_not_both(arguments):
    message = r"SmallResNet needs either num_classes \(a classifier\) or num_targets \(a regression\)"
    with pytest.raises(InputError, match=message):
        SmallResNet(**arguments)


@pytest.mark.parametrize(("name", "value"), [("num_classes", 0), ("num_targets", 0), ("num_targets", -2)])
def test_a_small_resnet_without_outputs_is_refused(name, value):
    with pytest.raises(InputError, match=f"SmallResNet: {name} must be at least 1, got {value}"):
        SmallResNet(**{name: value})


def test_a_part_of_a_checkpoint_is_taken(tmp_path):
    stage = ParaphraserModule([TinyNet(), TinyNet()], layers="features", input_shape=(1, 8, 8))
    trainer = tiny_trainer()
    trainer.fit(stage, datamodule=TinyDataModule())
    trainer.save_checkpoint(tmp_path / "stage.ckpt")
    for number in (0, 1):
        taken = Pretrained(Paraphraser(8), tmp_path / "stage.ckpt", part=f"paraphrasers.{number}")
        for name, value in stage.paraphrasers[number].state_dict().items():
            assert torch.equal(value, taken.state_dict()[name])
    with pytest.raises(InputError, match="holds nothing of 'generator'; its parts: paraphrasers"):
        Pretrained(Paraphraser(8), tmp_path / "stage.ckpt", part="generator")
