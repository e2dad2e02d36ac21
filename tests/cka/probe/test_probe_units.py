"""Frames and segments by frame centres, folds by groups."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cka_addon.align import Clock
from cka_addon.probe import folds, units
from cka_addon.probe.errors import FoldError
from cka_addon.probe.labels import Segment


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([(0.02, 0.0125), (0.01, 0.0), (0.01, 0.0125), (0.04, 0.02)]),
    st.lists(st.integers(1, 40), min_size=1, max_size=12),
    st.integers(0, 2**31),
)
def test_frames_are_those_whose_centre_is_inside(clock, lengths, seed):
    clock = Clock(*clock)
    ends = np.cumsum(lengths) * 0.013
    starts = np.concatenate([[0.0], ends[:-1]])
    frames = int(ends[-1] / clock.shift) + 1
    first, last = units.frames_of(clock, frames, starts, ends)
    times = clock.times(frames)
    x = torch.randn(frames, 3, generator=torch.Generator().manual_seed(seed))
    there = last > first
    found = units.means(x, first[there], last[there])
    rows = [Segment(a, b, str(i)) for i, (a, b) in enumerate(zip(starts, ends, strict=True))]
    owner = units.at_times(rows, times)
    for k, i in enumerate(np.flatnonzero(there)):
        inside = np.flatnonzero((times >= starts[i] - 1e-6 * clock.shift) & (times < ends[i] - 1e-6 * clock.shift))
        if len(inside):
            assert np.arange(first[i], last[i]).tolist() == inside.tolist()
            assert (owner[inside] == i).mean() > 0.99 or len(inside) < 3
        else:
            assert last[i] - first[i] == 1 and abs(times[first[i]] - (starts[i] + ends[i]) / 2) < clock.shift
        torch.testing.assert_close(found[k], x[first[i] : last[i]].mean(0), atol=1e-5, rtol=1e-5)


def test_times_beyond_the_audio_and_overlaps_are_counted():
    counts = units.Counts()
    rows = [
        Segment(0, 1, "a"),
        Segment(0.5, 0.6, "in a"),
        Segment(1, 2.5, "long"),
        Segment(3, 4, "behind"),
        Segment(1, 1, "0"),
    ]
    kept = units.usable_segments(rows, 2.0, counts)
    assert [(s.value, s.end) for s in kept] == [("long", 2.0)]
    assert counts.found == {
        "segments that overlap another": 2,
        "segments cut at the end of the audio": 1,
        "segments beyond the audio": 1,
        "segments without length": 1,
    }


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 6), st.integers(8, 40), st.integers(2, 5), st.integers(0, 1000))
def test_no_group_is_in_two_folds_and_sizes_are_even(count, groups, classes, seed):
    rng = np.random.default_rng(seed)
    names = [f"g{g}" for g in rng.integers(groups, size=400)]
    labels = [str(c) for c in rng.integers(classes, size=400)]
    fold = folds.deal(names, labels, count, seed)
    folds.check_disjoint(fold, names)
    assert set(fold.tolist()) == (set(range(count)) if count > 1 else {0, -1})
    if groups >= 4 * count and count > 1:
        sizes = np.bincount(fold, minlength=count)
        assert sizes.max() < 2.2 * sizes.min() + 60


def test_every_class_of_bound_labels_is_trained_on():
    """Who speaks cannot be asked of new speakers: each speaker is in every training part."""
    speakers = [f"s{i // 4}" for i in range(80)]
    made = folds.make_folds(speakers, speakers, [str(i) for i in range(80)], folds=4, seed=0)
    assert made.by == "utterance" and "one speaker only" in made.why
    for f in range(4):
        held = [s for s, at in zip(speakers, made.fold, strict=True) if at == f]
        assert sorted(held) == sorted(set(speakers))


def test_too_few_groups_and_shared_groups_are_refused():
    with pytest.raises(FoldError, match="got 3 groups for 5 folds"):
        folds.deal(["a", "b", "c"], None, 5, 0)
    with pytest.raises(FoldError, match="each of 2 classes is found in one utterance only"):
        folds.make_folds(["a", "b"], ["x", "y"], ["1", "2"], folds=2, seed=0)
    with pytest.raises(FoldError, match="group 'a' is in folds 0 and 1"):
        folds.check_disjoint(np.array([0, 1, 0]), ["a", "a", "b"])


def test_rare_classes_are_named():
    notes = folds.class_warnings(np.array([0, 0, 1, 1, -1]), ["a", "b", "a", "a", "c"])
    assert "1 classes are tested without having been trained on (1 examples" in notes[0]
    assert "1 classes are in training only, never tested: c" in notes[1]
