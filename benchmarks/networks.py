"""Networks of torchvision, timm and transformers, all without weights, for `benchmarks.architectures`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

CLASSES = 13


def _names(text: str) -> list[str]:
    return text.split()


TORCHVISION = _names("""
    alexnet resnet18 resnet50 resnext50_32x4d densenet121 squeezenet1_0 squeezenet1_1 googlenet inception_v3
    mobilenet_v2 mobilenet_v3_small mnasnet0_5 shufflenet_v2_x0_5 efficientnet_b0 regnet_x_400mf convnext_tiny swin_t
    swin_v2_t maxvit_t lraspp_mobilenet_v3_large fcn_resnet50 deeplabv3_mobilenet_v3_large r3d_18 mc3_18
""")
TIMM = _names("""
    botnet26t_256 resnet26t gernet_s mobileone_s0 lambda_resnet26t eca_resnext26ts gcresnext26ts regnetz_b16
    cait_xxs24_224 coat_lite_tiny convit_tiny convnextv2_atto crossvit_tiny_240 cs3darknet_s cspresnet50
    deit_tiny_patch16_224 dla34 dpn48b edgenext_xx_small efficientformerv2_s0 efficientnet_b0 tf_efficientnet_lite0
    mobilenetv2_050 fbnetc_100 mixnet_s efficientvit_b0 efficientvit_m0 fasternet_t0 fastvit_t8 focalnet_tiny_srf
    gcvit_xxtiny ghostnetv2_100 hardcorenas_a hgnet_tiny hgnetv2_b0 hrnet_w18_small inception_next_atto inception_v4
    levit_128s coatnet_nano_rw_224 maxvit_rmlp_pico_rw_256 poolformer_s12 convformer_s18 gmlp_ti16_224 resmlp_12_224
    mobilenetv3_small_050 lcnet_035 mobilenetv4_conv_small mobilevit_xxs mobilevitv2_050 mvitv2_tiny nextvit_small
    nf_resnet26 nf_regnet_b0 eca_nfnet_l0 pvt_v2_b0 rdnet_tiny regnetx_002 regnety_002 repvit_m0_9 res2net50_14w_8s
    resnest14d resnet18 ecaresnet26t resnetv2_18 resnetv2_50 rexnet_100 legacy_seresnet18 seresnet18 sequencer2d_s
    shvit_s1 starnet_s1 swiftformer_xs swin_tiny_patch4_window7_224 swinv2_cr_tiny_224 tnt_s_patch16_224 tresnet_m
    twins_svt_small twins_pcpvt_small vgg11_bn visformer_tiny vit_tiny_patch16_224 vit_relpos_small_patch16_224
    ese_vovnet19b_dw xception41 xcit_nano_12_p16_224 densenet121 darknet17 test_vit test_resnet test_efficientnet
    test_byobnet test_convnext test_nfnet
