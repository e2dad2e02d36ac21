"""The training loop: logs, resumption, evaluation, failures; on a few seconds of made speech."""

import logging
import math

import pytest
import torch

from s3prl_speaker_upstreams.errors import CheckpointMismatch, ConfigError
from s3prl_speaker_upstreams.pretrain.checkpointing import CheckpointStore
from s3prl_speaker_upstreams.pretrain.collapse import Collapse
from s3prl_speaker_upstreams.pretrain.trainer import NonFinite, clip_gradients

NUMBERS = ("loss", "loss_minus_lnk", "teacher_entropy", "marginal_entropy", "effective_dimension", "grad_norm", "lr")


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory, make):
    out = tmp_path_factory.mktemp("runs") / "finished"
    trainer = make(corpus, out)
    trainer.run()
    return out, trainer


def test_every_step_is_logged_with_what_tells_a_collapse(finished, log):
    out, trainer = finished
    rows = log(out)
    assert [r["step"] for r in rows] == list(range(1, 21))
    wanted = {"loss", "loss_minus_lnk", "teacher_entropy", "marginal_entropy", "kl", "embedding_spread"}
    wanted |= {"effective_dimension", "lr", "wd", "momentum", "teacher_temp", "grad_norm", "step_seconds", "waiting"}
    assert wanted <= rows[0].keys() and all(math.isfinite(r[k]) for r in rows for k in wanted)
    assert rows[0]["lr"] == 0.0 and rows[3]["lr"] == pytest.approx(1e-3)
    assert rows[-1]["momentum"] > rows[0]["momentum"] == 0.9
    assert (out / "config.yaml").exists() and [p.name for p in trainer.store.paths()][-1] == "step_00000020.pt"


def test_the_head_of_the_log_tells_effective_batch_and_learning_rate(corpus, tmp_path, make):
    text = make(corpus, tmp_path, "optim.lr_reference_batch=256", "run.accumulate=2", "optim.lr=0.1").describe()
    assert "16 utterances (8 x 2 accumulated x 1 processes)" in text and "effective learning rate 0.00625" in text


def test_checkpoint_holds_all_there_is(finished):
    out, trainer = finished
    state, _ = CheckpointStore(out / "checkpoints").load_newest()
    assert {"task", "optimizer", "scaler", "loader", "rng", "monitor", "config", "data", "step"} <= state.keys()
    keys = state["task"].keys()
    for part in (
        "student.encoder",
        "teacher.encoder",
        "student.head",
        "teacher.head",
        "center",
    ):
        assert any(k.startswith(part) for k in keys), part
    assert state["data"]["utterances"] == 36 and state["data"]["fingerprint"]


@pytest.mark.parametrize("stop", [7, 10])
@pytest.mark.parametrize("method", ["dino", "supervised"])
def test_resumed_equals_uninterrupted_bit_for_bit(corpus, tmp_path, method, stop, make, log):
    overrides = [f"method={method}", "run.steps=12"]
    whole = make(corpus, tmp_path / "whole", *overrides)
    whole.run()
    make(corpus, tmp_path / "parts", *overrides).run(stop_after=stop)
    torch.manual_seed(999)  # a new process starts with another state
    again = make(corpus, tmp_path / "parts", *overrides)
    again.run()
    a, b = whole.objective.state_dict(), again.objective.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    keys = [k for k in log(tmp_path / "whole")[0] if k not in ("step_seconds", "waiting")]
    assert [[r[k] for k in keys] for r in log(tmp_path / "whole")] == [
        [r[k] for k in keys] for r in log(tmp_path / "parts")
    ]


def test_a_cut_log_line_and_lines_beyond_the_checkpoint_are_dropped(corpus, tmp_path, make, log):
    out = tmp_path / "run"
    make(corpus, out, "run.steps=12").run(stop_after=8)
    with open(out / "metrics.jsonl", "a") as stream:  # what a kill between two checkpoints leaves
        stream.write('{"step": 9, "loss": 1.0}\n{"step": 10, "lo')
    make(corpus, out, "run.steps=12").run()
    assert [r["step"] for r in log(out)] == list(range(1, 13)) and log(out)[8]["loss"] != 1.0


