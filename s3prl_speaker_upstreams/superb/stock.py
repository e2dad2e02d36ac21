"""s3prl's own runner as a process: started, watched, its output kept, its failures told apart."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from s3prl_speaker_upstreams.superb.errors import NoSpaceLeft, RunFailed
from s3prl_speaker_upstreams.superb.run import Run

__all__ = ["no_finite_number", "run_stock"]

logger = logging.getLogger(__name__)

_TAIL = 25  # lines of the stock runner's output that an error shows

# what Python, and torch.save (whose C++ writer gives no reason), say when a file system takes no more
_FULL = re.compile(
    r"No space left on device|Errno 28\b|Disk quota exceeded|Errno 122\b|PytorchStreamWriter failed writing|"
    r"basic_ios::clear: iostream error|enforce fail at inline_container\.cc:\d+\] \. unexpected pos"
)
# what libraries say of values that are no numbers (scikit-learn, PESQ, torch, s3prl's own assertions)
_NOT_FINITE = re.compile(r"\b(?:[Nn]a[Nn]s?|NAN|nan|inf|infinity|Infinity|non-?finite|not finite)\b")

_OF_VALUES = ("ValueError", "RuntimeError", "AssertionError", "FloatingPointError", "ZeroDivisionError")


def no_finite_number(error: BaseException) -> bool:
    """Whether the runner failed over values that are no numbers, as a diverged training does."""
    last = str(error).rstrip().rsplit("\n", 1)[-1]  # the exception's own line, not the traceback's code
    kind, _, message = last.partition(":")
    of_values = kind.rsplit(".", 1)[-1] in _OF_VALUES  # not OSError and its like, whose paths may hold anything
    return isinstance(error, RunFailed) and of_values and bool(_NOT_FINITE.search(message))


def _die_with_parent() -> None:
    """In the child: end when the parent is killed, so that no orphan goes on writing checkpoints (Linux only)."""
    ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM)


def _environment(run: Run) -> dict[str, str]:
    environment = dict(os.environ)
    if run.s3prl_root is not None:
        parts = [str(run.s3prl_root.absolute()), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(part for part in parts if part)
    environment["PYTHONUNBUFFERED"] = "1"
    return environment


def run_stock(
    run: Run, arguments: Sequence[str], log: Path, *, module: str = "s3prl.run_downstream", nproc: int = 1
) -> str:
    """Run one stock command and return what it printed; its output also goes to `log`, command first.

    Raises NoSpaceLeft if the disk is full, RunFailed with the last lines for any other failure.
    """
    launcher = [sys.executable, "-m"]
    if nproc > 1:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}", "-m"]
        module = "s3prl_speaker_upstreams.superb.distributed"
    command = [*launcher, module, *arguments]
    log.parent.mkdir(parents=True, exist_ok=True)
    logger.info("$ %s\n  (output: %s)", " ".join(command), log)
    printed = bytearray()
    with open(log, "ab") as file:
        file.write(f"$ {' '.join(command)}\n".encode())
        file.flush()
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=_environment(run),
            preexec_fn=_die_with_parent if platform.system() == "Linux" else None,
        )
        assert process.stdout is not None
        try:
            while chunk := os.read(process.stdout.fileno(), 65536):
                printed += chunk
                with contextlib.suppress(OSError):  # a full disk: the run's own error is the one to show
                    file.write(chunk)
                    file.flush()
                if run.verbose:
                    sys.stderr.buffer.write(chunk)
                    sys.stderr.flush()
            code = process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
        finally:
            process.stdout.close()
    text = printed.decode(errors="replace")
    if code != 0:
        raise _failure(run, command, code, text, log)
    return text


def _failure(run: Run, command: Sequence[str], code: int, text: str, log: Path) -> Exception:
    lines = [line for line in re.split(r"[\r\n]+", text) if line.strip()]
    tail = "\n".join(lines[-_TAIL:])
    if _FULL.search(text):
        return NoSpaceLeft(
            f"s3prl could not save: the disk of {run.folder} is full, or a quota is reached. Checkpoints saved before "
            "are kept; make room and start the stage again, it goes on from the last whole one. Last lines of "
            f"{log}:\n{tail}"
        )
    return RunFailed(
        f"{' '.join(command)} ended with code {code}. Finished work is kept; after the cause is removed, start the "
        f"stage again. Last lines of {log}:\n{tail}"
    )
