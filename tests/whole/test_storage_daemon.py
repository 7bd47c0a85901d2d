"""How the storage daemon is started, found and ended by scripts and service managers."""
import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import time

import pytest

from support import nbd
from support.program import BINARY, PATIENCE, QmpError, run

MIB = 1024 * 1024
FOR_EVER_NS = 3600 * 10**9


@pytest.fixture
def disk(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(MIB))
    return path


def end_of(pid):
    """Waits until a process that is not ours has gone."""
    deadline = time.monotonic() + PATIENCE
    while os.path.exists(f"/proc/{pid}"):
        with open(f"/proc/{pid}/stat", encoding="ascii") as stat:
            if stat.read().rsplit(")", 1)[1].split()[0] == "Z":
                return
        assert time.monotonic() < deadline
        time.sleep(0.02)


def wait_until(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def wait_for(path):
    wait_until(path.exists)


def test_qemus_words_for_a_monitor(program, disk):
    path = program.folder / "monitor"
    process = program.start(
        "storage-daemon",
        "--blockdev", f"driver=file,node-name=f,filename={disk}",
        "--blockdev", "driver=raw,node-name=r,file=f",
        "--chardev", f"socket,path={path},server=on,wait=off,id=c",
        "--monitor", "chardev=c,mode=control,pretty=on")
    qmp = program.connect(path)
    assert {row["node-name"] for row in qmp.execute("query-named-block-nodes")} == {"f", "r"}
    qmp.execute("quit")
    assert process.wait() == 0, process.errors()
    assert not path.exists()


@pytest.mark.parametrize("words, status, text", [
    (["--monitor", "c", "--chardev", "socket,path=s,server=on,wait=off,id=c"], 1, "not found"),
    (["--chardev", "socket,path=s,server=on,id=c", "--chardev", "socket,path=t,server=on,id=c",
      "--monitor", "c"], 1, "Duplicate ID 'c'"),
    (["--chardev", "socket,path=s,server=on,id=c", "--monitor", "c", "--monitor", "c"], 1, "'c'|\"c\""),
    (["--chardev", "null,id=c", "--monitor", "c"], 2, "not supported"),
    (["--chardev", "stdio,id=c", "--chardev", "stdio,id=d", "--monitor", "c"], 1, "multiple"),
    (["--chardev", "stdio,id=c", "--monitor", "c", "--daemonize"], 1, "--daemonize"),
    (["--chardev", "socket,path=s,server=on", "--monitor", "c"], 2, "no id"),
    (["--qmp", "fd:nobody"], 1, "nobody"),
    (["--qmp", "fd:999"], 1, "999"),
    (["--qmp", "fd:0"], 1, "listening"),
    (["--blockdev", "driver=null-co,node-name=n"], 2, "--qmp"),
    (["--qmp", "unix:q", "--pidfile", "none/pid"], 1, "none/pid"),
    (["--qmp", "unix:q", "--blockdev", "driver=null-co,node-name=f",
      "--blockdev", "driver=throttle,node-name=n,throttle-group=t,file=f",
      "--object", "throttle-group,id=t"], 1, "'t'"),
])
def test_what_cannot_be_started_is_one_line(tmp_path, words, status, text):
    result = run("storage-daemon", *words, cwd=tmp_path)
    assert result.returncode == status, result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert any(part in result.stderr for part in text.split("|")), result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_pidfile_lives_as_long_as_the_process(program):
    pidfile = program.folder / "pid"
    pidfile.write_text("left behind by a crash")
    process, qmp = program.storage_daemon("--pidfile", pidfile)
    qmp.execute("query-version")
    assert pidfile.read_text() == f"{process.popen.pid}\n"
    second = run("storage-daemon", "--qmp", f"unix:{program.folder}/other", "--pidfile", pidfile)
    assert second.returncode == 1 and str(process.popen.pid) in second.stderr
    assert pidfile.read_text() == f"{process.popen.pid}\n"
    process.popen.terminate()
    assert process.wait() == 0, process.errors()
    assert not pidfile.exists()


def test_a_daemon_is_ready_when_its_parent_exits(program, disk):
    path, pidfile = program.folder / "monitor", program.folder / "pid"
    # Captured: the daemon must not keep the pipes open.
    started = run("storage-daemon", "--daemonize", "--pidfile", "pid", "--qmp", "unix:monitor",
                  "--blockdev", "driver=file,node-name=f,filename=disk.img", cwd=program.folder)
    assert (started.returncode, started.stdout, started.stderr) == (0, "", "")
    pid = int(pidfile.read_text())
    try:
        # At once: nothing is waited for.
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(path))
        qmp = program.connect(path)
        assert [row["node-name"] for row in qmp.execute("query-named-block-nodes")] == ["f"]
        assert os.getsid(pid) == pid
        for number in range(3):
            assert os.readlink(f"/proc/{pid}/fd/{number}") == "/dev/null"
    finally:
        os.kill(pid, signal.SIGTERM)
    end_of(pid)
    assert not pidfile.exists() and not path.exists()


