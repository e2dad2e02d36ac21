"""Intervals: what leaving a unit out does, and how often they hold the value of the whole population."""

import numpy as np
import pytest
import torch

from cka_addon.align import Clock
from cka_addon.errors import SpecError
from cka_addon.estimators import Pairs
from cka_addon.finish import finish
from cka_addon.hsic import BatchHsic, cka_matrix
from cka_addon.models import ModelInfo
from cka_addon.moments import Moments
from cka_addon.options import Options
from cka_addon.result import CKAResult
from cka_addon.run import gather, merge
from cka_addon.state import State
from cka_addon.uncertainty import Kept, LeftOut, intervals, leave_out, pick_frames, ratio
from cka_addon.utterances import Utterance

pytestmark = pytest.mark.compat
LAYERS, WIDTH, LATENT = 4, 16, 8
_G = torch.Generator().manual_seed(0)
_MIX = [torch.randn(LATENT, WIDTH, generator=_G) * torch.arange(1, LATENT + 1)[:, None] ** -0.7 for _ in range(LAYERS)]
_TURN = [torch.linalg.qr(torch.randn(LATENT, LATENT, generator=_G)).Q for _ in range(LAYERS)]


class World:
    """A source of made-up speech: frames that follow one another, utterances and speakers that differ.

    Layer k is the latent itself for k = 0 and a bent, turned copy for the last, with noise.
    """

    def __init__(self, seed, utterances, speakers=None, frames=(12, 30)):
        rng = np.random.default_rng(seed)
        g = torch.Generator().manual_seed(int(rng.integers(1 << 62)))
        speakers = speakers or utterances
        voices = torch.randn(speakers, LATENT, generator=g)
        self.infos = [
            ModelInfo("m", tuple(f"layer_{i}" for i in range(LAYERS)), (WIDTH,) * LAYERS, Clock(0.02, 0.0125))
        ]
        self.left_out, self.failures, self.table, self.speakers = {}, 0, {}, {}
        lengths = rng.integers(*frames, utterances)
        noise = torch.randn(utterances, frames[1], LATENT, generator=g)
        for t in range(1, frames[1]):
            noise[:, t] = 0.6 * noise[:, t - 1] + 0.8 * noise[:, t]
        own = 0.6 * torch.randn(utterances, 1, LATENT, generator=g)
        latent = noise + own + 0.4 * voices[torch.arange(utterances) % speakers][:, None]
        bent = [(k / (LAYERS - 1)) for k in range(LAYERS)]
        whole = [
            ((1 - a) * latent + a * torch.tanh(1.5 * latent @ turn)) @ mix
            + 0.3 * torch.randn(utterances, frames[1], WIDTH, generator=g)
            for a, turn, mix in zip(bent, _TURN, _MIX, strict=True)
        ]
        for u, length in enumerate(lengths):
            name = f"u{u:05d}"
            self.table[name] = Utterance(name, [[x[u, :length] for x in whole]], float(length) / 50, [None])
            self.speakers[name] = f"s{u % speakers}"
        self.ids = sorted(self.table)

    def read(self, name):
        return self.table[name]

    def seconds(self, name):
        return self.table[name].seconds

    def count(self, name):
        return len(self.table[name].layers[0][0])


def result_of(world, **options):
    return finish(gather(source=world, progress=False, announce=lambda text: None, **options))


