"""How well embeddings tell speakers apart: on a few hundred joined digits, and on trial lists such as VoxCeleb's.

Everything here takes ``embed``, a callable from a list of waveforms (samples,) float32 to embeddings (N, D), so that a
trained network, the same network untrained, and plain FBANK statistics are measured under one policy.

The digit test is small and confounded by the recording channel: a low error rate may mean that microphones were told
apart. Therefore it is run twice, with the recordings as they are and with the channel randomised per utterance, and
under three scorings:

``cosine``
    Cosine after the mean of the test recordings is removed (it needs no labels, and is done under all scorings).
``whitening``
    The same after whitening fitted on unlabelled training speech: what a well-conditioned space alone is worth.
``wccn``
    The same after scaling down what channel augmentation changes, fitted on augmented crops of training utterances.

An untrained network and FBANK belong into every table: without them no number here says anything.

>>> rows = [{"name": "net", "test": "clean", "scoring": "cosine", "eer": 0.1, "min_dcf_0.01": 0.9, "trials": 10}]
>>> print(table(rows))
name  test   scoring  EER %  minDCF 0.01  trials
net   clean  cosine   10.00        0.900      10
"""

from __future__ import annotations

import csv
import io
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from s3prl_speaker_upstreams.common.audio import read_audio, resample
from s3prl_speaker_upstreams.common.files import write_text
from s3prl_speaker_upstreams.data.augment import AugmentConfig, Augmenter
from s3prl_speaker_upstreams.data.datasets import MultiCropDataset, random_for
from s3prl_speaker_upstreams.data.manifest import Manifest, build_manifest
from s3prl_speaker_upstreams.errors import ConfigError
from s3prl_speaker_upstreams.verification.scoring import (
    WCCN,
    Trials,
    Whitening,
    all_pairs,
    effective_dimension,
    evaluate_scores,
    read_trials,
    score_pairs,
    score_trials,
)

__all__ = [
    "DigitsTest",
    "Embed",
    "digits_test",
    "embed_all",
    "embed_files",
    "evaluate_digits",
    "find_recordings",
    "fbank_statistics",
    "fit_crops",
    "randomise_channel",
    "split_recordings",
    "table",
    "verification",
    "write_rows",
]

log = logging.getLogger(__name__)

Embed = Callable[[list[np.ndarray]], np.ndarray]
SCORINGS = ("cosine", "whitening", "wccn")


# ---------------------------------------------------------------------------------------------- embedding
def embed_all(embed: Embed, wavs: Sequence[np.ndarray], batch_size: int = 32, progress: str = "") -> np.ndarray:
    """Embeddings (N, D) float64 of ``wavs``, ``batch_size`` at a time; a bar named ``progress`` if given.

    Raises ConfigError if ``embed`` returns something else than one finite row per waveform.

    >>> embed_all(lambda wavs: np.array([[wav.mean(), wav.std()] for wav in wavs]), [np.ones(8)] * 3).shape
    (3, 2)
    """
    from tqdm import tqdm

    rows = []
    for start in tqdm(range(0, len(wavs), batch_size), desc=progress, unit="batch", disable=not progress, delay=2):
        part = list(wavs[start : start + batch_size])
        out = np.asarray(embed(part), dtype=np.float64)
        if out.ndim != 2 or len(out) != len(part) or not np.isfinite(out).all():
            raise ConfigError(f"embed: got shape {out.shape} for {len(part)} waveforms, expected finite (N, D)")
        rows.append(out)
    return np.concatenate(rows)


def embed_files(
    embed: Embed,
    paths: Sequence[str],
    *,
    sample_rate: int = 16000,
    max_seconds: float | None = None,
    batch_seconds: float = 60.0,
    progress: str = "",
) -> np.ndarray:
    """Embeddings (N, D) of whole files, in the order of ``paths``.

    Parameters
    ----------
    embed : callable
    paths : sequence of str
    sample_rate : int
        Files of another rate are resampled.
    max_seconds : float, optional
        Longer files are cut there.
    batch_seconds : float
        Files are gathered up to this much speech before ``embed`` is called.
    progress : str
        Name of the progress bar; empty: none.

    Raises OSError or BadWaveform for a file that cannot be read: an error rate over the rest would not be comparable.

    >>> import soundfile, tempfile
    >>> name = tempfile.mkstemp(suffix=".wav")[1]
    >>> soundfile.write(name, np.zeros(16000), 16000)
    >>> embed_files(lambda wavs: np.array([[len(wav)] for wav in wavs]), [name, name]).tolist()
    [[16000.0], [16000.0]]
    """
    from tqdm import tqdm

    rows, gathered, samples = [], [], 0
    for path in tqdm(paths, desc=progress, unit="file", disable=not progress, delay=2):
        wav = read_audio(path, sample_rate=sample_rate)[0]
        gathered.append(wav if max_seconds is None else wav[: int(max_seconds * sample_rate)])
        samples += len(gathered[-1])
        if samples >= batch_seconds * sample_rate:
            rows.append(embed_all(embed, gathered, len(gathered)))
            gathered, samples = [], 0
    if gathered:
        rows.append(embed_all(embed, gathered, len(gathered)))
    if not rows:
        raise ConfigError("got no files to embed")
    return np.concatenate(rows)


