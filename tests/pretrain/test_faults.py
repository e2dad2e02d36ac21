"""What goes wrong around a run: nothing half-done passes as done, and nothing that was trained is lost."""

import errno
import logging
import os
import shutil
import signal
import threading

import pytest
import torch

from s3prl_speaker_upstreams import cli
from s3prl_speaker_upstreams.checkpoints import read_checkpoint
from s3prl_speaker_upstreams.common.files import locked
from s3prl_speaker_upstreams.errors import Busy, CheckpointUnreadable, ConfigError
from s3prl_speaker_upstreams.pretrain import checkpointing, trainer
from s3prl_speaker_upstreams.pretrain.checkpointing import CheckpointStore
from s3prl_speaker_upstreams.pretrain.export import average_checkpoints, export
from s3prl_speaker_upstreams.pretrain.trainer import WorkerDied

RARE = ("run.steps=6", "run.save_every=1000 steps")  # one checkpoint, at the end
SAME = ("loss", "grad_norm", "lr")


@pytest.fixture(scope="module")
def whole(corpus, make, tmp_path_factory):
    """An uninterrupted run of six steps."""
    out = tmp_path_factory.mktemp("whole")
    done = make(corpus, out, *RARE)
    done.run()
    return out, done.objective.state_dict()


def goes_on_as_never_stopped(corpus, make, log, out, whole, *overrides):
    again = make(corpus, out, *RARE, *overrides)
    again.run()
    assert again.finished
    assert [[r[k] for k in SAME] for r in log(out)] == [[r[k] for k in SAME] for r in log(whole[0])]
    state = again.objective.state_dict()
    assert all(torch.equal(state[k], v) for k, v in whole[1].items())


def at_step(run, step, action):
    """Call ``action`` in the middle of a step, after its forward pass has moved BatchNorm's and DINO's buffers."""
    original = run._gradient_norm

    def interrupted(loss, ids):
        if run.step == step:
            action()
        return original(loss, ids)

    run._gradient_norm = interrupted


def out_of_memory():
    raise RuntimeError("out of memory")


def key():
    os.kill(os.getpid(), signal.SIGINT)


def keys():
    key()
    key()


@pytest.mark.parametrize(
    ("action", "error", "kept"),
    [(out_of_memory, RuntimeError, 3), (keys, KeyboardInterrupt, 3), (key, None, 4)],
    ids=["exception", "two Ctrl-C", "Ctrl-C"],
)
def test_whatever_ends_a_run_its_last_whole_step_is_saved(corpus, make, log, tmp_path, whole, action, error, kept):
    run = make(corpus, tmp_path, *RARE)
    at_step(run, 3, action)
    if error is None:
        run.run()
        assert run.stopped == signal.SIGINT and not run.finished
    else:
        with pytest.raises(error):
            run.run()
    assert [CheckpointStore.step_of(p) for p in run.store.paths()] == [kept]
    goes_on_as_never_stopped(corpus, make, log, tmp_path, whole)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_killed_loader_worker_costs_nothing(corpus, make, log, tmp_path, whole):
    run = make(corpus, tmp_path, *RARE, "data.workers=1", "data.prefetch=1")

    def kill():
        import multiprocessing

        (worker,) = multiprocessing.active_children()
        os.kill(worker.pid, signal.SIGKILL)
        worker.join(10)

    at_step(run, 2, kill)
    with pytest.raises(WorkerDied, match=r"data\.workers.*goes on from the saved step"):
        run.run()
    run.loader.close()
    assert run.store.paths() and CheckpointStore.step_of(run.store.paths()[-1]) >= 2
    goes_on_as_never_stopped(corpus, make, log, tmp_path, whole)


def test_an_interrupt_during_the_update_waits_for_its_end(corpus, make, tmp_path):
    run = make(corpus, tmp_path, *RARE)
    after = run.objective.after_step

    def interrupted():
        if run.step == 2:
            keys()
        after()

    run.objective.after_step = interrupted
    run._stop_signal = 0
    with pytest.raises(KeyboardInterrupt):
        run.run()
    assert [CheckpointStore.step_of(p) for p in run.store.paths()] == [3]  # that step is whole


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_early_stop_has_an_exit_code_and_no_model(corpus, tmp_path, number, code, monkeypatch):
    arguments = ["pretrain", "--preset", "smoke", "--data", str(corpus), "--out", str(tmp_path), "--set", *RARE]
    original = trainer.Trainer._gradient_norm

    def stop(self, loss, ids):
        if self.step == 1:
            os.kill(os.getpid(), number)
        return original(self, loss, ids)

    monkeypatch.setattr(trainer.Trainer, "_gradient_norm", stop)
    assert cli.main([*arguments, "run.threads=1"]) == code
    assert not (tmp_path / "model.safetensors").exists()
    assert (tmp_path / "checkpoints" / "step_00000002.pt").exists()