""")

# Four times as many neurons as features, as in the published ones.
_SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
_IMAGES = {"image_size": 32, "patch_size": 8}
_WORDS = {"vocab_size": 99, "max_position_embeddings": 64}
_STAGES = {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 48, 64]}
TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    # The class, and what its configuration has beside the defaults.
    "vit": ("ViTForImageClassification", _SIZES | _IMAGES),
    "deit": ("DeiTForImageClassification", _SIZES | _IMAGES),
    "beit": ("BeitForImageClassification", _SIZES | _IMAGES),
    "dinov2": ("Dinov2ForImageClassification", _SIZES | _IMAGES),
    "swin": ("SwinForImageClassification", _IMAGES | {
        "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4,
    }),
    "convnextv2": ("ConvNextV2ForImageClassification", _STAGES),
    "segformer": ("SegformerForImageClassification", {
        "depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 48, 64], "num_attention_heads": [1, 2, 4, 4],
    }),
    "bert": ("BertForSequenceClassification", _SIZES | _WORDS),
    "roberta": ("RobertaForSequenceClassification", _SIZES | _WORDS),
    "electra": ("ElectraForSequenceClassification", _SIZES | _WORDS | {"embedding_size": 32}),
    "distilbert": ("DistilBertForSequenceClassification", {
        "vocab_size": 99, "dim": 64, "hidden_dim": 256, "n_layers": 2, "n_heads": 4,
    }),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 99, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "opt": ("OPTForCausalLM", {
        "vocab_size": 99, "hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 64,
    }),
    "t5": ("T5EncoderModel", {
        "vocab_size": 99, "d_model": 64, "d_kv": 16, "d_ff": 256, "num_layers": 2, "num_heads": 4,
    }),
    "llama": ("LlamaForCausalLM", _SIZES | _WORDS | {"num_key_value_heads": 2}),
    "qwen2": ("Qwen2ForCausalLM", _SIZES | _WORDS | {"num_key_value_heads": 2}),
}  # fmt: skip

NAMES = [
    *(f"torchvision {name}" for name in TORCHVISION),
    *(f"timm {name}" for name in TIMM),
    *(f"transformers {name}" for name in TRANSFORMERS),
]


def build(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A network in eval mode with its inputs, of the smallest of some sizes that it takes.

    Args:
        name: the library and the network, a line of `NAMES`.
    """
    torch.manual_seed(0)
    library, _, own = name.partition(" ")
    network, candidates = {"torchvision": _torchvision, "timm": _timm, "transformers": _transformers}[library](own)
    _enliven(network.eval())
    with torch.no_grad():
        for inputs in candidates:
            try:
                network(*inputs)
            except (RuntimeError, ValueError, AssertionError, IndexError, ZeroDivisionError):  # too small
                continue
            return network, inputs
    raise RuntimeError(f"{name} takes none of the inputs that are tried")


def _images(*sides: int) -> Iterator[tuple[Tensor, ...]]:
    return ((torch.randn(1, 3, side, side),) for side in sides)


def _torchvision(name: str) -> tuple[nn.Module, Iterator[tuple[Tensor, ...]]]:
    options: dict[str, Any] = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    if name in torchvision.models.list_models(module=torchvision.models.segmentation):
        options["weights_backbone"] = None
    network: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=CLASSES, **options)
    if name in torchvision.models.list_models(module=torchvision.models.video):
        return network, iter([(torch.randn(1, 3, 8, 32, 32),)])
    # The auxiliary head of Inception, which runs in training only, takes no smaller images.
    return network, _images(299) if name == "inception_v3" else _images(64, 128, 224)


def _timm(name: str) -> tuple[nn.Module, Iterator[tuple[Tensor, ...]]]:
    network = importlib.import_module("timm").create_model(name, pretrained=False, num_classes=CLASSES)
    return network, _images(64, 128, network.pretrained_cfg["input_size"][-1])


def _transformers(name: str) -> tuple[nn.Module, Iterator[tuple[Tensor, ...]]]:
    transformers = importlib.import_module("transformers")
    kind, options = TRANSFORMERS[name]
    made: Callable[..., nn.Module] = getattr(transformers, kind)
    network = made(made.config_class(num_labels=CLASSES, **options))  # type: ignore[attr-defined]
    inputs = torch.arange(24).view(2, 12) * 5 % 99 if "vocab_size" in options else torch.randn(1, 3, 32, 32)
    return network, iter([(inputs,)])


@torch.no_grad()
def _enliven(network: nn.Module) -> None:
    """Give norms, gates and scales numbers as after training: at the start many of them let nothing through."""
    for module in network.modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if not tensor.is_floating_point():
                continue
            if name in ("running_mean", "bias"):
                tensor.normal_(0, 0.1)
            elif name == "running_var" or (name == "weight" and tensor.dim() == 1):
                tensor.uniform_(0.5, 1.5)
            elif isinstance(tensor, nn.Parameter) and float(tensor.abs().max()) < 1e-2:
                tensor.normal_(0, 0.3)
