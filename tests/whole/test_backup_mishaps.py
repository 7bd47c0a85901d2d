"""diptych job backup and diptych restore where something is not as they left it: disks that
swapped their names, files of others, a manifest that is lost, signals, images in use."""
import json
import os
import resource
import shutil
import signal
import subprocess

import pytest

from support.backups import CANCELLED, CHUNK, DONE, FAILED, LOST, SIZE, Server
from support.nbd import wait_until
from support.program import BINARY, PATIENCE, run

MANIFEST = "diptych-backup.json"


@pytest.fixture
def server(program):
    return Server(program)


def running(server):
    return any(job["status"] == "running" for job in server.qmp.execute("query-jobs"))


def test_disks_that_swapped_their_names_are_not_taken_for_each_other(program):
    server = Server(program, images={"one": "one.img", "two": "two.img"})
    assert server.backup("one", "two").returncode == DONE
    server.end()
    server = Server(program, images={"one": "two.img", "two": "one.img"})
    server.write("one", 0, b"1" * CHUNK)
    for words in (["one", "two"], ["one"]):
        refused = server.backup(*words, "--incremental")
        assert refused.returncode == FAILED and "take a full one" in refused.stderr, refused.stderr
    # With the names put right, all goes on: nothing was lost.
    server.end()
    server = Server(program, images={"one": "one.img", "two": "two.img"})
    assert server.backup("one", "two", "--incremental").returncode == DONE
    for name in ("one", "two"):
        assert server.restored("--disk", name) == server.image(name)


def test_a_disk_with_two_names_has_a_chain_for_each(server):
    assert server.backup("one").returncode == DONE
    # As if it had been named by its device then.
    manifest = server.manifest()
    manifest["disks"][0]["name"] = "device"
    (server.backups / MANIFEST).write_text(json.dumps(manifest))
    for words in ((), ("--incremental",)):
        server.write("one", 0, b"1" * CHUNK)
        assert server.backup("one", *words).returncode == DONE
    [first] = server.entries("device")
    assert set(server.bitmaps("one")) == {first["bitmap"], server.entries("one")[-1]["bitmap"]}


def test_files_of_others_in_the_directory_stay(server):
    server.backups.mkdir()
    others = ["film.mkv.partial", "one.partial", "notes.txt", ".partial", "one.img"]
    for name in others:
        (server.backups / name).write_text(name)
    assert server.backup("one").returncode == DONE
    server.write("one", 0, b"1" * CHUNK)
    assert server.backup("one", "--incremental").returncode == DONE
    for name in others:
        assert (server.backups / name).read_text() == name
    assert server.restored() == server.image("one")


def test_backups_without_their_manifest_are_not_written_over(server):
    assert server.backup("one").returncode == DONE
    kept = server.image("one")
    manifest = server.backups / MANIFEST
    away = manifest.rename(server.folder / "away")
    server.write("one", 0, b"1" * CHUNK)
    refused = server.backup("one")
    assert refused.returncode == FAILED, refused.stderr
    assert "one.1.full.raw" in refused.stderr and MANIFEST in refused.stderr
    assert (server.backups / "one.1.full.raw").read_bytes() == kept
    # An older manifest does not know a backup that is there.
    shutil.copy(away, manifest)
    assert server.backup("one").returncode == DONE
    shutil.copy(away, manifest)
    held = (server.backups / "one.2.full.raw").read_bytes()
    server.write("one", 0, b"2" * CHUNK)
    made = server.backup("one")
    assert made.returncode == DONE and "one.2.full.raw" in made.stderr, made.stderr
    assert [entry["point"] for entry in server.entries("one")] == [1, 3]
    assert (server.backups / "one.2.full.raw").read_bytes() == held
    assert server.restored() == server.image("one")


def test_a_backup_that_cannot_be_noted_is_taken_away_again(server):
    assert server.backup("one").returncode == DONE
    before = server.manifest()
    server.write("one", 0, b"1" * SIZE)
    for name in ("one.2.incremental.raw", "one.2.incremental.ranges"):
        started = server.start("one", "--incremental", "--speed", "1")
        wait_until("the job", lambda: running(server))
        # Somebody takes the name meanwhile.
        (server.backups / name).write_text("")
        server.qmp.execute("block-job-set-speed", device="backup-one", speed=0)
        _, err = started.communicate(timeout=PATIENCE)
        assert started.returncode == FAILED and name in err, err
        (server.backups / name).unlink()
        assert server.manifest() == before
        server.assert_tidy()
    assert server.backup("one", "--incremental").returncode == DONE
    assert server.restored() == server.image("one")


def test_what_a_client_left_that_was_killed_in_the_first_backup_is_removed(server):
    started = server.start("one", "--speed", "1")
    wait_until("the job", lambda: running(server))
    started.kill()
    started.communicate(timeout=PATIENCE)
    assert run("restore", server.backups, "--list").returncode == DONE
    nothing = server.restore(server.folder / "x")
    assert nothing.returncode == FAILED and "none has ended well" in nothing.stderr, nothing.stderr
    server.qmp.execute("job-cancel", id="backup-one")
    wait_until("its end", lambda: not server.qmp.execute("query-jobs"))
    assert server.bitmaps("one")
    assert server.backup("one").returncode == DONE
    server.assert_tidy()