def data(world):
    """(per layer all frames, index of each frame's utterance)"""
    layers = [torch.cat([world.table[i].layers[0][k] for i in world.ids]) for k in range(LAYERS)]
    return layers, np.repeat(np.arange(len(world.ids)), [world.count(i) for i in world.ids])


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("path", ["gram", "moments"])
@pytest.mark.parametrize("means", [False, True])
def test_without_each_unit_is_what_computing_again_gives(path, means, biased):
    layers, owner = data(World(3, 20))
    if means:
        layers = [torch.stack([x[owner == u].mean(0) for u in range(20)]) for x in layers]
        owner = np.arange(20)
    kept = Kept([str(i) for i in range(20)], layers, owner, np.ones(len(owner)))
    moments = None
    if path == "moments":
        moments = Moments([WIDTH] * LAYERS, Pairs((LAYERS,)), dtype=torch.float64)
        moments.update([x.double() for x in layers])
    want = [cka_matrix([x[owner != u].double() for x in layers], form="stream", biased=biased) for u in range(20)]
    h = BatchHsic([WIDTH] * LAYERS, Pairs((LAYERS,)), form="stream", biased=biased)([x.double() for x in layers])
    got = leave_out(kept, h, len(owner), moments, biased=biased)
    assert np.abs(got.values - np.array(want)).max() < 1e-5
    assert np.all(got.noise == 0)


def test_a_sample_of_frames_gives_nearly_the_same_errors():
    layers, owner = data(World(4, 60, frames=(60, 120)))
    h = BatchHsic([WIDTH] * LAYERS, Pairs((LAYERS,)), form="stream")(layers)
    moments = Moments([WIDTH] * LAYERS, Pairs((LAYERS,)))
    moments.update(layers)
    units = [str(i) for i in range(60)]
    whole = leave_out(Kept(units, layers, owner, np.ones(len(owner))), h, len(owner), moments)
    picks = [np.flatnonzero(owner == u)[pick_frames(int((owner == u).sum()), 15, u)] for u in range(60)]
    chosen = np.concatenate(picks)
    weight = np.concatenate([np.full(15, (owner == u).sum() / 15) for u in range(60)])
    part = leave_out(Kept(units, [x[chosen] for x in layers], owner[chosen], weight), h, len(owner), moments)
    off = np.triu_indices(LAYERS, 1)
    relative = part.spread()[off] / whole.spread()[off]
    assert abs(relative.mean() - 1) < 0.1 and np.abs(relative - 1).max() < 0.2


DRAWS, OFF = 60, np.triu_indices(LAYERS, 1)


def direct(world, unit="utterance", means=False):
    """(values, values without each unit) of a world without going through the commands: fast."""
    layers, owner = data(world)
    names = world.ids
    if means:
        layers, owner = [torch.stack([x[owner == u].mean(0) for u in range(len(names))]) for x in layers], None
        owner = np.arange(len(names))
    if unit == "speaker":
        known = sorted(set(world.speakers.values()))
        owner, names = np.array([known.index(world.speakers[names[u]]) for u in owner]), known
    h = BatchHsic([WIDTH] * LAYERS, Pairs((LAYERS,)), form="stream")(layers)
    kept = Kept(list(names), layers, owner, np.ones(len(owner)))
    moments = Moments([WIDTH] * LAYERS, Pairs((LAYERS,)))
    moments.update(layers)
    return ratio(h), leave_out(kept, h, len(owner), moments, kind=unit)


def check_coverage(truth, values, ends):
    """95 % intervals hold the truth in 90 to 99.5 % and are not much wider than the spread of the values asks for."""
    inside = np.array([(low[OFF] <= truth) & (truth <= high[OFF]) for low, high in ends])
    coverage = inside.mean(0)
    assert 0.90 <= coverage.mean() <= 0.995, coverage
    assert coverage.min() >= 0.80, coverage  # 60 draws of 0.95 fall below this less than once in 10,000
    relative = np.mean([(high - low)[OFF] for low, high in ends], 0) / (2 * 1.96 * np.std(values, 0))
    assert relative.max() < 1.6, relative


@pytest.fixture(scope="module")
def population():
    """Values of a world so large that its own spread does not matter: over frames and over utterance means."""
    world = World(10_000, 4000)
    layers, owner = data(world)
    weight = torch.bincount(torch.from_numpy(owner)).double()
    means = [
        torch.zeros(4000, WIDTH).index_add_(0, torch.from_numpy(owner), x) / weight[:, None].float() for x in layers
    ]
    return tuple(cka_matrix(x, form="stream")[OFF] for x in (layers, means))