# --- a full disk -----------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(monkeypatch):
    """``disk.room`` : bytes that a run's folder of checkpoints may hold; a write beyond fails as on a full disk."""

    class Disk:
        room = 10**12

    original = checkpointing._Noting.write

    def write(self, data):
        folder = os.path.dirname(self.name)
        if sum(f.stat().st_size for f in os.scandir(folder)) + len(memoryview(data).cast("B")) > Disk.room:
            self.failure = OSError(errno.ENOSPC, "No space left on device")
            raise self.failure
        return original(self, data)

    monkeypatch.setattr(checkpointing._Noting, "write", write)
    return Disk


def test_old_checkpoints_make_room(tmp_path, disk, caplog):
    store, state = CheckpointStore(tmp_path, keep_last=5), {"x": torch.zeros(1000)}
    store.save(1, state)
    store.mark_best(1, 0.1)
    for step in (2, 3):
        store.save(step, state)
    disk.room = sum(f.stat().st_size for f in tmp_path.iterdir()) + 100
    assert store.save(4, state) is not None and "make room" in caplog.text
    assert [store.step_of(p) for p in store.paths()] == [1, 3, 4]  # the best, the newest then, the new one
    disk.room = 0
    assert store.save(5, state) is None
    assert store.step_of(store.load_newest()[1]) == 4 and not list(tmp_path.glob("*.part"))


def test_a_full_disk_never_makes_a_half_trained_model(corpus, tmp_path, disk, monkeypatch, capsys):
    """The last checkpoint does not fit: the model in memory is written, and the command fails."""
    original = trainer.Trainer._check_collapse

    def fill(self, metrics):
        disk.room = 0 if self.step > 2 else disk.room
        return original(self, metrics)

    monkeypatch.setattr(trainer.Trainer, "_check_collapse", fill)
    arguments = ["pretrain", "--preset", "smoke", "--data", str(corpus), "--out", str(tmp_path), "--set"]
    assert cli.main([*arguments, "run.steps=4", "run.save_every=2 steps", "run.threads=1"]) == 1
    assert "the checkpoint of step 4 could not be written" in capsys.readouterr().err
    assert [p.name for p in CheckpointStore(tmp_path / "checkpoints").paths()] == ["step_00000002.pt"]
    assert read_checkpoint(tmp_path / "model.safetensors").provenance["step"] == 4


def test_a_log_that_cannot_be_written_is_caught_up_with(corpus, make, log, tmp_path, monkeypatch, caplog):
    original, refused = trainer.append_line, []

    def append(path, line):
        if len(refused) < 2:
            refused.append(line)
            raise OSError(errno.ENOSPC, "No space left on device")
        original(path, line)

    monkeypatch.setattr(trainer, "append_line", append)
    run = make(corpus, tmp_path, "run.steps=4")
    run.run()
    assert run.finished and [r["step"] for r in log(tmp_path)] == [1, 2, 3, 4]
    assert caplog.text.count("training goes on") == 1


# --- one folder, one run ---------------------------------------------------------------------------------------------


def test_a_second_run_in_the_same_folder_is_refused(corpus, make, tmp_path):
    run = make(corpus, tmp_path, "run.steps=2")
    with locked(tmp_path / "run.lock", "x"), pytest.raises(Busy, match="in use by another process"):
        run.run()
    assert not (tmp_path / "metrics.jsonl").exists() and not (tmp_path / "checkpoints").exists()
    thread = threading.Thread(target=run.run)  # the lock is gone; outside the main thread there are no signal handlers
    thread.start()
    thread.join(60)
    assert run.finished


# --- checkpoints that cannot be read ---------------------------------------------------------------------------------


def test_a_run_whose_checkpoints_are_all_damaged_never_begins_anew_by_itself(corpus, make, whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole[0], out)
    for path in (out / "checkpoints").glob("*.pt"):
        path.write_bytes(b"damaged")
    for _ in range(3):  # a requeue loop
        with pytest.raises(CheckpointUnreadable, match="remove this folder to begin again at step 0"):
            make(corpus, out, *RARE).run()
    only = out / "checkpoints" / "step_00000006.pt"
    os.replace(only, only.with_name(only.name + ".corrupt"))  # as an earlier version left it
    with pytest.raises(CheckpointUnreadable):
        make(corpus, out, *RARE).run()
    shutil.rmtree(out / "checkpoints")
    make(corpus, out, *RARE).run(stop_after=1)


