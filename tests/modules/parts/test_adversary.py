"""The discriminators that MEAL V2 can be given, apart from its training."""

import pytest
import torch
from torch import nn

from distill_lightning import FixedDiscriminator, NoDiscriminator, OfficialDiscriminator, OwnDiscriminator
from distill_lightning.layers import Discriminator
from distill_lightning.schedules import OneCycle


@pytest.mark.parametrize(("choice", "kind"), [(OfficialDiscriminator(), "official"), (FixedDiscriminator(), "fixed")])
def test_a_discriminator_is_drawn_from_the_seed_and_leaves_the_random_state(choice, kind):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, second = choice.make(300), choice.make(300)
    assert isinstance(first, Discriminator)
    assert first.kind == kind
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one, other) for one, other in zip(first.parameters(), second.parameters(), strict=True))
    torch.manual_seed(4)
    others = choice.make(300).parameters()
    assert not all(torch.equal(one, other) for one, other in zip(first.parameters(), others, strict=True))


def test_an_own_network_is_taken_as_it_is_and_there_may_be_none():
    network = nn.Linear(3, 2)
    assert OwnDiscriminator(network).make(3) is network
    assert NoDiscriminator().make(3) is None
    assert not NoDiscriminator().has_own_group


@pytest.mark.parametrize("kind", [OfficialDiscriminator, FixedDiscriminator])
def test_a_rate_or_a_schedule_needs_a_group_of_its_own(kind):
    assert [kind(**options).has_own_group for options in ({}, {"lr": 0.1}, {"lr_scheduler": OneCycle})] == [
        False,
        True,
        True,
    ]


@pytest.mark.parametrize("kind", [OfficialDiscriminator, FixedDiscriminator])
def test_what_is_released_is_the_default(kind):
    assert vars(kind()) == {
        "shown": "logits", "mode": "cooperative", "weight": 1.0, "lr": None, "lr_scheduler": None,
    }  # fmt: skip
