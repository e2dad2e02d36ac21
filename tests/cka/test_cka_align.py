"""Clocks: which frames are the same moment."""

import numpy as np
import pytest
import torch

from cka_addon.align import Clock, align, describe, sample_instants, take
from cka_addon.errors import SpecError

pytestmark = pytest.mark.compat
CNN, STFT10, FBANK10 = Clock(0.02, 0.0125), Clock(0.01, 0.0), Clock(0.01, 0.0125)


def test_nearest_frame_by_time_not_by_index():
    # CNN frame i is at 12.5 + 20 i ms; the uncentred 10 ms frames at 12.5 + 10 j: j = 2 i exactly.
    (first, _), (second, _) = align([4, 9], [CNN, FBANK10])
    assert first.tolist() == [0, 1, 2, 3] and second.tolist() == [0, 2, 4, 6]
    # Centred STFT at 10 j ms: 12.5 is nearest to 10 (j = 1), not to frame 2 i = 0.
    assert align([4, 9], [CNN, STFT10])[1][0].tolist() == [1, 3, 5, 7]


def test_the_slower_clock_leads_whichever_comes_first():
    fast, slow = align([9, 4], [FBANK10, CNN])
    assert slow[0].tolist() == [0, 1, 2, 3] and fast[0].tolist() == [0, 2, 4, 6]


@pytest.mark.parametrize("frames", [6, 7, 8])
def test_lengths_that_differ_by_a_frame(frames):
    ranges = align([4, frames], [CNN, FBANK10])
    assert len(ranges[0][0]) == len(ranges[1][0]) == (4 if frames > 6 else 3)
    same = align([49, 50], [CNN, CNN])
    assert [len(r[0]) for r in same] == [49, 49]


def test_pool_takes_the_mean_of_the_frames_around():
    ranges = align([3, 7], [CNN, FBANK10], rule="pool")
    # Window 2.5 to 22.5 ms holds frames at 12.5 and, at its open end, not 22.5.
    x = torch.arange(7.0)[:, None]
    pooled = take(x, *ranges[1])
    times = FBANK10.times(7)
    want = [x[(times >= t - 0.01 - 1e-9) & (times < t + 0.01 - 1e-9)].mean().item() for t in CNN.times(3)]
    assert pooled[:, 0].tolist() == want


def test_same_signal_on_two_clocks_is_the_same_after_alignment():
    signal = lambda t: torch.tensor(np.stack([np.sin(9 * t), np.cos(5 * t)], 1))  # noqa: E731
    slow, fast = signal(CNN.times(50)), signal(STFT10.times(101))
    a, b = align([50, 101], [CNN, STFT10])
    by_time = (take(slow, *a) - take(fast, *b)).abs().max()
    by_index = (slow - fast[:100:2]).abs().max()
    assert by_time < 0.03 < by_index


def test_description_records_rule_and_misfit():
    d = describe([CNN, STFT10], "nearest")
    assert d["reference"] == 0 and d["largest_misfit_ms"] == [0.0, 2.5] and "nearest" in d["rule"]


def test_sampled_instants_are_the_same_everywhere_and_lie_on_frames():
    a, b = sample_instants("u1", 3.0, 20, seed=1), sample_instants("u1", 3.0, 20, seed=1)
    assert np.array_equal(a, b) and len(set(a)) == 20
    assert not np.array_equal(a, sample_instants("u1", 3.0, 20, seed=2))
    assert not np.array_equal(a, sample_instants("u2", 3.0, 20, seed=1))
    assert np.allclose(CNN.times(200)[CNN.nearest(a)], a)
    frames = (48000 - 400) // 320 + 1
    assert CNN.nearest(sample_instants("u", 3.0, 10**6, 0)).max() == frames - 1


def test_errors():
    with pytest.raises(SpecError, match="nearest, pool"):
        align([3], [CNN], rule="guess")
    with pytest.raises(SpecError, match="one vector per utterance"):
        align([1, 3], [Clock(0.0, 0.0), CNN])
