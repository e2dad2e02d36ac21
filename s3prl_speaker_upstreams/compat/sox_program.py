"""The sox program: floating-point samples of what it reads, with the numbers of torchaudio 2.5's libsox."""

from __future__ import annotations

import logging
import shutil
import struct
import subprocess
from collections.abc import Sequence

import numpy as np

from s3prl_speaker_upstreams.compat._errors import AudioUnreadable

__all__ = ["call", "find", "result"]

logger = logging.getLogger(__name__)


def find() -> str | None:
    """Path of the program, if there is one."""
    return shutil.which("sox")


def call(
    program: str, source: Sequence[str], effects: Sequence[Sequence[str]] = (), data: bytes | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Run the program on ``source`` (arguments for one input) or ``data`` on its standard input, without dither."""
    chain = [str(item) for effect in effects for item in effect]
    command = [program, "-D", *source, "-t", "wav", "-e", "floating-point", "-b", "32", "-", *chain]
    return subprocess.run(command, input=data, stdin=subprocess.DEVNULL if data is None else None, capture_output=True)


def result(done: subprocess.CompletedProcess[bytes], what: str) -> tuple[np.ndarray, int]:
    """Samples (time, channels) of the floating-point WAV that sox wrote to a pipe, and their rate."""
    lines = done.stderr.decode(errors="replace").splitlines()
    message = "; ".join(line for line in lines if "can't seek to fix it" not in line)  # that one is about the pipe
    if done.returncode != 0 or "FAIL" in message:  # damaged flac ends with status 0 and half of the audio
        raise AudioUnreadable(f"{what}: sox cannot process it ({message}); fetch or convert the file again")
    if message:
        logger.log(logging.WARNING if "EOF" in message else logging.DEBUG, "%s: %s", what, message)
    out, position, channels, rate = done.stdout, 12, 0, 0
    while position + 8 <= len(out):
        kind, size = out[position : position + 4], struct.unpack_from("<I", out, position + 4)[0]
        position += 8
        if kind == b"fmt ":
            channels, rate = struct.unpack_from("<HI", out, position + 2)
        if kind == b"data":  # sox cannot go back to write the true size into a pipe: the data end where the pipe ends
            usable = (len(out) - position) // (4 * channels) * 4 * channels
            samples = np.frombuffer(out[position : position + usable], dtype="<f4")
            return samples.reshape(-1, channels).copy(), rate
        position += size + size % 2
    raise AudioUnreadable(f"{what}: sox wrote no audio ({message or 'no message'})")
