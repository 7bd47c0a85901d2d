"""A stock Debian kernel: boots, mounts ext4, writes; its disk is backed up, in full and
twice incrementally, and mirrored."""
import hashlib
import os
import pathlib
import re
import shutil
import subprocess

import pytest

from support.program import BINARY, TOP

HERE = pathlib.Path(__file__).resolve().parent
NESTED = TOP / "tests/nested-kvm"
PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"


def call(*command, **options):
    return subprocess.run([str(word) for word in command], text=True, capture_output=True,
                          env={**os.environ, "PATH": PATH}, check=False, **options)


def with_libraries(program):
    """-f arguments that bring a program and its shared libraries into L1."""
    path = shutil.which(str(program))
    files = ["-f", f"{path}:/test/{os.path.basename(path)}"]
    listed = call("ldd", path)
    for library in re.findall(r"(?:=> )?(/\S+) \(0x", listed.stdout):
        files += ["-f", f"{library}:{library}"]
    return files




def check_files(image, holds, count):
    """The first files are there, as the guest wrote them; gives how many it knew of."""
    holds.mkdir()
    assert call("debugfs", "-R", f"rdump / {holds}", image).returncode == 0
    sums = (holds / "sums").read_text(errors="replace").splitlines()
    assert len(sums) >= count
    for number, line in enumerate(sums[:count]):
        digest, name = line.split()
        assert name == f"f{number}"
        assert hashlib.sha256((holds / name).read_bytes()).hexdigest() == digest, name
    return len(sums)


def check_backup(image, told, holds):
    """A backup is a file system after a power cut at an instant between two messages of
    the guest, which tells of every fifth file, and synchronises every other."""
    before, after = (int(number) for number in told.read_text().split())
    # What a mount does first. A check alone would not read the journal.
    replayed = call("e2fsck", "-E", "journal_only", "-y", image)
    assert replayed.returncode in (0, 1), replayed.stdout + replayed.stderr
    checked = call("e2fsck", "-fn", image)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    known = check_files(image, holds, before // 2 * 2)
    assert known <= after + 5 + 1, (before, after, known)
    later = call("debugfs", "-R", f"cat /f{after + 6}", image)
    assert "File not found" in later.stderr


@pytest.mark.timeout(600)
@pytest.mark.parametrize("cpus, copy_mode, files_to_write, backups", [
    (1, "background", 140, 2), (2, "write-blocking", 60, "none")])
def test_disk_of_a_running_debian_is_backed_up_mirrored_and_pivoted(
        guest_cache, tmp_path, cpus, copy_mode, files_to_write, backups):
    scratch, out = tmp_path / "scratch", tmp_path / "out"
    scratch.mkdir()
    with open(scratch / "source.raw", "wb") as image:
        image.truncate(64 << 20)
    made = call("mkfs.ext4", "-q", "-F", "-E", "root_owner=0:0", scratch / "source.raw")
    assert made.returncode == 0, made.stderr
    guest = tmp_path / "guest.cpio"
    built = call(NESTED / "mkinitramfs.sh", "-k", guest_cache, "-m", "virtio_mmio",
                 "-m", "virtio_blk", HERE / "guest-writes-files.sh", guest)
    assert built.returncode == 0, built.stderr
    files = {}
    for program in (BINARY, "socat"):
        words = with_libraries(program)
        files.update(zip(words[1::2], words[::2]))
    arguments = [word for name, flag in files.items() for word in (flag, name)]
    run = call(NESTED / "run-in-l1.sh", "-k", guest_cache, "-t", 400, "-s", "1G",
               "-S", scratch, "-o", out, *arguments, "-f", guest_cache / "vmlinux",
               "-f", guest, HERE / "mirror-in-l1.sh", cpus, copy_mode, files_to_write,
               backups)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]

    console = (out / "console").read_text(errors="replace")
    assert f"guest: {cpus} processors" in console
    target = out / "target.raw"
    checked = call("e2fsck", "-fn", target)
    assert checked.returncode == 0, checked.stdout + checked.stderr

    assert check_files(target, tmp_path / "files", files_to_write) == files_to_write
    if backups != "none":
        for number in range(backups + 1):
            check_backup(out / f"backup.{number}.raw", out / f"backup.{number}",
                         tmp_path / f"files.{number}")

    # The guest wrote on after the pivot, and not to the source.
    at_pivot = int(re.search(r"guest: (\d+) files", (out / "at-pivot").read_text())[1])
    assert at_pivot < files_to_write
    old = call("debugfs", "-R", f"cat /f{files_to_write - 1}", out / "source.raw")
    assert "File not found" in old.stderr
