"""Pre-training configuration: typed, strict, and the presets' published numbers."""

import math

import pytest

from s3prl_speaker_upstreams.common.config import parse_override
from s3prl_speaker_upstreams.errors import ConfigError
from s3prl_speaker_upstreams.pretrain import config as C
from s3prl_speaker_upstreams.pretrain.objective import model_configs
from s3prl_speaker_upstreams.pretrain.presets import PRESETS
from s3prl_speaker_upstreams.pretrain.schedules import duration_steps, learning_rate


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_preset_is_valid_and_survives_a_round_trip(preset, tmp_path):
    import yaml

    config = C.load(preset)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.to_dict()))
    assert C.load(file=path) == config
    ecapa, frontend = model_configs(config.model)
    assert ecapa.channels % ecapa.res2_scale == 0 and frontend.n_mels == ecapa.n_mels


def test_presets_do_not_share_state():
    a = C.load("small_dino", overrides=["model.ecapa.channels=64"])
    assert a.model.ecapa["channels"] == 64
    assert C.load("small_dino").model.ecapa["channels"] == 128


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("dino.prototype=5", "did you mean 'dino.prototypes'"),
        ("optim.learning_rate=5", "unknown key 'optim.learning_rate'"),
        ("dino.prototypes=many", "expected a whole number"),
        ("dino.prototypes=2.5", "expected a whole number"),
        ("run.batch=true", "expected a whole number"),
        ("optim.lr=fast", "expected a number"),
        ("run.tensorboard=1", "expected true or false"),
        ("dino.targets=sinkhorm", "did you mean 'sinkhorn'"),
        ("dino.teacher_temp=0", "temperatures must be above 0"),
        ("dino.momentum=1.5", "momentum"),
        ("run.batch=0", "at least 1"),
        ("run.save_every=soon", "run.save_every: duration 'soon'"),
        ("data.augment.snr_db=[1, 2, 3]", "expected 2 values"),
        ("optim=3", "expected a mapping"),
        ("lr", "expected key=value"),
    ],
)
def test_wrong_keys_and_values_are_refused_by_name(override, message):
    with pytest.raises(ConfigError) as caught:
        C.load("smoke", overrides=[override])
    assert message in str(caught.value)


def test_unknown_model_fields_are_refused():
    with pytest.raises(ConfigError, match="channels"):
        model_configs(C.load("smoke", overrides=["model.ecapa.chanels=3"]).model)
    with pytest.raises(ConfigError, match="wespeaker"):
        model_configs(C.load("smoke", overrides=["model.dialect=wespeeker"]).model)


def test_unknown_preset_lists_the_valid_ones():
    with pytest.raises(ConfigError, match="voxceleb2_dino"):
        C.load("voxceleb")


def test_order_of_preset_file_and_overrides(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("optim: {lr: 1e-2}\nrun: {batch: 3, seed: 5}\n")
    config = C.load("smoke", file=path, overrides=["run.batch=4", "data.train=[a, b]"])
    assert (config.optim.lr, config.run.batch, config.run.seed, config.data.train) == (0.01, 4, 5, ["a", "b"])
    assert config.dino.prototypes == 64  # of the preset, untouched


def test_a_missing_or_broken_file_is_explained(tmp_path):
    with pytest.raises(ConfigError, match="expected a YAML file"):
        C.load(file=tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="expected a mapping"):
        C.load(file=tmp_path / "list.yaml")


def test_override_values_are_yaml_and_never_code():
    assert parse_override("a.b=[1, x]") == (["a", "b"], [1, "x"])
    assert parse_override("a=null")[1] is None
    with pytest.raises(ConfigError):
        parse_override("a=!!python/object/apply:os.system ['true']")


@pytest.mark.parametrize(
    ("text", "steps"), [("2 epochs", 20), (2, 20), ("0.5", 5), ("7 steps", 7), ("25%", 50), ("1 epoch", 10)]
)
def test_durations(text, steps):
    assert duration_steps(text, steps_per_epoch=10, total_steps=200) == steps


def test_learning_rate_of_the_published_dino_recipe():
    # WeSpeaker: lr 0.2 * 128 / 256 after 20 of 150 epochs, then a cosine to 5e-5 * 128 / 256
    config = C.load("voxceleb2_dino")
    args = {"total": 150 * 100, "warmup": 20 * 100, "scale": 128 / 256}
    assert learning_rate(0, config, **args) == 0.0
    assert learning_rate(1000, config, **args) == pytest.approx(0.05)
    assert learning_rate(2000, config, **args) == pytest.approx(0.1)
    assert learning_rate(2000 + 6500, config, **args) == pytest.approx((0.1 + 2.5e-5) / 2)
    assert learning_rate(15000, config, **args) == pytest.approx(2.5e-5)


def test_learning_rate_of_the_published_supervised_recipe():
    # WeSpeaker's ExponentialDecrease: initial * (final / initial) ** (iteration / all), times warm-up, times batch / 64
    config = C.load("voxceleb2_supervised")
    args = {"total": 15000, "warmup": 600, "scale": 2.0}
    expected = 2 * 0.1 * math.exp(7500 / 15000 * math.log(5e-5 / 0.1))
    assert learning_rate(7500, config, **args) == pytest.approx(expected)
    assert learning_rate(300, config, **args) == pytest.approx(2 * 0.1 * (5e-4) ** (300 / 15000) / 2)


def test_published_settings_are_those_of_the_sources():
    dino, supervised = C.load("voxceleb2_dino"), C.load("voxceleb2_supervised")
    d, data = dino.dino, dino.data
    assert (d.prototypes, d.head_layers, d.head_hidden, d.bottleneck) == (65536, 3, 2048, 256)
    assert (data.global_crops, data.global_seconds, data.local_crops, data.local_seconds) == (2, 3.0, 4, 2.0)
    assert (d.warmup_teacher_temp, d.teacher_temp, d.student_temp, d.momentum, d.momentum_end) == (
        0.04,
        0.07,
        0.1,
        0.996,
        1,
    )
    assert (dino.optim.name, dino.optim.clip, dino.optim.clip_mode) == ("sgd", 3.0, "per_parameter")
    assert (supervised.aam.scale, supervised.aam.margin, tuple(supervised.data.speeds)) == (32.0, 0.2, (1.0, 0.9, 1.1))
