"""Fixtures of the tests that boot stock Linux guests."""
import os
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))


@pytest.fixture(scope="session")
def guest_cache():
    """The folder with Debian's kernel and a static busybox."""
    cache = os.environ.get("NESTED_KVM_CACHE")
    if not cache:
        pytest.fail("NESTED_KVM_CACHE is not set: run tests/run nested")
    return pathlib.Path(cache)
