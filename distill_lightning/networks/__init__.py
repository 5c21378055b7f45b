"""Students and teachers by name, typed so that YAML can configure them, and networks with weights from a file."""

from distill_lightning.networks.adapted import AdaptedInput, likely_input_shape, without_deviation
from distill_lightning.networks.detectors import faster_rcnn
from distill_lightning.networks.gaze import GazeNet
from distill_lightning.networks.images import SmallCNN, SmallResNet
from distill_lightning.networks.libraries import pytorchcv_network, timm_network, torchvision_network
from distill_lightning.networks.pretrained import Pretrained
from distill_lightning.networks.provenance import Recipe, build_from, recipe_of
from distill_lightning.networks.sequences import SmallLSTM, SmallTransformer
from distill_lightning.networks.translation import translation_transformer

__all__ = [
    "AdaptedInput",
    "GazeNet",
    "Pretrained",
    "Recipe",
    "SmallCNN",
    "SmallLSTM",
    "SmallResNet",
    "SmallTransformer",
    "build_from",
    "faster_rcnn",
    "likely_input_shape",
    "pytorchcv_network",
    "recipe_of",
    "timm_network",
    "torchvision_network",
    "translation_transformer",
    "without_deviation",
]
