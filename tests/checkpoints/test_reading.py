"""Every format: the tensors that come out are, bit for bit, those that its project wrote."""

from __future__ import annotations

import logging

import pytest
import torch

from s3prl_speaker_upstreams.checkpoints import (
    FORMATS,
    detect_format,
    expected_shapes,
    load_encoder,
    read_checkpoint,
)
from s3prl_speaker_upstreams.checkpoints.formats import BY_NAME
from s3prl_speaker_upstreams.ecapa import DIALECTS, Ecapa, EcapaConfig, FrontendConfig
from s3prl_speaker_upstreams.errors import CheckpointMismatch, CheckpointUnreadable, ConfigError

pytestmark = pytest.mark.compat
ORIGINALS = tuple(name for name in FORMATS if name != "native")


def assert_same(state, expected):
    assert set(state) == set(expected)
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype, name
        assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize("format", ORIGINALS)
def test_every_tensor_of_every_role(tiny, format):
    path, networks = tiny(format)
    default = "teacher" if "teacher" in networks else "supervised"
    for role, expected in networks.items():
        checkpoint = read_checkpoint(path, format=format, role=role)
        assert (checkpoint.role, checkpoint.format) == (role, format)
        assert_same(checkpoint.state, expected)
    assert read_checkpoint(path, format=format).role == default
    assert_same(read_checkpoint(path, format=format).state, networks[default])


@pytest.mark.parametrize("format", ORIGINALS)
def test_widths_come_from_the_file(tiny, format):
    changes = {"channels": 24, "mfa_channels": 20, "embedding_dim": 7, "se_channels": 3, "attention_channels": 9}
    path, _ = tiny(format, **changes, res2_scale=4, kernel_size=3)
    config = read_checkpoint(path, format=format).ecapa
    for key, value in {**changes, "res2_scale": 4, "kernel_size": 3}.items():
        assert getattr(config, key) == value
    dialect = DIALECTS[BY_NAME[format].dialects[0]].ecapa_config()
    for key in ("padding", "res2_identity", "block_wiring", "mfa_norm", "attention_hidden", "pool_var", "dilations"):
        assert getattr(config, key) == getattr(dialect, key)


@pytest.mark.parametrize("format", ORIGINALS)
def test_the_format_is_detected(tiny, format):
    path, _ = tiny(format)
    assert detect_format(path) == format
    assert detect_format(path.parent if "/" not in BY_NAME[format].folder_files[0] else path.parent.parent) == format


@pytest.mark.parametrize("format", ORIGINALS)
def test_the_encoder_runs(tiny, format):
    path, networks = tiny(format)
    encoder = load_encoder(path, format=format)
    assert not encoder.training
    with torch.no_grad():
        out = encoder([torch.randn(8000) * 0.1, torch.randn(3000) * 0.1], outputs=("hidden_states", "embedding"))
    assert out["embedding"].shape == (2, 10) and torch.isfinite(out["embedding"]).all()
    assert len(out["hidden_states"]) == 4
    dialect = DIALECTS[BY_NAME[format].dialects[0]].frontend
    assert encoder.frontend.cfg.scale == dialect.scale and encoder.frontend.cfg.mel == dialect.mel


@pytest.mark.parametrize("config", [EcapaConfig(), *(DIALECTS[name].ecapa_config() for name in DIALECTS)], ids=str)
def test_expected_shapes_are_those_of_the_model(config):
    config = config.replace(channels=32, mfa_channels=12, embedding_dim=5)
    shapes = {name: tuple(tensor.shape) for name, tensor in Ecapa(config).state_dict().items()}
    assert expected_shapes(config) == shapes
    assert list(expected_shapes(config)) == list(expected_shapes(config.replace(dilations=(1, 1, 1))))


def test_attention_without_context(tiny):
    path, networks = tiny("wespeaker", attention_context=False)
    checkpoint = read_checkpoint(path)
    assert checkpoint.ecapa.attention_context is False
    assert_same(checkpoint.state, networks["supervised"])


def test_embedding_norm_where_the_file_has_it(tiny, tmp_path):
    state = tiny.state("wespeaker", embedding_norm=True)
    torch.save({**tiny.original_state("wespeaker", state), **tiny.head("projection_head.")}, tmp_path / "avg_model.pt")
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint.ecapa.embedding_norm and checkpoint.role == "teacher"
    assert_same(checkpoint.state, state)


