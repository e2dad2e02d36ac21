"""QbE: query by example on QUESST 2014 (English); nothing is trained, single layers are searched."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s3prl_speaker_upstreams.superb.errors import CorpusError
from s3prl_speaker_upstreams.superb.layouts import Layout, files, lines, need
from s3prl_speaker_upstreams.superb.scoring import score_quesst
from s3prl_speaker_upstreams.superb.task import TENSORBOARD, Metric, Package, Score, Task

if TYPE_CHECKING:
    from s3prl_speaker_upstreams.superb.work import Work

__all__ = ["TASK"]


def _folder(layer: int | None, split: str) -> str:
    return f"layer{layer or 0}-{split}"


class _QueryByExample(Task):
    def layout(self, root: Path) -> Layout:
        lists = {part: f"scoring/language_key_{part}.lst" for part in ("utterances", "dev", "eval")}
        truths = [f"scoring/groundtruth_quesst14_{part}" for part in ("dev", "eval")]
        need(root, "scoring", *lists.values(), *truths)
        found = {}
        for part, file in lists.items():
            rows = [line.split() for line in lines(root / file)]
            english = [row[0] for row in rows if len(row) == 2 and row[1] == "nnenglish"]
            if not english:
                raise CorpusError(f"{root / file}: no line marked nnenglish, which the task is restricted to")
            found[part] = [root / re.sub(r"^.*?/", "", name) for name in english]
        answers = [path for truth in truths for path in files(root / truth)]
        return Layout(found, [*(root / name for name in lists.values()), *answers])

    def settings(self, data: Path, prepared: Path) -> dict[str, Any]:
        return {"downstream_expert.datarc.dataset_root": str(data)}

    def choose(self, work: Work) -> dict[str, Any]:
        """The layer with the best MTWV on dev is tested."""
        layers: list[int | None] = [None] if work.layers() == 1 else list(range(work.layers()))
        tried = [{"layer": layer, **self._searched(work, layer, "dev")} for layer in layers]
        best = max(tried, key=lambda one: one["MTWV"])
        return {
            "rule": "best MTWV on dev over layers",
            "layer": best["layer"],
            "dev_score": best["MTWV"],
            "checkpoints": {},
            "candidates": tried,
        }

    def _searched(self, work: Work, layer: int | None, split: str) -> dict[str, Any]:
        """Scores of one layer on the dev or test queries, searched once for what the run is made of."""
        expdir = work.run.folder / _folder(layer, split)
        truth = work.run.corpus / "scoring" / f"groundtruth_quesst14_{'dev' if split == 'dev' else 'eval'}"

        def search() -> dict[str, Any]:
            work.evaluate_layer(expdir, split, layer)
            return score_quesst(expdir / "benchmark.stdlist.xml", truth)

        key = {"layer": layer, "split": split}
        return work.remembered(expdir / "score.json", key, search, needs=[expdir / "benchmark.stdlist.xml"])

    def evaluate(self, work: Work, choice: dict[str, Any]) -> None:
        self._searched(work, choice["layer"], "test")

    def score(self, work: Work, choice: dict[str, Any]) -> Score:
        home = work.run.folder / _folder(choice["layer"], "test")
        work.needs(home / "score.json", "evaluate")
        details = self._searched(work, choice["layer"], "test")
        return Score({"MTWV": 100.0 * details["MTWV"]}, details, home)


TASK = _QueryByExample(
    name="QbE",
    title="query by example",
    order=40,
    downstream="quesst14_dtw",
    corpus="QUESST 2014 (speech.fit.vutbr.cz/files/quesst14Database.tgz)",
    packages=(TENSORBOARD, Package("lxml", "lxml"), Package("dtw", "dtw-python")),
    metrics=(
        Metric(
            *("MTWV", "", 100.0, True, "QbE_mtwv_public", (0.58, 7.36)),
            {
                "FBANK": 0.58,
                "wav2vec 2.0 Base": 2.33,
                "wav2vec 2.0 Large": 4.89,
                "HuBERT Base": 7.36,
                "HuBERT Large": 3.53,
            },
        ),
    ),
    smoke={"downstream_expert.max_workers": 1},
    trained=False,
    any_rate=True,
    predictions=(("benchmark.stdlist.xml", "qbe_public/benchmark.stdlist.xml"),),
    checkpoint_mb=0,
)
