"""Grouped folds: every group (speaker, session) is in one fold only, classes and sizes as even as that allows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cka_addon.probe.errors import FoldError

HOLDOUT = 4  # with one fold, one group in four is held out


@dataclass(frozen=True)
class Folds:
    """fold : (examples,) number of the fold an example is tested in, -1 for one that only trains;  count : folds

    by : what groups are;  why : a sentence, where they are not what was asked for
    """

    fold: np.ndarray
    count: int
    by: str
    why: str = ""


def spans(groups: Sequence[str], labels: Sequence[str]) -> int:
    """Number of classes that are found in at least two groups: only those can be tested on a group not trained on.

    >>> spans(["a", "a", "b"], ["x", "y", "x"])
    1
    """
    where: dict[str, set[str]] = {}
    for group, label in zip(groups, labels, strict=True):
        where.setdefault(label, set()).add(group)
    return sum(len(found) > 1 for found in where.values())


def deal(groups: Sequence[str], labels: Sequence[str] | None, folds: int, seed: int) -> np.ndarray:
    """Deal whole groups to folds, (examples,) int; the examples of a class are spread over the folds where they can be.

    labels : classes, or None for numbers;  folds : at least 2, or 1 to hold out a quarter of the groups (fold 0; the
    others get -1 and only train)
    Raises FoldError where there are fewer groups than folds.

    >>> fold = deal(["a", "a", "b", "b", "c", "c", "d", "d"], list("xxxxyyyy"), 2, seed=0)
    >>> bool(fold[0] == fold[1] != fold[2] == fold[3]), bool(fold[4] == fold[5] != fold[6] == fold[7])
    (True, True)
    """
    parts = HOLDOUT if folds == 1 else folds
    order, which = np.unique(np.asarray(groups, dtype=object).astype(str), return_inverse=True)
    if len(order) < min(parts, 2) or (folds > 1 and len(order) < folds):
        raise FoldError(
            f"got {len(order)} groups for {folds} folds; expected at least as many groups: use fewer folds, or group "
            "by something finer (--group utterance)"
        )
    parts = min(parts, len(order))
    classes, code = (
        np.unique(np.asarray(labels).astype(str), return_inverse=True)
        if labels is not None
        else (np.zeros(1), np.zeros(len(which), np.int64))
    )
    table = np.zeros((len(order), len(classes)))
    np.add.at(table, (which, code), 1)
    rng = np.random.default_rng([seed, 3])
    total = table.sum(0)
    want = np.maximum(total / parts, 1e-9)
    held = np.zeros((parts, len(classes)))
    place = np.zeros(len(order), np.int64)
    # Groups of rare classes first and large groups before small ones; a random order among equals.
    rarest = np.array([total[row > 0].min() for row in table])
    for g in np.lexsort((rng.permutation(len(order)), -table.sum(1), rarest)):
        row = table[g]
        share = row / row.sum()
        # How full each fold is already, for the classes that this group brings.
        full = (held / want) @ share
        size = held.sum(1) / max(total.sum() / parts, 1e-9)
        cost = full + 0.5 * size
        best = np.flatnonzero(cost <= cost.min() + 1e-12)
        place[g] = best[rng.integers(len(best))]
        held[place[g]] += row
    fold = place[which]
    if folds == 1:
        fold = np.where(fold == 0, 0, -1)
    check_disjoint(fold, groups)
    return fold


def check_disjoint(fold: np.ndarray, groups: Sequence[str]) -> None:
    """Raise FoldError where a group is in two folds.

    >>> check_disjoint(np.array([0, 1]), ["a", "a"])
    Traceback (most recent call last):
    cka_addon.probe.errors.FoldError: group 'a' is in folds 0 and 1; expected every group in one fold only
    """
    seen: dict[str, int] = {}
    for number, group in zip(np.asarray(fold).tolist(), groups, strict=True):
        if seen.setdefault(group, number) != number:
            raise FoldError(
                f"group '{group}' is in folds {seen[group]} and {number}; expected every group in one fold only"
            )


def make_folds(
    groups: Sequence[str],
    labels: Sequence[str] | None,
    utterances: Sequence[str],
    *,
    folds: int,
    seed: int,
    by: str = "speaker",
) -> Folds:
    """Folds by group; by utterance, said in `why`, where classes are bound to groups (who speaks, by speaker).

    Raises FoldError where classes are bound to single utterances too, or there are fewer groups than folds.

    >>> made = make_folds(["a", "a", "b", "b"], ["a", "a", "b", "b"], ["1", "2", "3", "4"], folds=2, seed=0)
    >>> made.by, made.why
    ('utterance', 'each class is found in one speaker only')
    """
    if labels is not None and by != "utterance":
        classes = len(set(labels))
        spanning = spans(groups, labels)
        if spanning < 2:
            if spans(utterances, labels) < 2:
                raise FoldError(
                    f"each of {classes} classes is found in one utterance only, so none can be tested on other speech; "
                    "expected classes that come back: other labels, or more recordings"
                )
            text = "each class is found" if not spanning else f"all but {spanning} of {classes} classes are found"
            fold = deal(utterances, labels, folds, seed)
            return Folds(fold, folds, "utterance", f"{text} in one {by} only")
    return Folds(deal(groups, labels, folds, seed), folds, by)


def class_warnings(fold: np.ndarray, labels: Sequence[str]) -> list[str]:
    """What the folds do to rare classes: those that some training part lacks, and those that are never tested."""
    names = np.asarray(labels).astype(str)
    classes = set(names.tolist())
    notes = []
    untrained: Counter[str] = Counter()
    for f in sorted(set(fold.tolist()) - {-1}):
        here = Counter(names[fold == f].tolist())
        missing = set(here) - set(names[fold != f].tolist())
        untrained.update({c: here[c] for c in missing})
    if untrained:
        notes.append(
            f"{len(untrained)} classes are tested without having been trained on ({sum(untrained.values())} examples, "
            f"counted as wrong): {', '.join(sorted(untrained)[:5])}"
        )
    if never := sorted(classes - set(names[fold >= 0].tolist())):
        notes.append(f"{len(never)} classes are in training only, never tested: {', '.join(never[:5])}")
    return notes
