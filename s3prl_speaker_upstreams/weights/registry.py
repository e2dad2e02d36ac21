"""The public ECAPA-TDNN checkpoints, as data: where from, how large, under which licence, how good, whom to cite.

Importing this module touches neither the network nor torch. :data:`REGISTRY` has the checkpoints by entry name; those
that ship inside this package are listed only where their file is present.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from ..common.hints import nearest
from ..errors import ConfigError

__all__ = ["REGISTRY", "PublicCheckpoint", "lookup"]

SHIPPED_FOLDER = Path(__file__).parent / "files"

_VOX2 = "VoxCeleb2 dev (5,994 speakers)"
_VOX12 = "VoxCeleb1 dev + VoxCeleb2 dev"


@dataclass(frozen=True)
class PublicCheckpoint:
    """One public checkpoint and its provenance.

    name : entry name (``-u NAME``)
    title : project and model
    source : how it is had. "hub": `file` of the Hugging Face repository `repo`; "url": a plain download; "zip": an
        archive with the file in it; "manual": no direct link, the user downloads it; "shipped": inside this package
    url : where the file is, or the page to get it from ("manual")
    file : its name there
    format : as ``format=`` of ``checkpoints.read_checkpoint``
    repo, revision : of the Hugging Face Hub or ModelScope
    sha256 : of the file, where known; otherwise that of the first download is recorded and held to
    size : bytes; `size_exact` says whether published or computed
    licence : of the weights (or of the repository that publishes them, and then says so)
    training_data : what it was trained on
    eer : published equal error rate on VoxCeleb1-O, percent (None where not published there)
    citation : paper
    frontend : name in ``ecapa.DIALECTS``, where the format does not decide it alone
    self_supervised : trained without speaker labels

    >>> PublicCheckpoint("x", "X", "url", "https://example.org/x.pt", "x.pt", "wespeaker").shipped
    False
    """

    name: str
    title: str
    source: str
    url: str
    file: str
    format: str
    repo: str | None = None
    revision: str | None = None
    sha256: str | None = None
    size: int | None = None
    size_exact: bool = False
    licence: str = "not stated"
    training_data: str = _VOX2
    eer: float | None = None
    citation: str = ""
    frontend: str | None = None
    self_supervised: bool = False

    @property
    def shipped(self) -> bool:
        """Whether the weights come inside this package."""
        return self.source == "shipped"

    @property
    def size_text(self) -> str:
        """Size for people: ``83.3 MB``, with ``~`` where it is not the publisher's figure."""
        if self.size is None:
            return "?"
        return f"{'' if self.size_exact else '~'}{self.size / 1e6:.{1 if self.size < 1e8 else 0}f} MB"


_ECAPA = "Desplanques et al., ECAPA-TDNN, Interspeech 2020, arXiv 2005.07143"
_WESPEAKER = "Wang et al., Wespeaker, ICASSP 2023, arXiv 2210.17016"
_SSLSV = "Lepage and Dehak, Self-supervised learning for speaker recognition, Speech Communication 176, 2026"
_RDINO = (
    "Chen et al., Pushing the limits of self-supervised speaker verification using regularized distillation framework, "
    "ICASSP 2023, arXiv 2211.04168"
)
_SSPS = "Lepage and Dehak, SSPS, Interspeech 2025, doi 10.21437/Interspeech.2025-183"


def _hub(name: str, title: str, repo: str, file: str, format: str, revision: str = "main", **more) -> PublicCheckpoint:
    url = f"https://huggingface.co/{repo}/resolve/{revision}/{file}"
    return PublicCheckpoint(name, title, "hub", url, file, format, repo=repo, revision=revision, **more)


def _modelscope(name: str, title: str, repo: str, revision: str, file: str, format: str, **more) -> PublicCheckpoint:
    url = f"https://modelscope.cn/api/v1/models/{repo}/repo?Revision={revision}&FilePath={file}"
    more.setdefault("licence", "Apache-2.0 (of the repository 3D-Speaker)")
    return PublicCheckpoint(name, title, "url", url, file, format, repo=repo, revision=revision, **more)


def _sslsv(name: str, title: str, folder: str, eer: float, **more) -> PublicCheckpoint:
    url = f"https://drive.google.com/drive/folders/{folder}"
    more.setdefault("citation", _SSLSV)
    more.setdefault("self_supervised", True)
    return PublicCheckpoint(name, title, "manual", url, "model_avg.pt", "sslsv", licence="MIT", eer=eer, **more)


