"""Similarity per group: a source of features for some recordings only, or with the means of groups taken away.

`compute --where gender=...` asks whether two layers are alike on these recordings; `compute --within speaker` whether
anything is left when each speaker's mean is removed from both: is what two models share only the speaker?
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from cka_addon.errors import AudioError, NonFinite
from cka_addon.models import ModelInfo
from cka_addon.probe.errors import LabelError
from cka_addon.sources import Source
from cka_addon.units import values
from cka_addon.utterances import Utterance


class Restricted:
    """A source with some of its recordings only; everything else is the source's own."""

    def __init__(self, source: Source, ids: Sequence[str]) -> None:
        self._source = source
        self.ids = [u for u in source.ids if u in set(ids)]
        self.infos: list[ModelInfo] = source.infos
        self.left_out: dict[str, str] = source.left_out
        self.failures = 0
        self.grouped: dict[str, object] = dict(getattr(source, "grouped", {}))

    def __getattr__(self, name: str) -> object:
        return getattr(self._source, name)

    def seconds(self, utterance: str) -> float:
        """Length of an utterance."""
        return self._source.seconds(utterance)

    def count(self, utterance: str) -> int:
        """Frames on the slowest clock."""
        return self._source.count(utterance)

    def read(self, utterance: str) -> Utterance:
        """Features of one utterance."""
        return self._source.read(utterance)

    def waveform(self, utterance: str) -> Tensor:
        """Samples of one utterance."""
        return self._source.waveform(utterance)


class Within(Restricted):
    """A source whose layers have lost the mean of each group; reads everything once more to know the means.

    group_of : recording -> group; recordings without one are left out
    per_utterance : whether the mean is that of the utterances' means (for examples="means"), not of the frames
    """

    def __init__(
        self, source: Source, group_of: Mapping[str, str], *, per_utterance: bool = False, progress: bool = True
    ) -> None:
        super().__init__(source, [u for u in source.ids if u in group_of])
        self.group_of = dict(group_of)
        self.left_out = {**source.left_out, **{u: "in no group" for u in source.ids if u not in group_of}}
        self._means: dict[str, list[list[Tensor]]] | None = None
        self._per_utterance, self._progress = per_utterance, progress

    def _learn(self) -> dict[str, list[list[Tensor]]]:
        sums: dict[str, list[list[Tensor]]] = {}
        counts: dict[str, list[int]] = {}
        for name in tqdm(self.ids, desc="group means", unit="utt", disable=not self._progress):
            try:
                layers = self._source.read(name).layers
            except (AudioError, NonFinite, RuntimeError):
                continue  # read again, reported and counted where the features are used
            group = self.group_of[name]
            if group not in sums:
                sums[group] = [[torch.zeros(x.shape[1], dtype=torch.float64) for x in model] for model in layers]
                counts[group] = [0] * len(layers)
            for m, model in enumerate(layers):
                counts[group][m] += 1 if self._per_utterance else len(model[0])
                for total, x in zip(sums[group][m], model, strict=True):
                    total += (x.double().mean(0) if self._per_utterance else x.double().sum(0)).cpu()
        return {g: [[t / max(1, n) for t in model] for model, n in zip(sums[g], counts[g], strict=True)] for g in sums}

    def read(self, utterance: str) -> Utterance:
        """Features less their group's mean."""
        if self._means is None:
            self._means = self._learn()
        found = self._source.read(utterance)
        if self.group_of[utterance] in self._means:
            means = self._means[self.group_of[utterance]]
            found.layers = [
                [(x.double() - mean.to(x.device)).float() for x, mean in zip(model, some, strict=True)]
                for model, some in zip(found.layers, means, strict=True)
            ]
        return found


def grouped(
    source: Source,
    *,
    where: Sequence[str] = (),
    within: str | None = None,
    per_utterance: bool = False,
    progress: bool = True,
    announce: Callable[[str], None] = lambda text: None,
) -> Source:
    """The source restricted to `FILE:COLUMN=VALUE` (all of them) and centred within `FILE:COLUMN` or path:speaker.

    Raises LabelError where no recording is left or a group is not known.
    """
    for text in where:
        column, equals, value = text.rpartition("=")
        if not equals or ":" not in column:
            raise LabelError(f"got --where '{text}'; expected FILE:COLUMN=VALUE, e.g. labels.tsv:gender=f")
        found = values(source.ids, column)
        chosen = [u for u, v in found.items() if v == value]
        if not chosen:
            raise LabelError(
                f"--where {text}: no recording has that value; expected one of {sorted(set(found.values()))[:8]}"
            )
        announce(f"where {text}: {len(chosen)} of {len(source.ids)} recordings")
        source = Restricted(source, chosen)
        source.grouped["where"] = [*where]
    if within is not None:
        group_of = values(source.ids, within)
        announce(
            f"within {within}: the means of {len(set(group_of.values()))} groups are removed (read once more for them)"
        )
        source = Within(source, group_of, per_utterance=per_utterance, progress=progress)
        source.grouped["within"] = within
    return source