def test_wespeaker_raw_dino(tiny, tmp_path):
    teacher, student = (tiny.state("wespeaker", seed, embedding_norm=True) for seed in (1, 2))
    model = {
        **tiny.original_state("wespeaker", student, "s_model."),
        **tiny.head("s_model.projection_head."),
        **tiny.original_state("wespeaker", teacher, "t_model."),
        **tiny.head("t_model.projection_head."),
        "dino_loss_calculator.center": torch.zeros(1, 9),
    }
    for number in (9, 10):
        path = tmp_path / "models" / f"model_{number}.pt"
        path.parent.mkdir(exist_ok=True)
        torch.save({"model": model, "optimizer": tiny.optimizer()}, path)
    assert_same(read_checkpoint(path).state, teacher)
    assert_same(read_checkpoint(path, role="student").state, student)
    # The latest by number, not by spelling.
    assert read_checkpoint(tmp_path).provenance["file"] == "model_10.pt"
    # The average has the teacher alone: a folder with both gives either.
    averaged = {**tiny.original_state("wespeaker", teacher), **tiny.head("projection_head.")}
    torch.save(averaged, tmp_path / "avg_model.pt")
    assert read_checkpoint(tmp_path).provenance["file"] == "avg_model.pt"
    assert_same(read_checkpoint(tmp_path, role="student").state, student)
    with pytest.raises(CheckpointMismatch, match=r"the teacher network, expected the student.*model_N\.pt hold both"):
        read_checkpoint(tmp_path / "avg_model.pt", role="student")


@pytest.mark.parametrize("method", ["moco", "simclr"])
def test_wespeaker_contrastive_raw(tiny, tmp_path, method):
    query, key = tiny.state("wespeaker", 1), tiny.state("wespeaker", 2)
    if method == "moco":
        model = {
            **tiny.original_state("wespeaker", query, "encoder_q."),
            **tiny.original_state("wespeaker", key, "encoder_k."),
            "queue": torch.randn(4, 8),
            "queue_ptr": torch.zeros(1, dtype=torch.long),
        }
    else:
        model = tiny.original_state("wespeaker", query, "encoder.")
        model["encoder.mlp.0.weight"] = torch.randn(3, 3)
    torch.save(model, tmp_path / "model_1.pt")
    # WeSpeaker embeds with MoCo's query encoder, which is the trained one.
    assert_same(read_checkpoint(tmp_path / "model_1.pt").state, query)


@pytest.mark.parametrize(
    ("extra", "roles"),
    [
        ({"classifier.weight": torch.zeros(3, 10)}, ("supervised",)),
        ({"projector.0.weight": torch.zeros(3, 10)}, ("supervised",)),
        ({"projector_momentum.0.weight": torch.zeros(3, 10), "queue": torch.zeros(2, 2)}, ("student", "teacher")),
    ],
    ids=["supervised", "simclr", "moco"],
)
def test_sslsv_other_methods(tiny, tmp_path, extra, roles):
    teacher, student = tiny.state("sslsv", 1), tiny.state("sslsv", 2)
    model = {**tiny.original_state("sslsv", student, "encoder."), **extra}
    model.update(tiny.frontend_buffers("hamming", "encoder.features_extractor.0."))
    if "teacher" in roles:
        model.update(tiny.original_state("sslsv", teacher, "encoder_momentum."))
        model.update(tiny.frontend_buffers("hamming", "encoder_momentum.features_extractor.0."))
    torch.save({"model": model}, tmp_path / "model_avg.pt")
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint.role == roles[0] and checkpoint.frontend.window == "hamming"
    assert_same(checkpoint.state, student)
    if "teacher" in roles:
        assert_same(read_checkpoint(tmp_path, role="teacher").state, teacher)
    else:
        with pytest.raises(CheckpointMismatch, match="expected the teacher"):
            read_checkpoint(tmp_path, role="teacher")