def test_a_corrupt_newest_checkpoint_falls_back_and_gives_the_same_numbers(
    corpus, finished, tmp_path, caplog, make, log
):
    out = tmp_path / "run"
    make(corpus, out).run(stop_after=15)
    newest = out / "checkpoints" / "step_00000015.pt"
    data = bytearray(newest.read_bytes())
    data[len(data) // 3] ^= 4
    newest.write_bytes(data)
    with caplog.at_level(logging.INFO):
        make(corpus, out).run()
    assert "falling back" in caplog.text and "step_00000010.pt (step 10" in caplog.text
    assert [[r[k] for k in NUMBERS] for r in log(out)] == [[r[k] for k in NUMBERS] for r in log(finished[0])]


def test_another_configuration_is_refused_with_the_difference(corpus, finished, make):
    out, _ = finished
    with pytest.raises(ConfigError, match=r"optim.lr: 0.001 before, 0.5 now"):
        make(corpus, out, "optim.lr=0.5").run()


def test_other_data_is_refused(corpus, tmp_path, make):
    out = tmp_path / "run"
    make(corpus, out, "run.steps=6").run(stop_after=2)
    with pytest.raises(ConfigError, match="the training speech .fingerprint.*--changed-config"):
        make(corpus, out, "run.steps=6", "data.min_seconds=1.2").run()


def test_accumulation_gives_the_mean_gradient(corpus, tmp_path, make, log):
    """Two micro-batches of 4 without batch statistics are one batch of 8: compare with BatchNorm in eval mode."""
    base = ["method=supervised", "run.steps=3", "aam.margin=0.0", "data.speeds=[1.0]"]
    losses = {}
    for name, extra in {"one": ["run.batch=8"], "two": ["run.batch=4", "run.accumulate=2"]}.items():
        trainer = make(corpus, tmp_path / name, *base, *extra)
        trainer.objective.encoder.train = lambda mode=True, m=trainer.objective.encoder: torch.nn.Module.train(m, False)
        trainer.run()
        losses[name] = [r["loss"] for r in log(tmp_path / name)]
    assert losses["two"] == pytest.approx(losses["one"], abs=2e-4)


def test_supervised_training_learns_the_speakers(corpus, tmp_path, make, log):
    trainer = make(
        corpus, tmp_path, "method=supervised", "run.steps=60", "data.speeds=[1.0]", "optim.lr=0.005", "run.batch=12"
    )
    assert trainer.objective.head.classes == 12
    last = trainer.run()
    rows = log(tmp_path)
    assert last["accuracy"] >= 0.75 and rows[0]["accuracy"] < 0.5
    assert [r["margin"] for r in rows][:12] == [0.0] * 12 and rows[-1]["margin"] == pytest.approx(0.2)


def test_speeds_multiply_the_speakers(corpus, tmp_path, make):
    trainer = make(corpus, tmp_path, "method=supervised", "data.speeds=[1.0, 0.9, 1.1]")
    assert trainer.objective.head.classes == 36


def test_a_non_finite_loss_names_step_and_files(corpus, tmp_path, monkeypatch, make):
    trainer = make(corpus, tmp_path, "run.steps=8")
    seen = []
    original = trainer.features.of

    def of(batch, device):
        seen.append(batch.ids)
        crops = original(batch, device)
        if len(seen) == 6:
            crops.features[0][0, 0, 0] = float("nan")
        return crops

    monkeypatch.setattr(trainer.features, "of", of)
    with pytest.raises(NonFinite) as caught:
        trainer.run()
    assert "step 6" in str(caught.value) and all(name in str(caught.value) for name in seen[5])
    # the poisoned step left no checkpoint; the one before is whole
    assert [p.name for p in trainer.store.paths()] == ["step_00000005.pt"]
    assert all(torch.isfinite(v).all() for v in CheckpointStore.load(trainer.store.paths()[0])["task"].values())


def test_a_collapse_stops_the_run_with_advice(corpus, tmp_path, make):
    overrides = ["dino.collapse.action=stop", "dino.collapse.grace=2 steps", "dino.collapse.patience=2"]
    trainer = make(corpus, tmp_path, *overrides, "dino.collapse.min_effective_dimension=100")
    with pytest.raises(Collapse, match="dino.koleo"):
        trainer.run()
    assert trainer.step == 4 and [p.name for p in trainer.store.paths()][-1] == "step_00000004.pt"


def test_evaluation_keeps_the_best(corpus, tmp_path, make, log):
    values = iter([0.3, 0.1, 0.2, 0.25])
    trainer = make(corpus, tmp_path, "eval.every=5 steps", "run.keep_last=1")
    calls = []

    def evaluate(encoder):
        calls.append(encoder([torch.randn(8000)], outputs=("embedding",))["embedding"].shape)
        return {"eer": next(values)}

    trainer.evaluate = evaluate
    trainer.run()
    assert calls == [(1, 24)] * 4
    assert [p.name for p in trainer.store.paths()] == ["step_00000010.pt", "step_00000020.pt"]
    assert trainer.store.best()[0].name == "step_00000010.pt" and trainer.store.best()[1] == 0.1
    assert [r["eer"] for r in log(tmp_path) if "eer" in r and "loss" not in r] == [0.3, 0.1, 0.2, 0.25]


def test_start_from_weights(corpus, finished, tmp_path, make):
    out, done = finished
    source = out / "checkpoints" / "step_00000020.pt"
    trainer = make(corpus, tmp_path, f"model.init={source}", "run.steps=4")
    trainer.run(stop_after=0)
    for key, value in done.objective.teacher.state_dict().items():
        assert torch.equal(trainer.objective.teacher.state_dict()[key], value)
    with pytest.raises(CheckpointMismatch):
        make(corpus, tmp_path / "b", f"model.init={source}", "model.ecapa.channels=16").run()


def test_tensorboard_log(corpus, tmp_path, make, log):
    pytest.importorskip("tensorboard")
    make(corpus, tmp_path, "run.steps=2", "run.tensorboard=true").run()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("loss")] == [1, 2]
    assert events.Scalars("loss")[1].value == pytest.approx(log(tmp_path)[1]["loss"], rel=1e-6)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_stays_near_float32(corpus, finished, tmp_path, precision, make, log):
    make(corpus, tmp_path, f"run.precision={precision}", "run.steps=20").run(stop_after=5)
    low, full = [r["loss"] for r in log(tmp_path)], [r["loss"] for r in log(finished[0])][:5]
    assert low != full and low == pytest.approx(full, abs=0.3)


def test_clipping_each_parameter_and_all_together():
    def parameters():
        a, b = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1))
        a.grad, b.grad = torch.tensor([3.0, 4.0]), torch.tensor([0.5])
        return [a, b]

    each = parameters()
    assert float(clip_gradients(each, 1.0, "per_parameter")) == pytest.approx(math.sqrt(25.25))
    assert each[0].grad.tolist() == pytest.approx([0.6, 0.8], abs=1e-5) and each[1].grad.tolist() == [0.5]
    together = parameters()
    clip_gradients(together, 1.0, "global")
    assert float(torch.cat([p.grad for p in together]).norm()) == pytest.approx(1.0, abs=1e-5)
    off = parameters()
    clip_gradients(off, 0.0, "global")
    assert off[0].grad.tolist() == [3.0, 4.0]
