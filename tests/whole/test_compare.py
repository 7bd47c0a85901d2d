"""The compare job: offline, on a ready mirror and on a snapshot while their source is
written, and its client."""
import json
import random
import struct
import threading
import time

import pytest

from support import nbd
from support.program import PATIENCE, QmpError, run

MIB = 1024 * 1024
SIZE = 8 * MIB
SAME, FAILED, CANCELLED, DIFFERS = 0, 1, 3, 5
#: Nobody writes below this.
QUIET = MIB


class Pair:
    """A storage daemon with nodes `a` and `b` on files, and two monitor sockets."""

    def __init__(self, program, first, second):
        self.files = [program.folder / name for name in ("a.img", "b.img")]
        for path, data in zip(self.files, (first, second)):
            path.write_bytes(data)
        self.client = program.folder / "client"
        nodes = [word for name, path in zip("ab", self.files) for word in (
            "--blockdev", f"driver=raw,node-name={name},file.driver=file,file.filename={path}")]
        self.process, self.qmp = program.storage_daemon("--qmp", f"unix:{self.client}", *nodes)

    def compare(self, first="a", second="b", **arguments):
        """Runs a comparison to its end, and gives what is listed of it then."""
        self.qmp.execute("blockdev-compare", job_id="c", device=first, target=second,
                         auto_dismiss=False, **arguments)
        self.qmp.status("c", "concluded")
        [job] = [job for job in self.qmp.execute("query-jobs") if job["id"] == "c"]
        [block_job] = [job for job in self.qmp.execute("query-block-jobs") if job["device"] == "c"]
        assert block_job["comparison"] == job["comparison"]
        assert self.qmp.execute("query-job-history")[-1]["comparison"] == job["comparison"]
        self.qmp.execute("job-dismiss", id="c")
        return job

    def compare_decided(self):
        """The same, again where a machine under load left something undecided."""
        deadline = time.monotonic() + PATIENCE
        while True:
            job = self.compare()
            if "error" not in job:
                return job
            assert "could not be compared" in job["error"], job
            assert job["comparison"]["differences"] <= 1, job
            assert time.monotonic() < deadline, job

    def job(self, *words):
        return run("job", *words, "--qmp", f"unix:{self.client}")

    def export(self, node, path):
        self.qmp.execute("nbd-server-start",
                         addr={"type": "unix", "data": {"path": str(path)}})
        self.qmp.execute("block-export-add", type="nbd", id="e", node_name=node, name="disk",
                         writable=True)


