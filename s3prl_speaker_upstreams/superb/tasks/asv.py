"""ASV: speaker verification on VoxCeleb1; there is no validation part, so every saved checkpoint is tested."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s3prl_speaker_upstreams.common.digests import file_sha256
from s3prl_speaker_upstreams.common.files import write_text
from s3prl_speaker_upstreams.superb.errors import CorpusError, RunFailed
from s3prl_speaker_upstreams.superb.layouts import Layout, first_file, shipped, text, voxceleb
from s3prl_speaker_upstreams.superb.saved import Saved
from s3prl_speaker_upstreams.superb.task import LIBROSA, STEPS, TENSORBOARD, Metric, Package, Score, Task, printed

if TYPE_CHECKING:
    from s3prl_speaker_upstreams.superb.work import Work

__all__ = ["TASK"]

_EVERY = 20000  # the checkpoints of every so many updates are tested (s3prl, sv_voxceleb1/test_expdir.sh)


class _SpeakerVerification(Task):
    def layout(self, root: Path) -> Layout:
        return voxceleb(root, "voxceleb1_test_v2.txt", "veri_test2.txt", "dev_meta_data.txt")

    def settings(self, data: Path, prepared: Path) -> dict[str, Any]:
        return {
            "downstream_expert.datarc.file_path": str(data),
            "downstream_expert.datarc.train_meta_data": str(prepared / "dev_speaker_ids.txt"),
            "downstream_expert.datarc.dev_meta_data": str(prepared / "dev_meta_data.txt"),
            "downstream_expert.datarc.test_meta_data": str(prepared / "voxceleb1_test_v2.txt"),
        }

    def prepare(self, data: Path, out: Path, s3prl_root: Path | None) -> None:
        source = first_file(
            data / "voxceleb1_test_v2.txt",
            data / "veri_test2.txt",
            shipped(s3prl_root, "sv_voxceleb1", "voxceleb1_test_v2.txt"),
        )
        if source is None:
            raise CorpusError(
                f"{data}: neither veri_test2.txt (from VoxCeleb1's page) nor voxceleb1_test_v2.txt (from s3prl's "
                "repository, s3prl/downstream/sv_voxceleb1) is there; put one into that folder or give --s3prl-root"
            )
        labels = set()
        for number, line in enumerate(text(source).splitlines(), 1):
            fields = line.split()
            if len(fields) != 3 or fields[0] not in ("0", "1"):
                raise CorpusError(f"{source}:{number}: {line!r} is not '0|1 id/video/a.wav id/video/b.wav'")
            labels.add(fields[0])
            for name in fields[1:]:
                if not (data / "test" / "wav" / name).is_file():
                    raise CorpusError(f"{source}:{number}: {name} is not in {data / 'test' / 'wav'}")
        if labels != {"0", "1"}:
            raise CorpusError(f"{source}: holds trials of label {sorted(labels)} only; EER needs both kinds")
        write_text(out / "voxceleb1_test_v2.txt", text(source))
        # s3prl opens a dev trial list when it starts but, with eval_dataloaders empty, scores none of it
        dev = first_file(
            data / "dev_meta_data.txt", shipped(s3prl_root, "sv_voxceleb1", "dev_meta_data", "dev_meta_data.txt")
        )
        write_text(out / "dev_meta_data.txt", text(dev or source))
        speakers = sorted(folder.name for folder in (data / "dev" / "wav").iterdir() if folder.is_dir())
        write_text(out / "dev_speaker_ids.txt", "".join(f"{name}\n" for name in speakers if name[0] != "."))

    def choose(self, work: Work) -> dict[str, Any]:
        """Saved checkpoints are tested, the best EER counts, as s3prl's docs/superb.md says."""
        excluded = work.excluded()
        tried: list[dict[str, Any]] = []
        for lr, fold, expdir in work.experiments():
            if expdir in {Path(one["experiment"]) for one in excluded}:
                continue
            saved = [one for one in work.same_training(lr, fold, expdir) if one.path.name.startswith("states-")]
            for one in [found for found in saved if found.step % _EVERY == 0] or saved:
                value = self._tested(work, one, expdir)
                if value is None or not math.isfinite(value):
                    excluded.append(work.exclude(lr, fold, expdir, f"update {one.step}: no finite test EER"))
                    continue
                tried.append({"lr": lr, "step": one.step, "EER": value, "checkpoint": str(one.path)})
        if not tried:
            raise RunFailed(f"{work.run.folder}: no checkpoint to choose from; {work.why(excluded)}")
        best = min(tried, key=lambda one: one["EER"])
        return {
            "rule": "lowest test EER over saved checkpoints",
            "lr": best["lr"],
            "dev_score": None,
            "checkpoints": {"": best["checkpoint"]},
            "step": best["step"],
            "candidates": tried,
            "excluded": excluded,
        }

    def _tested(self, work: Work, one: Saved, expdir: Path) -> float | None:
        """EER of one checkpoint, tested once for its content; None if the test ended for want of finite scores."""
        kept = expdir / f"states-{one.step}"

        def test() -> dict[str, Any]:
            log = kept / "test.log"
            said = work.test(one.path, "test", log, finite=True)
            if said is None:
                return {"EER": None}
            kept.mkdir(exist_ok=True)
            os.replace(expdir / "test_predict.txt", kept / "test_predict.txt")
            return {"EER": printed(said, "sv-voxceleb1/test-EER", log)}

        key = {"checkpoint": file_sha256(one.path)}
        return work.remembered(kept / "score.json", key, test, needs=[kept / "test_predict.txt"])["EER"]

    def evaluate(self, work: Work, choice: dict[str, Any]) -> None:
        """Nothing: checkpoints were tested in order to choose."""

    def score(self, work: Work, choice: dict[str, Any]) -> Score:
        best = Path(choice["checkpoints"][""])
        value = next(one["EER"] for one in choice["candidates"] if one["checkpoint"] == str(best))
        return Score({"EER": 100.0 * value}, {}, best.parent / best.stem)


TASK = _SpeakerVerification(
    name="ASV",
    title="speaker verification",
    order=60,
    downstream="sv_voxceleb1",
    corpus="VoxCeleb1 (dev/wav and test/wav; robots.ox.ac.uk/~vgg/data/voxceleb/vox1.html) and its trial list "
    "veri_test2.txt in DATA",
    packages=(TENSORBOARD, Package("sox", "sox"), LIBROSA, Package("sklearn", "scikit-learn")),
    metrics=(
        Metric(
            *("EER", "EER", 100.0, False, "SV_eer_public", (9.56, 5.11)),
            {
                "FBANK": 9.56,
                "wav2vec 2.0 Base": 6.02,
                "wav2vec 2.0 Large": 5.65,
                "HuBERT Base": 5.11,
                "HuBERT Large": 5.98,
            },
        ),
    ),
    smoke={**STEPS, "runner.gradient_accumulate_steps": 1, "downstream_expert.datarc.train_batch_size": 4},
    batch="downstream_expert.datarc.train_batch_size",
    best="",
    any_rate=True,
    walks=True,
    predictions=(("test_predict.txt", "sv_public/predict.txt"),),
    counts={"dev": 148642, "test": 4874},
    checkpoint_mb=120,
)
