"""Where the second view of a positive pair comes from: the same recording, the same speaker, or the same cluster.

Two crops of one recording share its microphone, room and noise, and a network may tell speakers apart by these. A
selection names another recording for the second half of the global crops of an utterance:

``same_utterance``
    No selection: all crops are of one recording (DINO, SimCLR and so on as published).
``same_speaker``
    Any other recording of the speaker. Needs labels: an oracle, that says what perfect selection would be worth.
``other_session``, ``same_session``
    The same with the speaker's other sessions only, or the same session only. A session is the folder of a recording
    (VoxCeleb's video, LibriSpeech's chapter).
``clusters``
    Without labels (Lepage and Dehak, "SSPS", arXiv 2505.14561): embeddings of all recordings are clustered by k-means
    on the cosine, and a positive is drawn from the recording's own cluster, or from one of its ``nearest`` neighbours.

>>> manifest = Manifest(["a/v1/1", "a/v1/2", "a/v2/3", "b/v3/4"], [1] * 4, [1] * 4, ["a", "a", "a", "b"])
>>> other = SpeakerPositives(manifest, "other_session")
>>> [other.partner(0, index) for index in range(4)]  # of the only session of b there is no other
[2, 2, 1, 3]
>>> count_positives(manifest, [0, 3], [2, 3])
{'pairs': 2, 'same_recording': 1, 'same_session': 1, 'same_speaker': 2}
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from s3prl_speaker_upstreams.data.keyed import random_for
from s3prl_speaker_upstreams.data.manifest import Manifest
from s3prl_speaker_upstreams.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SELECTIONS", "ClusterPositives", "Positives", "SpeakerPositives", "count_positives", "kmeans", "sessions"]

SELECTIONS = ("same_utterance", "same_speaker", "other_session", "same_session", "clusters")


class Positives(Protocol):
    """A selection: which utterance gives the other half of the global crops of ``index``."""

    def partner(self, epoch: int, index: int, purpose: str = "") -> int:
        """Depends on its arguments alone; ``index`` itself where there is no other."""
        ...


def sessions(manifest: Manifest) -> np.ndarray:
    """Number of the session of every utterance, (N,) int64: recordings in one folder are of one session."""
    folders = [os.path.dirname(item.path) for item in manifest]
    return np.unique(folders, return_inverse=True)[1].reshape(-1)


def _members(groups: np.ndarray) -> list[np.ndarray]:
    """Utterances of every group 0 .. max, sorted."""
    order = np.argsort(groups, kind="stable")
    return np.split(order, np.searchsorted(groups[order], np.arange(1, int(groups.max()) + 1)))


class SpeakerPositives:
    """Another recording of the same speaker, by the labels of the manifest (an oracle).

    Parameters
    ----------
    manifest : Manifest
    selection : "same_speaker", "other_session" or "same_session"
    seed : int

    Raises ConfigError if utterances have no speaker, or no utterance has a partner.
    """

    def __init__(
        self, manifest: Manifest, selection: Literal["same_speaker", "other_session", "same_session"], seed: int = 0
    ):
        if not manifest.labelled:
            raise ConfigError(
                f"positives={selection} needs the speaker of every utterance; {manifest.describe_speakers()}. Use "
                "same_utterance or clusters, or a list that states speakers"
            )
        self.manifest, self.selection, self.seed = manifest, selection, int(seed)
        self.members = _members(manifest.labels)
        self.sessions = None if selection == "same_speaker" else sessions(manifest)
        if not any(len(self.candidates(index)) for index in range(len(manifest))):
            raise ConfigError(
                f"positives={selection}: no utterance has another one to go with (a session is a recording's folder)"
            )

    def candidates(self, index: int) -> np.ndarray:
        """Utterances that may go with ``index``, sorted; empty where there are none."""
        others = self.members[self.manifest.labels[index]]
        others = others[others != index]
        if self.sessions is None:
            return others
        same = self.sessions[others] == self.sessions[index]
        return others[same if self.selection == "same_session" else ~same]

    def partner(self, epoch: int, index: int, purpose: str = "") -> int:
        """See :class:`Positives`."""
        others = self.candidates(index)
        if not len(others):
            return index
        rng = random_for(self.seed, epoch, self.manifest[index].id, f"positive{purpose}")
        return int(others[rng.integers(len(others))])


class ClusterPositives:
    """A recording of the same cluster of embeddings, or of a neighbouring one (SSPS, arXiv 2505.14561).

    Before :meth:`update` was called, positives come from the same recording.

    Parameters
    ----------
    manifest : Manifest
    nearest : int
        0: from the own cluster; else from one of so many nearest other clusters, drawn with equal chance (the paper's
        M; with far more clusters than speakers the own cluster is often the own session).
    seed : int

    >>> manifest = Manifest(list("abcd"), [1] * 4, [1] * 4)
    >>> positives = ClusterPositives(manifest)
    >>> positives.update([0, 0, 1, 1], np.eye(2))
    >>> [positives.partner(0, index) for index in range(4)]
    [1, 0, 3, 2]
    """

    def __init__(self, manifest: Manifest, nearest: int = 0, seed: int = 0):
        if nearest < 0:
            raise ConfigError(f"nearest: got {nearest}, expected 0 (the own cluster) or more")
        self.manifest, self.nearest, self.seed = manifest, int(nearest), int(seed)
        self.assignments: np.ndarray | None = None
        self.neighbours = np.empty((0, 0), dtype=np.int64)
        self.members: list[np.ndarray] = []

    def update(self, assignments: Sequence[int] | np.ndarray, centroids: np.ndarray) -> None:
        """Take new clusters.

        assignments : (N,) cluster of every utterance. centroids : (clusters, D), as :func:`kmeans` returns both.
        """
        assignments = np.asarray(assignments, dtype=np.int64)
        if assignments.shape != (len(self.manifest),):
            raise ConfigError(f"got clusters of {assignments.shape} utterances, expected {len(self.manifest)}")
        if self.nearest >= len(centroids) > 0 and self.nearest:
            raise ConfigError(
                f"nearest: got {self.nearest} of {len(centroids)} clusters, expected fewer than there are"
            )
        neighbours = np.arange(len(centroids))[:, None]
        if self.nearest:
            unit = centroids / np.maximum(np.linalg.norm(centroids, axis=1, keepdims=True), 1e-12)
            neighbours = np.empty((len(unit), self.nearest), dtype=np.int64)
            for start in range(0, len(unit), 1024):
                near = unit[start : start + 1024] @ unit.T
                near[np.arange(len(near)), start + np.arange(len(near))] = -np.inf  # itself
                neighbours[start : start + 1024] = np.argsort(-near, axis=1, kind="stable")[:, : self.nearest]
        self._set(assignments, neighbours)

    def _set(self, assignments: np.ndarray, neighbours: np.ndarray) -> None:
        self.assignments, self.neighbours = assignments, neighbours
        members = _members(assignments)
        self.members = members + [np.empty(0, dtype=np.int64)] * (len(neighbours) - len(members))

    def partner(self, epoch: int, index: int, purpose: str = "") -> int:
        """See :class:`Positives`."""
        if self.assignments is None:
            return index
        rng = random_for(self.seed, epoch, self.manifest[index].id, f"positive{purpose}")
        near = self.neighbours[self.assignments[index]]
        others = self.members[int(near[rng.integers(len(near))])]
        others = others[others != index]
        return int(others[rng.integers(len(others))]) if len(others) else index

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to draw the same positives."""
        import torch

        if self.assignments is None:
            return {}
        return {"assignments": torch.from_numpy(self.assignments), "neighbours": torch.from_numpy(self.neighbours)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the clusters of :meth:`state_dict`."""
        if state:
            self._set(state["assignments"].numpy(), state["neighbours"].numpy())


def kmeans(
    x: Tensor, clusters: int, iterations: int = 10, seed: int = 0, block: int = 16384
) -> tuple[np.ndarray, np.ndarray]:
    """Clusters of embeddings by their direction: k-means on the cosine, on the device where ``x`` is.

    Parameters
    ----------
    x : (N, D)
        Scaled to unit length here.
    clusters : int
        At most N. It begins at as many rows that ``seed`` draws.
    iterations : int
        As often rows are assigned and centroids moved (10 in SSPS). A cluster that lost all rows goes to the row that
        is farthest from its own centroid.
    block : int
        Rows that are compared at once.

    Returns
    -------
    assignments (N,) int64, centroids (clusters, D) float64 of unit length

    >>> import torch
    >>> x = torch.tensor([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0], [0.1, 3.0]])
    >>> assignments, centroids = kmeans(x, 2)
    >>> bool(assignments[0] == assignments[1] != assignments[2] == assignments[3])
    True
    """
    import torch
    import torch.nn.functional as F

    if not 1 <= clusters <= len(x):
        raise ConfigError(f"clusters: got {clusters}, expected 1 to {len(x)}, the number of recordings")
    with torch.no_grad():
        x = F.normalize(x.detach().float(), dim=1)
        begin = np.sort(np.random.default_rng(seed).permutation(len(x))[:clusters])
        centroids = x[torch.from_numpy(begin).to(x.device)].clone()
        for _ in range(max(1, iterations)):
            nearest, similarity = _assigned(x, centroids, block)
            sums = torch.zeros_like(centroids).index_add_(0, nearest, x)
            counts = torch.bincount(nearest, minlength=clusters)
            empty = torch.nonzero(counts == 0).view(-1)
            if len(empty):
                sums[empty] = x[torch.argsort(similarity, stable=True)[: len(empty)]]
            centroids = F.normalize(sums, dim=1)
        nearest, _ = _assigned(x, centroids, block)
    return nearest.cpu().numpy(), centroids.double().cpu().numpy()


def _assigned(x: Tensor, centroids: Tensor, block: int) -> tuple[Tensor, Tensor]:
    import torch

    parts = [(x[start : start + block] @ centroids.T).max(dim=1) for start in range(0, len(x), block)]
    return torch.cat([part.indices for part in parts]), torch.cat([part.values for part in parts])


def count_positives(manifest: Manifest, anchors: Iterable[int], partners: Iterable[int]) -> dict[str, int]:
    """How many pairs are of the same recording, session and (where known) speaker, for a log."""
    counts = {"pairs": 0, "same_recording": 0, "same_session": 0, "same_speaker": 0}
    for anchor, partner in zip(anchors, partners, strict=True):
        counts["pairs"] += 1
        same = anchor == partner
        counts["same_recording"] += same
        counts["same_session"] += same or (
            os.path.dirname(manifest[anchor].path) == os.path.dirname(manifest[partner].path)
        )
        label = manifest.labels[anchor]
        counts["same_speaker"] += same or (label >= 0 and bool(label == manifest.labels[partner]))
    return counts
