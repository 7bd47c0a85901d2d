"""`diptych demo`: boots, mirrors, pivots, proves; and leaves nothing behind."""
import json
import os
import signal
import subprocess
import time

import pytest

from support.program import BINARY, PATIENCE, run

pytestmark = pytest.mark.usefixtures("kvm")


@pytest.fixture
def temporary(tmp_path):
    """The directory that the demo takes for temporary files."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    return folder


def demo(temporary, *arguments):
    return run("demo", *arguments, env={**os.environ, "TMPDIR": str(temporary)})


@pytest.mark.parametrize("copy_mode", ["background", "write-blocking"])
def test_source_target_and_the_guests_record_agree(temporary, copy_mode):
    done = demo(temporary, "--json", "--size", "64M", "--copy-mode", copy_mode)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["identical"] is True
    assert result["size-bytes"] == 64 << 20
    assert result["failed-requests"] == result["wrong-blocks"] == 0
    names = [phase["name"] for phase in result["phases"]]
    assert names == ["before", "copying", "ready", "pivot", "after"]
    # The guest wrote all the time, and after the pivot to the target alone.
    for phase in result["phases"]:
        if phase["name"] != "pivot":
            assert phase["writes"] > 0, phase
    verdict = result["verdict"]
    assert verdict["rewritten-after-pivot"] > 0
    assert verdict["equal"] + verdict["rewritten-after-pivot"] == verdict["blocks"]
    assert list(temporary.iterdir()) == []


def test_the_table_ends_with_the_answer(temporary):
    done = demo(temporary, "--size", "16M")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "identical: yes"


def test_kept_images_are_where_it_says(temporary, tmp_path):
    disk = tmp_path / "disk"
    done = demo(temporary, "--json", "--size", "16M", "--disk", disk, "--keep")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["kept"] == [str(disk), f"{disk}.mirror"]
    for path in (disk, tmp_path / "disk.mirror"):
        assert path.stat().st_size == 16 << 20
    assert list(temporary.iterdir()) == []


def test_a_disk_with_data_is_left_alone(temporary, tmp_path):
    disk = tmp_path / "disk"
    disk.write_text("precious")
    done = demo(temporary, "--disk", disk)
    assert done.returncode == 1
    assert str(disk) in done.stderr and done.stderr.count("\n") == 1
    assert disk.read_text() == "precious"
    assert not (tmp_path / "disk.mirror").exists()
    assert list(temporary.iterdir()) == []


def children(process):
    """The processes that a process has started."""
    path = f"/proc/{process.pid}/task/{process.pid}/children"
    with open(path, encoding="ascii") as file:
        return [int(child) for child in file.read().split()]


def is_gone(pid):
    """Whether a process has ended; one that nobody has reaped has."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as file:
            return file.read().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_until(what, patience=PATIENCE):
    deadline = time.monotonic() + patience
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 130)])
def test_a_signal_ends_the_guest_and_removes_the_files(temporary, number, status):
    process = subprocess.Popen(
        [BINARY, "demo", "--size", "64M"], stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(temporary)})
    try:
        wait_until(lambda: children(process) or process.poll() is not None)
        guests = children(process)
        assert guests
        process.send_signal(number)
        assert process.wait(PATIENCE) == status
    finally:
        process.kill()
        process.communicate()
    assert list(temporary.iterdir()) == []
    assert all(is_gone(pid) for pid in guests)


def test_a_killed_demo_takes_its_guest_along(temporary):
    process = subprocess.Popen(
        [BINARY, "demo", "--size", "64M"], stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, "TMPDIR": str(temporary)})
    try:
        wait_until(lambda: children(process) or process.poll() is not None)
        guests = children(process)
        assert guests
    finally:
        process.kill()
        process.wait()
    wait_until(lambda: all(is_gone(pid) for pid in guests))
