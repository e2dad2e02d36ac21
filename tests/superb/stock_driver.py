"""Calls the stock ``s3prl.run_downstream.main()`` again and again in one process, for importing s3prl takes seconds.

Usage: python stock_driver.py PLAN.json REPORT.json. The plan is a list of {"id": str, "argv": [str]}; the report maps
each id to {"ok": bool, "output": str}. Output is what the command printed, with the traceback if it failed.
"""

from __future__ import annotations

import builtins
import contextlib
import gc
import io
import json
import sys
import traceback
from pathlib import Path


def main(plan: str, report: str) -> None:
    from s3prl import run_downstream

    plain_isinstance = builtins.isinstance
    results = {}
    for item in json.loads(Path(plan).read_text()):
        printed = io.StringIO()
        sys.argv = ["run_downstream.py", *item["argv"]]
        ok = True
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
            try:
                run_downstream.main()
            except (Exception, SystemExit):
                ok = False
                traceback.print_exc(file=printed)
        builtins.isinstance = plain_isinstance  # main() wraps it; wrapped again and again, it would double in cost
        gc.collect()
        results[item["id"]] = {"ok": ok, "output": printed.getvalue()}
        Path(report).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