@pytest.mark.parametrize(("format", "window"), [("sslsv", "hann"), ("taoruijie", "hamming")])
def test_window_and_filters_come_from_the_file(tiny, format, window, caplog):
    path, _ = tiny(format)
    key = "encoder_momentum.features_extractor.0" if format == "sslsv" else "speaker_encoder.torchfbank.1"
    saved = torch.load(path, weights_only=False)
    saved = saved.get("model", saved)
    checkpoint = read_checkpoint(path)
    assert checkpoint.frontend.window == window
    encoder = load_encoder(path)
    assert torch.equal(encoder.frontend.mel, saved[f"{key}.mel_scale.fb"])
    assert torch.equal(encoder.frontend.window, saved[f"{key}.spectrogram.window"])
    with caplog.at_level(logging.WARNING):
        other = read_checkpoint(path, frontend="speechbrain")
    assert other.frontend == DIALECTS["speechbrain"].frontend and not other.frontend_buffers
    assert "not used" in caplog.text


def test_other_pre_emphasis_is_refused(tiny):
    path, _ = tiny("taoruijie")
    state = torch.load(path, weights_only=True)
    state["speaker_encoder.torchfbank.0.flipped_filter"][0, 0, 0] = -0.95
    torch.save(state, path)
    with pytest.raises(CheckpointMismatch, match=r"-0\.9[45].*expected \[-0\.97"):
        read_checkpoint(path)


def test_wrapped_by_data_parallel_and_compile(tiny, tmp_path):
    state = tiny.state("speechbrain")
    torch.save({"model": tiny.original_state("speechbrain", state, "module._orig_mod.")}, tmp_path / "x.pt")
    assert_same(read_checkpoint(tmp_path / "x.pt", format="speechbrain").state, state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(tiny, tmp_path, dtype):
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tiny.state("speechbrain").items()}
    torch.save(tiny.original_state("speechbrain", state), tmp_path / "x.pt")
    loaded = read_checkpoint(tmp_path / "x.pt").state
    assert {t.dtype for t in loaded.values()} == {torch.float32, torch.int64}
    assert torch.equal(loaded["mfa.conv.weight"], state["mfa.conv.weight"].float())


# --- which front-end -------------------------------------------------------------------------------------------------


def test_speechbrain_and_3dspeaker_cannot_be_told_apart(tiny, tmp_path, caplog):
    path, _ = tiny("speechbrain", name="model.pt")
    with caplog.at_level(logging.WARNING):
        assert read_checkpoint(path).format == "speechbrain"
    assert "same keys and shapes" in caplog.text and "format=3dspeaker" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        as_3d = read_checkpoint(path, format="3dspeaker")
    assert not caplog.text
    assert as_3d.frontend == DIALECTS["3dspeaker"].frontend != DIALECTS["speechbrain"].frontend


@pytest.mark.parametrize(
    ("neighbour", "text", "expected"),
    [
        ("hyperparams.yaml", "model: !new:speechbrain.lobes.models.ECAPA_TDNN.ECAPA_TDNN\n", "speechbrain"),
        ("label_encoder.txt", "'id' => 0", "speechbrain"),
        ("configuration.json", '{"framework": "pytorch", "task": "speaker-verification"}', "3dspeaker"),
    ],
)
def test_neighbouring_files_tell(tiny, caplog, neighbour, text, expected):
    path, _ = tiny("speechbrain", name="model.pt")
    (path.parent / neighbour).write_text(text)
    with caplog.at_level(logging.INFO):
        assert read_checkpoint(path).format == expected
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert neighbour in caplog.text


@pytest.mark.parametrize("format", ["rdino", "sdpn"])
def test_two_front_ends_of_rdino(tiny, caplog, format):
    path, _ = tiny(format)
    with caplog.at_level(logging.WARNING):
        assert read_checkpoint(path).frontend == DIALECTS["rdino"].frontend
    assert "--frontend modelscope (frontend='modelscope'" in caplog.text
    for choice in ("rdino", "modelscope"):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert read_checkpoint(path, frontend=choice).frontend == DIALECTS[choice].frontend
        assert not caplog.text


