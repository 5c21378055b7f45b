"""Structured pruning that shrinks tensors: channels, hidden units, heads, neurons and layers are removed for good.

::

    groups = channel_groups(network, images)             # or unit_groups, head_groups, neuron_groups
    keep = {g: g.scores(network, values).topk(g.size // 2).indices for g in groups}
    shrink(network, keep)                                # in place; then a new optimiser
    recalibrate(network, batches)                        # BatchNorm statistics
    description = describe(network)                      # plain values
    rebuild(built_as_before, description).load_state_dict(network.state_dict())
"""

from distill_lightning.compression.surgery.attention import Attention, convert_attention
from distill_lightning.compression.surgery.batch_norm import recalibrate
from distill_lightning.compression.surgery.channels import channel_groups
from distill_lightning.compression.surgery.groups import Group, Member, shrink
from distill_lightning.compression.surgery.rebuilding import describe, describe_layer, rebuild, rebuild_layer
from distill_lightning.compression.surgery.recurrent import gate_masks, in_blocks, unit_group, unit_groups
from distill_lightning.compression.surgery.torch_pruning import channel_groups_by_torch_pruning
from distill_lightning.compression.surgery.transformer import head_groups, neuron_groups, remove_layers

__all__ = [
    "Attention",
    "Group",
    "Member",
    "channel_groups",
    "channel_groups_by_torch_pruning",
    "convert_attention",
    "describe",
    "describe_layer",
    "gate_masks",
    "head_groups",
    "in_blocks",
    "neuron_groups",
    "rebuild",
    "rebuild_layer",
    "recalibrate",
    "remove_layers",
    "shrink",
    "unit_group",
    "unit_groups",
]