_PUBLIC = (
    _hub(
        "ecapa_tdnn",
        "SpeechBrain ECAPA-TDNN",
        "speechbrain/spkrec-ecapa-voxceleb",
        "embedding_model.ckpt",
        "speechbrain",
        revision="0f99f2d0ebe89ac095bcc5903c4dd8f72b367286",
        sha256="0575cb64845e6b9a10db9bcb74d5ac32b326b8dc90352671d345e2ee3d0126a2",
        size=83_316_686,
        size_exact=True,
        licence="Apache-2.0",
        training_data=_VOX12,
        eer=0.90,
        citation=f"Ravanelli et al., SpeechBrain, arXiv 2106.04624; {_ECAPA}",
    ),
    _hub(
        "ecapa_tdnn_wespeaker_c512",
        "WeSpeaker ECAPA512",
        "Wespeaker/wespeaker-voxceleb-ecapa-tdnn512",
        "avg_model.pt",
        "wespeaker",
        size=38_700_000,
        licence="CC-BY-4.0",
        eer=1.07,
        citation=_WESPEAKER,
    ),
    _hub(
        "ecapa_tdnn_wespeaker_c512_lm",
        "WeSpeaker ECAPA512, large-margin fine-tuned",
        # The one repository of the four whose name lacks "voxceleb".
        "Wespeaker/wespeaker-ecapa-tdnn512-LM",
        "avg_model.pt",
        "wespeaker",
        revision="a2f3dcb1c8702caccc7a55ceb57f5e8d1842112b",
        size=38_700_000,
        licence="CC-BY-4.0",
        eer=0.88,
        citation=_WESPEAKER,
    ),
    _hub(
        "ecapa_tdnn_wespeaker_c1024",
        "WeSpeaker ECAPA1024",
        "Wespeaker/wespeaker-voxceleb-ecapa-tdnn1024",
        "avg_model.pt",
        "wespeaker",
        size=72_600_000,
        licence="CC-BY-4.0",
        eer=0.86,
        citation=_WESPEAKER,
    ),
    _hub(
        "ecapa_tdnn_wespeaker_c1024_lm",
        "WeSpeaker ECAPA1024, large-margin fine-tuned",
        "Wespeaker/wespeaker-voxceleb-ecapa-tdnn1024-LM",
        "avg_model.pt",
        "wespeaker",
        size=72_600_000,
        licence="CC-BY-4.0",
        eer=0.80,
        citation=_WESPEAKER,
    ),
    _modelscope(
        "ecapa_tdnn_3dspeaker",
        "3D-Speaker ECAPA-TDNN",
        "iic/speech_ecapa-tdnn_sv_en_voxceleb_16k",
        "v1.0.1",
        "ecapa_tdnn.bin",
        "3dspeaker",
        size=83_000_000,
        eer=0.87,
        citation=f"Chen et al., 3D-Speaker-Toolkit, arXiv 2403.19971; {_ECAPA}",
    ),
    _sslsv(
        "ecapa_tdnn_sslsv",
        "sslsv supervised ECAPA-1024",
        "1ZTXgZeWv9dbnosLzMtHU4wSQXvg9M-SF",
        1.34,
        self_supervised=False,
    ),
    PublicCheckpoint(
        "ecapa_tdnn_taoruijie",
        "TaoRuijie ECAPA-TDNN",
        "url",
        "https://raw.githubusercontent.com/TaoRuijie/ECAPA-TDNN/4904fda6c5da208998321e3ea75e24320bab8aad/"
        "exps/pretrain.model",
        "pretrain.model",
        "taoruijie",
        revision="4904fda6c5da208998321e3ea75e24320bab8aad",
        size=67_000_000,
        licence="MIT",
        eer=0.96,
        citation=f"repository TaoRuijie/ECAPA-TDNN; {_ECAPA}",
    ),
    _modelscope(
        "ecapa_dino",
        "RDINO ECAPA-TDNN (3D-Speaker)",
        "damo/speech_rdino_ecapa_tdnn_sv_en_voxceleb_16k",
        "v1.0.2",
        "pretrained_rdino.pth",
        "rdino",
        frontend="rdino",
        size=640_000_000,
        eer=3.16,
        citation=_RDINO,
        self_supervised=True,
    ),
    PublicCheckpoint(
        "ecapa_dino_wespeaker",
        "WeSpeaker DINO ECAPA512",
        "zip",
        "https://wenet.org.cn/downloads?models=wespeaker&version=voxceleb_ecapa512_dino.zip",
        "avg_model.pt",
        "wespeaker",
        size=113_000_000,
        licence="CC-BY-4.0",
        eer=3.02,
        citation="Chen et al., A comprehensive study on self-supervised distillation for speaker representation "
        f"learning, arXiv 2210.15936; {_WESPEAKER}",
        self_supervised=True,
    ),
    _sslsv(
        "ecapa_dino_sslsv",
        "sslsv DINO ECAPA-1024",
        "1_4jkqiumnFjHfMcYrm8ckpRo85c4Gdqd",
        2.82,
        size=363_000_000,
    ),
    _sslsv(
        "ecapa_dino_sslsv_ssps",
        "sslsv DINO + SSPS ECAPA-1024",
        "1wgtHkaha6O0lIT0hN3Hcf8bGIk9wHBA1",
        2.53,
        size=363_000_000,
        citation=_SSPS,
    ),
    _sslsv("ecapa_simclr_sslsv", "sslsv SimCLR ECAPA-1024", "1ziVtNDFspiC1Qbj8kbqb5s9e1LW98Vmt", 6.41),
    _sslsv(
        "ecapa_simclr_sslsv_ssps",
        "sslsv SimCLR + SSPS ECAPA-1024",
        "1Uv09fswUNDCbhrxR8_e8kOLVa60KB2rW",
        2.57,
        citation=_SSPS,
    ),
    _sslsv("ecapa_moco_sslsv", "sslsv MoCo ECAPA-1024", "1obndtNWHm8I4-9rhxugS7OFlUbFhCNGh", 6.48),
    _sslsv("ecapa_swav_sslsv", "sslsv SwAV ECAPA-1024", "1_oDDza2fau84tZA060Wy8xZfy_guAy6w", 8.12),
    _sslsv("ecapa_vicreg_sslsv", "sslsv VICReg ECAPA-1024", "1Ir37Nh6O38biOvHeW6pzgcMB8oOaAdEg", 7.42),
    _modelscope(
        "ecapa_dino_3dspeaker",
        "RDINO ECAPA-TDNN, Mandarin (3D-Speaker)",
        "damo/speech_rdino_ecapa_tdnn_sv_zh-cn_3dspeaker_16k",
        "v1.0.1",
        "rdino.pth",
        "rdino",
        frontend="rdino",
        training_data="3D-Speaker (10,000 Mandarin speakers)",
        citation=_RDINO,
        self_supervised=True,
    ),
    _modelscope(
        "ecapa_sdpn",
        "SDPN ECAPA-TDNN (3D-Speaker)",
        "iic/speech_sdpn_ecapa_tdnn_sv_en_voxceleb_16k",
        "v1.0.0",
        "sdpn.pth",
        "sdpn",
        frontend="rdino",
        size=343_000_000,
        eer=1.80,
        citation="Chen et al., Self-Distillation Prototypes Network, arXiv 2308.02774",
        self_supervised=True,
    ),
)