def data_of(seed, size=SIZE):
    return random.Random(seed).randbytes(size // 2) + bytes(size - size // 2)


class Writer(threading.Thread):
    """Writes an export at random, and one place again and again, until it is stopped."""

    def __init__(self, path):
        super().__init__(daemon=True)
        self.client = nbd.Raw(path, "disk")
        self.ending = threading.Event()
        self.written = 0
        self.failed = None
        self.start()

    def run(self):
        chance = random.Random(5)
        try:
            while not self.ending.is_set():
                # Several at a time.
                batch = [QUIET, *(chance.randrange(QUIET, SIZE, 4096) for _ in range(7))]
                for offset in batch:
                    self.client.send(nbd.WRITE, offset, 4096, chance.randbytes(4096))
                for _ in batch:
                    _, error, _ = struct.unpack(">IIQ", self.client.take(16))
                    assert error == 0
                self.written += len(batch)
        except Exception as error:  # Told by `stop`.
            self.failed = error

    def stop(self):
        self.ending.set()
        self.join()
        self.client.close()
        assert self.failed is None, self.failed
        assert self.written > 0


def test_images_that_nobody_uses(program):
    data = bytearray(data_of(1))
    pair = Pair(program, data, data + bytes(MIB))
    same = pair.compare()
    assert "error" not in same and same["current-progress"] == SIZE + MIB
    assert same["comparison"] == {"differences": 0, "differing-bytes": 0, "ranges": [],
                                  "undecided-bytes": 0, "complete": True}
    for offset in (0, 700, 2 * MIB + 1, SIZE + MIB - 1):
        with open(pair.files[1], "r+b") as file:
            file.seek(offset)
            file.write(b"\xff" if data[offset:offset + 1] != b"\xff" else b"\0")
    found = pair.compare(max_differences=2)["comparison"]
    assert found["differences"] == 3 and found["differing-bytes"] == 2048
    assert found["first-difference"] == 0
    assert found["ranges"] == [{"offset": 0, "length": 1024}, {"offset": 2 * MIB, "length": 512}]


def test_a_ready_mirror_is_compared_while_its_source_is_written(program):
    pair = Pair(program, data_of(2), bytes(SIZE))
    path = program.folder / "nbd"
    pair.export("a", path)
    pair.qmp.execute("blockdev-mirror", job_id="m", device="a", target="b", sync="full")
    pair.qmp.event("BLOCK_JOB_READY")
    writer = Writer(path)
    nbd.wait_until("something is written", lambda: writer.written > 100)
    for _ in range(3):
        job = pair.compare_decided()
        assert job["comparison"]["differences"] == 0, job
    # What is wrong on the target is found beside the guest's writes.
    with open(pair.files[1], "r+b") as file:
        file.seek(QUIET // 2)
        file.write(bytes(512))
    job = pair.compare_decided()
    assert job["comparison"]["ranges"] == [{"offset": QUIET // 2, "length": 512}]
    writer.stop()
    # It was never in the mirror's way.
    pair.qmp.execute("job-complete", id="m")
    assert "error" not in pair.qmp.event("BLOCK_JOB_COMPLETED", device="m")["data"]


def test_a_mirror_that_pivots_ends_its_comparison(program):
    pair = Pair(program, data_of(3), bytes(SIZE))
    pair.qmp.execute("blockdev-mirror", job_id="m", device="a", target="b", sync="full")
    pair.qmp.event("BLOCK_JOB_READY")
    with open(pair.files[1], "r+b") as file:
        file.seek(MIB)
        file.write(bytes(512))
    pair.qmp.execute("blockdev-compare", job_id="c", device="a", target="b", speed=1,
                     auto_dismiss=False)
    pair.qmp.execute("job-complete", id="m")
    pair.qmp.status("m", "null")
    pair.qmp.execute("block-job-set-speed", device="c", speed=0)
    pair.qmp.status("c", "concluded")
    [job] = pair.qmp.execute("query-jobs")
    assert "mirror" in job["error"] or "place" in job["error"], job


def test_a_snapshot_is_compared_with_a_copy_while_the_disk_is_written(program):
    data = data_of(4)
    pair = Pair(program, data, data)
    kept = program.folder / "t.img"
    kept.write_bytes(bytes(SIZE))
    pair.qmp.execute("blockdev-add", driver="file", node_name="t", filename=str(kept))
    pair.qmp.execute("blockdev-add", driver="copy-before-write", node_name="cbw", file="a",
                     target="t")
    pair.qmp.execute("blockdev-add", driver="snapshot-access", node_name="then", file="cbw")
    path = program.folder / "nbd"
    pair.export("cbw", path)
    writer = Writer(path)
    nbd.wait_until("something is written", lambda: writer.written > 100)
    job = pair.compare("then", "b")
    assert "error" not in job and job["comparison"]["differences"] == 0, job
    writer.stop()
    assert pair.compare("a", "b")["comparison"]["differences"] > 0


def test_a_finished_backup_is_compared_while_its_disk_is_written(program):
    pair = Pair(program, data_of(8), bytes(SIZE))
    path = program.folder / "nbd"
    pair.export("a", path)
    writer = Writer(path)
    nbd.wait_until("something is written", lambda: writer.written > 100)
    pair.qmp.execute("transaction", actions=[
        {"type": "block-dirty-bitmap-add",
         "data": {"node": "a", "name": "since", "granularity": 4096}},
        {"type": "blockdev-backup",
         "data": {"job-id": "b", "device": "a", "target": "b", "sync": "full"}}])
    assert "error" not in pair.qmp.event("BLOCK_JOB_COMPLETED", device="b")["data"]
    for _ in range(3):
        job = pair.compare(bitmap="since")
        assert "error" not in job, job
        found = job["comparison"]
        assert found["differences"] == found["undecided-bytes"] == 0, found
        assert 0 < found["skipped-bytes"] <= SIZE - QUIET, found
    # Without it what was written since differs.
    assert pair.compare()["comparison"]["differences"] > 0
    text = pair.job("compare", "--source", "a", "--target", "b", "--bitmap", "since")
    assert text.returncode == SAME, text.stderr
    assert "The nodes are the same, not counting" in text.stdout
    # Damage of the backup is found beside the guest's writes, where those are not: also
    # between places that it writes.
    for offset in (0, QUIET - 512):
        with open(pair.files[1], "r+b") as file:
            file.seek(offset)
            was = file.read(512)
            file.seek(offset)
            file.write(bytes(byte ^ 255 for byte in was))
    found = pair.compare(bitmap="since")["comparison"]
    assert found["ranges"] == [{"offset": 0, "length": 512}, {"offset": QUIET - 512, "length": 512}]
    other = pair.job("compare", "--source", "a", "--target", "b", "--bitmap", "since")
    assert other.returncode == DIFFERS
    writer.stop()
    # The bitmap has all that was written, and was never changed by somebody else.
    [bitmap] = [bitmap for node in pair.qmp.execute("query-named-block-nodes")
                for bitmap in node.get("dirty-bitmaps", [])]
    assert bitmap["recording"] and not bitmap["busy"] and bitmap["count"] > 0


def test_a_bitmap_that_cannot_tell_what_was_written_since_is_refused(program):
    pair = Pair(program, bytes(MIB), bytes(MIB))

    def refused(**arguments):
        with pytest.raises(QmpError) as error:
            pair.qmp.execute("blockdev-compare", **{
                "job_id": "c", "device": "a", "target": "b", "bitmap": "x", **arguments})
        assert all(job["id"] != "c" for job in pair.qmp.execute("query-jobs"))
        return str(error.value)

    assert "Bitmap 'x' could not be found" in refused()
    assert "Bitmap '' could not be found" in refused(bitmap="")
    assert "string" in refused(bitmap={"node": "a", "name": "x"})
    pair.qmp.execute("block-dirty-bitmap-add", node="b", name="x")
    assert "could not be found" in refused()
    pair.qmp.execute("block-dirty-bitmap-add", node="a", name="x", disabled=True)
    assert "does not record" in refused()
    pair.qmp.execute("block-dirty-bitmap-enable", node="a", name="x")
    pair.qmp.execute("nbd-server-start", addr={
        "type": "unix", "data": {"path": str(program.folder / "nbd")}})
    pair.qmp.execute("block-export-add", type="nbd", id="e", node_name="a", writable=True,
                     bitmaps=["x"])
    assert "in use" in refused()
    pair.qmp.execute("block-export-del", id="e")
    pair.qmp.event("BLOCK_EXPORT_DELETED")
    # Nobody changes it as long as it says what is left out.
    pair.qmp.execute("blockdev-compare", job_id="c", device="a", target="b", bitmap="x",
                     auto_finalize=False)
    for change in ("clear", "disable", "remove"):
        with pytest.raises(QmpError) as error:
            pair.qmp.execute(f"block-dirty-bitmap-{change}", node="a", name="x")
        assert "in use" in str(error.value)
    pair.qmp.event("BLOCK_JOB_PENDING")
    pair.qmp.execute("job-finalize", id="c")
    pair.qmp.status("c", "null")
    pair.qmp.execute("block-dirty-bitmap-remove", node="a", name="x")


def test_what_cannot_be_compared_is_refused(program):
    pair = Pair(program, bytes(MIB), bytes(MIB))
    for arguments, text in [
            (dict(device="a", target="a"), "Cannot compare node 'a' with itself"),
            (dict(device="a", target="x"), "nor node-name='x'"),
            (dict(device="", target="b"), "nor node-name=''"),
            (dict(device="a", target="b", max_differences=1025), "at most 1024"),
            (dict(device="a", target="b", max_differences=-1), "max-differences"),
            (dict(device="a", target="b", speed=-1), "speed"),
            (dict(device="a", target="b", on_source_error="x"), "'x'"),
            (dict(device="a", target=["b"]), "target")]:
        with pytest.raises(QmpError) as refused:
            pair.qmp.execute("blockdev-compare", job_id="c", **arguments)
        assert text in str(refused.value), (arguments, refused.value)
        assert pair.qmp.execute("query-jobs") == []
    pair.qmp.execute("blockdev-compare", job_id="c", device="a", target="b", auto_finalize=False)
    pair.qmp.event("BLOCK_JOB_PENDING")
    for refusal in ("blockdev-del", "blockdev-mirror"):
        arguments = dict(node_name="a") if refusal == "blockdev-del" else dict(
            job_id="m", device="a", target="b", sync="full")
        with pytest.raises(QmpError):
            pair.qmp.execute(refusal, **arguments)
    pair.qmp.execute("job-finalize", id="c")
    pair.qmp.status("c", "null")
    pair.qmp.execute("blockdev-del", node_name="a")


def test_the_client_tells_what_differs_from_what_failed(program):
    data = bytearray(data_of(6))
    pair = Pair(program, data, data)
    same = pair.job("compare", "--source", "a", "--target", "b")
    assert same.returncode == SAME, same.stderr
    assert "The nodes are the same" in same.stdout
    with open(pair.files[0], "r+b") as file:
        file.seek(MIB)
        file.write(bytes(1024))
    other = pair.job("compare", "--source", "a", "--target", "b", "--json")
    assert other.returncode == DIFFERS, other.stderr
    lines = [json.loads(line) for line in other.stdout.splitlines()]
    [result] = [line["result"] for line in lines if "result" in line]
    assert result["outcome"] == "completed"
    assert result["comparison"]["differences"] == 1
    assert result["comparison"]["first-difference"] == MIB
    text = pair.job("compare", "--source", "a", "--target", "b")
    assert text.returncode == DIFFERS
    assert "1 range of 1.00 KiB in all, the first at byte 1048576" in text.stdout
    refused = pair.job("compare", "--source", "a", "--target", "x")
    assert refused.returncode == FAILED and "node-name='x'" in refused.stderr
    pair.qmp.execute("blockdev-add", driver="blkdebug", node_name="bad", image="b",
                     inject_error=[{"event": "none", "iotype": "read", "sector": 4096}])
    failed = pair.job("compare", "--source", "a", "--target", "bad", "--on-target-error", "ignore")
    assert failed.returncode == FAILED, (failed.stdout, failed.stderr)
    assert "could not be compared" in failed.stderr
    # Nothing is left on the list.
    assert pair.qmp.execute("query-jobs") == []


def test_the_client_can_be_told_not_to_wait_and_the_job_be_cancelled(program):
    pair = Pair(program, data_of(7), data_of(7))
    started = pair.job("compare", "--source", "a", "--target", "b", "--detach", "--speed", "64K",
                       "--job-id", "slow")
    assert started.returncode == 0 and "slow: started" in started.stdout
    cancelled = pair.job("cancel", "slow")
    assert cancelled.returncode == 0, cancelled.stderr
    [ended] = pair.qmp.execute("query-job-history")
    assert ended["result"] == "cancelled" and ended["comparison"]["complete"] is False