def test_a_daemon_that_fails_says_so_through_its_parent(tmp_path):
    for words, status, text in (
            (["--qmp", "unix:q", "--blockdev", "driver=file,node-name=f,filename=none.img"],
             1, "none.img"),
            (["--qmp", "unix:q", "--pidfile", "none/pid"], 1, "none/pid"),
            (["--qmp", "tcp:q"], 2, "unix:PATH")):
        started = run("storage-daemon", "--daemonize", *words, cwd=tmp_path)
        assert started.returncode == status, started.stderr
        assert text in started.stderr and len(started.stderr.splitlines()) == 1
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("daemonize", [False, True])
def test_sockets_are_passed_by_a_service_manager(program, daemonize):
    path, pidfile = program.folder / "passed", program.folder / "pid"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        # The shell's pid is that of the program it becomes.
        script = 'n=$1; shift; export LISTEN_PID=$$ LISTEN_FDS=2 LISTEN_FDNAMES=other:qmp; ' \
                 f'exec "$@" 3</dev/null 4<&{listener.fileno()}'
        command = [BINARY, "storage-daemon", "--qmp", "fd:qmp", "--pidfile", str(pidfile)]
        if daemonize:
            command.append("--daemonize")
        process = subprocess.Popen(["bash", "-c", script, "bash", "-", *command],
                                   pass_fds=[listener.fileno()])
    if daemonize:
        assert process.wait(PATIENCE) == 0
    wait_for(pidfile)
    pid = int(pidfile.read_text())
    qmp = program.connect(path)
    assert "qemu" in qmp.execute("query-version")
    os.kill(pid, signal.SIGTERM)
    end_of(pid)
    process.wait(PATIENCE)
    # It is somebody else's.
    assert path.exists()


def test_a_passed_socket_can_be_named_by_its_number(program):
    path = program.folder / "passed"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        number = listener.fileno()
        process = subprocess.Popen(
            [BINARY, "storage-daemon", "--chardev", f"socket,fd={number},server=on,id=c",
             "--monitor", "c"], pass_fds=[number])
    try:
        program.connect(path).execute("quit")
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.wait()


def add_images(qmp, folder, *names, size=MIB):
    for name in names:
        path = folder / f"{name}.img"
        with open(path, "wb") as image:
            image.write(os.urandom(size))
        qmp.execute("blockdev-add", driver="raw", node_name=name,
                    file={"driver": "file", "filename": str(path)})


def wait_jobs(qmp, **statuses):
    deadline = time.monotonic() + PATIENCE
    while True:
        seen = {job["id"]: job["status"] for job in qmp.execute("query-jobs")}
        if all(seen.get(name) == status for name, status in statuses.items()):
            return
        assert time.monotonic() < deadline, seen
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_jobs_in_every_state_end_with_a_signal(program, number):
    process, qmp = program.storage_daemon()
    states = {"running": {"speed": 1}, "paused": {"speed": 1}, "ready": {},
              "standby": {}, "pending": {"auto_finalize": False},
              "concluded": {"auto_dismiss": False}}
    for name, options in states.items():
        add_images(qmp, program.folder, f"s-{name}", f"t-{name}")
        qmp.execute("blockdev-mirror", job_id=name, device=f"s-{name}", target=f"t-{name}",
                    sync="full", **options)
    qmp.execute("job-pause", id="paused")
    wait_jobs(qmp, ready="ready", standby="ready", pending="ready", concluded="ready")
    qmp.execute("job-pause", id="standby")
    for name in ("pending", "concluded"):
        qmp.execute("job-complete", id=name)
    wait_jobs(qmp, **{name: name for name in states})
    process.popen.send_signal(number)
    assert process.wait() == 0, process.errors()
    assert process.errors() == ""


