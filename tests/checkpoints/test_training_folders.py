"""The folders that the projects' own trainings write: found, told apart, and read with the options that they state."""

from __future__ import annotations

import logging

import pytest
import torch

from s3prl_speaker_upstreams.checkpoints import build_encoder, load_encoder, read_checkpoint
from s3prl_speaker_upstreams.ecapa import DIALECTS
from s3prl_speaker_upstreams.errors import CheckpointMismatch

pytestmark = pytest.mark.compat

# As SpeechBrain's create_experiment_directory writes it: references resolved, shared nodes as anchors.
HYPERPARAMS = """
# Generated 2024-05-01 from:
# /home/somebody/recipes/VoxCeleb/SpeakerRec/hparams/train_ecapa_tdnn.yaml
seed: 1986
__set_seed: !apply:speechbrain.utils.seed_everything [1986]
output_folder: results/ecapa_augment/1986
sample_rate: 16000
n_mels: 80
left_frames: 0
right_frames: 0
deltas: false
compute_features: &id001 !new:speechbrain.lobes.features.Fbank
  n_mels: 80
  left_frames: 0
  right_frames: 0
  deltas: false
embedding_model: &id002 !new:speechbrain.lobes.models.ECAPA_TDNN.ECAPA_TDNN
  input_size: 80
  channels: [16, 16, 16, 16, 24]
  kernel_sizes: [5, 3, 3, 3, 1]
  dilations: [1, 3, 4, 5, 1]
  groups: [1, 1, 1, 1, 1]
  attention_channels: 5
  lin_neurons: 10
  se_channels: 6
mean_var_norm: &id004 !new:speechbrain.processing.features.InputNormalization
  norm_type: sentence
  std_norm: false
modules:
  compute_features: *id001
  embedding_model: *id002
  mean_var_norm: *id004
"""

# As 3D-Speaker's build_config writes it: references stay, keys are sorted.
CONFIG = """
embedding_model:
  args:
    channels: [16, 16, 16, 16, 24]
    dilations: [1, 3, 4, 5, 1]
    input_size: <fbank_dim>
    lin_neurons: <embedding_size>
  obj: speakerlab.models.ecapa_tdnn.ECAPA_TDNN.ECAPA_TDNN
embedding_size: 10
exp_dir: exp/ecapa_tdnn
fbank_dim: 80
feature_extractor:
  args: {mean_nor: true, n_mels: <fbank_dim>, sample_rate: <sample_rate>}
  obj: speakerlab.process.processor.FBank
sample_rate: 16000
"""

RDINO_CONFIG = """
n_mels: 80
student_ecapa: &a
  args: {channels: [16, 16, 16, 16, 24], input_size: <n_mels>, lin_neurons: 10}
  obj: speakerlab.models.rdino.ECAPA_TDNN.ECAPA_TDNN
teacher_ecapa: *a
teacher_head: {args: {in_dim: 10}, obj: speakerlab.models.rdino.RDINO_Head.RDINOHead}
"""


@pytest.fixture
def speechbrain_training(tiny, tmp_path):
    """results/NAME/SEED of a SpeechBrain training, with a checkpoint in the middle of an epoch and one at its end."""

    def make(hyperparams: str | None = HYPERPARAMS):
        root = tmp_path / "results" / "ecapa_augment" / "1986"
        for name, seed, ended in (("CKPT+2024-05-01+12-00-00+00", 1, True), ("CKPT+2024-05-01+12-30-00+00", 2, False)):
            folder = root / "save" / name
            folder.mkdir(parents=True)
            torch.save(
                tiny.original_state("speechbrain", tiny.state("speechbrain", seed)), folder / "embedding_model.ckpt"
            )
            torch.save({"weight": torch.randn(12, 10)}, folder / "classifier.ckpt")
            (folder / "CKPT.yaml").write_text(
                f"# yamllint disable\nErrorRate: 0.1\nend-of-epoch: {str(ended).lower()}\n"
            )
            (folder / "counter.ckpt").write_text("3")
        (root / "train_log.txt").write_text("epoch: 1\n")
        if hyperparams is not None:
            (root / "hyperparams.yaml").write_text(hyperparams)
        return root, root / "save" / "CKPT+2024-05-01+12-00-00+00" / "embedding_model.ckpt"

    return make