def fbank_statistics(frontend=None) -> Embed:
    """Baseline without any network: mean and standard deviation over time of every log-mel band, (N, 2 n_mels).

    Parameters
    ----------
    frontend : callable, list of 1-D tensors -> Ragged, optional
        By default that of the project's own dialect, without the mean normalisation that would remove the means.

    >>> fbank_statistics()([np.random.default_rng(0).normal(0, 0.1, 16000).astype("float32")]).shape
    (1, 160)
    """
    import torch

    if frontend is None:
        from s3prl_speaker_upstreams.ecapa import DIALECTS, Frontend

        frontend = Frontend(DIALECTS["native"].frontend).log_mel

    def embed(wavs: list[np.ndarray]) -> np.ndarray:
        with torch.no_grad():
            frames = frontend([torch.from_numpy(np.ascontiguousarray(wav, dtype=np.float32)) for wav in wavs]).split()
        return np.stack([np.concatenate([x.numpy().mean(0), x.numpy().std(0)]) for x in frames])

    return embed


# ---------------------------------------------------------------------------------------------- the digit test
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
    folder: str | os.PathLike,
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
    train: Manifest | str | os.PathLike,
    *,
    noise: str | Sequence[str] | None = None,
    rirs: str | Sequence[str] | None = None,
    channel_draws: int = 3,
    fit_utterances: int = 300,
    wccn_crops: int = 4,
    bootstrap_samples: int = 200,
    seed: int = 0,
    progress: bool = True,
) -> list[dict]:
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
    manifest = train if isinstance(train, Manifest) else build_manifest(train, progress=progress)
    fit_noise, test_noise = split_recordings(noise)
    fit_rirs, test_rirs = split_recordings(rirs)
    rate = digits.sample_rate
    band = {"band_limit_hz": digits.band_hz if digits.band_hz < rate / 2 else None}
    for_test = Augmenter(AugmentConfig.channel_randomised(test_noise, test_rirs), rate)
    for_wccn = Augmenter(AugmentConfig.channel_randomised(fit_noise, fit_rirs, **band), rate)
    only_band = Augmenter(AugmentConfig(noise_p=0.0, rir_p=0.0, **band), rate)
    shared = {"utterances": fit_utterances, "seed": seed, "sample_rate": rate}
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


# ---------------------------------------------------------------------------------------------- trial lists
def verification(
    embed: Embed,
    trials: Trials | str | os.PathLike,
    root: str | os.PathLike,
    *,
    cohort: Manifest | None = None,
    cohort_utterances: int = 3000,
    top_n: int = 300,
    sample_rate: int = 16000,
    max_seconds: float | None = None,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, float]:
    """EER and minDCF of a trial list, such as Vox1-O, under cosine scoring and what the cohort allows.

    Parameters
    ----------
    embed : callable
    trials : Trials or path of a trial list
    root : folder
        Where the recordings named in the list are; names without a suffix are tried as ``.wav`` and ``.flac``.
    cohort : Manifest, optional
        Training speech. Its mean is removed for ``mean_eer`` and its members normalise the scores for ``asnorm_eer``;
        if it is labelled, a member is the mean over a speaker.
    cohort_utterances : int
        At most so many of it, drawn by ``seed``.
    top_n : int
        Of AS-norm.
    sample_rate, max_seconds, progress
        As of :func:`embed_files`.

    Returns
    -------
    dict
        ``eer``, ``min_dcf_0.01``, ``min_dcf_0.05``, ``trials``, ``targets``; with a cohort also ``mean_...`` and
        ``asnorm_...``.

    Raises ConfigError or OSError if a recording of the list is missing.

    >>> import soundfile, tempfile
    >>> root = Path(tempfile.mkdtemp())
    >>> for name, level in (("a", 0.1), ("b", 0.1), ("c", 0.5)):
    ...     soundfile.write(root / f"{name}.wav", np.full(800, level), 16000)
    >>> trials = Trials(np.array([1, 0]), ("a.wav", "a.wav"), ("b.wav", "c.wav"))
    >>> embed = lambda wavs: np.array([[1.0, wav.mean()] for wav in wavs])
    >>> verification(embed, trials, root, progress=False)["eer"]
    0.0
    """
    trials = trials if isinstance(trials, Trials) else read_trials(trials)
    names = trials.names
    paths = find_recordings(trials, root)
    shared = {"sample_rate": sample_rate, "max_seconds": max_seconds}
    rows = embed_files(embed, paths, progress="embedding trials" if progress else "", **shared)
    embeddings = dict(zip(names, rows, strict=True))
    out = dict(evaluate_scores(score_trials(trials, embeddings), trials.labels))
    if cohort is not None:
        chosen = np.sort(random_for(seed, 0, "", "cohort").permutation(len(cohort))[:cohort_utterances])
        chosen_paths = [cohort[int(index)].path for index in chosen]
        members = embed_files(embed, chosen_paths, progress="embedding cohort" if progress else "", **shared)
        mean = members.mean(0)
        labels = cohort.labels[chosen]
        if cohort.labelled:
            members = np.stack([members[labels == label].mean(0) for label in np.unique(labels)])
        for prefix, options in (("mean", {}), ("asnorm", {"cohort": members, "top_n": top_n})):
            scores = score_trials(trials, embeddings, mean=mean, **options)
            measured = evaluate_scores(scores, trials.labels)
            out.update({f"{prefix}_{key}": measured[key] for key in ("eer", "min_dcf_0.01", "min_dcf_0.05")})
    return out