def test_options_override(tiny):
    path, _ = tiny("speechbrain")
    checkpoint = read_checkpoint(path, dilations=(1, 2, 3), stride=2, normalisation="mean_var", top_db=None)
    assert checkpoint.ecapa.dilations == (1, 2, 3) and checkpoint.ecapa.stride == 2
    assert checkpoint.frontend.normalisation == "mean_var" and checkpoint.frontend.top_db is None
    assert read_checkpoint(path, frontend={"window": "hann"}).frontend.window == "hann"
    own = FrontendConfig(window="hann")
    assert read_checkpoint(path, frontend=own).frontend == own


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "wespeeker"}, "expected one of native, speechbrain"),
        ({"role": "pupil"}, "expected one of teacher"),
        ({"frontend": "fbank"}, "expected one of 3dspeaker"),
        ({"dilation": 3}, "unknown option 'dilation'"),
        ({"frontend": {"windows": "hann"}}, "did you mean 'window'"),
        ({"n_mels": 40}, r"got \(16, 80, 5\), expected \(16, 40, 5\)"),
    ],
)
def test_wrong_options(tiny, options, message):
    path, _ = tiny("speechbrain")
    with pytest.raises((ConfigError, CheckpointMismatch), match=message):
        read_checkpoint(path, **options)


def test_a_width_that_is_not_the_files(tiny):
    path, _ = tiny("speechbrain")
    with pytest.raises(CheckpointMismatch, match="channels=32.*leave it out"):
        read_checkpoint(path, channels=32)


# --- strictness ------------------------------------------------------------------------------------------------------


SAME_FORM = ({"speechbrain", "3dspeaker"}, {"rdino", "sdpn"})
# The user's word is enough for a file that may be any of them; a file with student and teacher says itself what it is.
MAY_BE = {(plain, told) for plain in SAME_FORM[0] for told in (*SAME_FORM[0], *SAME_FORM[1])} | {
    ("rdino", "sdpn"),
    ("sdpn", "rdino"),
}


@pytest.mark.parametrize(
    ("format", "wrong"), [(a, b) for a in ORIGINALS for b in ORIGINALS if a != b and (a, b) not in MAY_BE]
)
def test_the_wrong_format_is_refused_and_the_right_one_named(tiny, format, wrong):
    path, _ = tiny(format)
    with pytest.raises(CheckpointMismatch) as caught:
        read_checkpoint(path, format=wrong)
    message = str(caught.value)
    assert str(path) in message
    named = next((s for s in SAME_FORM if format in s), {format})
    assert any(f"--format {name} (format='{name}'" in message for name in named), message


@pytest.mark.parametrize("format", ORIGINALS)
def test_one_tensor_too_few_or_too_many(tiny, format):
    path, _ = tiny(format)
    data = torch.load(path, weights_only=False)
    state = data["teacher"] if format in ("rdino", "sdpn") else data["model"] if format == "sslsv" else data
    momentum = format == "sslsv"
    lost = next(k for k in state if k.endswith(".weight") and (not momentum or k.startswith("encoder_momentum.")))
    tensor = state.pop(lost)
    torch.save(data, path)
    with pytest.raises(CheckpointMismatch, match="1 of .* expected keys are not there"):
        read_checkpoint(path, format=format)
    state[lost] = tensor
    prefix = {"rdino": "module.backbone.", "sdpn": "module.backbone.", "sslsv": "encoder_momentum."}.get(format, "")
    prefix = "speaker_encoder." if format == "taoruijie" else prefix
    state[f"{prefix}adapter.weight"] = torch.zeros(2)
    torch.save(data, path)
    with pytest.raises(CheckpointMismatch, match="keys unmatched, first '.*adapter.weight'"):
        read_checkpoint(path, format=format)


@pytest.mark.parametrize("format", ORIGINALS)
def test_a_tensor_of_another_shape(tiny, format):
    path, _ = tiny(format)
    data = torch.load(path, weights_only=False)
    state = data["teacher"] if format in ("rdino", "sdpn") else data["model"] if format == "sslsv" else data
    for key in state:
        if state[key].dim() == 3 and state[key].shape[-1] == 3:
            state[key] = torch.zeros(2, 2, 5)
    torch.save(data, path)
    with pytest.raises(CheckpointMismatch, match=r"another shape.*res2.*got \(2, 2, 5\), expected \(2, 2, 3\)"):
        read_checkpoint(path, format=format)


