"""What people get wrong: one line that says what and how to mend it."""
import os
import subprocess

import pytest

from support.program import BINARY, QmpError, run

MIB = 1024 * 1024


def one_line(result, status, *words):
    """The run ended with this status and one line of error with these words."""
    assert result.returncode == status, (result.returncode, result.stderr)
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    for word in words:
        assert word in lines[0], lines[0]
    assert "panicked" not in lines[0]


@pytest.fixture
def disk(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(MIB))
    return path


def test_missing_kernel(kvm, disk):
    one_line(run("run", "--kernel", disk.parent / "none", "--disk", f"path={disk}"),
             1, "none", "No such file")


def test_not_a_kernel(kvm, disk):
    one_line(run("run", "--kernel", disk), 1, str(disk), "kernel")


def test_missing_disk(kvm, disk):
    one_line(run("run", "--kernel", disk, "--disk", f"path={disk}.none"),
             1, "disk.img.none", "No such file", "truncate")


def test_usage_mistakes_exit_with_2():
    for arguments in (["run"], ["run", "--kernel", "k", "--cpus", "0"],
                      ["run", "--kernel", "k", "--memory", "12Q"],
                      ["run", "--kernel", "k", "--disk", "id=a"],
                      ["run", "--kernel", "k", "--disk", "path=a,color=red"],
                      ["storage-daemon"], ["fly"]):
        one_line(run(*arguments), 2)


@pytest.mark.parametrize("arguments, words", [
    (["--cpus", "33"], ["--cpus", "32"]),
    (["--memory", "1025K"], ["whole MiB", "--memory"]),
    (["--memory", "100T"], ["--memory"]),
    (["--disk", "path=a,queues=65"], ["1 to 64"]),
    (["--disk", "path=a,id=x", "--disk", "path=b,id=x"], ["'x'", "own"]),
    (["--disk", "path=a,id=0x"], ["'0x'", "letter"]),
    (["--disk", "path=a,iothread=io9"], ["--iothread id=io9"]),
    (["--disk", "path=a,iothread="], ["a+b"]),
    (["--disk", "path=a,iothread=t+t", "--iothread", "id=t"], ["twice"]),
    (["--on-reboot", "fly"], ["exit", "reset"]),
    (["--kernal", "k"], ["--kernel", "--help"]),
    (["--log-level", "a=b=c"], ["--log-level"]),
])
def test_usage_mistakes_are_found_before_anything_is_opened(arguments, words):
    one_line(run("run", "--kernel", "/no/such/kernel", *arguments), 2, *words)


def test_configuration_mistakes_exit_with_2_and_say_where(tmp_path):
    path = tmp_path / "guest.json"
    for text, words in (
            ('{"kernel": "k",\n "disk": "path=d.img"}', ["line 2", "a list of disks"]),
            ('{"kernel": "k", "cpus": 300}', ["1 to 32"]),
            ('{"kernel": "k", "cpu": 1}', ["cpu"]),
            ('{"cpus": 1}', ["--kernel"])):
        path.write_text(text)
        one_line(run("run", "--config", path), 2, *words)
    one_line(run("run", "--config", tmp_path / "none.toml"), 1, "none.toml", "No such file")


def test_one_image_for_two_disks(kvm, disk):
    one_line(run("run", "--kernel", BINARY, "--disk", f"path={disk}", "--disk", f"path={disk}"),
             1, "disk1", "lock", "another process", "readonly=on")


def test_fifos_are_not_waited_for(disk):
    fifo = disk.parent / "fifo"
    os.mkfifo(fifo)
    one_line(run("run", "--kernel", fifo), 1, str(fifo), "regular file")
    one_line(run("run", "--kernel", BINARY, "--initrd", fifo), 1, str(fifo), "regular file")
    one_line(run("run", "--kernel", BINARY, "--serial", f"file:{fifo}"),
             1, str(fifo), "nobody reads")


def test_socket_in_a_missing_folder(disk):
    path = disk.parent / "none/qmp"
    one_line(run("storage-daemon", "--qmp", f"unix:{path}"), 1, str(path), "create")


def test_disk_used_by_another_process(program, disk, kvm):
    _, qmp = program.storage_daemon()
    qmp.execute("blockdev-add", driver="raw", node_name="d",
                file={"driver": "file", "filename": str(disk)})
    target = disk.parent / "target.img"
    target.write_bytes(bytes(MIB))
    qmp.execute("blockdev-add", driver="raw", node_name="t",
                file={"driver": "file", "filename": str(target)})
    qmp.execute("blockdev-mirror", job_id="j", device="d", target="t", sync="full")
    qmp.status("j", "ready")
    # The target is being written by the job: nobody else may.
    one_line(run("run", "--kernel", BINARY, "--disk", f"path={target}"),
             1, str(target), "lock", "another process")


