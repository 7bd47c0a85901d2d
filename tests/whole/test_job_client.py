"""diptych job, the client: against diptych's own storage daemon, QEMU's, and peers
that do not behave."""
import contextlib
import fcntl
import json
import os
import pty
import shutil
import signal
import socket
import struct
import subprocess
import termios
import threading
import time

import pytest

from support.program import BINARY, PATIENCE, QmpError, run

MIB = 1024 * 1024
DONE, FAILED, USAGE, CANCELLED, LOST = 0, 1, 2, 3, 4
#: Slow enough for a test to act while a job copies, whatever the machine.
SLOW = "256K"


class Server:
    """A storage daemon with a disk 'disk' of 8 MiB on two monitor sockets."""

    def __init__(self, program, kind, arguments):
        self.folder = program.folder
        self.source = self.folder / "source.img"
        self.source.write_bytes(os.urandom(4 * MIB))
        os.truncate(self.source, 8 * MIB)
        self.sockets = [self.folder / "qmp1", self.folder / "qmp2"]
        node = f"driver=raw,node-name=disk,file.driver=file,file.filename={self.source}"
        if kind == "diptych":
            words = [BINARY, "storage-daemon", "--blockdev", node]
            for path in self.sockets:
                words += ["--qmp", f"unix:{path}"]
        else:
            words = [kind, *arguments, "--blockdev", node]
            for number, path in enumerate(self.sockets):
                words += ["--chardev", f"socket,path={path},server=on,wait=off,id=c{number}",
                          "--monitor" if "storage" in kind else "--mon",
                          f"chardev=c{number}" + (",mode=control" if "system" in kind else "")]
        if "system" in kind:
            # QEMU's emulator has its long options with one dash.
            words = [word[1:] if word.startswith("--") else word for word in words]
        self.process = subprocess.Popen(words, stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + PATIENCE
        while not all(path.exists() for path in self.sockets):
            assert self.process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)

    def job(self, *words, **options):
        """Runs the client to its end, on the first socket."""
        return run("job", *words, "--qmp", f"unix:{self.sockets[0]}", **options)

    def other(self, *words):
        """The same on the second socket, beside a client on the first."""
        return run("job", *words, "--qmp", f"unix:{self.sockets[1]}")

    def start(self, *words):
        """Starts the client on the first socket."""
        return subprocess.Popen(
            [BINARY, "job", *map(str, words), "--qmp", f"unix:{self.sockets[0]}"],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def jobs(self):
        """The jobs by id, asked on the second socket."""
        listed = self.other("list", "--json")
        assert listed.returncode == DONE, listed.stderr
        rows = [json.loads(line) for line in listed.stdout.splitlines()]
        return {row["id"]: row for row in rows}

    def wait_job(self, name, *statuses):
        deadline = time.monotonic() + PATIENCE
        while self.jobs().get(name, {}).get("status") not in statuses:
            assert time.monotonic() < deadline, self.jobs()
            time.sleep(0.05)

    def nodes(self):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(PATIENCE)
            connection.connect(str(self.sockets[1]))
            stream = connection.makefile("rw")
            stream.readline()
            for command in ("qmp_capabilities", "query-named-block-nodes"):
                stream.write(json.dumps({"execute": command}) + "\n")
                stream.flush()
                answer = json.loads(stream.readline())
            return {row["node-name"] for row in answer["return"]
                    if not row["node-name"].startswith("#")}

    def end(self):
        self.process.kill()
        self.process.wait()


KINDS = {
    "diptych": [],
    "qemu-storage-daemon": [],
    "qemu-system-x86_64": ["--machine", "none", "--nodefaults", "--display", "none"],
}


@pytest.fixture(params=KINDS)
def server(request, program):
    if request.param != "diptych" and not shutil.which(request.param):
        pytest.skip(f"no {request.param}")
    made = Server(program, request.param, KINDS[request.param])
    yield made
    made.end()


@pytest.fixture
def daemon(program):
    made = Server(program, "diptych", [])
    yield made
    made.end()


def lines(text):
    return [json.loads(line) for line in text.splitlines()]


def result(completed):
    """The last line of JSON."""
    return lines(completed.stdout)[-1]["result"]


def test_a_file_is_created_mirrored_to_and_pivoted_to(server):
    target = server.folder / "new.img"
    done = server.job("mirror", "disk", target, "--create", "--complete", "--json")
    assert done.returncode == DONE, done.stderr
    rows = lines(done.stdout)
    statuses = [row["data"]["status"] for row in rows
                if row.get("event") == "JOB_STATUS_CHANGE"]
    assert [status for status in statuses if status not in ("paused", "standby")] == [
        "created", "running", "ready", "waiting", "pending", "concluded", "null"]
    assert rows[-1]["result"]["outcome"] == "completed"
    assert rows[-1]["result"]["job"] == "mirror-disk"
    assert target.read_bytes() == server.source.read_bytes()
    # Data only where the source has data.
    assert target.stat().st_blocks * 512 < 6 * MIB
    assert "mirror-disk-target" in server.nodes()


def test_a_mirror_is_left_ready_and_completed_later(server):
    target = server.folder / "new.img"
    done = server.job("mirror", "disk", target, "--create", "--job-id", "j")
    assert (done.returncode, server.jobs()["j"]["status"]) == (DONE, "ready"), done.stderr
    assert "job complete" in done.stdout
    listed = server.job("list").stdout.splitlines()
    assert listed[0].split()[:3] == ["ID", "TYPE", "STATUS"]
    assert listed[1].split()[:3] == ["j", "mirror", "ready"]
    done = server.job("complete", "j")
    assert done.returncode == DONE, done.stderr
    assert done.stdout.startswith("j: completed")
    assert server.jobs() == {}
    assert server.job("watch").stdout == "There are no jobs\n"


def test_a_copy_ends_well_and_its_node_goes(server):
    target = server.folder / "new.img"
    done = server.job("mirror", "disk", target, "--create", "--copy-only")
    assert done.returncode == DONE, done.stderr
    assert target.read_bytes() == server.source.read_bytes()
    assert server.nodes() == {"disk"}


def test_an_nbd_export_is_copied_to_and_pivoted_to(server, program):
    target = server.folder / "exported.img"
    target.write_bytes(bytes(MIB))
    os.truncate(target, 8 * MIB)
    path = server.folder / "target.sock"
    _, qmp = program.storage_daemon(
        "--blockdev", f"driver=raw,node-name=x,file.driver=file,file.filename={target}",
        "--nbd-server", f"addr.type=unix,addr.path={path}",
        "--export", "nbd,id=e,node-name=x,name=a b,writable=on")
    uri = f"nbd+unix:///a%20b?socket={path}"
    refused = server.job("mirror", "disk", f"nbd+unix:///none?socket={path}")
    assert refused.returncode == FAILED
    assert "Requested export not available" in refused.stderr
    done = server.job("mirror", "disk", uri, "--copy-only", "--json")
    assert done.returncode == DONE, done.stderr
    assert result(done)["outcome"] == "completed"
    assert server.nodes() == {"disk"}
    assert target.read_bytes() == server.source.read_bytes()
    done = server.job("mirror", "disk", uri, "--complete")
    assert done.returncode == DONE, done.stderr
    assert "mirror-disk-target" in server.nodes()
    # It is the disk now.
    with pytest.raises(QmpError, match="still in use"):
        qmp.execute("block-export-del", id="e")
    assert target.read_bytes() == server.source.read_bytes()


def test_verbs_and_a_watcher_on_another_socket(server):
    target = server.folder / "new.img"
    started = server.job("mirror", "disk", target, "--create", "--job-id", "j",
                         "--speed", SLOW, "--detach")
    assert started.returncode == DONE, started.stderr
    watcher = server.start("watch", "j", "--json")
    with contextlib.closing(watcher.stdout):
        assert "progress" in json.loads(watcher.stdout.readline())
        assert server.other("pause", "j").returncode == DONE
        again = server.other("pause", "j")
        assert again.returncode == FAILED and "already" in again.stderr
        server.wait_job("j", "paused")
        assert server.other("complete", "j").returncode == FAILED
        assert server.other("resume", "j").returncode == DONE
        assert server.other("set-speed", "j", "128K").returncode == DONE
        assert server.jobs()["j"]["speed"] == 128 * 1024
        assert server.other("set-speed", "j", "0").returncode == DONE
        server.wait_job("j", "ready")
        assert server.other("cancel", "--force", "j").returncode == DONE
        seen = lines(watcher.stdout.read())
    assert watcher.wait(PATIENCE) == CANCELLED
    assert seen[-1]["result"]["outcome"] == "cancelled"
    assert "BLOCK_JOB_READY" in {row.get("event") for row in seen}


def test_soft_cancel_of_a_ready_mirror_is_a_copy(server):
    target = server.folder / "new.img"
    assert server.job("mirror", "disk", target, "--create", "--job-id", "j").returncode == DONE
    done = server.job("cancel", "j")
    assert done.returncode == DONE and "completed" in done.stdout
    assert target.read_bytes() == server.source.read_bytes()


def test_a_job_that_waits_for_finalize_and_dismiss(server):
    target = server.folder / "new.img"
    done = server.job("mirror", "disk", target, "--create", "--job-id", "j", "--complete",
                      "--auto-finalize", "off", "--auto-dismiss", "off")
    assert done.returncode == DONE and "job finalize" in done.stdout, done.stderr
    assert server.jobs()["j"]["status"] == "pending"
    assert server.job("dismiss", "j").returncode == FAILED
    done = server.job("finalize", "j", "--json")
    assert done.returncode == DONE and result(done)["outcome"] == "completed"
    assert server.jobs()["j"]["status"] == "concluded"
    assert server.job("watch", "j").returncode == DONE
    assert server.job("dismiss", "j").returncode == DONE
    assert server.jobs() == {}


def test_a_failed_job_is_told_and_its_node_goes(server):
    target = server.folder / "small.img"
    target.write_bytes(bytes(MIB))
    done = server.job("mirror", "disk", target)
    assert done.returncode == FAILED
    assert "failed" in done.stderr and "size" in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert server.nodes() == {"disk"}
    done = server.job("mirror", "disk", target, "--auto-dismiss", "off", "--job-id", "j")
    assert done.returncode == FAILED
    assert "error" in server.jobs()["j"]
    assert server.job("watch", "j").returncode == FAILED


def test_refusals_leave_nothing_behind(server):
    target = server.folder / "new.img"
    for words, text in (
            (["none", target, "--create"], "none"),
            (["disk", target], "--create"),
            (["disk", target, "--create", "--job-id", "9"], "9"),
            (["disk", "disk"], "itself"),
            (["disk", server.folder / "no/folder.img", "--create"], "Cannot create")):
        done = server.job("mirror", *words)
        assert done.returncode == FAILED, (words, done.stderr)
        assert text in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
        assert not target.exists()
    assert server.nodes() == {"disk"}
    for verb in ("pause", "resume", "cancel", "complete", "finalize", "dismiss", "watch"):
        assert server.job(verb, "none").returncode == FAILED, verb


def interrupted(server, number, *options):
    """A client that copies and gets a signal; its status and what it said."""
    client = server.start("mirror", "disk", server.folder / "new.img", "--create",
                          "--job-id", "j", "--speed", SLOW, *options)
    # It follows once it has told of progress.
    assert "copying" in client.stderr.readline()
    client.send_signal(number)
    _, errors = client.communicate(timeout=PATIENCE)
    return client.returncode, errors


def test_a_signal_ends_the_client_and_not_the_job(server):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        status, errors = interrupted(server, number)
        assert (status, "'j' goes on" in errors) == (128 + number, True), errors
        assert server.jobs()["j"]["status"] == "running"
        assert server.nodes() >= {"disk", "j-target"}
        done = server.job("cancel", "j", "--delete-node", "j-target")
        assert done.returncode == DONE, done.stderr
        assert server.nodes() == {"disk"}


def test_a_signal_cancels_the_job_where_that_is_asked_for(server):
    status, errors = interrupted(server, signal.SIGINT, "--cancel-on-interrupt")
    assert status == CANCELLED, errors
    assert server.jobs() == {}
    assert server.nodes() == {"disk"}


def test_a_server_that_ends_is_told_from_a_job_that_fails(server):
    client = server.start("mirror", "disk", server.folder / "new.img", "--create",
                          "--job-id", "j", "--speed", SLOW)
    assert "copying" in client.stderr.readline()
    server.process.kill()
    _, errors = client.communicate(timeout=PATIENCE)
    assert client.returncode == LOST
    assert "closed" in errors


def test_bars_on_a_terminal(daemon):
    primary, secondary = pty.openpty()
    fcntl.ioctl(secondary, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    target = daemon.folder / "new.img"
    client = subprocess.Popen(
        [BINARY, "job", "mirror", "disk", target, "--create", "--complete", "--speed", SLOW,
         "--qmp", f"unix:{daemon.sockets[0]}"],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=secondary)
    os.close(secondary)
    shown, fast = b"", False
    with contextlib.suppress(OSError):  # The terminal's end.
        while data := os.read(primary, 65536):
            shown += data
            if b"left" in shown and not fast:
                fast = daemon.other("set-speed", "mirror-disk", "0").returncode == DONE
    os.close(primary)
    assert client.communicate(timeout=PATIENCE)[0].startswith(b"mirror-disk: completed")
    assert client.returncode == DONE
    shown = shown.decode()
    for words in ("mirror-disk", " %", " of 8.00 MiB", "copying", "KiB/s", "left"):
        assert words in shown, shown


def test_usage_mistakes_exit_with_2(daemon):
    for words in (["fly"], ["mirror", "disk"], ["pause"], ["set-speed", "j", "fast"],
                  ["mirror", "disk", "t", "--sync", "some"],
                  ["mirror", "disk", "t", "--granularity", "3"],
                  ["mirror", "disk", "nbds://host/export"],
                  ["mirror", "disk", "nbd+unix:///export"],
                  ["mirror", "disk", "t", "--complete", "--detach"]):
        done = daemon.job(*words)
        assert done.returncode == USAGE, (words, done.stderr)
        assert len(done.stderr.splitlines()) == 1, done.stderr
    done = run("job", "list")
    assert done.returncode == USAGE and "--qmp" in done.stderr


def test_a_usage_mistake_is_told_in_json_where_that_is_asked_for(daemon):
    done = daemon.job("--json", "mirror", "disk")
    assert done.returncode == USAGE and len(lines(done.stdout)) == 1
    assert result(done)["outcome"] == "usage" and "<TARGET>" in result(done)["error"]


def test_a_client_whose_stdout_is_closed_does_not_know_what_became_of_the_job(daemon):
    read, write = os.pipe()
    os.close(read)
    client = subprocess.Popen(
        [BINARY, "job", "--json", "mirror", "disk", daemon.folder / "new.img", "--create",
         "--job-id", "j", "--speed", SLOW, "--qmp", f"unix:{daemon.sockets[0]}"],
        stdin=subprocess.DEVNULL, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    _, errors = client.communicate(timeout=PATIENCE)
    assert client.returncode == LOST and "goes on" in errors, errors
    assert daemon.jobs()["j"]["status"] == "running"


def test_a_client_whose_stderr_is_full_does_its_work(daemon):
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [BINARY, "job", "mirror", "disk", daemon.folder / "new.img", "--create",
             "--complete", "--qmp", f"unix:{daemon.sockets[0]}"],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=full, timeout=PATIENCE,
            check=False)
    assert done.returncode == DONE and b"completed" in done.stdout


def test_a_folder_whose_name_is_no_utf_8_is_told(daemon):
    folder = os.path.join(os.fsencode(daemon.folder), b"\xff")
    os.mkdir(folder)
    done = daemon.job("mirror", "disk", "new.img", "--create", cwd=folder)
    assert done.returncode == USAGE and "UTF-8" in done.stderr, done.stderr
    assert os.listdir(folder) == []


def test_no_socket(tmp_path):
    done = run("job", "list", "--qmp", f"unix:{tmp_path}/none", "--json")
    assert done.returncode == LOST and "none" in done.stderr
    assert result(done)["outcome"] == "lost"


def test_one_client_at_a_time_is_explained(daemon):
    with socket.socket(socket.AF_UNIX) as other:
        other.connect(str(daemon.sockets[0]))
        other.recv(4096)
        done = daemon.job("list", "--timeout", "1")
    assert done.returncode == LOST and "one client at a time" in done.stderr


GREETING = b'{"QMP": {"version": {}, "capabilities": []}}\r\n'
COMMANDS = b'{"return": [{"name": "query-jobs"}, {"name": "job-pause"}], "id": 2}\r\n'
NEGOTIATED = GREETING + b'{"return": {}, "id": 1}\r\n' + COMMANDS


def _flood(data):
    def act(connection):
        with contextlib.suppress(OSError):
            while True:
                connection.sendall(data)
    return act


def _say(data):
    def act(connection):
        connection.sendall(data)
        with contextlib.suppress(OSError):
            while connection.recv(65536):
                pass
    return act


def _say_and_close(data):
    return lambda connection: connection.sendall(data)


@pytest.mark.parametrize("act, words", [
    (_say(b""), ["No greeting"]),
    (_say(GREETING), ["qmp_capabilities", "1 s"]),
    (_say(NEGOTIATED), ["query-jobs", "1 s"]),
    (_say_and_close(b""), ["closed"]),
    (_say_and_close(NEGOTIATED), ["closed"]),
    (_say(b"HTTP/1.1 400 Bad Request\r\n"), ["Not a QMP message"]),
    (_say(b"\x1b[2J\xff\xfe\x00\n"), ["Not a QMP message"]),
    (_say(NEGOTIATED + b'{"return": 7, "id": 3}\r\n'), ["query-jobs", "not understood"]),
    (_say(NEGOTIATED + b'{"return": [], "id": "x"}\r\n'), ["Not a QMP message"]),
    (_say(b"[" * 100000 + b"\n"), ["Not a QMP message"]),
    (_flood(b"x" * 65536), ["Not a QMP message"]),
    (_flood(b"{" * 65536), ["line without end", "within"]),
    (_flood(NEGOTIATED + b'{"event": "E", "data": {}}\r\n' * 1000), ["Not a QMP message",
                                                                     "within", "without end"]),
    (_flood(b"\r\n" * 10000), ["No greeting"]),
])
def test_peers_that_do_not_behave(tmp_path, act, words):
    path = tmp_path / "peer"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve():
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                act(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        done = run("job", "list", "--timeout", "1", "--qmp", f"unix:{path}")
        thread.join(PATIENCE)
    assert done.returncode == LOST, done.stderr
    assert any(word in done.stderr for word in words), done.stderr
    assert len(done.stderr.splitlines()) == 1 and len(done.stderr) < 2000
    assert "\x1b" not in done.stderr
