"""Waveforms and files to embeddings, by any encoder: a callable, or one of this package's models.

:data:`Embed` is a callable from a list of waveforms (samples,) float32 to embeddings (N, D), so that a trained network,
the same network untrained, and plain FBANK statistics are measured under one policy.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from s3prl_speaker_upstreams.common.audio import read_audio
from s3prl_speaker_upstreams.errors import BadAudio, ConfigError
from s3prl_speaker_upstreams.verification.parallel import Ranks

if TYPE_CHECKING:
    import torch

    from s3prl_speaker_upstreams.ecapa import SpeakerEncoder

__all__ = ["Embed", "embed_all", "embed_files", "embed_with", "fbank_statistics"]

Embed = Callable[[list[np.ndarray]], np.ndarray]


def embed_with(encoder: SpeakerEncoder, batch: int = 16, device: str | torch.device = "cpu") -> Embed:
    """``encoder`` as an :data:`Embed`: ``batch`` waveforms at a time, on ``device`` (it is moved there).

    >>> from s3prl_speaker_upstreams.checkpoints import build_encoder, untrained
    >>> embed = embed_with(build_encoder(untrained(channels=16, mfa_channels=24, embedding_dim=8)))
    >>> embed([np.zeros(8000, dtype=np.float32)] * 3).shape
    (3, 8)
    """
    import torch

    try:
        encoder = encoder.to(device)
    except (RuntimeError, AssertionError) as error:  # no such GPU, or PyTorch without CUDA
        raise ConfigError(f"device {device}: {error}; use cpu") from error

    @torch.inference_mode()
    def embed(wavs: list[np.ndarray]) -> np.ndarray:
        encoder.eval()
        rows = []
        for start in range(0, len(wavs), batch):
            part = [torch.from_numpy(np.ascontiguousarray(w, dtype=np.float32)) for w in wavs[start : start + batch]]
            out = encoder([wav.to(device) for wav in part], outputs=("embedding",))["embedding"]
            rows.append(out.float().cpu().numpy())
        return np.concatenate(rows)

    return embed


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
    paths: Sequence[str | os.PathLike[str]],
    *,
    sample_rate: int = 16000,
    max_seconds: float | None = None,
    batch_seconds: float = 60.0,
    progress: str = "",
    ranks: Ranks | None = None,
    skip: dict[str, str] | None = None,
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
    ranks : Ranks, optional
        Processes that share the work; every one gets all rows.
    skip : dict, optional
        Unusable files are noted here, path -> why, and their rows are NaN. Without it they raise BadAudio: an error
        rate over the rest would not be comparable.

    >>> import soundfile, tempfile
    >>> name = tempfile.mkstemp(suffix=".wav")[1]
    >>> soundfile.write(name, np.zeros(16000), 16000)
    >>> embed_files(lambda wavs: np.array([[len(wav)] for wav in wavs]), [name, name]).tolist()
    [[16000.0], [16000.0]]
    """
    from tqdm import tqdm

    if not len(paths):
        raise ConfigError("got no files to embed")
    ranks = ranks or Ranks()
    limit = None if max_seconds is None else int(max_seconds * sample_rate)
    mine = [(number, os.fspath(paths[number])) for number in range(ranks.rank, len(paths), ranks.size)]
    work = _embedded(embed, mine, sample_rate, limit, batch_seconds, skip is not None)
    rows: dict[int, np.ndarray] = {}
    often = 0.5 if sys.stderr.isatty() else 20.0  # a log file wants few lines
    with tqdm(
        total=len(paths),
        desc=progress,
        unit="file",
        disable=not progress,
        delay=2,
        mininterval=often,
        maxinterval=often,
    ) as bar:
        for found, unusable in _in_step(work, ranks):
            rows.update(found)
            bar.update(len(found) + len(unusable))
            if skip is not None:
                skip.update(unusable)
    if not rows:
        raise ConfigError(f"none of {len(paths)} recordings is usable, first: {next(iter((skip or {}).values()), '')}")
    nothing = np.full(len(next(iter(rows.values()))), np.nan)
    return np.stack([rows.get(number, nothing) for number in range(len(paths))])


_Part = tuple[dict[int, np.ndarray], dict[str, str]]


def _embedded(
    embed: Embed, files: list[tuple[int, str]], sample_rate: int, limit: int | None, batch_seconds: float, skip: bool
) -> Iterator[_Part]:
    """(rows by number, unusable files) of one batch after the other."""
    numbers: list[int] = []
    wavs: list[np.ndarray] = []
    unusable: dict[str, str] = {}
    for count, (number, path) in enumerate(files, 1):
        try:
            wavs.append(read_audio(path, sample_rate=sample_rate)[0][:limit])
            numbers.append(number)
        except BadAudio as error:
            if not skip:
                raise
            unusable[path] = str(error)
        if sum(map(len, wavs)) >= batch_seconds * sample_rate or count == len(files):
            found = embed_all(embed, wavs, len(wavs)) if wavs else np.empty((0, 0))
            yield dict(zip(numbers, found, strict=True)), unusable
            numbers, wavs, unusable = [], [], {}


def _in_step(work: Iterator[_Part], ranks: Ranks) -> Iterator[_Part]:
    """The parts of all processes, as they come. The processes meet every ``sync_seconds``, and fail together."""
    finished = False
    failure: Exception | None = None
    while True:
        parts: list[_Part] = []
        begin = time.monotonic()
        while not finished and (ranks.size == 1 or time.monotonic() - begin < ranks.sync_seconds):
            try:
                parts.append(next(work))
                if ranks.size == 1:
                    break
            except StopIteration:
                finished = True
            except Exception as error:
                if ranks.size == 1:
                    raise
                failure, finished = error, True
        everyone = ranks.gather((parts, finished, None if failure is None else f"{type(failure).__name__}: {failure}"))
        if failure is not None:
            raise failure
        for number, (_, _, what) in enumerate(everyone):
            if what is not None:
                raise ConfigError(f"process {number} of {ranks.size} failed: {what}")
        for theirs, _, _ in everyone:
            yield from theirs
        if all(done for _, done, _ in everyone):
            return


def fbank_statistics(frontend: Callable[[list[torch.Tensor]], Any] | None = None) -> Embed:
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