def mirror_to_what_hangs(qmp):
    """Mirrors s to a target that never answers and cancels that by force, until requests
    were on their way by then: so the target stays in use."""
    for attempt in range(50):
        qmp.execute("blockdev-add", driver="null-co", node_name="far", size=MIB,
                    latency_ns=FOR_EVER_NS)
        qmp.execute("blockdev-mirror", job_id="j0", device="s", target="far", sync="full")
        time.sleep(attempt * 0.1)
        qmp.execute("job-cancel", id="j0")
        qmp.event("BLOCK_JOB_CANCELLED", device="j0")
        qmp.status("j0", "null")
        try:
            qmp.execute("blockdev-del", node_name="far")
        except QmpError as error:
            assert "in use" in error.desc
            return
    raise AssertionError("no request of the mirror was on its way")


def test_storage_that_hangs_is_given_up_in_time(program):
    process, qmp = program.storage_daemon()
    add_images(qmp, program.folder, "s")
    mirror_to_what_hangs(qmp)
    process.popen.terminate()
    assert process.wait() == 1
    assert "in time" in process.errors()


def test_a_forced_cancel_does_not_wait_for_a_target_that_hangs(program):
    _, qmp = program.storage_daemon()
    add_images(qmp, program.folder, "s", "t")
    mirror_to_what_hangs(qmp)
    # The source is nobody's any more.
    qmp.execute("blockdev-mirror", job_id="j1", device="s", target="t", sync="full")
    qmp.status("j1", "ready")
    qmp.execute("job-complete", id="j1")
    qmp.event("BLOCK_JOB_COMPLETED", device="j1")


def test_clients_that_do_not_read_do_not_keep_it(program):
    process, qmp = program.storage_daemon()
    request = json.dumps({"execute": "query-commands"}).encode() + b"\n"
    qmp.socket.settimeout(1)
    # Until nothing more is taken: the replies fill every buffer.
    with contextlib.suppress(TimeoutError):
        while True:
            qmp.socket.send(request * 100)
    process.popen.terminate()
    assert process.wait() == 0, process.errors()


def test_a_mirror_to_an_nbd_server_that_hangs_does_not_keep_it(program):
    far = program.folder / "far.img"
    far.write_bytes(bytes(8 * MIB))
    path = program.folder / "nbd"
    server = subprocess.Popen(["qemu-nbd", "-f", "raw", "-t", "-k", str(path), str(far)])
    try:
        wait_for(path)
        process, qmp = program.storage_daemon()
        add_images(qmp, program.folder, "s", size=8 * MIB)
        qmp.execute("blockdev-add", driver="nbd", node_name="far",
                    server={"type": "unix", "path": str(path)})
        qmp.execute("blockdev-mirror", job_id="j0", device="s", target="far", sync="full",
                    speed=MIB)
        qmp.status("j0", "running")
        server.send_signal(signal.SIGSTOP)
        qmp.execute("block-job-set-speed", device="j0", speed=0)
        process.popen.terminate()
        # A request may hang in the server: then it is given up.
        assert process.wait() in (0, 1), process.errors()
    finally:
        server.kill()
        server.wait()