def test_image_locks_exclude_qemu(program, disk):
    _, qmp = program.storage_daemon()
    for name, image in (("s", disk), ("t", disk.parent / "target.img")):
        image.write_bytes(bytes(MIB))
        qmp.execute("blockdev-add", driver="file", node_name=name, filename=str(image))
    qmp.execute("blockdev-mirror", job_id="j", device="s", target="t", sync="full")
    qmp.status("j", "ready")
    result = subprocess.run(
        ["qemu-io", "-f", "raw", "-c", "write 0 512", str(disk.parent / "target.img")],
        capture_output=True, text=True, check=False)
    assert "Failed to get" in result.stderr + result.stdout
    qmp.execute("block-job-cancel", device="j")
    qmp.status("j", "null")
    for name in ("s", "t"):
        qmp.execute("blockdev-del", node_name=name)
    subprocess.run(["qemu-io", "-f", "raw", "-c", "write 0 512",
                    str(disk.parent / "target.img")], capture_output=True, check=True)


def test_qemu_lock_excludes_the_mirror_target(program, disk):
    """qemu-nbd holds the target for writing: the mirror must not start."""
    target = disk.parent / "target.img"
    target.write_bytes(bytes(MIB))
    pid_file = disk.parent / "pid"
    subprocess.run(["qemu-nbd", "-f", "raw", "--fork", "--persistent", "--pid-file",
                    str(pid_file), "-k", str(disk.parent / "nbd"), str(target)],
                   check=True, timeout=30)
    try:
        _, qmp = program.storage_daemon()
        qmp.execute("blockdev-add", driver="file", node_name="s", filename=str(disk))
        with pytest.raises(QmpError, match="lock"):
            qmp.execute("blockdev-add", driver="file", node_name="t", filename=str(target))
            qmp.execute("blockdev-mirror", job_id="j", device="s", target="t", sync="full")
        assert qmp.execute("query-jobs") == []
    finally:
        os.kill(int(pid_file.read_text()), 15)


def test_target_smaller_than_source(program, disk):
    target = disk.parent / "target.img"
    target.write_bytes(bytes(MIB // 2))
    _, qmp = program.storage_daemon()
    for name, image in (("s", disk), ("t", target)):
        qmp.execute("blockdev-add", driver="file", node_name=name, filename=str(image))
    qmp.execute("blockdev-mirror", job_id="j", device="s", target="t", sync="full")
    end = qmp.event("BLOCK_JOB_COMPLETED", device="j")
    assert "size" in end["data"]["error"], end
    qmp.status("j", "null")
    assert {node["node-name"] for node in qmp.execute("query-named-block-nodes")} == {"s", "t"}


def test_socket_path_taken_by_a_file(disk):
    one_line(run("storage-daemon", "--qmp", f"unix:{disk}"), 1, str(disk))
    assert disk.stat().st_size == MIB


def test_socket_path_taken_by_a_living_monitor(program, disk):
    program.storage_daemon()
    path = program.folder / "qmp.0"
    one_line(run("storage-daemon", "--qmp", f"unix:{path}"), 1, str(path), "in use")
    assert path.exists()


def test_no_kvm_is_one_line_with_a_remedy(disk):
    """/dev hidden behind an empty one: run and demo say what to do."""
    hide = ("mount -t tmpfs none /dev && mknod /dev/null c 1 3 && mknod /dev/urandom c 1 9"
            " && exec \"$@\"")
    for arguments in (["run", "--kernel", BINARY], ["demo"]):
        result = subprocess.run(
            ["unshare", "-m", "sh", "-c", hide, "sh", BINARY, *arguments],
            capture_output=True, text=True, timeout=60, check=False)
        if "unshare:" in result.stderr or "mount:" in result.stderr:
            pytest.skip("cannot hide /dev/kvm: no right to mount")
        one_line(result, 1, "/dev/kvm")


def test_disk_full_at_copy_leaves_source_and_daemon_alive(program, tmp_path):
    """The target's file system is full: the job fails, the daemon goes on."""
    full = tmp_path / "full"
    full.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", full],
                      capture_output=True, check=False).returncode != 0:
        pytest.skip("no right to mount a small file system")
    try:
        source = tmp_path / "source.img"
        source.write_bytes(os.urandom(4 * MIB))
        before = source.read_bytes()
        with open(full / "target.img", "wb") as target:
            target.truncate(4 * MIB)
        process, qmp = program.storage_daemon()
        for name, image in (("s", source), ("t", full / "target.img")):
            qmp.execute("blockdev-add", driver="file", node_name=name, filename=str(image))
        qmp.execute("blockdev-mirror", job_id="j", device="s", target="t", sync="full")
        end = qmp.event("BLOCK_JOB_COMPLETED", device="j")
        assert "No space left" in end["data"]["error"], end
        qmp.status("j", "null")
        assert process.alive()
        assert source.read_bytes() == before
        for name in ("s", "t"):
            qmp.execute("blockdev-del", node_name=name)
        qmp.execute("quit")
        process.wait()
    finally:
        subprocess.run(["umount", full], check=False)
