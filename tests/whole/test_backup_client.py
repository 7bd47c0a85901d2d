"""diptych job backup and diptych restore: what they make is what the disk held at one
instant, and what is not whole is never taken for it."""
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import threading
import time

import pytest

from support.backups import (CANCELLED, CHUNK, DONE, FAILED, LOST, MIB, SIZE, USAGE,
                             Server)
from support.nbd import wait_until
from support.program import PATIENCE, run
from support.sectors import Client, SECTOR, FLUSH, WRITE


@pytest.fixture
def server(program):
    return Server(program)


def test_a_full_and_its_incrementals_make_every_instant(server):
    instants = []
    for number in range(4):
        instants.append(server.image("one"))
        made = server.backup("one", *(["--incremental"] if number else []))
        assert made.returncode == DONE, made.stderr
        assert f"one: point {number + 1}, {'incremental' if number else 'full'}" in made.stdout
        server.assert_tidy()
        for place in range(3):
            offset = (number * 5 + place * 23) * CHUNK + 512
            server.write("one", offset % SIZE, bytes([number + 1]) * 4096)
        # What becomes zeroes has to be zeroes in what is restored.
        server.write("one", number * CHUNK, bytes(CHUNK))
    for number, instant in enumerate(instants):
        assert server.restored("--point", number + 1) == instant
    assert server.restored() == instants[-1]
    held = [entry["ranges"]["bytes"] for entry in server.entries("one")[1:]]
    assert all(0 < bytes_ <= 5 * CHUNK for bytes_ in held), held
    listed = server.restore("--list")
    assert listed.returncode == DONE
    assert [line.split()[:4] for line in listed.stdout.splitlines()[1:]] == [
        ["one", "1", "full", "-"], ["one", "2", "incremental", "1"],
        ["one", "3", "incremental", "2"], ["one", "4", "incremental", "3"]]
    rows = [json.loads(line)["backup"] for line in
            server.restore("--list", "--json").stdout.splitlines()]
    assert [row["point"] for row in rows] == [1, 2, 3, 4]
    assert server.restore("--verify").returncode == DONE


def test_an_incremental_backup_of_nothing_is_one(server):
    assert server.backup("one").returncode == DONE
    assert server.backup("one", "--incremental").returncode == DONE
    assert server.entries("one")[1]["ranges"]["count"] == 0
    assert server.restored() == server.image("one")
    server.assert_tidy()


