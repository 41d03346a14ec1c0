"""The tests of tests/device_cases.py, in a process of their own.

A PyTorch that has met a device in Python cannot run backward in a forked process any more, as other
tests do.
"""

import subprocess
import sys

from tests.helpers import ROOT


def test_scripts_on_an_imitated_device() -> None:
    words = "-m pytest -q -p no:cacheprovider tests/device_cases.py".split()
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
