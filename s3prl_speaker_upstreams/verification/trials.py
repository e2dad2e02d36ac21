"""Trial lists and score files: which recordings are compared, and what came out."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from s3prl_speaker_upstreams.common.files import write_text
from s3prl_speaker_upstreams.data.lists import read_text
from s3prl_speaker_upstreams.errors import ConfigError

__all__ = ["Trials", "all_pairs", "read_scores", "read_trials", "speaker_units", "write_scores", "write_trials"]


@dataclass(frozen=True)
class Trials:
    """A trial list: ``labels`` (trials,) int64, and the names of both sides."""

    labels: np.ndarray
    enrol: tuple[str, ...]
    test: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.enrol)

    @property
    def names(self) -> list[str]:
        """Every recording that is needed, once, sorted."""
        return sorted({*self.enrol, *self.test})


_LABELS = {"1": 1, "0": 0, "target": 1, "nontarget": 0, "imposter": 0, "impostor": 0}


def _parts(line: str) -> list[str]:
    for separator in ("\t", ",", ";"):
        if line.count(separator) == 2:
            return [part.strip() for part in line.split(separator)]
    return line.split()


def read_trials(path: str | os.PathLike[str]) -> Trials:
    """Read ``label enrol test`` lines (VoxCeleb: label 1 or 0) or ``enrol test target|nontarget`` lines (Kaldi).

    Columns are parted by blanks, or by tabs, commas or semicolons (for names with blanks). UTF-8 or UTF-16.

    Raises ConfigError naming the first line that is neither.

    >>> import tempfile
    >>> name = tempfile.mkstemp()[1]
    >>> _ = Path(name).write_text("1 id1/a.wav id1/b.wav\\n0 id1/a.wav id2/c.wav\\n")
    >>> trials = read_trials(name)
    >>> trials.labels.tolist(), trials.names
    ([1, 0], ['id1/a.wav', 'id1/b.wav', 'id2/c.wav'])
    """
    labels, enrol, test = [], [], []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        parts = _parts(line)
        if not parts:
            continue
        if len(parts) == 3 and parts[0] in _LABELS:
            label, first, second = parts
        elif len(parts) == 3 and parts[2] in _LABELS:
            first, second, label = parts
        else:
            raise ConfigError(
                f"{path}, line {number}: got {line!r}, expected '1|0 enrol test' or 'enrol test target|nontarget'"
            )
        labels.append(_LABELS[label])
        enrol.append(first)
        test.append(second)
    if not labels:
        raise ConfigError(f"{path}: got no trials, expected lines like '1 id1/a.wav id1/b.wav'")
    return Trials(np.array(labels, dtype=np.int64), tuple(enrol), tuple(test))


def write_trials(trials: Trials, path: str | os.PathLike[str]) -> Path:
    """Write ``label enrol test`` lines; the file appears whole or not at all."""
    rows = zip(trials.labels, trials.enrol, trials.test, strict=True)
    return write_text(path, "".join(f"{label} {first} {second}\n" for label, first, second in rows))


def all_pairs(speakers: Sequence[object] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every pair of recordings once: pairs (trials, 2) and labels (trials,), 1 where the speaker is the same.

    >>> pairs, labels = all_pairs(["a", "a", "b"])
    >>> pairs.tolist(), labels.tolist()
    ([[0, 1], [0, 2], [1, 2]], [1, 0, 0])
    """
    who = np.asarray(speakers)
    first, second = np.triu_indices(len(speakers), 1)
    return np.stack([first, second], 1), (who[first] == who[second]).astype(np.int64)


# ---------------------------------------------------------------------------------------------- who speaks
_VOXCELEB = re.compile(r"(?:^|/)(id\d{5})/")


def speaker_units(trials: Trials) -> tuple[np.ndarray, str]:
    """What the two sides of every trial are samples of, for :func:`.metrics.bootstrap`: (trials, 2) int, and its name.

    Speakers by the recordings' names (``id10270/...``, else the first folder), where the labels agree with them for all
    trials; else recordings that target trials link are one speaker's; else, if that leaves one, recordings.

    >>> units, what = speaker_units(Trials(np.array([1, 0]), ("a/1", "a/1"), ("a/2", "b/1")))
    >>> units.tolist(), what
    ([[0, 0], [0, 1]], 'speakers, by name')
    >>> speaker_units(Trials(np.array([1, 0]), ("u1", "u1"), ("u2", "u3")))[1]
    'speakers, as target trials link them'
    """
    names = trials.names
    row = {name: number for number, name in enumerate(names)}
    sides = np.array([[row[a], row[b]] for a, b in zip(trials.enrol, trials.test, strict=True)])
    same = trials.labels.astype(bool)
    matches = [_VOXCELEB.search(name) for name in names]
    if all(matches) or all("/" in name for name in names):
        folders = [match.group(1) if match else name.split("/")[0] for match, name in zip(matches, names, strict=True)]
        speakers = np.unique(folders, return_inverse=True)[1]
        if ((speakers[sides[:, 0]] == speakers[sides[:, 1]]) == same).all():
            return speakers[sides], "speakers, by name"
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    links = sides[same]
    graph = coo_matrix((np.ones(len(links)), (links[:, 0], links[:, 1])), shape=(len(names), len(names)))
    count, speakers = connected_components(graph, directed=False)
    if count > 1 and (speakers[sides[~same, 0]] != speakers[sides[~same, 1]]).all():
        return speakers[sides], "speakers, as target trials link them"
    return sides, "recordings"


# ---------------------------------------------------------------------------------------------- score files
def write_scores(trials: Trials, scores: Mapping[str, np.ndarray], path: str | os.PathLike[str]) -> Path:
    """Write a table with tabs: label, enrol, test, and a column for every scoring; whole or not at all."""
    rows = ["\t".join(["label", "enrol", "test", *scores])]
    columns = [trials.labels.tolist(), trials.enrol, trials.test, *([f"{x:.6g}" for x in v] for v in scores.values())]
    rows += ["\t".join(map(str, row)) for row in zip(*columns, strict=True)]
    return write_text(path, "\n".join(rows) + "\n")


def read_scores(path: str | os.PathLike[str]) -> tuple[Trials, dict[str, np.ndarray]]:
    """What :func:`write_scores` wrote. Raises ConfigError if the file is something else.

    >>> import tempfile
    >>> trials = Trials(np.array([1, 0]), ("a", "a"), ("b", "c"))
    >>> path = write_scores(trials, {"cosine": np.array([0.5, 0.25])}, Path(tempfile.mkdtemp()) / "scores.tsv")
    >>> read_scores(path)[1]["cosine"].tolist()
    [0.5, 0.25]
    """
    lines = read_text(path).splitlines()
    head = lines[0].split("\t") if lines else []
    if head[:3] != ["label", "enrol", "test"] or len(head) < 4:
        raise ConfigError(
            f"{path}: got {lines[0][:80] if lines else 'nothing'!r}, expected a file of `evaluate --scores`"
        )
    try:
        rows = [line.split("\t") for line in lines[1:]]
        trials = Trials(np.array([int(r[0]) for r in rows]), tuple(r[1] for r in rows), tuple(r[2] for r in rows))
        return trials, {name: np.array([float(r[3 + i]) for r in rows]) for i, name in enumerate(head[3:])}
    except (ValueError, IndexError) as error:
        raise ConfigError(f"{path}: not the table that its first line promises ({error})") from error