def test_exports_from_the_command_line_are_served_when_the_parent_exits(program, disk):
    pidfile = program.folder / "pid"
    started = run("storage-daemon", "--daemonize", "--pidfile", pidfile,
                  "--blockdev", f"driver=file,node-name=f,filename={disk}",
                  "--object", "throttle-group,id=t",
                  "--blockdev", "driver=throttle,node-name=n,throttle-group=t,file=f",
                  "--nbd-server", f"addr.type=unix,addr.path={program.folder}/nbd",
                  "--export", "nbd,id=e,node-name=n,name=disk")
    assert started.returncode == 0, started.stderr
    pid = int(pidfile.read_text())
    try:
        info = subprocess.run(
            ["qemu-img", "compare", "-f", "raw", "-F", "raw", str(disk),
             f"nbd+unix:///disk?socket={program.folder}/nbd"],
            capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert "identical" in info.stdout, info
    finally:
        os.kill(pid, signal.SIGTERM)
    end_of(pid)
    assert not (program.folder / "nbd").exists()


def test_an_export_comes_after_its_server(tmp_path, disk):
    words = ["--blockdev", f"driver=file,node-name=f,filename={disk}",
             "--export", "nbd,id=e,node-name=f", "--nbd-server", "addr.type=unix,addr.path=n"]
    result = run("storage-daemon", *words, cwd=tmp_path)
    assert result.returncode == 1 and "'e'" in result.stderr, result.stderr


def test_the_nbd_server_takes_a_passed_socket_by_its_name(program, disk):
    path = program.folder / "passed"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        script = 'export LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=nbd; ' \
                 f'exec "$@" 3<&{listener.fileno()}'
        process = subprocess.Popen(
            ["bash", "-c", script, "bash", BINARY, "storage-daemon",
             "--blockdev", f"driver=file,node-name=f,filename={disk}",
             "--nbd-server", "addr.type=fd,addr.str=nbd", "--export", "nbd,id=e,node-name=f"],
            pass_fds=[listener.fileno()])
    try:
        # The server serves from its option on, and has the export from the next one on.
        deadline = time.monotonic() + PATIENCE
        while True:
            info = subprocess.run(["qemu-img", "info", "--output=json",
                                   f"nbd+unix:///f?socket={path}"],
                                  capture_output=True, text=True, timeout=PATIENCE, check=False)
            if info.returncode == 0:
                break
            assert "export 'f' not present" in info.stderr, info.stderr
            assert time.monotonic() < deadline
        assert json.loads(info.stdout)["virtual-size"] == MIB
        process.terminate()
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.wait()


#: 64 KiB from the beginning of the disk.
NBD_READ = struct.pack(">IHHQQI", 0x25609513, 0, 0, 1, 0, 65536)


def nbd_client(path, export):
    """A connection to an export, through the shortest handshake there is."""
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(PATIENCE)
    connection.connect(str(path))
    stream = connection.makefile("rb", buffering=0)
    assert stream.read(18).startswith(b"NBDMAGICIHAVEOPT")
    name = export.encode()
    # Fixed newstyle, no zeroes; NBD_OPT_EXPORT_NAME.
    connection.sendall(struct.pack(">I8sII", 3, b"IHAVEOPT", 1, len(name)) + name)
    assert len(stream.read(10)) == 10
    return connection


def test_nbd_clients_in_the_middle_of_a_request_do_not_keep_it(program):
    """Requests that hang in the storage, and a client that does not read replies."""
    process, qmp = program.storage_daemon()
    add_images(qmp, program.folder, "disk")
    qmp.execute("blockdev-add", driver="null-co", node_name="far", size=MIB,
                latency_ns=FOR_EVER_NS)
    qmp.execute("nbd-server-start", addr={"type": "unix",
                                          "data": {"path": str(program.folder / "nbd")}})
    for node in ("disk", "far"):
        qmp.execute("block-export-add", type="nbd", id=node, node_name=node)
    with nbd_client(program.folder / "nbd", "far") as hung, \
            nbd_client(program.folder / "nbd", "disk") as deaf:
        hung.sendall(NBD_READ)
        deaf.settimeout(1)
        # Until nothing more is taken: the replies fill every buffer.
        with contextlib.suppress(TimeoutError):
            while True:
                deaf.send(NBD_READ * 100)
        process.popen.terminate()
        assert process.wait() == 1
        assert "'far'" in process.errors()


def test_a_stderr_that_takes_nothing_ends_no_daemon(program):
    path = program.folder / "monitor"
    with open("/dev/full", "wb") as full:
        process = subprocess.Popen(
            [BINARY, "storage-daemon", "--log-level", "debug", "--qmp", f"unix:{path}"],
            stdin=subprocess.DEVNULL, stderr=full)
    try:
        for _ in range(3):
            # Each client that comes and goes is logged.
            qmp = program.connect(path)
            qmp.execute("query-version")
            qmp.close()
        process.terminate()
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.wait()


def test_a_main_thread_that_hangs_is_ended_by_a_signal(program):
    """It hangs in writing its log to a pipe that nobody reads."""
    path = program.folder / "monitor"
    read, write = os.pipe()
    process = subprocess.Popen(
        [BINARY, "storage-daemon", "--log-level", "debug", "--qmp", f"unix:{path}"],
        stdin=subprocess.DEVNULL, stderr=write)
    try:
        # A greeting says that it listens for signals.
        qmp = program.connect(path)
        open_files = f"/proc/{process.pid}/fd"
        connected = len(os.listdir(open_files))
        qmp.close()
        wait_until(lambda: len(os.listdir(open_files)) < connected)
        os.set_blocking(write, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(write, b"x" * 65536)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(write, b"x")
        os.set_blocking(write, True)
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(path))
            # Once it is accepted, that is logged before main looks for anything else.
            wait_until(lambda: len(os.listdir(open_files)) >= connected)
            process.terminate()
            assert process.wait(PATIENCE) == 1
    finally:
        process.kill()
        process.wait()
        os.close(read)
        os.close(write)


def test_nodes_inside_one_another_without_end_are_refused(program):
    process, qmp = program.storage_daemon()
    for levels in (110, 130, 900):
        below = {"driver": "null-co"}
        for _ in range(levels):
            below = {"driver": "raw", "file": below}
        with pytest.raises(QmpError, match="others|inside|depth|nesting"):
            qmp.execute("blockdev-add", node_name="top", **below)
    qmp.execute("blockdev-add", driver="null-co", node_name="n0")
    with pytest.raises(QmpError, match="others"):
        for number in range(1, 200):
            qmp.execute("blockdev-add", driver="raw", node_name=f"n{number}",
                        file=f"n{number - 1}")
    qmp.execute("quit")
    assert process.wait() == 0, process.errors()


def test_a_client_at_stdin_and_stdout():
    process = subprocess.Popen(
        [BINARY, "storage-daemon", "--chardev", "stdio,id=c", "--monitor", "c"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    commands = [{"execute": name, "id": name}
                for name in ("qmp_capabilities", "query-version", "quit")]
    said, _ = process.communicate("".join(map(json.dumps, commands)), timeout=PATIENCE)
    greeting, *replies = map(json.loads, said.splitlines())
    assert "QMP" in greeting
    assert [reply["id"] for reply in replies] == [command["id"] for command in commands]
    assert process.returncode == 0


def test_the_end_of_stdin_ends_the_client_and_not_the_daemon(program):
    path = program.folder / "monitor"
    process = program.start("storage-daemon", "--chardev", "stdio,id=c", "--monitor", "c",
                            "--qmp", f"unix:{path}", stdout=subprocess.PIPE)
    # Its stdin is /dev/null.
    assert b"QMP" in process.popen.stdout.readline()
    program.connect(path).execute("quit")
    assert process.wait() == 0, process.errors()


def test_a_monitor_on_a_tcp_socket(program):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = program.start(
        "storage-daemon", "--chardev",
        f"socket,host=127.0.0.1,port={port},server=on,wait=off,id=c", "--monitor", "c")
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            client = socket.create_connection(("127.0.0.1", port), PATIENCE)
            break
        except ConnectionRefusedError:
            assert time.monotonic() < deadline and process.alive(), process.errors()
            time.sleep(0.02)
    with client, client.makefile("rb") as lines:
        assert b"QMP" in lines.readline()
        client.sendall(b'{"execute": "qmp_capabilities"}{"execute": "quit"}')
        assert lines.readline() == lines.readline() == b'{"return": {}}\r\n'
    assert process.wait() == 0


@pytest.mark.parametrize("option, words, text", [
    ("object", "help", "List of user creatable objects:\n  iothread\n  throttle-group\n"),
    ("object", "throttle-group,help", "  x-iops-total=<int>\n"),
    ("blockdev", "help", "  raw\n"),
    ("blockdev", "driver=raw,help",
     "  file=<str>, or file.driver=<str> and what that takes (required)\n"),
    ("chardev", "help", "Available chardev backend types:\n  socket\n  stdio\n"),
    ("chardev", "socket,?", "  path=<str>\n"),
    ("monitor", "help", "  chardev=<str>"),
    ("nbd-server", "help", "  addr.path=<str> (required with addr.type=unix)\n"),
    ("export", "help", "  nbd\n"),
    ("export", "nbd,help", "  node-name=<str> (required)\n"),
])
def test_what_there_is_for_an_option_is_told(option, words, text):
    result = run("storage-daemon", f"--{option}", words)
    assert result.returncode == 0
    assert text in result.stdout and not result.stdout.startswith("error")
    assert result.stderr == ""


def test_nbd_clients_wait_until_everything_on_the_command_line_is_done(program, disk, tmp_path):
    server, peer = tmp_path / "nbd.sock", tmp_path / "peer.sock"
    program.start(
        "storage-daemon", "--qmp", f"unix:{tmp_path / 'qmp'}",
        "--nbd-server", f"addr.type=unix,addr.path={server}",
        # This waits for a server that comes later.
        "--blockdev", f"nbd,node-name=n,server.type=unix,server.path={peer},export=x,"
        "open-timeout=60",
        "--export", "nbd,id=e,node-name=n,name=late")
    deadline = time.monotonic() + PATIENCE
    while not server.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    early = nbd.Raw(server)
    program.start(
        "storage-daemon", "--qmp", f"unix:{tmp_path / 'qmp2'}",
        "--nbd-server", f"addr.type=unix,addr.path={peer}",
        "--blockdev", f"file,node-name=f,filename={disk}",
        "--export", "nbd,id=e,node-name=f,name=x,writable=on")
    early.greet()
    replies = early.option(nbd.GO, struct.pack(">I", 4) + b"late" + bytes(2))
    assert replies[-1][0] == 1
