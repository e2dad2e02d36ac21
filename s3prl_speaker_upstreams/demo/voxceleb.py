"""Lay any recordings with speaker labels out as VoxCeleb1, the corpus of the SID and ASV tasks."""

from __future__ import annotations

import itertools
import logging
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from s3prl_speaker_upstreams.common.audio import SAMPLE_RATE, read_audio, write_audio
from s3prl_speaker_upstreams.common.files import write_text
from s3prl_speaker_upstreams.errors import BadAudio
from s3prl_speaker_upstreams.superb.errors import CorpusError

__all__ = ["SPEAKERS", "VoxCeleb1", "lay_out_voxceleb1", "read_clip"]

logger = logging.getLogger(__name__)

SPEAKERS = 1251
"""Speakers of VoxCeleb1; s3prl's SID head has that many outputs, labelled ``int(id[2:]) - 10001``."""


@dataclass(frozen=True)
class VoxCeleb1:
    """Where the parts of a laid out corpus lie, and which speaker got which id.

    root : folder with ``dev/wav`` and ``test/wav``; goes to s3prl's ``file_path``
    identification_list : ``1|2|3 id/video/utterance.wav`` lines (train, dev, test); goes to SID's ``meta_data``
    trials : ``1|0 first.wav second.wav`` lines over test speakers, for ASV's ``test_meta_data``
    dev_trials : the same over training speakers, for ASV's ``dev_meta_data``
    speakers : name in the source -> id in the corpus
    counts : utterances of train, dev and test in `identification_list`
    """

    root: Path
    identification_list: Path
    trials: Path
    dev_trials: Path
    speakers: dict[str, str] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)


def read_clip(path: str | os.PathLike[str]) -> np.ndarray:
    """One recording as (samples,) float32 at 16 kHz. Raises CorpusError if it is missing, damaged or empty."""
    try:
        return read_audio(path)[0]
    except BadAudio as error:
        raise CorpusError(str(error)) from error


def _joined(clips: list[np.ndarray], seconds: float | None) -> list[np.ndarray]:
    """Clips of one speaker joined, in their order, until each piece lasts `seconds`; a short rest joins the last."""
    if seconds is None:
        return clips
    wanted, pieces, open_piece, length = int(seconds * SAMPLE_RATE), [], [], 0
    for clip in clips:
        open_piece.append(clip)
        length += len(clip)
        if length >= wanted:
            pieces.append(np.concatenate(open_piece))
            open_piece, length = [], 0
    if open_piece:
        rest = np.concatenate(open_piece)
        if pieces:
            pieces[-1] = np.concatenate([pieces[-1], rest])
        else:
            pieces.append(rest)
    return pieces