def embedding(encoder) -> torch.Tensor:
    wav = torch.randn(12000, generator=torch.Generator().manual_seed(0)) * 0.1
    with torch.no_grad():
        return encoder([wav], outputs=("embedding",))["embedding"]


def test_a_speechbrain_training_is_read_with_its_options(speechbrain_training, caplog):
    root, file = speechbrain_training()
    told = read_checkpoint(file, format="speechbrain", dilations=(3, 4, 5))
    for place in (root, root / "save", file.parent, file):
        with caplog.at_level(logging.WARNING):
            found = read_checkpoint(place)
        assert not caplog.records
        assert found.format == "speechbrain" and found.ecapa == told.ecapa and found.frontend == told.frontend
        assert torch.equal(embedding(build_encoder(found)), embedding(build_encoder(told)))
    assert found.ecapa.dilations == (3, 4, 5)


def test_the_way_to_a_checkpoint_does_not_matter(speechbrain_training, threed_training, tmp_path, monkeypatch):
    """A relative path from within the folder, and a link from elsewhere, have the same neighbours."""
    for (_, file), format in ((speechbrain_training(), "speechbrain"), (threed_training(), "3dspeaker")):
        monkeypatch.chdir(file.parent)
        (tmp_path / f"{format}.ckpt").symlink_to(file)
        for place in (file.name, f"../{file.parent.name}/{file.name}", tmp_path / f"{format}.ckpt"):
            found = read_checkpoint(place)
            assert (found.format, found.ecapa.dilations) == (format, (3, 4, 5)), place


def test_the_options_are_worth_reading(speechbrain_training):
    """What going without them would cost: that the right value above is not that of the defaults."""
    root, file = speechbrain_training()
    right, wrong = embedding(load_encoder(root)), embedding(load_encoder(root, dilations=(2, 3, 4)))
    assert (right - wrong).norm() > 1e-3 * right.norm()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("sample_rate: 16000", "sample_rate: 8000", "sample_rate=8000, expected 16000; .*another rate"),
        ("  n_mels: 80\n  left", "  n_mels: 80\n  sample_rate: 8000\n  left", "compute_features.sample_rate=8000"),
        (
            "  n_mels: 80\n  left",
            "  n_mels: 80\n  filter_shape: gaussian\n  left",
            "filter_shape='gaussian'.*triangular",
        ),
        ("  n_mels: 80\n  left", "  n_mels: 80\n  power: 1\n  left", "compute_features: got power=1.*not known"),
        ("  n_mels: 80\n  left", "  win_length: 32\n  n_mels: 80\n  left", "win_length=32, expected 25"),
        ("  n_mels: 80\n  left", "  left", "n_mels=40, expected 80"),
        ("features.Fbank", "features.MFCC", "features.MFCC, expected"),
        ("  lin_neurons", "  activation: !name:torch.nn.LeakyReLU\n  lin_neurons", "torch.nn.LeakyReLU.*torch.nn.ReLU"),
        ("  lin_neurons", "  gropus: 2\n  lin_neurons", "embedding_model: got gropus=2"),
        ("  lin_neurons: 10", "  lin_neurons: !ref <a> + <b>", "expression is not evaluated"),
        ("groups: [1, 1, 1, 1, 1]", "groups: [1, 2, 1, 1, 1]", "groups"),
        ("  std_norm: false", "  std_norm: false\n  per_channel: true", "mean_var_norm: got per_channel=True"),
    ],
)
def test_what_changes_numbers_is_refused_by_name(speechbrain_training, old, new, message):
    assert old in HYPERPARAMS
    root, file = speechbrain_training(HYPERPARAMS.replace(old, new, 1))
    with pytest.raises(CheckpointMismatch, match=message) as caught:
        read_checkpoint(file)
    assert str(root / "hyperparams.yaml") in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "field", "value"),
    [
        ("  n_mels: 80\n  left", "  f_max: 7600\n  n_mels: 80\n  left", "fmax", 7600),
        ("  n_mels: 80\n  left", "  n_fft: 512\n  n_mels: 80\n  left", "n_fft", 512),
        (
            "  lin_neurons",
            "  activation: !name:torch.nn.ReLU\n  dropout: 0.1\n  device: cuda\n  lin_neurons",
            "fmax",
            8000,
        ),
    ],
)
def test_what_can_be_had_is_taken_over(speechbrain_training, old, new, field, value):
    root, file = speechbrain_training(HYPERPARAMS.replace(old, new, 1))
    assert getattr(read_checkpoint(file).frontend, field) == value


