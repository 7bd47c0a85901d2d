"""Fixtures of the whole-program tests: the real binary, real sockets."""
import os
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from support.program import Program  # noqa: E402


@pytest.fixture
def program(tmp_path):
    """Starts diptych processes and ends those a test leaves behind."""
    programs = Program(tmp_path)
    yield programs
    programs.end_all()


@pytest.fixture(scope="session")
def kvm():
    """Skips, by name, what needs /dev/kvm where there is none."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("no usable /dev/kvm")
