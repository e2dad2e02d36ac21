"""ECAPA-TDNN (arXiv 2005.07143) on real frames only: every utterance gets what it would get alone, in any batch.

The originals pad a batch to its longest utterance and their convolutions read that padding: SpeechBrain's ``block_4``
of a short utterance is off by 75 % beside a long one. Here a batch is a :class:`~.ragged.Ragged` matrix of real
frames; before every convolution the frames beyond an utterance's own ends hold what a run alone would see there (its
reflection, or zeros), and means, softmax and batch statistics run over real frames only.

Two ways through the same weights: this module's differentiable one (training, fine-tuning), and :mod:`.inference`,
which the model takes by itself when no gradients are recorded.

Short input: any utterance of at least one frame works. A reflection longer than the utterance is folded back
repeatedly (as ``np.pad`` does); the variance of a single frame is zero before its floor, also where the original
divides by n - 1.

Fine-tuning: in train mode BatchNorm takes its statistics over the real frames of the batch, provided that gradients
are recorded and the norm's own parameters require them (:class:`~.layers.BatchNorm`). Where a batch holds a single
value per channel (one frame in all; for ``pool_norm`` and ``embedding_norm`` one utterance) no variance exists: the
running statistics are used, and not updated.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError
from .config import EcapaConfig, FrontendConfig
from .frontend import Frontend
from .inference import Plan
from .layers import BatchNorm, Block, ConvNorm, Pooling
from .ragged import Ragged, patches

__all__ = ["OUTPUTS", "Ecapa", "SpeakerEncoder"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16}
OUTPUTS = ("hidden_states", "mfa", "pooled", "embedding")


class Ecapa(nn.Module):
    """The network from features to embedding.

    >>> model = Ecapa(EcapaConfig(channels=32, mfa_channels=96)).eval()
    >>> out = model(Ragged(torch.randn(50, 80), [40, 10]), outputs=("hidden_states", "embedding"))
    >>> len(out["hidden_states"]), out["hidden_states"][3].data.shape, out["embedding"].shape
    (4, torch.Size([50, 32]), torch.Size([2, 192]))
    """

    def __init__(self, cfg: EcapaConfig, dtype: str = "float32") -> None:
        super().__init__()
        if dtype not in DTYPES:
            raise ConfigError(f"Ecapa: got dtype={dtype!r}, expected one of {list(DTYPES)}")
        self.cfg, self.dtype = cfg, dtype
        self._plan: tuple[tuple, Plan] | None = None
        self.block_1 = ConvNorm(cfg.n_mels, cfg.channels, cfg.kernel_size)
        self.block_2, self.block_3, self.block_4 = (Block(cfg, d) for d in cfg.dilations)
        self.mfa = ConvNorm(3 * cfg.channels, cfg.mfa_channels, norm=cfg.mfa_norm)
        self.pool = Pooling(cfg)
        self.pool_norm = BatchNorm(2 * cfg.mfa_channels)
        self.embedding = nn.Linear(2 * cfg.mfa_channels, cfg.embedding_dim)
        if cfg.embedding_norm:
            self.embedding_norm = BatchNorm(cfg.embedding_dim)

    def forward(
        self, features: Ragged, outputs: Sequence[str] = ("hidden_states",)
    ) -> dict[str, Tensor | Ragged | tuple[Ragged, ...]]:
        """The asked ``outputs``, computing no further than needed.

        features : Ragged of (frames, n_mels)
        "hidden_states" : tuple of Ragged (frames, channels), block_1 .. block_4; "mfa" : Ragged (frames, mfa_channels);
        "pooled" : (utterances, 2 mfa_channels); "embedding" : (utterances, embedding_dim)

        Raises ConfigError on an unknown output.
        """
        unknown = [name for name in outputs if name not in OUTPUTS]
        if unknown or not outputs:
            raise ConfigError(f"Ecapa: got outputs={list(outputs)}, expected some of {list(OUTPUTS)}")
        deep = [name for name in outputs if name != "hidden_states"]
        # A model that was converted to another precision works in that precision.
        features = Ragged(features.data.to(self.block_1.conv.weight.dtype), features.lengths)
        mfa = None
        if self._differentiable(features.data):
            states = self._blocks(features)
        else:
            states, mfa = self._folded()(features, mfa=bool(deep))
        found = self._head(states, deep, mfa) if deep else {}
        return {name: states if name == "hidden_states" else found[name] for name in outputs}

    def head(self, hidden_states: Sequence[Ragged], outputs: Sequence[str]) -> dict[str, Tensor | Ragged]:
        """Some of "mfa", "pooled", "embedding" from the hidden states of :meth:`forward`.

        Raises ConfigError on an unknown output.
        """
        unknown = [name for name in outputs if name not in OUTPUTS[1:]]
        if unknown or not outputs:
            raise ConfigError(f"Ecapa.head: got outputs={list(outputs)}, expected some of {list(OUTPUTS[1:])}")
        # States of a forward pass under autocast are of its precision; here it need not be on any more.
        dtype = self.mfa.conv.weight.dtype
        states = [Ragged(h.data.to(dtype), h.lengths) for h in hidden_states]
        return self._head(states, outputs, None)

    def _head(self, states: Sequence[Ragged], outputs: Sequence[str], mfa: Ragged | None) -> dict[str, Tensor | Ragged]:
        if mfa is None and self._differentiable(states[0].data):
            mfa = Ragged(self.mfa(torch.cat([h.data for h in states[1:]], 1)), states[0].lengths)
        elif mfa is None:
            mfa = self._folded().mfa(states)
        found: dict = {"mfa": mfa}
        if "pooled" in outputs or "embedding" in outputs:
            found["pooled"] = self.pool(mfa)
        if "embedding" in outputs:
            x = self.embedding(self.pool_norm(found["pooled"]).to(self.embedding.weight.dtype))
            found["embedding"] = self.embedding_norm(x) if self.cfg.embedding_norm else x
        return {name: found[name] for name in outputs}

    def _differentiable(self, x: Tensor) -> bool:
        """Whether to take the path that records gradients.

        It is also the one that torch.compile can see through, and that a model converted to another precision takes.
        """
        if torch.compiler.is_compiling() or self.block_1.conv.weight.dtype != torch.float32:
            return True
        if self.training and any(_uses_batch(module) for module in self.modules()):
            return True
        return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters()))

    def train(self, mode: bool = True) -> Ecapa:
        """As ``nn.Module.train``; also forgets the folded weights."""
        self._plan = None
        return super().train(mode)

    def _folded(self) -> Plan:
        """The folded weights, made anew when a parameter or buffer has changed since."""
        tensors = [*self.parameters(), *self.buffers()]
        # Changes through ``.data`` leave the version alone; three values catch those that touch every parameter.
        probes = (self.block_1.conv.bias, self.block_4.tdnn2.conv.bias, self.mfa.conv.bias)
        state = (
            self.dtype,
            torch.stack([p.detach()[0] for p in probes]).tolist(),
            *((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors),
        )
        if self._plan is None or self._plan[0] != state:
            blocks = (self.block_2, self.block_3, self.block_4)
            self._plan = state, Plan(self.cfg, self.block_1, blocks, self.mfa, DTYPES[self.dtype])
        return self._plan[1]

    def __getstate__(self) -> dict:
        # Weights in the layout of the processor at hand can be neither copied nor pickled.
        return {**self.__dict__, "_plan": None}

    def _blocks(self, features: Ragged) -> tuple[Ragged, ...]:
        cfg = self.cfg
        x, lengths = patches(features, cfg.kernel_size, cfg.stride, cfg.padding)
        conv = self.block_1.conv
        x = F.linear(x, conv.weight.transpose(1, 2).flatten(1), conv.bias)
        states = [Ragged(self.block_1.finish(x), lengths)]
        total = states[0].data
        for block in (self.block_2, self.block_3, self.block_4):
            states.append(block(Ragged(total, lengths) if cfg.block_wiring == "cumulative" else states[-1]))
            if cfg.block_wiring == "cumulative":
                total = total + states[-1].data
        return tuple(states)


def _uses_batch(module: nn.Module) -> bool:
    """Whether ``module`` is a norm, of ours or put in the place of one of ours, that takes statistics of the batch."""
    if isinstance(module, BatchNorm):
        return module.uses_batch()
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training


class SpeakerEncoder(nn.Module):
    """Front-end and network: waveforms in, hidden states out.

    >>> encoder = SpeakerEncoder(EcapaConfig(channels=32, mfa_channels=96), FrontendConfig()).eval()
    >>> out = encoder([torch.randn(16000), torch.randn(800)])
    >>> [h.lengths for h in out["hidden_states"]], encoder.downsample_rate, encoder.hidden_size
    ([[101, 6], [101, 6], [101, 6], [101, 6]], 160, 32)
    """

    def __init__(
        self, ecapa: EcapaConfig, frontend: FrontendConfig, dtype: str = "float32", **frontend_buffers: Tensor
    ) -> None:
        super().__init__()
        if ecapa.n_mels != frontend.width:
            raise ConfigError(
                f"got {frontend.width} features per frame and a network for n_mels={ecapa.n_mels}; they must be equal"
            )
        self.frontend = Frontend(frontend, **frontend_buffers)
        self.ecapa = Ecapa(ecapa, dtype)

    @property
    def downsample_rate(self) -> int:
        """Samples per hidden-state frame."""
        return self.frontend.cfg.hop_length * self.ecapa.cfg.stride

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""
        return self.ecapa.cfg.channels

    def forward(
        self, wavs: Sequence[Tensor], outputs: Sequence[str] = ("hidden_states",)
    ) -> dict[str, Tensor | Ragged | tuple[Ragged, ...]]:
        """As :meth:`Ecapa.forward`, from a list of (samples,) waveforms; "fbank" adds the features : Ragged."""
        features = self.frontend(wavs)
        rest = [name for name in outputs if name != "fbank"]
        found = self.ecapa(features, rest) if rest else {}
        return {**found, "fbank": features} if "fbank" in outputs else found
