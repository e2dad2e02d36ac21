"""``model.init``: weights of any kind bring their network and front-end; what is new is said."""

import logging

import pytest
import torch

from s3prl_speaker_upstreams import cli
from s3prl_speaker_upstreams.checkpoints import load_encoder, read_checkpoint, save_native
from s3prl_speaker_upstreams.ecapa import DIALECTS, SpeakerEncoder
from s3prl_speaker_upstreams.errors import CheckpointMismatch, CheckpointUnreadable, ConfigError
from s3prl_speaker_upstreams.pretrain.checkpointing import CheckpointStore
from s3prl_speaker_upstreams.pretrain.config import load
from s3prl_speaker_upstreams.pretrain.export import average_checkpoints, encoder_of, export

SUPERVISED = ("method=supervised", "data.speeds=[1.0]")


@pytest.fixture(scope="module")
def run(corpus, make, tmp_path_factory):
    """A finished supervised run on another front-end than the preset's."""
    out = tmp_path_factory.mktemp("run")
    trainer = make(corpus, out, "run.steps=3", "run.save_every=1 steps", *SUPERVISED, "model.dialect=wespeaker")
    trainer.run()
    return out, trainer.objective.state_dict()


def same(network, state):
    return all(torch.equal(v, state[k]) for k, v in network.state_dict().items())


def started(trainer, caplog):
    with caplog.at_level(logging.INFO):
        trainer.run(stop_after=0)
    return caplog.text


def test_a_public_checkpoint_brings_network_and_frontend(corpus, make, tmp_path, caplog):
    """Behind 3D-Speaker's front-end whatever the preset says; a resumed run needs the file no more."""
    dialect = DIALECTS["3dspeaker"]
    widths = {"channels": 16, "mfa_channels": 24, "embedding_dim": 12, "se_channels": 8, "attention_channels": 8}
    encoder = SpeakerEncoder(dialect.ecapa_config(**widths), dialect.frontend)
    source = save_native(encoder, tmp_path / "x.safetensors")
    init = (f"model.init={source}", "run.steps=2", "run.save_every=1 steps")
    trainer = make(corpus, tmp_path / "run", *init)
    assert trainer.frontend == dialect.frontend and trainer.features.frontend.cfg == dialect.frontend
    assert f"the network of {source}; head and prototypes are new" in started(trainer, caplog)
    assert all(same(network, encoder.ecapa.state_dict()) for network in trainer.objective.networks().values())
    trainer.run(stop_after=1)
    source.unlink()
    again = make(corpus, tmp_path / "run", *init)
    again.run()
    assert again.finished and again.frontend == dialect.frontend
    exported = read_checkpoint(export(tmp_path / "run", tmp_path / "y.safetensors"))
    assert exported.frontend == dialect.frontend and exported.ecapa == encoder.ecapa.cfg


def test_a_name_of_the_registry(corpus, make, tmp_path, caplog):
    trainer = make(corpus, tmp_path, "model.init=ecapa_dino_small")
    shipped = load_encoder_of("ecapa_dino_small")
    assert trainer.frontend == shipped.frontend.cfg
    started(trainer, caplog)
    assert same(trainer.objective.networks()["student"], shipped.ecapa.state_dict())


def load_encoder_of(name):
    from s3prl_speaker_upstreams.weights import resolve

    return load_encoder(resolve(name))


@pytest.mark.parametrize("kind", ["folder", "checkpoint", "average"])
def test_a_run_of_the_same_speakers_brings_its_classifier(corpus, make, run, tmp_path, caplog, kind):
    out, state = run
    source = {"folder": out, "checkpoint": out / "checkpoints" / "step_00000003.pt"}.get(kind, tmp_path / "average.pt")
    if kind == "average":
        average_checkpoints([out], source, last=3)
        steps = [CheckpointStore.load(p)["task"] for p in CheckpointStore(out / "checkpoints").paths()]
        state = {k: torch.stack([s[k].double() for s in steps]).mean(0).to(v.dtype) if v.is_floating_point() else v
                 for k, v in steps[-1].items()}  # fmt: skip
    trainer = make(corpus, tmp_path / "run", f"model.init={source}", *SUPERVISED)
    assert trainer.frontend == DIALECTS["wespeaker"].frontend
    assert "all weights of" in started(trainer, caplog)
    assert same(trainer.objective, state)


def test_other_speakers_get_a_new_classifier(corpus, make, run, tmp_path, caplog):
    fewer = tmp_path / "fewer"
    fewer.mkdir()
    for speaker in ("spk00", "spk01", "spk02"):
        (fewer / speaker).symlink_to(corpus / speaker)
    trainer = make(fewer, tmp_path / "run", f"model.init={run[0]}", *SUPERVISED)
    assert "the classifier is new" in started(trainer, caplog)
    assert trainer.objective.head.classes == 3
    assert same(trainer.objective.networks()["supervised"], encoder_of_run(run).ecapa.state_dict())