@pytest.mark.parametrize("case", ["utterance", "means", "speaker"])
def test_intervals_cover_the_value_of_the_population(population, case):
    """Full counts (25 to 400 utterances, every mode, real speech too) are in recipes/benchmark/cka_intervals.py."""
    values, ends, boot = [], [], []
    for seed in range(DRAWS):
        world = World(seed, 60 if case == "speaker" else 25, 20 if case == "speaker" else None)
        point, left_out = direct(world, "speaker" if case == "speaker" else "utterance", case == "means")
        values.append(point[OFF])
        ends.append(intervals(left_out, point))
        boot.append(intervals(left_out, point, method="bootstrap", resamples=300))
    truth = population[case == "means"]
    check_coverage(truth, values, ends)
    check_coverage(truth, values, boot)


def test_minibatch_intervals_cover_the_value_that_minibatches_estimate():
    options = {"mode": "minibatch", "batch_size": 64, "mix": 4, "form": "gram"}
    truth = result_of(World(10_000, 1600), **options, blocks=1, interval="none").values[OFF]
    found = [result_of(World(seed, 48), **options, blocks=12) for seed in range(DRAWS)]
    check_coverage(truth, [r.values[OFF] for r in found], [(r.lower, r.upper) for r in found])


def test_where_there_can_be_no_interval_there_is_none_and_the_reason():
    few = result_of(World(0, 8), mode="full")
    assert few.lower is None and few.details["interval"] == (
        "none: 8 utterances, intervals need at least 10: use more recordings"
    )
    mini = result_of(World(0, 40), batch_size=64)
    assert mini.lower is None and "2 blocks of utterances, intervals need at least 5" in mini.details["interval"]
    assert "smaller --mix" in mini.details["interval"]
    assert result_of(World(0, 40), mode="full", interval="none").details["interval"].startswith("none")
    with pytest.raises(SpecError, match="interval='guess'; expected one of jackknife, bootstrap, none"):
        Options(interval="guess")


def test_shares_of_pairs_within_utterances_are_told():
    """The reason why minibatches give another value than all examples: known by counting."""
    world = World(0, 64, frames=(20, 21))
    full = result_of(world, mode="full").details["pairs_within_utterances"]
    assert full == pytest.approx(19 / (64 * 20 - 1))
    mini = result_of(world, batch_size=80, mix=4, blocks=4).details["pairs_within_utterances"]
    assert mini == pytest.approx(19 / 79, rel=0.1)


def test_units_are_saved_beside_the_result_and_go_with_it_only(tmp_path):
    result = result_of(World(1, 30), mode="full")
    again = CKAResult.load(result.save(tmp_path / "r.json"))
    assert again.left_out.units == result.left_out.units and again.left_out.kind == "utterance"
    assert np.allclose(again.left_out.values, result.left_out.values, atol=1e-6)
    result_of(World(2, 30), mode="full").save(tmp_path / "other.json")
    (tmp_path / "r.units.npz").write_bytes((tmp_path / "other.units.npz").read_bytes())
    assert CKAResult.load(tmp_path / "r.json").left_out is None


def test_kept_examples_travel_with_shards(tmp_path):
    options = {"mode": "full", "form": "stream", "blocks": 6, "unit": "speaker"}
    whole = result_of(World(5, 60, 20), **options)
    parts = []
    for i in (1, 2):
        state = gather(source=World(5, 60, 20), shard=f"{i}/2", progress=False, announce=lambda text: None, **options)
        parts.append(State.load(state.save(tmp_path / f"{i}.safetensors")))
    joined = merge(parts)
    for what in ("values", "lower", "upper"):
        assert np.abs(getattr(joined, what) - getattr(whole, what)).max() < 1e-9
    assert whole.details["interval"] == "jackknife over 20 speakers, 95%"


def test_values_at_one_have_intervals_without_width():
    values = np.ones((12, 2, 2))
    low, high = intervals(LeftOut([str(i) for i in range(12)], values, 12), np.ones((2, 2)))
    assert np.array_equal(low, high) and low[0, 1] == 1