def test_everything_is_taken_back_also_after_a_second_signal(server):
    started = server.start("one", "--speed", "1")
    wait_until("the job", lambda: running(server))
    # The server does not answer: the client waits for its answer to the cancelling.
    server.process.popen.send_signal(signal.SIGSTOP)
    try:
        started.send_signal(signal.SIGINT)
        for line in started.stderr:
            if "Cancelling" in line:
                break
        started.send_signal(signal.SIGINT)
        # It waits on: for what takes everything down.
        with pytest.raises(subprocess.TimeoutExpired):
            started.wait(1)
    finally:
        server.process.popen.send_signal(signal.SIGCONT)
    _, err = started.communicate(timeout=PATIENCE)
    assert started.returncode == CANCELLED, err
    server.assert_tidy()


def test_a_chain_is_restored_that_is_longer_than_what_may_be_open(server):
    for number in range(24):
        server.write("one", number * CHUNK, bytes([number + 1]) * CHUNK)
        made = server.backup("one", *(["--incremental"] if number else []))
        assert made.returncode == DONE, made.stderr
    target = server.folder / "restored"
    restored = subprocess.run(
        [BINARY, "restore", str(server.backups), str(target)], capture_output=True, text=True,
        timeout=PATIENCE, check=False, stdin=subprocess.DEVNULL,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20)))
    assert restored.returncode == DONE, restored.stderr
    assert target.read_bytes() == server.image("one")


def test_names_that_are_not_text_are_told_in_json_too(server):
    link = os.fsencode(server.folder) + b"/l\xff"
    server.backups.mkdir()
    os.symlink(server.backups, link)
    made = subprocess.run(
        [BINARY, "job", "backup", "one", "--json", "--qmp", f"unix:{server.client}", "--to", link],
        capture_output=True, timeout=PATIENCE, check=False, stdin=subprocess.DEVNULL)
    assert made.returncode == DONE, made.stderr
    assert "backup" in json.loads(made.stdout.splitlines()[-1])
    target = os.fsencode(server.folder) + b"/x\xff"
    restored = subprocess.run(
        [BINARY, "restore", str(server.backups), target, "--json"],
        capture_output=True, timeout=PATIENCE, check=False, stdin=subprocess.DEVNULL)
    assert restored.returncode == DONE, restored.stderr
    assert json.loads(restored.stdout.splitlines()[-1])["result"]["outcome"] == "restored"
    with open(target, "rb") as image:
        assert image.read() == server.image("one")


def test_an_image_that_a_server_has_open_is_not_replaced(server):
    assert server.backup("one").returncode == DONE
    held = server.image("two")
    refused = server.restore(server.folder / "two.img", "--force")
    assert refused.returncode == FAILED and "in use" in refused.stderr, refused.stderr
    assert server.image("two") == held
    server.end()
    assert server.restore(server.folder / "two.img", "--force").returncode == DONE
    assert server.image("two") == server.image("one")


def test_a_disk_that_is_not_there_is_not_listed(server):
    assert server.backup("one").returncode == DONE
    refused = server.restore("--list", "--disk", "three")
    assert refused.returncode == FAILED and "there are: one" in refused.stderr, refused.stderr
    listed = server.restore("--list", "--disk", "one")
    assert listed.returncode == DONE and listed.stdout.splitlines()[1].startswith("one ")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small file system")
def test_a_full_directory_is_named_and_left_as_it_was(server):
    server.backups.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "none", server.backups],
                             capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"no mount: {mounted.stderr}")
    try:
        failed = server.backup("one")
        assert failed.returncode == FAILED, failed.stderr
        assert f"could not write '{server.backups}/one.1.full.raw'" in failed.stderr
        server.assert_tidy()
        subprocess.run(["mount", "-o", "remount,size=16M", server.backups], check=True)
        assert server.backup("one").returncode == DONE
        assert server.restored() == server.image("one")
    finally:
        subprocess.run(["umount", server.backups], check=True)


def test_a_backup_that_nobody_hears_of_is_taken_away(server):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        ended = subprocess.run(
            [BINARY, "job", "backup", "one", "--json", "--qmp", f"unix:{server.client}",
             "--to", str(server.backups)],
            stdout=closed, stderr=subprocess.PIPE, text=True, timeout=PATIENCE, check=False,
            stdin=subprocess.DEVNULL)
    assert ended.returncode == LOST, ended.stderr
    assert "goes on" not in ended.stderr and "--list" in ended.stderr
    server.assert_tidy()


def test_what_a_manifest_says_does_not_steer_the_terminal(server):
    assert server.backup("one").returncode == DONE
    whole = server.manifest()
    path = server.backups / MANIFEST
    for place, value in (("bitmap", "\x1b[31m"), ("kind", "\x1b[2J")):
        changed = json.loads(json.dumps(whole))
        changed["disks"][0]["entries"][0][place] = value
        path.write_text(json.dumps(changed))
        for refused in (server.backup("one", "--incremental"), server.restore("--list")):
            assert "\x1b" not in refused.stderr + refused.stdout
        assert server.backup("one", "--incremental").returncode == FAILED