def encoder_of_run(run):
    return encoder_of(CheckpointStore(run[0] / "checkpoints").load_newest()[0])[0]


def test_the_same_number_of_other_speakers_is_not_the_same_speakers(corpus, make, run, tmp_path, caplog):
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    for speaker in corpus.iterdir():
        (renamed / f"x{speaker.name}").symlink_to(speaker)
    trainer = make(renamed, tmp_path / "run", f"model.init={run[0]}", *SUPERVISED)
    assert "the classifier is new" in started(trainer, caplog)
    mine = make(corpus, tmp_path / "mine", "run.steps=3", *SUPERVISED)
    mine.run(stop_after=1)
    with pytest.raises(ConfigError, match="the speakers are others now"):
        make(renamed, tmp_path / "mine", "run.steps=3", *SUPERVISED, changed_config=True).run()


def test_supervised_weights_start_dino(corpus, make, run, tmp_path, caplog):
    trainer = make(corpus, tmp_path, f"model.init={run[0]}")
    assert "head and prototypes are new" in started(trainer, caplog)
    assert same(trainer.objective.networks()["teacher"], encoder_of_run(run).ecapa.state_dict())


def test_what_the_user_says_himself_holds(corpus, make, run, tmp_path, caplog):
    trainer = make(corpus, tmp_path / "a", f"model.init={run[0]}", "model.frontend.fmin=50")
    assert trainer.frontend == DIALECTS["wespeaker"].frontend.replace(fmin=50)
    assert "another front-end than its own, as asked" in caplog.text
    other = make(corpus, tmp_path / "b", f"model.init={run[0]}", "model.dialect=sslsv")
    assert other.frontend == DIALECTS["sslsv"].frontend
    with pytest.raises(CheckpointMismatch, match="channels: 32 there, 16 here; leave model.ecapa"):
        make(corpus, tmp_path / "c", f"model.init={run[0]}", "model.ecapa.channels=16").run()


def test_no_such_weights(corpus, make, tmp_path):
    with pytest.raises(CheckpointUnreadable, match="did you mean 'ecapa_dino_small'"):
        make(corpus, tmp_path, "model.init=ecapa_dino_smal")


def test_show_spells_the_adopted_network_out(corpus, run, capsys):
    assert cli.main(["pretrain", "--preset", "smoke", "--set", f"model.init={run[0]}", "--show"]) == 0
    assert "channels: 32" in (text := capsys.readouterr().out) and "window: hamming" in text and "fmin: 20.0" in text


# --- what a preset needs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["voxceleb2_dino", "voxceleb2_supervised", "voxceleb2_large_margin", "small_dino"])
def test_a_preset_with_noise_does_not_train_without(corpus, preset, tmp_path, capsys):
    arguments = ["pretrain", "--preset", preset, "--data", str(corpus), "--out", str(tmp_path)]
    assert cli.main(arguments) == 1
    assert "pass --noise FOLDER, or train without: --set data.augment.noise_p=0" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    off = ["data.augment.noise_p=0", "data.augment.rir_p=0", "model.init=x"]
    assert load(preset, overrides=off).missing == []
    given = {"data": {"augment": {"noise": "a", "rirs": "b"}}, "model": {"init": "x"}}
    assert load(preset, given=given).missing == []


def test_large_margin_is_what_wespeaker_does(corpus, make, tmp_path):
    """No speed perturbation, three classes a speaker as in the run it comes from, never from scratch."""
    config = load("voxceleb2_large_margin", overrides=["data.augment.noise_p=0", "data.augment.rir_p=0"])
    assert tuple(config.data.speeds) == (1.0,) and config.data.speed_classes == 3
    assert len(config.missing) == 1 and "model.init" in config.missing[0]
    first = make(corpus, tmp_path / "a", "run.steps=1", "method=supervised", "data.speeds=[1.0, 0.9, 1.1]")
    first.run()
    average = average_checkpoints([tmp_path / "a"], tmp_path / "average.pt", last=1)
    lm = ("method=supervised", "data.speeds=[1.0]", "data.speed_classes=3", "aam.initial_margin=0.5", "aam.margin=0.5")
    second = make(corpus, tmp_path / "b", "run.steps=1", *lm, f"model.init={average}")
    second.run(stop_after=0)
    assert second.objective.head.classes == 36
    assert same(second.objective, CheckpointStore.load(average)["task"])
    labels = torch.cat([next(second.loader).labels for _ in range(4)])
    assert int(labels.max()) < 12  # only the real speakers are heard