def test_unknown_top_level_tensors(tiny, tmp_path):
    state = tiny.original_state("sslsv", tiny.state("sslsv"), "encoder.")
    torch.save({"model": {**state, "surprise.weight": torch.zeros(1)}}, tmp_path / "a.pt")
    with pytest.raises(CheckpointMismatch, match="first 'model.surprise.weight'"):
        read_checkpoint(tmp_path / "a.pt")
    torch.save({"model": state, "surprise": {"weight": torch.zeros(1)}}, tmp_path / "b.pt")
    with pytest.raises(CheckpointMismatch, match="first 'surprise.weight'"):
        read_checkpoint(tmp_path / "b.pt")


def test_not_a_number(tiny):
    path, _ = tiny("speechbrain")
    state = torch.load(path, weights_only=True)
    state["mfa.conv.conv.weight"][0, 0, 0] = float("nan")
    torch.save(state, path)
    with pytest.raises(CheckpointMismatch, match="'mfa.conv.conv.weight' holds NaN"):
        read_checkpoint(path)


def test_nemo_is_refused_by_name(tmp_path):
    keys = (
        "preprocessor.featurizer.window",
        "encoder.layers.0.conv_layer.weight",
        "encoder.layers.1.group_tdnn_block.0.conv_layer.weight",
        "encoder.layers.1.se_layer.se_layer.0.weight",
        "encoder.feature_agg.conv_layer.weight",
        "decoder._pooling.attention_layer.0.conv_layer.weight",
        "decoder.final.weight",
    )
    torch.save({key: torch.zeros(2) for key in keys}, tmp_path / "model_weights.ckpt")
    for options in ({}, {"format": "speechbrain"}):
        with pytest.raises(CheckpointMismatch, match="is a NeMo speaker model.*group convolutions"):
            read_checkpoint(tmp_path / "model_weights.ckpt", **options)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"layer.weight": torch.zeros(2)}, "1 tensors, first 'layer.weight', expected an ECAPA-TDNN"),
        ({}, "no tensors"),
        (torch.zeros(3), "got a saved Tensor"),
        ([1, 2], "got a saved list"),
        ({"block_1.conv.weight": torch.zeros(2, 2, 5)}, "save_native"),
    ],
    ids=["foreign", "empty", "tensor", "list", "ours"],
)
def test_foreign_contents(tmp_path, data, message):
    torch.save(data, tmp_path / "x.pt")
    with pytest.raises(CheckpointMismatch, match=message):
        read_checkpoint(tmp_path / "x.pt")


# --- folders and their configurations --------------------------------------------------------------------------------

HYPERPARAMS = """
n_mels: 80
run: !apply:os.system ["touch {marker}"]
compute_features: !new:speechbrain.lobes.features.Fbank
    n_mels: !ref <n_mels>
mean_var_norm: !new:speechbrain.processing.features.InputNormalization
    norm_type: sentence
    std_norm: False
embedding_model: !new:speechbrain.lobes.models.ECAPA_TDNN.ECAPA_TDNN
    input_size: !ref <n_mels>
    channels: [16, 16, 16, 16, 24]
    kernel_sizes: [5, 3, 3, 3, 1]
    dilations: [1, 3, 4, 5, 1]
    lin_neurons: 10
"""


def test_hyperparams_are_data_not_code(tiny, tmp_path):
    path, networks = tiny("speechbrain")
    marker = tmp_path / "executed"
    (path.parent / "hyperparams.yaml").write_text(HYPERPARAMS.format(marker=marker))
    checkpoint = read_checkpoint(path.parent)
    assert checkpoint.ecapa.dilations == (3, 4, 5)  # the one thing that the weights cannot tell
    assert_same(checkpoint.state, networks["supervised"])
    assert not marker.exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[16, 16, 16, 16, 24]", "[32, 32, 32, 32, 24]", "got channels=16 by its tensors, expected 32"),
        ("[16, 16, 16, 16, 24]", "[16, 16, 16, 32, 24]", "blocks of unequal width"),
        ("kernel_sizes: [5, 3, 3, 3, 1]", "kernel_sizes: [5, 5, 3, 3, 1]", "kernel_sizes"),
        ("norm_type: sentence", "norm_type: global", "norm_type='global', expected 'sentence'"),
        ("ECAPA_TDNN.ECAPA_TDNN", "Xvector.Xvector", "Xvector, expected"),
        ("    n_mels: !ref <n_mels>", "    n_mels: 80\n    deltas: True", "deltas=True"),
        ("    std_norm: False\n", "", "std_norm=True, expected False"),
    ],
)
def test_hyperparams_that_contradict(tiny, tmp_path, old, new, message):
    path, _ = tiny("speechbrain")
    text = HYPERPARAMS.format(marker=tmp_path / "executed")
    assert old in text
    (path.parent / "hyperparams.yaml").write_text(text.replace(old, new))
    with pytest.raises(CheckpointMismatch, match=message):
        read_checkpoint(path.parent)