def test_a_checkpoint_folder_of_speechbrain_by_itself(speechbrain_training, caplog):
    _, file = speechbrain_training(None)
    with caplog.at_level(logging.INFO):
        assert read_checkpoint(file).format == "speechbrain"
    assert "CKPT+2024-05-01+12-00-00+00 is of a SpeechBrain training" in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


# --- 3D-Speaker ------------------------------------------------------------------------------------------------------


@pytest.fixture
def threed_training(tiny, tmp_path):
    """exp/ecapa_tdnn of a 3D-Speaker training: two epochs, the counter, the configuration."""

    def make(config: str | None = CONFIG):
        root = tmp_path / "exp" / "ecapa_tdnn"
        for epoch in (9, 70):
            folder = root / "models" / f"CKPT-EPOCH-{epoch}-00"
            folder.mkdir(parents=True)
            torch.save(
                tiny.original_state("3dspeaker", tiny.state("3dspeaker", epoch)), folder / "embedding_model.ckpt"
            )
            (folder / "epoch_counter.ckpt").write_text(str(epoch))
            (folder / "CKPT.yaml").write_text(f"epoch: {epoch}\nunixtime: 1.0\n")
        if config is not None:
            (root / "config.yaml").write_text(config)
        return root, folder / "embedding_model.ckpt"

    return make


def test_a_3dspeaker_training_is_not_taken_for_speechbrain(threed_training, tiny, caplog):
    root, file = threed_training()
    told = read_checkpoint(file, format="3dspeaker", dilations=(3, 4, 5))
    for place in (root, root / "models", file.parent, file):
        with caplog.at_level(logging.WARNING):
            found = read_checkpoint(place)
        assert not caplog.records
        assert (found.format, found.frontend) == ("3dspeaker", DIALECTS["3dspeaker"].frontend)
        assert found.ecapa.dilations == (3, 4, 5)
        assert torch.equal(embedding(build_encoder(found)), embedding(build_encoder(told)))
    # Epoch 70 is later than epoch 9, whatever their spelling.
    assert torch.equal(found.state["mfa.conv.bias"], tiny.state("3dspeaker", 70)["mfa.conv.bias"])


@pytest.mark.parametrize("left", ["folder's name", "epoch_counter.ckpt", "config.yaml"])
def test_each_trace_of_3dspeaker_tells(threed_training, tmp_path, left):
    root, file = threed_training(CONFIG if left == "config.yaml" else None)
    if left != "folder's name":
        file = file.parent.rename(tmp_path / "model") / file.name
    if left != "epoch_counter.ckpt":
        (file.parent / "epoch_counter.ckpt").unlink()
    if left == "config.yaml":
        (root / "config.yaml").rename(file.parent / "config.yaml")
    assert read_checkpoint(file).format == "3dspeaker"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("sample_rate: 16000", "sample_rate: 8000", "sample_rate=8000"),
        ("    lin_neurons", "    surprise: 1\n    lin_neurons", "embedding_model: got surprise=1"),
        ("processor.FBank", "processor.MFCC", "feature_extractor .*MFCC"),
        ("mean_nor: true,", "mean_nor: true, dither: 1,", "feature_extractor: got dither=1"),
        ("ECAPA_TDNN.ECAPA_TDNN", "ECAPA_TDNN.ResNet", "ResNet, expected an ECAPA_TDNN"),
    ],
)
def test_what_3dspeaker_states_and_cannot_be_had(threed_training, old, new, message):
    assert old in CONFIG
    _, file = threed_training(CONFIG.replace(old, new, 1))
    with pytest.raises(CheckpointMismatch, match=message):
        read_checkpoint(file)


def test_3dspeaker_without_mean_normalisation(threed_training):
    _, file = threed_training(CONFIG.replace("mean_nor: true, ", ""))
    assert read_checkpoint(file).frontend.normalisation == "none"


