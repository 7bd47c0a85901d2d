"""Replays the recorded QMP conversations against the storage daemon."""
import pathlib
import subprocess
import sys

import pytest

from support.program import BINARY, TOP, Program
from support.scenarios import waits_for

TOOL = TOP / "tests/qmpdiff/qmpdiff"
# Scenarios that come with a checkout of the project's planning folder, if it is
# there: they may be more, or newer, than our own copies.
FOLDERS = [TOP / "tests/qmp-scenarios", TOP.parent / "shared/qmp-scenarios"]


def _scenarios():
    seen = {}
    for folder in FOLDERS:
        for path in sorted(folder.glob("*.json")):
            transcript = folder / "transcripts" / path.name
            if not transcript.exists():
                continue
            content = path.read_bytes() + transcript.read_bytes()
            if seen.get(path.name) == content:
                continue
            where = path.stem if path.name not in seen else f"{path.stem}-as-it-stands"
            seen[path.name] = content
            yield pytest.param(path, id=where)


@pytest.fixture(scope="session")
def commands(tmp_path_factory):
    programs = Program(tmp_path_factory.mktemp("commands"))
    try:
        _, qmp = programs.storage_daemon()
        return [row["name"] for row in qmp.execute("query-commands")]
    finally:
        programs.end_all()


@pytest.mark.parametrize("path", list(_scenarios()))
def test_replay(path, commands):
    missing = waits_for(path, commands)
    if missing:
        pytest.skip(f"waits for {', '.join(missing)}")
    result = subprocess.run(
        [sys.executable, TOOL, "check", "--events", "no-pauses", "-v", "--target",
         f"{BINARY} storage-daemon --qmp unix:{{sock}}", path],
        capture_output=True, text=True, timeout=200, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_folder_holds_scenarios():
    assert len(list(pathlib.Path(FOLDERS[0]).glob("*.json"))) > 80