def test_a_configuration_that_grows_when_it_is_read(tiny):
    """Aliases of aliases: a few lines that stand for more than any memory holds."""
    path, _ = tiny("speechbrain")
    lines = ["speechbrain.: x", "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    lines += ["loop: &loop [*loop, *loop]"]
    (path.parent / "hyperparams.yaml").write_text("\n".join(lines))
    assert read_checkpoint(path.parent).format == "speechbrain"


def test_unreadable_configuration_is_said_and_not_used(tiny, caplog):
    path, _ = tiny("speechbrain")
    (path.parent / "hyperparams.yaml").write_text("speechbrain. a: [1,\n b: }")
    with caplog.at_level(logging.WARNING):
        assert read_checkpoint(path.parent).ecapa.channels == 16
    assert "not readable as YAML" in caplog.text


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("model: ECAPA_TDNN_GLOB_c16\nmodel_args: {feat_dim: 80, embed_dim: 10}\n", None),
        ("model: ResNet34\n", "expected an ECAPA_TDNN"),
        ("model: ECAPA_TDNN_c16\n", "attention_context=True by its tensors, expected False"),
        ("model: ECAPA_TDNN_GLOB_c512\n", "channels=16 by its tensors, expected 512"),
        ("dataset_args: {frontend: s3prl}\n", "other features"),
        ("dataset_args: {resample_rate: 8000}\n", "other features"),
        ("dataset_args: {cmvn_args: {norm_var: true}}\n", "norm_var"),
    ],
)
def test_wespeaker_configuration(tiny, config, message):
    path, _ = tiny("wespeaker")
    (path.parent / "config.yaml").write_text(config)
    if message is None:
        assert read_checkpoint(path.parent).ecapa.embedding_dim == 10
    else:
        with pytest.raises(CheckpointMismatch, match=message):
            read_checkpoint(path.parent)


def test_a_stranger_s_configuration_above_the_folder_is_not_read(tiny):
    path, _ = tiny("wespeaker")
    (path.parent.parent / "config.yaml").write_text("model: ResNet34\n")
    assert read_checkpoint(path).ecapa.channels == 16
    (path.parent / "models").mkdir()
    inside = path.rename(path.parent / "models" / path.name)
    (inside.parent.parent / "config.yaml").write_text("model: ResNet34\n")
    with pytest.raises(CheckpointMismatch, match="ResNet34"):
        read_checkpoint(inside)


def test_wespeaker_without_mean_normalisation(tiny):
    path, _ = tiny("wespeaker")
    (path.parent / "config.yaml").write_text("dataset_args: {cmvn: false}\n")
    assert read_checkpoint(path.parent).frontend.normalisation == "none"


def test_sslsv_configuration(tiny):
    path, _ = tiny("sslsv")
    folder = path.parent.parent
    (folder / "config.yml").write_text("encoder: {type: ecapatdnn, channels: [16, 16, 16, 16, 24], encoder_dim: 10}\n")
    assert read_checkpoint(folder).ecapa.channels == 16
    (folder / "config.yml").write_text("encoder: {type: resnet34}\n")
    with pytest.raises(CheckpointMismatch, match="resnet34"):
        read_checkpoint(folder)


def test_folders_without_a_checkpoint(tmp_path):
    (tmp_path / "readme.txt").write_text("x")
    with pytest.raises(CheckpointUnreadable, match=r"holds readme\.txt; expected .* such as embedding_model\.ckpt"):
        read_checkpoint(tmp_path)
    with pytest.raises(CheckpointUnreadable, match="no such file or folder"):
        read_checkpoint(tmp_path / "nothing")