@pytest.mark.parametrize("format", ["rdino", "sdpn"])
def test_trainings_of_rdino_and_sdpn(tiny, format):
    path, networks = tiny(format, name="models/checkpoint.pth")
    config = (
        RDINO_CONFIG.replace("rdino.RDINO_Head.RDINOHead", "sdpn.SDPN_Head.SDPNHead")
        if format == "sdpn"
        else RDINO_CONFIG
    )
    (path.parent.parent / "config.yaml").write_text(config)
    (path.parent / "checkpoint0060.pth").write_bytes(path.read_bytes())
    found = read_checkpoint(path.parent.parent)
    assert (found.format, found.role, found.provenance["file"]) == (format, "teacher", "checkpoint.pth")
    assert torch.equal(found.state["mfa.conv.bias"], networks["teacher"]["mfa.conv.bias"])
    (path.parent.parent / "config.yaml").write_text(
        config.replace("lin_neurons: 10", "lin_neurons: 10, log_input: false")
    )
    with pytest.raises(CheckpointMismatch, match="log_input=False"):
        read_checkpoint(path)


@pytest.mark.parametrize("trace", ["width", "name", "config.yaml", "configuration.json", "prefix"])
def test_a_bare_backbone_of_rdino_has_rdinos_front_end(tiny, tmp_path, trace, caplog):
    state = tiny.state("rdino", embedding_dim=512 if trace == "width" else 10)
    path = tmp_path / ("rdino_backbone.pt" if trace == "name" else "model.pt")
    torch.save(tiny.original_state("rdino", state, "backbone." if trace == "prefix" else ""), path)
    if trace == "config.yaml":
        (tmp_path / trace).write_text(RDINO_CONFIG)
    if trace == "configuration.json":
        (tmp_path / trace).write_text('{"framework": "pytorch", "task": "x", "model": {"type": "rdino_ecapa-tdnn-sv"}}')
    with caplog.at_level(logging.WARNING):
        found = read_checkpoint(path)
    assert (found.format, found.role, found.frontend) == ("rdino", "teacher", DIALECTS["rdino"].frontend)
    assert ("same keys" in caplog.text) == (trace in ("width", "name", "prefix"))  # a sign, not a statement: said
    assert read_checkpoint(path, format="speechbrain").frontend == DIALECTS["speechbrain"].frontend or trace == "prefix"


# --- the others ------------------------------------------------------------------------------------------------------


def test_a_training_of_taoruijie(tiny):
    for epoch in (2, 10):
        path, networks = tiny("taoruijie", name=f"model/model_{epoch:04d}.model")
    (path.parent.parent / "score.txt").write_text("EER")
    assert read_checkpoint(path.parent.parent).provenance["file"] == "model_0010.model"


def test_a_training_of_wespeaker(tiny):
    path, networks = tiny("wespeaker", name="models/model_10.pt")
    (path.parent / "model_9.pt").write_bytes(b"")
    (path.parent / "init.zip").write_bytes(b"")
    config = (
        "model: ECAPA_TDNN_GLOB_c16\nmodel_args: {feat_dim: 80, embed_dim: 10, pooling_func: ASTP, emb_bn: false}\n"
    )
    (path.parent.parent / "config.yaml").write_text(config)
    assert read_checkpoint(path.parent.parent).provenance["file"] == "model_10.pt"
    (path.parent.parent / "config.yaml").write_text(config.replace("emb_bn: false", "emb_bn: false, dilation: 3"))
    with pytest.raises(CheckpointMismatch, match="model_args: got dilation=3"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("mel_hop_length: 80", "mel_hop_length=80, expected 160"),
        ("mel_sample_rate: 8000", "mel_sample_rate=8000"),
        ("extract_mel_features: false", "extract_mel_features=False"),
        ("kernel_sizes: [5, 5, 3, 3, 1]", "kernel_sizes"),
        ("surprise: 1", "encoder: got surprise=1"),
    ],
)
def test_what_sslsv_states_and_cannot_be_had(tiny, said, message):
    path, _ = tiny("sslsv")
    (path.parent.parent / "config.yml").write_text(f"encoder: {{type: ecapatdnn, {said}}}\n")
    with pytest.raises(CheckpointMismatch, match=message):
        read_checkpoint(path)
