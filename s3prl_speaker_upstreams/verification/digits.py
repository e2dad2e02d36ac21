"""The digit test: a few hundred recordings joined from short clips, clean and through random channels.

It is small and confounded by the recording channel: a low error rate may mean that microphones were told apart.
Therefore it is run twice, with the recordings as they are and with the channel randomised per utterance, and under
three scorings:

``cosine``
    Cosine after the mean of the test recordings is removed (it needs no labels, and is done under all scorings).
``whitening``
    The same after whitening fitted on unlabelled training speech: what a well-conditioned space alone is worth.
``wccn``
    The same after scaling down what channel augmentation changes, fitted on augmented crops of training utterances.

An untrained network and FBANK belong into every table: without them no number here says anything.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from s3prl_speaker_upstreams.common.audio import read_audio, resample
from s3prl_speaker_upstreams.data.augment import AugmentConfig, Augmenter
from s3prl_speaker_upstreams.data.datasets import MultiCropDataset
from s3prl_speaker_upstreams.data.keyed import random_for
from s3prl_speaker_upstreams.data.manifest import Manifest, build_manifest
from s3prl_speaker_upstreams.errors import ConfigError
from s3prl_speaker_upstreams.verification.embedding import Embed, embed_all
from s3prl_speaker_upstreams.verification.metrics import effective_dimension, evaluate_scores
from s3prl_speaker_upstreams.verification.scoring import score_pairs
from s3prl_speaker_upstreams.verification.transforms import WCCN, Whitening
from s3prl_speaker_upstreams.verification.trials import all_pairs

__all__ = ["DigitsTest", "digits_test", "evaluate_digits", "fit_crops", "randomise_channel", "split_recordings"]

SCORINGS = ("cosine", "whitening", "wccn")


@dataclass(frozen=True)
class DigitsTest:
    """Recordings of one speaker each, and who speaks.

    Attributes
    ----------
    wavs : list of (samples,) float32
    speakers : list of str
    sample_rate : int
        Of ``wavs``.
    band_hz : float
        Highest frequency that the original recordings hold.
    """

    wavs: list[np.ndarray]
    speakers: list[str]
    sample_rate: int
    band_hz: float

    def __len__(self) -> int:
        return len(self.wavs)


def digits_test(
    folder: str | os.PathLike[str],
    *,
    seconds: float = 3.0,
    per_speaker: int = 30,
    seed: int = 0,
    sample_rate: int = 16000,
) -> DigitsTest:
    """Join short clips of one speaker to recordings of ``seconds``, no clip in two of them.

    Parameters
    ----------
    folder : folder of ``<speaker>/<clip>`` files
    seconds : float
    per_speaker : int
        Recordings of every speaker.
    seed : int
        Which clips meet.
    sample_rate : int

    Raises ConfigError if a speaker has too few clips.

    >>> import soundfile, tempfile
    >>> from pathlib import Path
    >>> root = Path(tempfile.mkdtemp())
    >>> for speaker in ("ann", "bob"):
    ...     (root / speaker).mkdir()
    ...     for clip in range(4):
    ...         soundfile.write(root / speaker / f"{clip}.wav", np.random.default_rng(clip).normal(0, 0.1, 8000), 8000)
    >>> test = digits_test(root, seconds=1.5, per_speaker=2)
    >>> test.speakers, test.wavs[0].shape, test.band_hz
    (['ann', 'ann', 'bob', 'bob'], (24000,), 4000.0)
    """
    clips = build_manifest(folder, layout="speaker", min_seconds=0.05, cache=False, progress=False)
    rate = int(clips.sample_rates[0])
    if (clips.sample_rates != rate).any():
        raise ConfigError(f"{folder}: got clips of {sorted(set(clips.sample_rates.tolist()))} Hz, expected one rate")
    wavs, speakers = [], []
    needed = int(round(seconds * rate))
    for number, speaker in enumerate(clips.speakers):
        order = random_for(seed, 0, speaker, "digits").permutation(np.flatnonzero(clips.labels == number))
        queue = iter(order.tolist())
        for count in range(per_speaker):
            parts: list[np.ndarray] = []
            while sum(len(part) for part in parts) < needed:
                index = next(queue, None)
                if index is None:
                    have = float(clips.durations[clips.labels == number].sum())
                    raise ConfigError(
                        f"{folder}: speaker {speaker} has {have:.0f} s of clips, enough for {count} recordings of "
                        f"{seconds} s, expected {per_speaker}; lower per_speaker"
                    )
                parts.append(read_audio(clips[index].path, sample_rate=None)[0])
            wavs.append(resample(np.concatenate(parts)[:needed], rate, sample_rate))
            speakers.append(speaker)
    return DigitsTest(wavs, speakers, sample_rate, min(rate, sample_rate) / 2)


def split_recordings(source: str | Sequence[str] | None) -> tuple[list[str] | None, list[str] | None]:
    """Two halves, without a common file, of a folder of noises or impulse responses (None gives two None).

    What a scoring is fitted with must not be what it is tested with.

    >>> split_recordings(None)
    (None, None)
    """
    if source is None:
        return None, None
    paths = [item.path for item in build_manifest(source, layout="none", min_seconds=0.0, cache=False, progress=False)]
    if len(paths) < 2:
        raise ConfigError(f"{source}: got {len(paths)} recording, expected at least two to split")
    return paths[0::2], paths[1::2]


def randomise_channel(
    wavs: Sequence[np.ndarray], augmenter: Augmenter, seed: int = 0, draw: int = 0
) -> list[np.ndarray]:
    """Every waveform through a channel of its own, drawn by ``seed``, ``draw`` and its number.

    >>> wavs = [np.random.default_rng(0).normal(0, 0.1, 8000).astype("float32")] * 2
    >>> first, second = randomise_channel(wavs, Augmenter(AugmentConfig.channel_randomised(None, None)))
    >>> bool(np.abs(first - second).max() > 0.01)
    True
    """
    return [augmenter(wav, random_for(seed, draw, str(number), "channel")) for number, wav in enumerate(wavs)]


def fit_crops(
    train: Manifest,
    *,
    augment: Augmenter | None,
    crops: int,
    utterances: int = 200,
    seconds: float = 3.0,
    seed: int = 0,
    sample_rate: int = 16000,
) -> tuple[list[np.ndarray], np.ndarray]:
    """Crops of unlabelled training speech to fit a scoring on: waveforms, and which utterance each is of.

    ``crops`` of each of at most ``utterances`` utterances, which ``seed`` draws, augmented each by itself.

    >>> import soundfile, tempfile
    >>> name = tempfile.mkstemp(suffix=".wav")[1]
    >>> soundfile.write(name, np.random.default_rng(0).normal(0, 0.1, 64000), 16000)
    >>> wavs, groups = fit_crops(Manifest(["a"], [64000], [16000], paths=[name]), augment=None, crops=3)
    >>> len(wavs), groups.tolist()
    (3, [0, 0, 0])
    """
    dataset = MultiCropDataset(
        train,
        n_global=crops,
        n_local=0,
        global_seconds=seconds,
        augment=augment,
        seed=seed,
        sample_rate=sample_rate,
    )
    chosen = np.sort(random_for(seed, 0, "", "fit").permutation(len(train))[:utterances])
    items = [dataset[(0, int(index))] for index in chosen]
    groups = np.repeat([item.index for item in items], crops)
    return [wav for item in items for wav in item.global_crops], groups


def evaluate_digits(
    embeds: Mapping[str, Embed],
    digits: DigitsTest,
    train: Manifest | str | os.PathLike[str],
    *,
    noise: str | Sequence[str] | None = None,
    rirs: str | Sequence[str] | None = None,
    channel_draws: int = 3,
    fit_utterances: int = 300,
    wccn_crops: int = 4,
    bootstrap_samples: int = 200,
    seed: int = 0,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """EER and minDCF of several embeddings: clean and with the channel randomised, under three scorings (see above).

    Parameters
    ----------
    embeds : mapping of name -> callable
        For instance ``{"trained": ..., "untrained": ..., "fbank": fbank_statistics()}``.
    digits : DigitsTest
        All pairs of its recordings are trials.
    train : Manifest, folder or list
        Unlabelled speech that whitening and WCCN are fitted on, cropped to the length of the test recordings and
        limited to their band.
    noise, rirs : folder, list file or paths, optional
        Half of each is used by the test, the other half to fit WCCN.
    channel_draws : int
        How often all recordings get new channels; the trials of all draws are pooled.
    fit_utterances : int
        Training utterances used.
    wccn_crops : int
        Augmented crops of each.
    bootstrap_samples : int
        Draws of recordings for the 95 % interval; 0: none. It speaks for *these speakers*: other speakers vary more.
    seed : int
    progress : bool

    Returns
    -------
    list of dict
        With keys ``name``, ``test`` (``clean`` or ``channel``), ``scoring``, ``eer``, ``min_dcf_0.01``,
        ``min_dcf_0.05``, ``trials``, ``targets``, ``dimension``, ``effective_dimension`` (of the test embeddings),
        ``eer_low``, ``eer_high``.

    Examples
    --------
    See ``recipes/pretrain/small.sh``; with spectra in place of a network, and filtered noise in place of speakers:

    >>> import soundfile, tempfile
    >>> from pathlib import Path
    >>> root = Path(tempfile.mkdtemp())
    >>> for s in (1, 2, 3):
    ...     (root / f"s{s}").mkdir()
    ...     for clip in range(6):
    ...         wav = np.convolve(np.random.default_rng(10 * s + clip).normal(0, 0.1, 8000), np.ones(s), "same")
    ...         soundfile.write(root / f"s{s}" / f"{clip}.wav", wav, 8000)
    >>> test = digits_test(root, seconds=1.0, per_speaker=4)
    >>> def embed(wavs):
    ...     power = np.abs(np.fft.rfft(wavs)[:, :4000]) ** 2
    ...     return np.log(power.reshape(len(wavs), 4, 1000).mean(2))
    >>> rows = evaluate_digits({"spectrum": embed}, test, root, bootstrap_samples=0, progress=False)
    >>> len(rows), min(row["eer"] for row in rows if row["test"] == "clean")
    (6, 0.0)
    """
    if not embeds:
        raise ConfigError("got nothing to evaluate, expected {name: embed}")
    manifest = train if isinstance(train, Manifest) else build_manifest(train, layout="none", progress=progress)
    fit_noise, test_noise = split_recordings(noise)
    fit_rirs, test_rirs = split_recordings(rirs)
    rate = digits.sample_rate
    band: dict[str, Any] = {"band_limit_hz": digits.band_hz if digits.band_hz < rate / 2 else None}
    for_test = Augmenter(AugmentConfig.channel_randomised(test_noise, test_rirs), rate)
    for_wccn = Augmenter(AugmentConfig.channel_randomised(fit_noise, fit_rirs, **band), rate)
    only_band = Augmenter(AugmentConfig(noise_p=0.0, rir_p=0.0, **band), rate)
    shared: dict[str, Any] = {"utterances": fit_utterances, "seed": seed, "sample_rate": rate}
    shared["seconds"] = float(np.mean([len(wav) for wav in digits.wavs])) / rate
    plain, _ = fit_crops(manifest, augment=only_band, crops=1, **shared)
    varied, groups = fit_crops(manifest, augment=for_wccn, crops=wccn_crops, **shared)
    draws = [randomise_channel(digits.wavs, for_test, seed, draw) for draw in range(channel_draws)]
    pairs, labels = all_pairs(digits.speakers)

    rows = []
    for name, embed in embeds.items():

        def of(wavs: Sequence[np.ndarray], what: str, name: str = name, embed: Embed = embed) -> np.ndarray:
            return embed_all(embed, wavs, progress=f"{name}, {what}" if progress else "")

        tables_of = {"clean": [of(digits.wavs, "clean")], "channel": [of(wavs, "channel") for wavs in draws]}
        matrices = {
            "cosine": np.eye(tables_of["clean"][0].shape[1]),
            "whitening": Whitening.fit(of(plain, "whitening")).matrix,
            "wccn": WCCN.fit(of(varied, "WCCN"), groups).matrix,
        }
        for test, tables in tables_of.items():
            if not tables:
                continue
            for scoring in SCORINGS:
                scores = np.concatenate(
                    [score_pairs((x - x.mean(0)) @ matrices[scoring], pairs) for x in tables],
                )
                rows.append(
                    {
                        "name": name,
                        "test": test,
                        "scoring": scoring,
                        **evaluate_scores(
                            scores,
                            np.tile(labels, len(tables)),
                            bootstrap_samples=bootstrap_samples,
                            units=np.tile(pairs, (len(tables), 1)),
                        ),
                        "dimension": tables[0].shape[1],
                        "effective_dimension": float(np.mean([effective_dimension(x) for x in tables])),
                    }
                )
    return rows