def _told_by(path: Path) -> dict:
    """What a native checkpoint states in its header (read without torch or safetensors); {} if it states nothing.

    The format: 8 bytes of little-endian size, then so much JSON, whose ``__metadata__`` is ours to fill.
    """
    try:
        with open(path, "rb") as file:
            header = json.loads(file.read(min(int.from_bytes(file.read(8), "little"), 10_000_000)))
        told = json.loads(header["__metadata__"]["config"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return told if isinstance(told, dict) and isinstance(told.get("provenance"), dict) else {}


def _shipped_entry(path: Path) -> PublicCheckpoint:
    told = _told_by(path)
    provenance = told.get("provenance", {})
    self_supervised = told.get("role") in ("teacher", "student")
    title = f"{'self-supervised ' if self_supervised else ''}ECAPA-TDNN that comes with this package"
    data = provenance.get("training_data", "see the file's provenance")
    if isinstance(data, Mapping):  # as this package's own training writes it
        data = f"{', '.join(map(str, data.get('sources', ())))} ({data.get('hours', 0):.2g} h)"
    return PublicCheckpoint(
        path.stem,
        str(provenance.get("title", title)),
        "shipped",
        "",
        path.name,
        "native",
        size=path.stat().st_size,
        size_exact=True,
        licence=str(provenance.get("licence", "Apache-2.0")),
        training_data=str(data),
        citation=str(provenance.get("citation", _ECAPA)),
        self_supervised=self_supervised,
    )


def _shipped() -> tuple[PublicCheckpoint, ...]:
    """Weights inside this package: the files that are there, each under its own name."""
    return tuple(_shipped_entry(path) for path in sorted(SHIPPED_FOLDER.glob("*.safetensors")))


REGISTRY: Mapping[str, PublicCheckpoint] = MappingProxyType({entry.name: entry for entry in (*_PUBLIC, *_shipped())})


def lookup(name: str) -> PublicCheckpoint:
    """Registry entry of a name; an unknown one gets the nearest names and the list of all.

    Raises ConfigError if the name is unknown.

    >>> lookup("ecapa_tdnn").revision[:7]
    '0f99f2d'
    """
    if name in REGISTRY:
        return REGISTRY[name]
    near = nearest(name, REGISTRY, n=2)
    raise ConfigError(
        f"unknown checkpoint {name!r}"
        + (f"; did you mean {' or '.join(map(repr, near))}?" if near else "")
        + f" Expected a URL, or one of {', '.join(sorted(REGISTRY))}"
    )