# --- averaging and exporting -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluated(corpus, make, tmp_path_factory):
    """A run whose first evaluation was its best: steps 1 (best), 4 and 5 are kept."""
    out = tmp_path_factory.mktemp("evaluated") / "run"
    values = iter([0.1, 0.4, 0.3, 0.2, 0.5])
    run = make(corpus, out, "run.steps=5", "eval.every=1 steps", "run.keep_last=2")
    run.evaluate = lambda encoder: {"eer": next(values), "min_dcf_0.01": 0.9}
    run.run()
    return out


def test_an_average_never_takes_in_a_stale_best(evaluated, tmp_path):
    assert [CheckpointStore.step_of(p) for p in CheckpointStore(evaluated / "checkpoints").paths()] == [1, 4, 5]
    averaged = average_checkpoints([evaluated], tmp_path / "a.safetensors")
    assert read_checkpoint(averaged).provenance["averaged"] == ["step_00000004.pt", "step_00000005.pt"]
    for last in (0, 3, -1):
        with pytest.raises(ConfigError, match="from 1 to 2"):
            average_checkpoints([evaluated], tmp_path / "b.safetensors", last=last)
    one = average_checkpoints([evaluated], tmp_path / "c.safetensors", last=1)
    assert read_checkpoint(one).provenance["averaged"] == ["step_00000005.pt"]


@pytest.mark.parametrize(("which", "step", "eer"), [("best", 1, 0.1), ("newest", 5, 0.5), ("4", 4, 0.2)])
def test_an_export_holds_the_numbers_of_its_own_step(evaluated, log, tmp_path, which, step, eer):
    provenance = read_checkpoint(export(evaluated, tmp_path / "m.safetensors", which=which)).provenance
    metrics = provenance["metrics"]
    assert (provenance["step"], metrics["step"], metrics["eer"], metrics["evaluated_at_step"]) == (
        step,
        step,
        eer,
        step,
    )
    assert metrics["loss"] == next(r["loss"] for r in log(evaluated) if r["step"] == step and "loss" in r)


def test_a_stop_between_checkpoint_and_evaluation_costs_neither(corpus, make, log, tmp_path):
    overrides = ("run.steps=4", "eval.every=2 steps", "run.save_every=1000 steps")
    run = make(corpus, tmp_path, *overrides)

    def fail(encoder):
        raise ValueError("a bad recording")

    run.evaluate = fail
    with pytest.raises(ValueError, match="a bad recording"):
        run.run()
    assert [CheckpointStore.step_of(p) for p in run.store.paths()] == [2]
    again, seen = make(corpus, tmp_path, *overrides), []
    again.evaluate = lambda encoder: {"eer": 0.5 - 0.1 * len(seen) if not seen.append(1) else 0.0}
    again.run()
    assert [r["step"] for r in log(tmp_path) if "eer" in r and "loss" not in r] == [2, 4]


def test_a_wrong_trial_list_is_found_at_the_start(corpus, make, tmp_path):
    trials = tmp_path / "trials.txt"
    trials.write_text("1 spk00/0.wav spk00/1.wav\n0 spk00/0.wav nobody/1.wav\n")
    with pytest.raises(ConfigError, match="nobody/1.wav"):
        make(corpus, tmp_path / "run", f"eval.trials={trials}", f"eval.root={corpus}")


# --- what may change between a run and its continuation --------------------------------------------------------------


def test_a_renamed_corpus_folder_changes_nothing(corpus, make, log, tmp_path, whole):
    moved = tmp_path / "elsewhere"
    shutil.copytree(corpus, moved)
    out = tmp_path / "run"
    make(corpus, out, *RARE).run(stop_after=3)
    goes_on_as_never_stopped(moved, make, log, out, whole)


def test_other_noise_is_another_run_and_the_same_noise_elsewhere_is_not(corpus, make, tmp_path):
    noise, same, other = tmp_path / "noise", tmp_path / "same", tmp_path / "other"
    shutil.copytree(corpus / "spk00", noise)
    shutil.copytree(corpus / "spk00", same)
    shutil.copytree(corpus / "spk01", other)
    out, steps = tmp_path / "run", ("run.steps=2", "data.augment.rir_p=0")
    make(corpus, out, *steps, f"data.augment.noise={noise}").run(stop_after=1)
    with pytest.raises(ConfigError, match="the noise recordings"):
        make(corpus, out, *steps, f"data.augment.noise={other}").run()
    make(corpus, out, *steps, f"data.augment.noise={same}").run()