def find_recordings(trials: Trials | str | os.PathLike, root: str | os.PathLike) -> list[str]:
    """Paths of a trial list's recordings, in the order of ``trials.names``.

    Raises ConfigError for the first one that is missing, and what :func:`read_trials` raises.
    """
    trials = trials if isinstance(trials, Trials) else read_trials(trials)
    return [_found(Path(root), name) for name in trials.names]


def _found(root: Path, name: str) -> str:
    for candidate in (root / name, *(root / f"{name}{suffix}" for suffix in (".wav", ".flac"))):
        if candidate.is_file():
            return os.fspath(candidate)
    # A converted corpus keeps the names of the list up to the suffix.
    for suffix in (".wav", ".flac"):
        if (root / name).with_suffix(suffix).is_file():
            return os.fspath((root / name).with_suffix(suffix))
    raise ConfigError(f"{root / name}: no such recording; give the folder that the names of the trial list begin in")


# ---------------------------------------------------------------------------------------------- tables
_COLUMNS = {
    "name": ("name", "{}"),
    "test": ("test", "{}"),
    "scoring": ("scoring", "{}"),
    "seed": ("seed", "{}"),
    "eer": ("EER %", "{:.2f}"),
    "eer_low": ("low", "{:.2f}"),
    "eer_high": ("high", "{:.2f}"),
    "min_dcf_0.01": ("minDCF 0.01", "{:.3f}"),
    "min_dcf_0.05": ("minDCF 0.05", "{:.3f}"),
    "effective_dimension": ("eff. dim.", "{:.1f}"),
    "trials": ("trials", "{}"),
}


def table(rows: Iterable[Mapping]) -> str:
    """Rows of :func:`evaluate_digits` as text, error rates in per cent; columns that no row has are left out."""
    rows = list(rows)
    keys = [key for key in _COLUMNS if any(key in row for row in rows)]
    cells = [[_COLUMNS[key][0] for key in keys]]
    for row in rows:
        values = [row.get(key) for key in keys]
        percent = [100 * v if k.startswith("eer") and v is not None else v for k, v in zip(keys, values, strict=True)]
        cells.append(["" if v is None else _COLUMNS[k][1].format(v) for k, v in zip(keys, percent, strict=True)])
    width = [max(len(line[column]) for line in cells) for column in range(len(keys))]
    left = [isinstance(next((row[key] for row in rows if key in row), ""), str) for key in keys]
    lines = []
    for line in cells:
        parts = [c.ljust(w) if flush else c.rjust(w) for c, w, flush in zip(line, width, left, strict=True)]
        lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)


def write_rows(rows: Iterable[Mapping], path: str | os.PathLike, *, settings: Mapping | None = None) -> list[Path]:
    """Write rows as ``path``.csv and, with the settings and versions that made them, as ``path``.json.

    >>> import tempfile
    >>> [path.suffix for path in write_rows([{"eer": 0.1}], Path(tempfile.mkdtemp()) / "result")]
    ['.csv', '.json']
    """
    from s3prl_speaker_upstreams import __version__

    rows = [dict(row) for row in rows]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    base = Path(path)
    record = {
        "rows": rows,
        "settings": dict(settings or {}),
        "versions": {"s3prl_speaker_upstreams": __version__, "numpy": np.__version__},
    }
    return [
        write_text(base.with_name(base.name + ".csv"), text.getvalue()),
        write_text(base.with_name(base.name + ".json"), json.dumps(record, indent=1) + "\n"),
    ]
