"""Configurations: round trips, refusals, and what the dialects say."""

from __future__ import annotations

import json

import pytest

from s3prl_speaker_upstreams.ecapa import DIALECTS, EcapaConfig, FrontendConfig
from s3prl_speaker_upstreams.errors import ConfigError

pytestmark = pytest.mark.compat


@pytest.mark.parametrize("name", DIALECTS)
def test_dialects_survive_json(name):
    dialect = DIALECTS[name]
    cfg = dialect.ecapa_config()
    assert EcapaConfig.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg
    assert FrontendConfig.from_dict(json.loads(json.dumps(dialect.frontend.to_dict()))) == dialect.frontend


@pytest.mark.parametrize("cls", [EcapaConfig, FrontendConfig])
def test_unknown_keys_are_refused_with_the_nearest_known_one(cls):
    with pytest.raises(ConfigError, match=r"unknown key 'n_mel'.*'n_mels'"):
        cls.from_dict({"n_mel": 40})


@pytest.mark.parametrize(
    ("cls", "wrong"),
    [
        (EcapaConfig, {"padding": "same"}),
        (EcapaConfig, {"channels": 100}),
        (EcapaConfig, {"kernel_size": 4}),
        (EcapaConfig, {"stride": 0}),
        (EcapaConfig, {"channels": 64.0}),
        (EcapaConfig, {"dilations": [2, 3]}),
        (EcapaConfig, {"mfa_norm": "yes"}),
        (FrontendConfig, {"window": "blackman"}),
        (FrontendConfig, {"n_fft": 256}),
        (FrontendConfig, {"fmin": 9000.0}),
    ],
)
def test_values_out_of_range_are_refused(cls, wrong):
    with pytest.raises(ConfigError, match=rf"{cls.__name__}: got {next(iter(wrong))}=.*expected"):
        cls.from_dict(wrong)