def test_changed_config_can_change_the_batch(corpus, make, log, tmp_path, caplog):
    """36 utterances in batches of 6 (6 steps an epoch), from epoch 1 on in batches of 12 (3 steps an epoch)."""
    base = ("run.epochs=3", "run.steps=null", "run.save_every=1000 steps", "optim.lr_reference_batch=null")
    make(corpus, tmp_path, *base, "run.batch=6").run(stop_after=8)
    with pytest.raises(ConfigError, match="batch of all processes: 6 before, 12 now.*--changed-config"):
        make(corpus, tmp_path, *base, "run.batch=12").run()
    changed = make(corpus, tmp_path, *base, "run.batch=12", changed_config=True)
    batches = []
    original = changed.features.of
    changed.features.of = lambda batch, device: (batches.append((batch.epoch, batch.batch)), original(batch, device))[1]
    with caplog.at_level(logging.INFO):
        changed.run()
    # 8 steps of 6 were epoch 1.33; what is left are 5 steps of 12
    assert batches == [(1, 1), (1, 2), (2, 0), (2, 1), (2, 2)] and changed.step == changed.last_step == 13
    rows = log(tmp_path)
    assert [r["step"] for r in rows] == list(range(1, 14))
    assert rows[7]["epoch"] == pytest.approx(8 / 6, abs=1e-3) and rows[8]["epoch"] == pytest.approx(5 / 3, abs=1e-3)
    assert rows[-1]["epoch"] == 3.0 and rows[-1]["lr"] < rows[8]["lr"]
    again = make(corpus, tmp_path, *base, "run.batch=12")  # nothing has to be said twice
    again.run()
    assert again.finished and again.step == 13


def test_changed_config_can_change_the_data(corpus, make, log, tmp_path):
    make(corpus, tmp_path, "run.steps=4").run(stop_after=2)
    fewer = make(corpus, tmp_path, "run.steps=4", "data.min_seconds=1.2", changed_config=True)
    fewer.run()
    assert fewer.finished and [r["step"] for r in log(tmp_path)] == [1, 2, 3, 4]


def test_a_run_of_an_earlier_version_goes_on(corpus, make, tmp_path):
    """Its checkpoint knows nothing of what came since."""
    run = make(corpus, tmp_path, "run.steps=3")
    run.run(stop_after=2)
    path = run.store.paths()[-1]
    state = CheckpointStore.load(path)
    del state["config"]["dino"]["regularisation_start"], state["shift"]
    for key in ("noise", "rirs", "speaker_names"):
        state["data"].pop(key, None)
    torch.save(state, path)
    path.with_name(path.name + ".sha256").unlink()
    again = make(corpus, tmp_path, "run.steps=3")
    again.run()
    assert again.finished


@pytest.mark.parametrize("method", ["dino", "supervised"])
def test_a_checkpoint_of_the_first_format_goes_on_bit_for_bit(corpus, make, log, tmp_path, method):
    """Its keys lay elsewhere: rewritten to the old ones, the run's numbers stay."""
    steps = (f"method={method}", "run.steps=4", "run.save_every=1000 steps")
    make(corpus, tmp_path / "whole", *steps).run()
    out = tmp_path / "old"
    old = make(corpus, out, *steps)
    old.run(stop_after=2)
    path = old.store.paths()[-1]
    state = CheckpointStore.load(path)
    state["format"] = 1
    if method == "dino":
        state["task"] = {"core." + k.removeprefix("watch."): v for k, v in state["task"].items()}
    else:
        state["task"] = {k.replace("encoder.", "encoder_.", 1): v for k, v in state["task"].items()}
    torch.save(state, path)
    path.with_name(path.name + ".sha256").unlink()
    make(corpus, out, *steps).run()
    assert [[r[k] for k in SAME] for r in log(out)] == [[r[k] for k in SAME] for r in log(tmp_path / "whole")]
    assert export(out, tmp_path / "m.safetensors", which="2" if path.exists() else "4").exists()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("run.log_every", "0", "at least 1"),
        ("run.steps", "0", "at least 1"),
        ("run.epochs", "0", "above 0"),
        ("eval.every", "0 steps", "more than 0"),
        ("run.save_every", "0", "more than 0"),
    ],
)
def test_zero_is_refused_by_name(corpus, configuration, key, value, message):
    with pytest.raises(ConfigError, match=f"{key}.*{message}"):
        configuration(corpus, f"{key}={value}")


def test_off_means_off(corpus, configuration, tmp_path):
    assert configuration(corpus, "dino.collapse.action=off").dino.collapse.action == "off"
    with pytest.raises(ConfigError, match="dino.collapse.action: got True"):
        configuration(corpus, "dino.collapse.action=on")


def test_accumulation_says_what_it_is_not(corpus, make, tmp_path):
    text = make(corpus, tmp_path, "run.accumulate=2", "dino.koleo=0.1").describe()
    assert "BatchNorm, Sinkhorn-Knopp and KoLeo see each micro-batch of 8 utterances alone" in text
    assert "note" not in make(corpus, tmp_path).describe()
    assert "is not run.batch=16" in text
