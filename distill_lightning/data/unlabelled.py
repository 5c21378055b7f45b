"""Real inputs without labels."""

from __future__ import annotations

from functools import cached_property
from typing import cast

from torch import Tensor, nn

from distill_lightning.data.batch import map_tensors
from distill_lightning.data.datamodules import ViewDataModule, ViewDataset
from distill_lightning.data.digests import digest_of
from distill_lightning.data.fingerprint import data_fingerprint
from distill_lightning.data.samplers import Inputs
from distill_lightning.data.views import Draws
from distill_lightning.errors import InputError


class UnlabelledSampler(nn.Module):
    """Real inputs of which nobody needs to know the labels: teachers and student are asked about them all the same.

    A row's sample is drawn, uniformly and with replacement, from the row's own key, and is seen in the row's view, as
    augmented as training samples are. Labels, where the data have some, are never looked at. Samples are made on the
    host, so that a step on a GPU waits for the keys of its rows. What ``on_damaged: skip`` puts in the place of
    a damaged file is drawn like any other sample.

    ::

        samplers:
          - class_path: UnlabelledSampler
            init_args:
              data: {class_path: DigitsDataModule, init_args: {subset: 100}}

    Args:
        data: a data module of ours, whose samples the networks read as they read those of the training.
        split: ``"rest"``: the training samples that ``subset`` leaves out, so that with the training's own data module,
            and its ``seed``, none is a training sample; or another split that ``data`` has.

    Raises:
        InputError: ``data`` has no splits to choose from; when first used: the split has no samples, or they are not
            shaped like the batch's inputs.

    Example:
        >>> import torch
        >>> from distill_lightning import DigitsDataModule, UnlabelledSampler
        >>> from distill_lightning.data.views import Draws
        >>> sampler = UnlabelledSampler(DigitsDataModule(subset=100))
        >>> draws = Draws(0, torch.arange(3), torch.zeros(3, dtype=torch.int64))
        >>> sampler(torch.zeros(3, 1, 16, 16), draws).shape
        torch.Size([3, 1, 16, 16])
    """

    def __init__(self, data: ViewDataModule, *, split: str = "rest") -> None:
        super().__init__()
        if not isinstance(data, ViewDataModule):
            raise InputError(
                f"UnlabelledSampler: data must be a ViewDataModule, such as DigitsDataModule, got "
                f"{type(data).__name__}: of another one make a FunctionSampler"
            )
        self.data, self.split = data, split

    @cached_property
    def samples(self) -> ViewDataset:
        """The samples that are drawn from."""
        try:
            found = self.data.dataset(self.split, augment=True)
        except KeyError as error:
            if error.args != (self.split,):
                raise
            raise InputError(f"UnlabelledSampler: {type(self.data).__name__} has no split {self.split!r}") from None
        if not len(found):
            raise InputError(
                f"UnlabelledSampler: {type(self.data).__name__} has no samples in its split {self.split!r}"
                + (": set its subset, which leaves some" if self.split == "rest" else "")
            )
        # Partners would be made for nothing.
        found.partners = False
        return found

    def extra_repr(self) -> str:
        """Which samples they are; a store's answers depend on it."""
        options = {name: getattr(self.samples, name) for name in self.samples.depends_on}
        told = digest_of([data_fingerprint(self.data.dataset(self.split)), repr(options)]).hex()
        return f"{type(self.data).__name__}, split={self.split!r}, samples={len(self.samples)}, digest={told}"

    def forward(self, inputs: Inputs, draws: Draws) -> Inputs:
        """As many samples as ``draws`` has rows."""
        chosen = (draws.uniform(1)[:, 0] * len(self.samples)).long()
        drawn = cast("Inputs", self.samples.make(chosen.cpu(), draws.view.cpu()).input)

        def like(made: Tensor, given: Tensor) -> Tensor:
            if made.shape[1:] != given.shape[1:]:
                raise InputError(
                    f"UnlabelledSampler: {type(self.data).__name__} has samples of shape {tuple(made.shape[1:])}, the "
                    f"training's have {tuple(given.shape[1:])}: give it the same sizes"
                )
            return made.to(given.device, given.dtype)

        return cast("Inputs", map_tensors(like, drawn, inputs))