def lay_out_voxceleb1(
    utterances: Mapping[str, Sequence[str | os.PathLike[str] | np.ndarray]],
    out: str | os.PathLike[str],
    *,
    join_seconds: float | None = None,
    split: tuple[float, float, float] = (0.8, 0.1, 0.1),
    test_speakers: Sequence[str] = (),
    trials_per_speaker: int = 20,
    seed: int = 0,
) -> VoxCeleb1:
    """Write recordings of known speakers in VoxCeleb1's layout, with the lists that SID and ASV read.

    Parameters
    ----------
    utterances : speaker -> its recordings: paths (any rate and format; resampled to 16 kHz, mono) or
        (samples,) arrays at 16 kHz
    out : folder of the corpus, made if absent
    join_seconds : join short clips of one speaker, shuffled by `seed`, until each utterance lasts that long.
        ASV drops utterances that last 2 s or less; None leaves clips as they are
    split : shares of each speaker's utterances for training, dev and test of SID; every part gets at least one
    test_speakers : speakers that go to ``test/wav`` and are not trained on by ASV (SID uses all). Empty: trials are
        drawn over all speakers, and their test utterances of SID are the recordings compared
    trials_per_speaker : same-speaker trials of each speaker; as many different-speaker trials are drawn
    seed : of the shuffling; the same input and seed give the same corpus

    Returns
    -------
    VoxCeleb1, whose ids are id10001, id10002, ... in the sorted order of speaker names

    Raises
    ------
    CorpusError if a speaker has under three utterances, a recording cannot be read, there are more speakers than
    VoxCeleb1 has, or `test_speakers` names one that is absent.

    Examples
    --------
    >>> import tempfile
    >>> noise = np.random.default_rng(0).uniform(-0.1, 0.1, (2, 4, 48000)).astype(np.float32)
    >>> corpus = lay_out_voxceleb1({"ann": list(noise[0]), "bob": list(noise[1])}, tempfile.mkdtemp())
    >>> corpus.speakers, corpus.counts
    ({'ann': 'id10001', 'bob': 'id10002'}, {'train': 4, 'dev': 2, 'test': 2})
    """
    if not utterances:
        raise CorpusError("got no speaker; give {speaker: [recordings]}")
    if len(utterances) > SPEAKERS:
        raise CorpusError(f"got {len(utterances)} speakers; s3prl's SID task has {SPEAKERS} classes")
    absent = sorted(set(test_speakers) - set(utterances))
    if absent:
        raise CorpusError(f"test_speakers names {absent}, which are not among the speakers {sorted(utterances)}")
    if len(set(test_speakers)) == len(utterances):
        raise CorpusError("every speaker is a test speaker, which leaves none to train ASV on")
    root = Path(out).absolute()
    root.mkdir(parents=True, exist_ok=True)
    ids = {speaker: f"id{10001 + index}" for index, speaker in enumerate(sorted(utterances))}
    listing: list[tuple[int, str]] = []
    tested: dict[str, list[str]] = {}
    trained: dict[str, list[str]] = {}
    for speaker in sorted(utterances):
        items = list(utterances[speaker])
        if join_seconds is not None:
            random.Random(f"{seed}-{speaker}").shuffle(items)
        clips = [np.asarray(item, np.float32) if isinstance(item, np.ndarray) else read_clip(item) for item in items]
        pieces = _joined(clips, join_seconds)
        if len(pieces) < 3:
            raise CorpusError(
                f"speaker {speaker} has {len(pieces)} utterances, expected 3 or more (one each to train, dev and "
                f"test); give more recordings{'' if join_seconds is None else ' or a smaller join_seconds'}"
            )
        dev_count = max(1, round(split[1] * len(pieces)))
        test_count = max(1, round(split[2] * len(pieces)))
        while dev_count + test_count >= len(pieces):
            dev_count, test_count = max(1, dev_count - 1), max(1, test_count - 1)
        train_count = len(pieces) - dev_count - test_count
        is_test = speaker in set(test_speakers)
        for index, piece in enumerate(pieces):
            part = 1 if index < train_count else 2 if index < train_count + dev_count else 3
            relative = f"{ids[speaker]}/v{index // 10:04d}/{index % 10 + 1:05d}.wav"
            write_audio(root / ("test" if is_test else "dev") / "wav" / relative, piece)
            listing.append((part, relative))
            if is_test or (part == 3 and not test_speakers):
                tested.setdefault(speaker, []).append(relative)
            if not is_test:
                trained.setdefault(speaker, []).append(relative)
    if not test_speakers:
        # ASV opens test/wav: the same recordings are given there under a second root, by hard links where possible
        for names in tested.values():
            for relative in names:
                _link(root / "dev" / "wav" / relative, root / "test" / "wav" / relative)
    id_list = write_text(root / "veri_test_class.txt", "".join(f"{part} {name}\n" for part, name in listing))
    trials = write_text(root / "voxceleb1_test_v2.txt", _trials(tested, trials_per_speaker, seed))
    dev_trials = write_text(root / "dev_meta_data.txt", _trials(trained, trials_per_speaker, seed + 1))
    write_text(root / "dev_speaker_ids.txt", "".join(f"{ids[speaker]}\n" for speaker in sorted(trained)))
    header = "VoxCeleb1 ID\tName\tSet\n"
    rows = (f"{ids[s]}\t{s}\t{'test' if s in set(test_speakers) else 'dev'}\n" for s in sorted(ids))
    write_text(root / "vox1_meta.csv", header + "".join(rows))
    counts = {part: sum(1 for p, _ in listing if p == n) for n, part in ((1, "train"), (2, "dev"), (3, "test"))}
    logger.info("%s: %d speakers, %s utterances", root, len(ids), counts)
    return VoxCeleb1(root, id_list, trials, dev_trials, ids, counts)


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        target.unlink()
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        target.write_bytes(source.read_bytes())


def _trials(utterances: Mapping[str, Sequence[str]], per_speaker: int, seed: int) -> str:
    """Same- and different-speaker pairs, alternating, as VoxCeleb1's trial lists write them."""
    draw = random.Random(seed)
    lines = []
    for speaker in sorted(utterances):
        own = list(itertools.combinations(utterances[speaker], 2))
        draw.shuffle(own)
        others = [name for other in sorted(utterances) if other != speaker for name in utterances[other]]
        # one utterance alone still gives a target trial of itself: lists stay non-empty for EER's two error kinds
        for first, second in own[:per_speaker] or [(utterances[speaker][0],) * 2]:
            lines.append(f"1 {first} {second}\n")
            if others:
                lines.append(f"0 {first} {draw.choice(others)}\n")
    return "".join(lines)
