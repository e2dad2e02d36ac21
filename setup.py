"""Build stub: everything declarative is in setup.cfg; this adds the start-up file to the wheel.

s3prl has no plugin hook, so the package installs ``s3prl_speaker_upstreams.pth`` next to itself; Python's ``site``
runs its one line in every process (see ``s3prl_speaker_upstreams/_startup.py``). Setuptools has no option for files
at the top of site-packages, neither in wheels nor in editable installs, so both wheel-building commands get the file
appended here, entered in RECORD, which is what makes it disappear on ``pip uninstall``.
"""

import base64
import hashlib
import os
import zipfile
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.editable_wheel import editable_wheel

PTH = "s3prl_speaker_upstreams.pth"


def add_to_wheel(wheel: Path, name: str, content: bytes) -> None:
    """Rewrite ``wheel`` with one more file ``name`` at its top, listed in its RECORD."""
    beside = wheel.with_suffix(".tmp")
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(beside, "w", zipfile.ZIP_DEFLATED) as new:
        for item in old.infolist():
            data = old.read(item)
            if item.filename.endswith(".dist-info/RECORD"):
                data += f"{name},sha256={digest},{len(content)}\n".encode()
            new.writestr(item, data)
        new.writestr(name, content)
    os.replace(beside, wheel)


class WithStartUpFile:
    """Mixed into a command that leaves one wheel in ``self.dist_dir``."""

    def run(self):
        before = set(Path(self.dist_dir).glob("*.whl")) if self.dist_dir else set()
        super().run()
        content = (Path(__file__).parent / "s3prl_speaker_upstreams" / PTH).read_bytes()
        wheels = set(Path(self.dist_dir).glob("*.whl"))
        for wheel in wheels - before or wheels:
            with zipfile.ZipFile(wheel) as archive:
                done = PTH in archive.namelist()
            if not done:
                add_to_wheel(wheel, PTH, content)


class BdistWheel(WithStartUpFile, bdist_wheel):
    pass


class EditableWheel(WithStartUpFile, editable_wheel):
    pass


setup(cmdclass={"bdist_wheel": BdistWheel, "editable_wheel": EditableWheel})
