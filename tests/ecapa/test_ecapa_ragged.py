"""Bookkeeping of ragged batches against plain numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s3prl_speaker_upstreams.ecapa import Ragged
from s3prl_speaker_upstreams.ecapa.ragged import Gaps, patches, reflect_index

pytestmark = pytest.mark.compat
LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=6)


def ragged(lengths: list[int], width: int = 3) -> Ragged:
    return Ragged(torch.arange(1.0, sum(lengths) * width + 1).view(-1, width), lengths)


@given(length=st.integers(1, 9), pad=st.integers(0, 40))
def test_reflection_is_that_of_numpy(length, pad):
    expected = np.pad(np.arange(length), pad, mode="reflect" if length > 1 else "edge")
    assert reflect_index(np.arange(-pad, length + pad), length).tolist() == expected.tolist()


@given(lengths=LENGTHS)
def test_pad_and_unpad_are_inverse(lengths):
    batch = ragged(lengths)
    padded = batch.pad(-1.0)
    assert padded.shape == (len(lengths), max(lengths), 3)
    assert (padded == -1).sum() == 3 * (len(lengths) * max(lengths) - sum(lengths))
    back = Ragged.unpad(padded, lengths)
    assert torch.equal(back.data, batch.data) and back.lengths == lengths


@given(lengths=LENGTHS)
def test_grids_cover_the_batch_in_order(lengths):
    grids = list(ragged(lengths).grids())
    assert torch.equal(torch.cat([g.flatten(0, 1) for g in grids]), ragged(lengths).data)
    assert [g.shape[1] for g in grids for _ in range(len(g))] == lengths


def test_equal_lengths_are_one_grid():
    assert len(list(ragged([4] * 5).grids())) == 1


@given(lengths=LENGTHS, more=st.lists(st.integers(0, 14), min_size=6, max_size=6))
def test_extend_repeats_the_last_frame_and_cuts_none(lengths, more):
    longer = ragged(lengths).extend(more[: len(lengths)])
    for old, new, wanted in zip(ragged(lengths).split(), longer.split(), more, strict=False):
        assert len(new) == max(len(old), wanted)
        assert torch.equal(new[: len(old)], old) and (new[len(old) :] == old[-1]).all()


@given(lengths=LENGTHS, width=st.integers(1, 5))
def test_gaps_show_each_utterances_own_reflection(lengths, width):
    batch, gaps = ragged(lengths), Gaps.of(lengths, width, torch.device("cpu"))
    spread = batch.data[gaps.source]
    expected = np.concatenate(
        [np.pad(u.numpy(), ((width, width), (0, 0)), mode="reflect" if len(u) > 1 else "edge") for u in batch.split()]
    )
    assert np.array_equal(spread.numpy(), expected)
    assert torch.equal(spread[gaps.real], batch.data)
    assert torch.equal(spread[gaps.gap], spread[gaps.gap_source])
    assert sorted([*gaps.gap.tolist(), *gaps.real.tolist()]) == list(range(len(spread)))


@settings(deadline=None)
@given(lengths=LENGTHS, kernel=st.sampled_from([1, 3, 5]), stride=st.integers(1, 3))
@pytest.mark.parametrize("padding", ["reflect", "zeros"])
def test_patches_are_what_a_padded_convolution_sees(padding, lengths, kernel, stride):
    batch, pad = ragged(lengths, 2), kernel // 2
    weight = torch.randn(4, 2, kernel)
    seen, frames = patches(batch, kernel, stride, padding)
    expected = []
    for u in batch.split():
        mode = "constant" if padding == "zeros" else "reflect" if len(u) > 1 else "edge"
        padded = torch.from_numpy(np.pad(u.numpy(), ((pad, pad), (0, 0)), mode=mode))
        expected.append(torch.nn.functional.conv1d(padded.t()[None], weight, stride=stride)[0].t())
    assert frames == [len(e) for e in expected]
    torch.testing.assert_close(seen @ weight.transpose(1, 2).flatten(1).t(), torch.cat(expected), atol=1e-3, rtol=1e-4)