class Counter(threading.Thread):
    """Writes a counter to `one`, then to `two`, each flushed, and other data beside it."""

    def __init__(self, server):
        super().__init__(daemon=True)
        self.server, self.going, self.count, self.error = server, True, 0, None
        self.random = random.Random(1)

    def run(self):
        try:
            clients = [Client(str(self.server.nbd), name, PATIENCE) for name in ("one", "two")]
            while self.going:
                self.count += 1
                for client in clients:
                    for offset in (0, SIZE // 2 + self.random.randrange(SIZE // 2 // SECTOR - 8)
                                   // 8 * 8 * SECTOR):
                        data = self.count.to_bytes(8, "little") * 512
                        client.send(WRITE, offset, len(data), data)
                        assert client.reply()[0] == 0
                    client.send(FLUSH)
                    assert client.reply()[0] == 0
            for client in clients:
                client.close()
        except Exception as error:  # pylint: disable=broad-except
            self.error = error

    def end(self):
        self.going = False
        self.join(PATIENCE)
        assert self.error is None, self.error


@pytest.mark.parametrize("fleecing", [False, True])
def test_disks_are_backed_up_at_one_instant_while_they_are_written(server, fleecing):
    words = ["--fleecing", server.folder] if fleecing else []
    counter = Counter(server)
    counter.start()
    for number in range(4):
        before = counter.count
        wait_until("writes", lambda: counter.count > before + 2)
        made = server.backup("one", "two", *words, *(["--incremental"] if number else []))
        assert made.returncode == DONE, made.stderr
    counter.end()
    for point in range(1, 5):
        first, second = (int.from_bytes(server.restored(
            "--disk", name, "--point", point)[:8], "little") for name in ("one", "two"))
        assert second <= first <= second + 1
        assert first > 0
    server.assert_tidy()
    assert server.restore("x").returncode == USAGE


def test_a_guest_does_not_wait_for_a_slow_target_with_fleecing(server):
    started = server.start("one", "--fleecing", server.folder, "--speed", "64K", "--json")
    wait_until("the job", lambda: server.qmp.execute("query-jobs"))
    instant = server.image("one")
    for chunk in range(SIZE // CHUNK):
        server.write("one", chunk * CHUNK, b"\7" * 512)
    [job] = server.qmp.execute("query-block-jobs")
    assert job["fleecing"]["scratch-bytes"] > 0
    assert job["fleecing"]["stalls"] > 0
    assert job["fleecing"]["longest-stall-ns"] <= job["fleecing"]["total-stall-ns"]
    server.qmp.execute("block-job-set-speed", device=job["device"], speed=0)
    out, err = started.communicate(timeout=PATIENCE)
    assert started.returncode == DONE, err
    results = [json.loads(line).get("result") for line in out.splitlines()]
    [result] = [row for row in results if row]
    assert result["outcome"] == "completed" and "fleecing" in result
    assert server.restored() == instant
    server.assert_tidy()


def test_a_backup_that_fleeces_tells_how_long_the_guest_waited(server):
    """However short it is."""
    made = server.backup("one", "--fleecing", server.folder)
    assert made.returncode == DONE and "the guest never waited" in made.stdout, made.stdout
    made = server.backup("one", "two", "--fleecing", server.folder, "--json")
    results = [json.loads(line).get("result") for line in made.stdout.splitlines()]
    told = [row["fleecing"]["stalls"] for row in results if row]
    assert told == [0, 0], made.stdout
    rows = server.qmp.execute("query-job-history")
    assert [row["fleecing"]["scratch-bytes"] for row in rows] == [0, 0, 0]


def test_what_is_damaged_is_named_and_not_restored(server):
    for number in range(3):
        assert server.backup("one", *(["--incremental"] if number else [])).returncode == DONE
        server.write("one", 3 * CHUNK, bytes([number + 1]) * 512)
    target = server.folder / "target"
    kept = server.folder / "kept"
    shutil.copytree(server.backups, kept)
    entry = server.entries("one")[1]

    def damage(change, *words):
        shutil.rmtree(server.backups)
        shutil.copytree(kept, server.backups)
        change()
        result = server.restore(target, *words)
        assert result.returncode == FAILED, result.stdout
        assert len(result.stderr.splitlines()) == 1, result.stderr
        assert not target.exists()
        assert not list(server.folder.glob(".target*"))
        return result.stderr

    def change_byte(name, offset):
        with open(server.backups / name, "r+b") as file:
            file.seek(offset)
            byte = file.read(1)
            file.seek(offset)
            file.write(bytes([byte[0] ^ 1]))

    assert entry["file"] in damage(lambda: change_byte(entry["file"], 3 * CHUNK + 7))
    assert entry["file"] in damage((server.backups / entry["file"]).unlink)
    assert entry["file"] in damage(lambda: os.truncate(server.backups / entry["file"], SIZE - 1))
    assert entry["ranges"]["file"] in damage(lambda: change_byte(entry["ranges"]["file"], 0))
    assert entry["ranges"]["file"] in damage((server.backups / entry["ranges"]["file"]).unlink)
    full = server.entries("one")[0]["file"]
    assert full in damage(lambda: change_byte(full, 100))
    assert full in damage(lambda: change_byte(full, SIZE - 1))

    def link():
        (server.backups / full).unlink()
        (server.backups / full).symlink_to(server.folder / "one.img")
    assert full in damage(link)

    def text(old, new):
        path = server.backups / "diptych-backup.json"
        path.write_text(path.read_text().replace(old, new))
    assert "diptych-backup.json" in damage(lambda: text(full, "../one.img"))
    assert "diptych-backup.json" in damage(lambda: text("{", "["))
    assert "diptych-backup.json" in damage(lambda: text('"point": 2', '"point": 1'))
    assert "diptych-backup.json" in damage(lambda: text(str(SIZE), "99999999999999999999"))
    assert "no backups" in damage((server.backups / "diptych-backup.json").unlink)
    damage(lambda: None, "--point", "0")
    damage(lambda: None, "--disk", "three")
    # And with nothing damaged it is there.
    shutil.rmtree(server.backups)
    shutil.copytree(kept, server.backups)
    assert server.restore(target).returncode == DONE
    assert hashlib.sha256(target.read_bytes()).digest()
    # It is not overwritten.
    target.write_bytes(b"other")
    refused = server.restore(target)
    assert refused.returncode == FAILED and "--force" in refused.stderr
    assert target.read_bytes() == b"other"
    assert server.restore(server.backups / full, "--force").returncode == FAILED


def test_a_broken_chain_is_refused_with_a_remedy(server, program):
    def refused(*words):
        made = server.backup("one", "--incremental", *words)
        assert made.returncode == FAILED
        assert "take a full one" in made.stderr
        return made.stderr

    assert "no backup" in refused()
    assert server.backup("one").returncode == DONE
    [entry] = server.entries("one")
    path = server.backups / entry["file"]
    path.rename(path.with_suffix(".away"))
    assert entry["file"] in refused()
    path.with_suffix(".away").rename(path)
    os.truncate(path, SIZE + 512)
    assert entry["file"] in refused()
    os.truncate(path, SIZE)
    with open(path, "r+b") as file:
        file.write(b"damage")
    assert entry["file"] in refused("--verify")
    server.qmp.execute("block-dirty-bitmap-disable", node="one", name=entry["bitmap"])
    assert "not recording" in refused()
    server.qmp.execute("block-dirty-bitmap-remove", node="one", name=entry["bitmap"])
    assert entry["bitmap"] in refused()
    # The remedy helps.
    assert server.backup("one").returncode == DONE
    server.write("one", 0, b"x" * 512)
    assert server.backup("one", "--incremental").returncode == DONE
    assert server.restored() == server.image("one")
    server.assert_tidy()


def test_a_failure_takes_everything_back_and_the_next_one_has_all(server):
    assert server.backup("one", "two").returncode == DONE
    # More than one request of the job, so that its speed holds it.
    server.write("one", 0, b"1" * SIZE)
    server.write("two", 0, b"2" * SIZE)
    before = server.manifest()
    started = server.start("one", "two", "--incremental", "--speed", "1", "--job-id", "j",
                           "--on-target-error", "report")
    wait_until("the jobs", lambda: len(server.qmp.execute("query-jobs")) == 2)
    # Somebody cancels one of them: the other one is of no use then.
    server.qmp.execute("block-job-cancel", device="j-two", force=True)
    _, err = started.communicate(timeout=PATIENCE)
    assert started.returncode == CANCELLED, err
    assert server.manifest() == before
    server.assert_tidy()
    assert server.backup("one", "two", "--incremental").returncode == DONE
    for name in ("one", "two"):
        assert server.restored("--disk", name) == server.image(name)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_takes_everything_back(server, number):
    assert server.backup("one").returncode == DONE
    server.write("one", 0, b"1" * SIZE)
    for words in ((), ("--incremental",)):
        started = server.start("one", "--speed", "1", "--fleecing", server.folder, *words)
        wait_until("the job", lambda: any(job["status"] == "running"
                                          for job in server.qmp.execute("query-jobs")))
        started.send_signal(number)
        _, err = started.communicate(timeout=PATIENCE)
        assert started.returncode == CANCELLED, err
        server.assert_tidy()
    assert server.backup("one", "--incremental").returncode == DONE
    assert server.restored() == server.image("one")


def test_what_a_killed_client_left_is_removed_by_the_next_one(server):
    assert server.backup("one").returncode == DONE
    server.write("one", 0, b"1" * SIZE)
    started = server.start("one", "--incremental", "--speed", "1")
    wait_until("the job", lambda: any(job["status"] == "running"
                                      for job in server.qmp.execute("query-jobs")))
    started.kill()
    started.communicate(timeout=PATIENCE)
    refused = server.backup("one", "--incremental")
    assert refused.returncode == FAILED and "job list" in refused.stderr, refused.stderr
    [job] = server.qmp.execute("query-jobs")
    server.qmp.execute("job-cancel", id=job["id"])
    wait_until("its end", lambda: not server.qmp.execute("query-jobs"))
    server.write("one", CHUNK, b"2" * 512)
    assert server.backup("one", "--incremental").returncode == DONE
    assert server.restored() == server.image("one")
    server.assert_tidy()


def test_two_backups_do_not_go_into_a_directory_at_once(server):
    started = server.start("one", "--speed", "1")
    wait_until("the job", lambda: server.qmp.execute("query-jobs"))
    other = run("job", "backup", "two", "--to", server.backups, "--qmp", f"unix:{server.other}")
    assert other.returncode == FAILED and "under way" in other.stderr, other.stderr
    started.send_signal(signal.SIGINT)
    started.communicate(timeout=PATIENCE)
    server.assert_tidy()


def test_mistakes_change_nothing(server):
    for words, status in (
            (["none"], FAILED),
            (["one", "one"], USAGE),
            ([], USAGE),
            (["one", "--fleecing", "/nonexistent"], FAILED),
            (["one", "--speed", "-1"], USAGE),
            (["one", "--job-id", "1!"], FAILED),
            (["one", "--granularity", "3"], FAILED)):
        made = server.backup(*words)
        assert made.returncode == status, (words, made.stderr)
        assert len(made.stderr.splitlines()) == 1, made.stderr
        server.assert_tidy()
    assert run("job", "backup", "one", "--to", "/dev/null/x",
               "--qmp", f"unix:{server.client}").returncode == FAILED


@pytest.mark.skipif(not shutil.which("qemu-storage-daemon"), reason="no qemu-storage-daemon")
def test_qemus_daemon_is_backed_up_and_told_from_one_that_can_fleece(tmp_path):
    disk, sock, backups = (tmp_path / name for name in ("disk", "qmp", "backups"))
    disk.write_bytes(os.urandom(MIB))
    daemon = subprocess.Popen(
        ["qemu-storage-daemon", "--chardev", f"socket,path={sock},server=on,wait=off,id=c",
         "--monitor", "c", "--blockdev",
         f"driver=raw,node-name=one,file.driver=file,file.filename={disk}"],
        stdin=subprocess.DEVNULL)
    try:
        wait_until("the daemon listens", sock.exists)
        words = ["job", "backup", "one", "--to", backups, "--qmp", f"unix:{sock}"]
        refused = run(*words, "--fleecing", tmp_path)
        assert refused.returncode == FAILED, refused.stderr
        assert "leave out --fleecing" in refused.stderr
        assert not backups.exists()
        made = run(*words)
        assert made.returncode == DONE, made.stderr
        restored = run("restore", backups, tmp_path / "restored")
        assert restored.returncode == DONE, restored.stderr
        assert (tmp_path / "restored").read_bytes() == disk.read_bytes()
    finally:
        daemon.kill()
        daemon.wait()


@pytest.mark.skipif(os.geteuid() != 0 or not os.path.exists("/dev/loop-control"),
                    reason="needs root and loop devices")
def test_a_block_device_is_written_when_asked_for(server):
    assert server.backup("one").returncode == DONE
    backing = server.folder / "backing"
    backing.write_bytes(os.urandom(SIZE + MIB))
    made = subprocess.run(["losetup", "-f", "--show", str(backing)],
                          capture_output=True, text=True, check=False)
    if made.returncode != 0:
        pytest.skip(f"no loop device: {made.stderr}")
    device = made.stdout.strip()
    try:
        kept = server.folder / "one.img"
        refused = server.restore(device)
        assert refused.returncode == FAILED and "--force" in refused.stderr, refused.stderr
        restored = server.restore(device, "--force")
        assert restored.returncode == DONE, restored.stderr
        assert "next backup has to be a full one" in restored.stderr
        with open(device, "rb") as opened:
            assert opened.read(SIZE) == kept.read_bytes()
            # What is behind the disk is not the backup's.
            assert len(opened.read()) == MIB
    finally:
        subprocess.run(["losetup", "-d", device], check=True)


def test_a_server_that_dies_leaves_what_is_whole(server):
    assert server.backup("one").returncode == DONE
    instant = server.image("one")
    server.write("one", 0, b"1" * SIZE)
    before = server.manifest()
    started = server.start("one", "--incremental", "--speed", "1", "--fleecing", server.folder)
    wait_until("the job", lambda: server.qmp.execute("query-jobs"))
    server.process.popen.kill()
    _, err = started.communicate(timeout=PATIENCE)
    assert started.returncode == LOST, err
    assert server.manifest() == before
    # No scratch file is left, whoever was killed.
    assert not [path for path in server.folder.iterdir() if "scratch" in path.name]
    assert server.restored() == instant


def test_fleecing_leaves_nothing_behind_whatever_ends_it(server):
    scratch = server.folder / "scratch"
    scratch.mkdir()
    target = server.folder / "target.img"

    def start(**arguments):
        target.write_bytes(b"")
        os.truncate(target, SIZE)
        server.qmp.execute("blockdev-add", driver="file", node_name="target",
                           filename=str(target))
        server.qmp.execute("blockdev-backup", job_id="j", device="one", target="target",
                           sync="full", fleecing={"directory": str(scratch)}, **arguments)
        assert not list(scratch.iterdir()), "it has no name"

    def gone():
        server.qmp.status("j", "null")
        server.qmp.execute("blockdev-del", node_name="target")
        server.assert_tidy_nodes()

    server.assert_tidy_nodes = lambda: wait_until(
        "the nodes", lambda: {name for name in server.nodes()
                              if not name.startswith("#")} == {"one", "two"}
        and len(server.nodes()) == 4)
    start()
    gone()
    assert target.read_bytes() == server.image("one")
    start(speed=1)
    server.write("one", SIZE - 4096, b"1" * 4096)
    server.qmp.execute("block-job-cancel", device="j", force=True)
    gone()
    # A transaction that is refused.
    target.write_bytes(b"")
    os.truncate(target, SIZE)
    server.qmp.execute("blockdev-add", driver="file", node_name="target", filename=str(target))
    with pytest.raises(Exception, match="abort|Abort"):
        server.qmp.execute("transaction", actions=[
            {"type": "blockdev-backup", "data": {
                "job-id": "j", "device": "one", "target": "target", "sync": "full",
                "fleecing": {"directory": str(scratch)}}},
            {"type": "abort", "data": {}}])
    server.qmp.execute("blockdev-del", node_name="target")
    server.assert_tidy_nodes()
    # What is refused.
    for arguments, text in (
            ({"fleecing": {"directory": "/nonexistent"}}, "scratch file"),
            ({"fleecing": {}}, "directory"),
            ({"fleecing": 1}, "fleecing"),
            ({"fleecing": {"directory": str(scratch)}, "compress": True}, "Compression")):
        server.qmp.execute("blockdev-add", driver="file", node_name="target",
                           filename=str(target))
        with pytest.raises(Exception, match=text):
            server.qmp.execute("blockdev-backup", job_id="j", device="one", target="target",
                               sync="full", **arguments)
        server.qmp.execute("blockdev-del", node_name="target")
        server.assert_tidy_nodes()
    # The end of the process.
    start(speed=1)
    server.qmp.execute("quit")
    assert server.process.wait() == 0, server.process.errors()
    assert not list(scratch.iterdir())


def test_ranges_of_a_bitmap_come_in_parts(server):
    server.qmp.execute("block-dirty-bitmap-add", node="one", name="b", granularity=65536)
    wanted = [1, 3, 5, 6, 9]
    for chunk in wanted:
        server.write("one", chunk * CHUNK, b"x" * 512)
    found, offset = [], 0
    while offset is not None:
        answer = server.qmp.execute("query-block-dirty-bitmap-ranges", node="one", name="b",
                                    offset=offset, max_ranges=2)
        assert (answer["size"], answer["granularity"]) == (SIZE, CHUNK)
        found += [(row["offset"] // CHUNK, row["length"] // CHUNK) for row in answer["ranges"]]
        offset = answer.get("next-offset")
    assert found == [(1, 1), (3, 1), (5, 2), (9, 1)]
    for arguments in ({"max_ranges": 0}, {"max_ranges": 99999}, {"name": "none"},
                      {"offset": -1, "max_ranges": 5, "name": "none"}):
        with pytest.raises(Exception):
            server.qmp.execute("query-block-dirty-bitmap-ranges",
                               **{"node": "one", "name": "b", **arguments})
    past = server.qmp.execute("query-block-dirty-bitmap-ranges", node="one", name="b",
                              offset=2 ** 63 - 1)
    assert past["ranges"] == []
