"""Runs stock programs one after another, each in a fresh child of a process that has imported s3prl: seconds saved.

Reads lines of JSON {"module", "argv"} and answers with lines of JSON {"code", "output"}.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import tempfile
import traceback


def _run(module: str, argv: list[str], out: int) -> int:
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.argv = [module, *argv]
    code = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as done:
        code = int(done.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    import s3prl.downstream.runner  # noqa: F401 - what every child would import anyway

    for line in sys.stdin:
        asked = json.loads(line)
        with tempfile.TemporaryFile() as out:
            code = _run(asked["module"], asked["argv"], out.fileno())
            out.seek(0)
            answer = {"code": code, "output": out.read().decode(errors="replace")}
        sys.__stdout__.write(json.dumps(answer) + "\n")
        sys.__stdout__.flush()


if __name__ == "__main__":
    main()
