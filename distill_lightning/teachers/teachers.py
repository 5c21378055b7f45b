"""The one way from a method to its teachers, whoever answers for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distill_lightning.data.batch import Batch
from distill_lightning.data.samplers import join
from distill_lightning.errors import InputError, NonFiniteError
from distill_lightning.layers import FeatureTap, InputShape, dry_forward, fingerprint
from distill_lightning.networks.provenance import recipe_of
from distill_lightning.outputs import Output
from distill_lightning.teachers import origin
from distill_lightning.teachers.about import About, join_rows, split_rows
from distill_lightning.teachers.ensemble import EnsembleRule, TeacherEnsemble
from distill_lightning.teachers.frozen import Frozen
from distill_lightning.teachers.questions import (
    Features,
    Logits,
    MeanLogits,
    Question,
    Softened,
    TeacherOutputs,
    answered,
    feature_names,
)
from distill_lightning.teachers.store import TeacherStore

Given = TeacherStore | nn.Module | Sequence[nn.Module] | None
"""What a method takes as ``teachers``."""


class Teachers(Frozen):
    """Frozen teachers and what a method asks them; an attribute of a `DistillationModule`.

    ::

        self.teachers = Teachers(teachers, ask=[Softened(temperature)])   # in the constructor
        probs = self.teachers.probabilities(batch)                        # in terms

    Every network runs once per batch, however many questions there are. Where a `TeacherStore` was given, its answers
    take the networks' place as soon as it knows them, and the method does not notice.

    ``len``, iteration and indexing are about the teachers alone; ``networks`` holds everything that is frozen, the
    `TeacherEnsemble` as one network and those of the questions, paraphrasers for example.

    Args:
        given: a network, several, a `TeacherEnsemble`, a `TeacherStore`, which may hold the networks that fill it, or
            ``None``: there are no teachers, and nothing may be asked.
        ask: the questions, each of a kind of its own.
        about: which inputs they are about; ``None``: each batch's own.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from distill_lightning import Batch, KDModule, MeanLogits, Softened, Teachers
        >>> module = KDModule(nn.Linear(4, 3), [nn.Linear(4, 3), nn.Linear(4, 3)], num_classes=3)
        >>> module.teachers = Teachers(module.teachers, ask=[Softened(temperature=4.0), MeanLogits()])
        >>> batch = Batch(torch.rand(2, 4))
        >>> module.teachers.probabilities(batch).shape, module.teachers.mean_logits(batch).shape
        (torch.Size([2, 3]), torch.Size([2, 3]))
    """

    def __init__(self, given: Given | Teachers, ask: Sequence[Question], *, about: About | None = None) -> None:
        # Those of another module can be handed on.
        self.given: Given = given.given if isinstance(given, Teachers) else given
        self.store = self.given if isinstance(self.given, TeacherStore) else None
        networks = self.given.networks if isinstance(self.given, TeacherStore) else self.given
        self.ensemble = None if networks is None else TeacherEnsemble.of(networks)
        self.questions = list(ask)
        self.about = About() if about is None else about
        self.taps: list[FeatureTap] = []
        self.output: Output | None = None
        self._who, self._per_position = "", False
        self.heard: Sequence[Tensor] = ()
        """What each network has just given for a batch, until the batch ends."""
        self._last: tuple[Batch, dict[str, Any], dict[str, Tensor] | None] | None = None
        # Those whose outputs for positions could be read in one way alone.
        self._known_layouts: set[int] = set()
        own = [] if self.ensemble is None else [self.ensemble]
        super().__init__([*own, *(network for question in ask for network in question.networks())])
        for question in self.questions:
            if isinstance(question, Features) and self.ensemble is not None:
                self.taps = self.ensemble.tapped(question.layer_of_each(len(self)), question.channels)

    def __len__(self) -> int:
        return 0 if self.ensemble is None else len(self.ensemble)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(() if self.ensemble is None else self.ensemble)

    def __getitem__(self, number: int) -> nn.Module:
        return list(self)[number]

    def __bool__(self) -> bool:
        return self.ensemble is not None or self.store is not None

    def __repr__(self) -> str:
        return f"Teachers({', '.join(type(network).__name__ for network in self) or self.store})"

    def joined(self, module: Any) -> None:
        """Look at the networks' outputs, where the module knows the shape of an input.

        Raises:
            InputError: a network does not fit.
        """
        self.output, self._who, self._per_position = module.output, type(module).__name__, module.per_position
        if self.ensemble is not None:
            self.output.check_rule(self.ensemble.rule.combine)
        if module.input_shape is not None and not self.taps:
            for number, network in enumerate(self):
                self.check(number, network, dry_forward(network, module.input_shape).shape)

    def check(self, number: int, network: nn.Module, shape: Sequence[int]) -> None:
        """Look at the shape of a teacher's output.

        Raises:
            InputError: it does not fit the module's.
        """
        self._known_output.check_teacher(f"teacher {number}", network, shape, per_position=self._per_position)

    def shapes(self, input_shape: InputShape) -> list[tuple[int, ...]]:
        """Shapes ``(1, C, H, W)`` of the teachers' tapped features, from one dry forward or as a store tells them."""
        if self.ensemble is None:
            if self.store is None:
                raise self._nobody()
            return self.store.feature_shapes()
        found = []
        for number, tap in enumerate(self.taps):
            output, features = tap.shapes(input_shape)
            self.check(number, tap.network, output)
            found.append(tuple(features[tap.layers[0]]))
        return found

    def _laid_out(self, number: int, output: Tensor) -> Tensor:
        if output.ndim > 2 and number not in self._known_layouts:
            if needed := self._known_output.needs_layout(output.shape):
                name = type(self[number]).__name__
                raise InputError(f"teacher {number} ({name}) gives {tuple(output.shape)}, which has {needed}")
            self._known_layouts.add(number)
        return self._known_output.laid_out(output)

    # What a method reads

    def distribution(self, batch: Batch) -> Tensor:
        """`Softened`: the ensemble's distribution ``(N, K)`` or ``(N, 2 d)``, of every input it is asked about."""
        return self._answer(batch, Softened, self._known_output.name)

    def probabilities(self, batch: Batch) -> Tensor:
        """`Softened`, of a classification: ``(N, K)`` or ``(N, T, K)``.

        Raises:
            InputError: the networks' outputs are not logits.
        """
        if self._known_output.name != "probabilities":
            raise InputError(
                f"{self._who} reads probabilities of {type(self._known_output).__name__}: read distribution(batch)"
            )
        return self._answer(batch, Softened, "probabilities")

    def logits(self, batch: Batch) -> Tensor:
        """`Logits`: every teacher's, ``(M, N, ...)``."""
        return self._answer(batch, Logits, "logits").transpose(0, 1)

    def mean_logits(self, batch: Batch) -> Tensor:
        """`MeanLogits`, ``(N, K)``."""
        return self._answer(batch, MeanLogits, "mean_logits")

    def features(self, batch: Batch) -> list[Tensor]:
        """`Features`: one for each teacher, ``(N, C_m, H, W)``."""
        self._refuse_undeclared(Features, "features")
        answers = self._answers(batch)
        names = feature_names(answers)
        if not names:
            raise self._not_held("features")
        return [answers[name] for name in names]

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """The inputs that the teachers are asked about, made once per batch."""
        if self._last is None or self._last[0] is not batch:
            self._last = (batch, self.about.inputs(batch), None)
        return self._last[1]

    def _answers(self, batch: Batch) -> dict[str, Tensor]:
        """All answers about a training batch, by name: from the store as far as it knows them, else asked.

        Raises:
            InputError: there are no teachers, and no store that knows their answers.
        """
        inputs = self.inputs(batch)
        known = self._last[2] if self._last is not None else None
        if known is None:
            known = self.run(batch) if self.store is None else self._from_store(batch, self.store)
            self._last = (batch, inputs, known)
        return known

    def _answer(self, batch: Batch, kind: type[Question], name: str) -> Tensor:
        # A store may know more than it is asked for.
        self._refuse_undeclared(kind, name)
        answers = self._answers(batch)
        if name not in answers:
            raise self._not_held(name)
        return answers[name]

    # Who answers

    def run(self, batch: Batch) -> dict[str, Tensor]:
        """Run the networks and answer every question."""
        return answered(self.questions, self._outputs_of(batch))

    def rows_to_store(self, batch: Batch) -> dict[str, Tensor]:
        """What the store keeps about a batch: an answer ``(N, ...)`` for each question and input, or the logits alone.

        Raises:
            InputError: no store can reproduce the inputs.
            NonFiniteError: an answer that counts is nan or infinite, which would be kept.
        """
        suffixes = self.about.suffixes(batch, self.inputs(batch))
        questions = [Logits()] if self._are_logits_kept() else self.questions
        rows = split_rows(answered(questions, self._outputs_of(batch)), suffixes, batch.size)
        refuse_non_finite(rows, batch)
        return rows

    def _from_store(self, batch: Batch, store: TeacherStore) -> dict[str, Tensor]:
        suffixes = self.about.suffixes(batch, self.inputs(batch))
        ask = None if self.ensemble is None else partial(self.rows_to_store, batch)
        found = store.read_or_ask(batch, ask, device=batch.device)
        if self._are_logits_kept():
            logits = found["logits"].transpose(0, 1).unbind() if "logits" in found else ()
            features = [found[name] for name in feature_names(found)]
            return answered(self.questions, TeacherOutputs(logits, features, self.rule, self._known_output))
        return join_rows(found, suffixes)

    def _outputs_of(self, batch: Batch) -> TeacherOutputs:
        if self.ensemble is None:
            raise self._nobody()
        every = list(self.inputs(batch).values())
        inputs = every[0] if len(every) == 1 else join(every)
        if not self.taps:
            outputs = self.ensemble.each(inputs)
            for number, (network, output) in enumerate(zip(self, outputs, strict=True)):
                self.check(number, network, output.shape)
            self.heard = [self._laid_out(number, output) for number, output in enumerate(outputs)]
            return TeacherOutputs(self.heard, (), self.rule, self._known_output)
        pairs = self.ensemble.each(inputs, self.taps)
        features = [features[tap.layers[0]] for tap, (_, features) in zip(self.taps, pairs, strict=True)]
        self.heard = [output for output, _ in pairs]
        return TeacherOutputs(self.heard, features, self.rule, self._known_output)

    @property
    def rule(self) -> EnsembleRule:
        """How the teachers' predictions become one, as they, or in their absence the store, tell."""
        if self.ensemble is not None:
            return self.ensemble.rule
        if self.store is None:
            raise self._nobody()
        return EnsembleRule(**self.store.found["made_by"]["ensemble"])

    def describe(self) -> dict[str, Any]:
        """Plain values of the questions and inputs that a store's answers depend on."""
        about = self.about.describe()
        if self.store is not None and self.store.keep == "logits":
            return about
        asked = {name: value for question in self.questions for name, value in question.describe().items()}
        if self.ensemble is None:
            # The store itself tells of the teachers that filled it.
            asked = {name: value for name, value in asked.items() if name not in Features.OF_NETWORKS}
        return {**asked, **about, **self._known_output.describe_answers()}

    @property
    def _known_output(self) -> Output:
        if self.output is None:
            raise RuntimeError("Teachers is asked before it became an attribute of a DistillationModule")
        return self.output

    def _are_logits_kept(self) -> bool:
        if self.store is None or self.store.keep != "logits":
            return False
        asks_features = any(question.needs_features for question in self.questions)
        if (asks_features and not self.store.holds_features) or type(self.about) is not About:
            raise InputError(f"{self._who} needs more than its teachers' logits: leave the store's keep out")
        return True

    def _refuse_undeclared(self, kind: type[Question], name: str) -> None:
        if not any(isinstance(question, kind) for question in self.questions):
            asked = ", ".join(type(question).__name__ for question in self.questions) or "nothing"
            raise InputError(
                f"{self._who} reads the teachers' {name} but asks for {asked}: add {kind.__name__} to Teachers(ask=...)"
            )

    def _not_held(self, name: str) -> InputError:
        path = None if self.store is None else self.store.path
        return InputError(
            f"{self._who} reads the teachers' {name}, which the store {path} does not hold: fill another folder"
        )

    @staticmethod
    def _nobody() -> InputError:
        return InputError("there are no teachers: give networks, or a complete TeacherStore")

    # Predictions for validation and test

    def prediction(self, inputs: Any) -> Tensor | None:
        """The ensemble's prediction in the form that metrics read; ``None``: there are no networks to ask."""
        if self.ensemble is None:
            return None
        rule, output = self.rule, self._known_output
        with torch.no_grad():
            distribution = output.collapse(self._each(inputs), weights=rule.weights, combine=rule.combine)
            return output.as_prediction(distribution)

    def predictions(self, inputs: Any) -> list[Tensor]:
        """Each teacher's prediction in the form that metrics read."""
        output = self._known_output
        with torch.no_grad():
            return [output.teacher_prediction(one) for one in self._each(inputs)]

    def _each(self, inputs: Any) -> list[Tensor]:
        outputs = [] if self.ensemble is None else self.ensemble.each(inputs)
        return [self._laid_out(number, output) for number, output in enumerate(outputs)]

    # What happens when

    def fit_starts(self, module: Any) -> None:
        """Move to the module's device.

        Raises:
            InputError: there are questions and nobody to answer them; without a training, nobody need be there.
        """
        if self.questions and not self:
            raise self._nobody()
        super().fit_starts(module)

    def training_starts(self, module: Any) -> None:
        """Tell the store what it is about, and take up what a killed training has left in it."""
        if self.store is not None:
            origin.begin_store(module, self, self.store)

    def batch_ends(self, module: Any) -> None:
        """Let go of the answers, which may be large."""
        self._last, self.heard = None, ()

    def epoch_ends(self, module: Any) -> None:
        """What the teachers have said in this epoch can be read from now on."""
        if self.store is not None:
            origin.finish_epoch(module.trainer, self.store)

    def fit_ends(self, module: Any) -> None:
        """Another training may fill the store."""
        if self.store is not None:
            self.store.release()

    # In checkpoints

    def fingerprints(self, name: str) -> dict[str, str]:
        """Of the teachers, and of the questions' own networks."""
        found = {} if self.ensemble is None else {name: fingerprint(self.ensemble)}
        extra = [network for question in self.questions for network in question.networks()]
        return found | ({"paraphrasers": fingerprint(nn.ModuleList(extra))} if extra else {})

    def recipe(self) -> Any:
        """How the networks were built; ``None`` with a store, whose folder no checkpoint names."""
        if self.ensemble is None or self.store is not None:
            return None
        return {"networks": [recipe_of(network) for network in self.ensemble], **self.ensemble.options()}


def refuse_non_finite(rows: Mapping[str, Tensor], batch: Batch) -> None:
    """What is not finite must not be kept; rounding would hide it. Minus infinity masks classes of logits.

    Raises:
        NonFiniteError: an answer that counts is nan or infinite.
    """
    for name, values in rows.items():
        counted = batch.counted
        if counted is not None and values.shape[: counted.ndim] != counted.shape:
            counted = None
        # In one pass: the largest number is nan where any is.
        within = tuple(range(1 if counted is None else counted.ndim, values.ndim))
        bad = ~((values.amax(within) if within else values) < torch.inf)
        if counted is not None:
            bad &= counted
        # On the host, where the answers go in any case.
        numbers = np.flatnonzero(bad.reshape(len(bad), -1).any(dim=1).cpu().numpy())
        if len(numbers):
            index = numbers if batch.key is None else batch.key.index.cpu().numpy()[numbers]
            raise NonFiniteError(
                f"the teachers' {name} of {len(index)} samples ({', '.join(map(str, index[:8]))}) hold nan or inf, and "
                "a store would keep them: mend the inputs or replace the teachers"
            )
