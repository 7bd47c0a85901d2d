"""The `preallocate` filter below qcow2 images, which QEMU's tools then read."""
import json
import signal
import subprocess

import pytest

from support.program import QmpError

MIB = 1 << 20
RESERVE = 32 * MIB


def run(*args):
    return subprocess.run([str(a) for a in args], check=True, capture_output=True,
                          text=True, timeout=120).stdout


def image(path):
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "64M")
    return path


def check(path):
    report = json.loads(run("qemu-img", "check", "--output=json", path))
    assert report["check-errors"] == 0 and report.get("corruptions", 0) == 0, report


def add(qmp, path, inline=True):
    """The image in `path`, as node `disk`, over a filter of the name `ahead` unless
    that is inline."""
    ahead = {"driver": "preallocate", "prealloc-size": RESERVE,
             "file": {"driver": "file", "filename": str(path)}}
    if not inline:
        qmp.execute("blockdev-add", node_name="ahead", **ahead)
        ahead = "ahead"
    qmp.execute("blockdev-add", driver="qcow2", node_name="disk", file=ahead)


def export(qmp, tmp_path):
    address = {"type": "unix", "data": {"path": str(tmp_path / "nbd")}}
    qmp.execute("nbd-server-start", addr=address)
    qmp.execute("block-export-add", type="nbd", id="e", node_name="disk", writable=True)
    return f"nbd+unix:///disk?socket={tmp_path / 'nbd'}"


def qemu_io(url, *commands, image_format="raw"):
    args = [part for command in commands for part in ("-c", command)]
    output = run("qemu-io", "-f", image_format, *args, url)
    assert "failed" not in output, output


WRITES = ("write -P 1 0 3M", "write -P 2 8M 5M")
READS = ("read -P 1 0 3M", "read -P 0 3M 5M", "read -P 2 8M 5M", "read -P 0 13M 51M")


@pytest.mark.parametrize("inline", [False, True])
def test_space_is_taken_ahead_and_given_back(program, tmp_path, inline):
    path = image(tmp_path / "disk.qcow2")
    process, qmp = program.storage_daemon()
    add(qmp, path, inline)
    url = export(qmp, tmp_path)
    qemu_io(url, *WRITES)
    ahead = path.stat()
    assert ahead.st_size > RESERVE and ahead.st_blocks * 512 > RESERVE
    qmp.execute("block-export-del", id="e", mode="hard")
    qmp.event("BLOCK_EXPORT_DELETED", id="e")
    qmp.execute("blockdev-del", node_name="disk")
    assert path.stat().st_size < 12 * MIB
    # The file is free, though the filter may still be there.
    qemu_io(path, *READS, image_format="qcow2")
    qmp.execute("quit")
    assert process.wait() == 0
    check(path)


def test_the_end_of_the_program_gives_it_back(program, tmp_path):
    path = image(tmp_path / "disk.qcow2")
    process, qmp = program.storage_daemon()
    add(qmp, path)
    qemu_io(export(qmp, tmp_path), *WRITES)
    assert path.stat().st_size > RESERVE
    process.popen.send_signal(signal.SIGTERM)
    assert process.wait() == 0
    assert path.stat().st_size < 12 * MIB
    qemu_io(path, *READS, image_format="qcow2")
    check(path)


def test_an_image_whose_process_was_killed_is_longer_and_whole(program, tmp_path):
    path = image(tmp_path / "disk.qcow2")
    process, qmp = program.storage_daemon()
    add(qmp, path)
    qemu_io(export(qmp, tmp_path), *WRITES, "flush")
    process.popen.kill()
    process.popen.wait()
    assert path.stat().st_size > RESERVE
    check(path)
    (tmp_path / "nbd").unlink(missing_ok=True)
    process, qmp = program.storage_daemon()
    add(qmp, path)
    url = export(qmp, tmp_path)
    qemu_io(url, *READS)
    qemu_io(url, "write -P 3 20M 4M")
    qmp.execute("quit")
    assert process.wait() == 0
    qemu_io(path, *READS[:3], "read -P 3 20M 4M", image_format="qcow2")
    check(path)


def test_a_mirror_to_such_an_image(program, tmp_path):
    source = tmp_path / "src.img"
    run("qemu-img", "create", "-q", "-f", "raw", source, "64M")
    qemu_io(source, *WRITES)
    path = image(tmp_path / "disk.qcow2")
    process, qmp = program.storage_daemon()
    qmp.execute("blockdev-add", driver="file", node_name="src", filename=str(source))
    add(qmp, path, inline=False)
    qmp.execute("blockdev-mirror", job_id="m", device="src", target="disk", sync="full")
    qmp.event("BLOCK_JOB_READY", device="m")
    assert path.stat().st_size > RESERVE
    qmp.execute("job-complete", id="m")
    assert "error" not in qmp.event("BLOCK_JOB_COMPLETED", device="m")["data"]
    qmp.status("m", "null")
    qmp.execute("blockdev-reopen", options=[
        {"driver": "qcow2", "node-name": "disk", "file": "ahead", "read-only": True}])
    assert path.stat().st_size < 12 * MIB
    qmp.execute("quit")
    assert process.wait() == 0
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", source, path)
    check(path)


def test_nobody_else_has_a_file_that_is_taken_ahead(program, tmp_path):
    path = image(tmp_path / "disk.qcow2")
    _, qmp = program.storage_daemon()
    add(qmp, path)
    with pytest.raises(QmpError, match='Failed to get "write" lock'):
        qmp.execute("blockdev-add", driver="qcow2", node_name="other",
                    file={"driver": "file", "filename": str(path)})
    # What it takes can be changed under the image.
    qmp.execute("blockdev-reopen", options=[{
        "driver": "qcow2", "node-name": "disk", "file": {
            "driver": "preallocate", "prealloc-size": 0,
            "file": {"driver": "file", "filename": str(path)}}}])
    qemu_io(export(qmp, tmp_path), *WRITES)
    assert path.stat().st_size < 12 * MIB
