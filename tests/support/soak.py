"""A storage daemon under random use: jobs, verbs, writers and faults, and a checker.

Each lane has a disk, exported by NBD to a writer, that is mirrored again and again to
targets of all kinds; whoever of the monitors is quickest decides how a job ends. What
must hold whatever they do:

- the events of a job are a path through the state machine, with one end event, and all
  monitors see the same ones in the same order (`legal`);
- refusals are of the classes that QMP clients know, and every command is answered;
- a disk that a job leaves behind, the source after a pivot or the target after a soft
  cancel, explains itself as one instant between the decision and the end (`sectors`);
- with its writer stopped, source and target are equal byte by byte;
- no acknowledged write is ever missing from the disk that the writer uses;
- ids can be used again at once, and in the end nothing is left: jobs, nodes, exports,
  file descriptors, threads, memory; and the daemon ends well.

Random numbers come from a seed, one sequence per thread: what each thread wants is the
same in each run, how they meet is not.
"""
import collections
import contextlib
import json
import os
import random
import socket
import subprocess
import threading
import time

from support.legal import Events
from support.program import Program, QmpError
from support.sectors import SECTOR, Client, Cut, Record, Writer, sector_of

MIB = 1 << 20
SECTORS = 2 * MIB // SECTOR
# No command, request or job may take longer, on a machine however loaded.
PATIENCE = 90
# A job that its monitors do not end in this time is helped, then cancelled.
HELP, ENOUGH = 3, 10
CLASSES = {"GenericError", "DeviceNotActive"}
GROWTH = 128 * MIB


class Stopped(Exception):
    """The soak is at its end."""


class Monitor:
    """A monitor whose events are read as they come. Commands of one at a time."""

    def __init__(self, soak, name, path, listen=None):
        self.soak, self.name, self.listen = soak, name, listen
        self.socket = socket.socket(socket.AF_UNIX)
        deadline = time.monotonic() + PATIENCE
        while self.socket.connect_ex(str(path)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"no monitor at {path}")
            time.sleep(0.02)
        self.events, self.replies = [], collections.deque()
        self.came = threading.Condition()
        self.closed = False
        self.busy = threading.Lock()
        self.thread = threading.Thread(target=self._read, name=f"reader {name}", daemon=True)
        self.thread.start()
        self.execute("qmp_capabilities")

    def _read(self):
        try:
            with self.socket.makefile("rb") as lines:
                for line in lines:
                    message = json.loads(line)
                    if "event" in message:
                        self.events.append(line)
                        if self.listen:
                            self.listen(message)
                    elif "QMP" not in message:
                        with self.came:
                            self.replies.append(message)
                            self.came.notify_all()
        except (OSError, ValueError) as error:
            self.soak.note(self.name, f"reading ended: {error}")
        with self.came:
            self.closed = True
            self.came.notify_all()

    def execute(self, command, **arguments):
        """Runs a command; returns what it returned, or raises QmpError."""
        arguments = {name.replace("_", "-"): value for name, value in arguments.items()
                     if value is not None}
        with self.busy:
            began = time.monotonic()
            number = self.soak.note(self.name, f"{command} {json.dumps(arguments)}")
            self.socket.sendall(json.dumps(
                {"execute": command, "arguments": arguments}).encode() + b"\n")
            with self.came:
                if not self.came.wait_for(lambda: self.replies or self.closed, PATIENCE):
                    self.soak.complain(f"{self.name}: {command} {arguments}: "
                                       f"no reply in {PATIENCE} s")
                    raise Stopped
                if not self.replies:
                    self.soak.complain(f"{self.name}: {command} {arguments}: connection ended")
                    raise Stopped
                message = self.replies.popleft()
            took = time.monotonic() - began
            self.soak.slowest = max(self.soak.slowest, (took, f"{command} {arguments}"))
        self.soak.commands += 1
        if "error" in message:
            error = message["error"]
            self.soak.refused += 1
            self.soak.note(self.name, f"#{number}: {error['class']}: {error['desc']}")
            legal = error["class"] in CLASSES and (
                error["class"] == "GenericError" or command.startswith("block-job-"))
            if not legal or not error["desc"]:
                self.soak.complain(f"{self.name}: {command} {arguments}: {error}")
            raise QmpError(error)
        return message["return"]

    def tries(self, command, **arguments):
        """The same, for what may be refused: None then."""
        try:
            return self.execute(command, **arguments)
        except QmpError:
            return None

    def close(self):
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.thread.join(PATIENCE)
        self.socket.close()


class Soak:
    """One daemon, its peer, and all that use them."""

    def __init__(self, folder, seed, seconds, lanes=3, monitors=3):
        self.folder, self.seed, self.seconds = folder, seed, seconds
        self.lane_count, self.monitor_count = lanes, monitors
        self.log = collections.deque(maxlen=4000)
        self.numbers = iter(range(1, 1 << 62))
        self.lock = threading.Lock()
        self.complaints = []
        self.commands = self.refused = 0
        self.slowest = (0, "")
        self.began = time.monotonic()
        self.ending = threading.Event()
        self.decisions = collections.defaultdict(list)
        self.tally = collections.Counter()
        self.program = Program(folder)
        self.small = folder / "small"
        self.lanes = []

    # --- what is told ---------------------------------------------------------

    def note(self, who, what):
        number = next(self.numbers)
        self.log.append(f"{time.monotonic():.3f} {who} #{number}: {what}")
        return number

    def complain(self, text):
        self.note("CHECKER", text)
        with self.lock:
            self.complaints.append(text)
        self.ending.set()

    def random(self, name):
        return random.Random(f"{self.seed}:{name}")

    def report(self):
        return "\n".join([
            f"seed {self.seed}, {self.seconds} s, {self.lane_count} lanes",
            *self.complaints[:10], "", "the last actions:", *self.log, "",
            "the daemon's log:", self.daemon.errors()[-8000:]])

    def decided(self, qmp, job, verb, command, **arguments):
        """Gives a job its end, and keeps when: before it is sent, or a fast job would be
        over before it is known. What is refused decided nothing."""
        decision = (time.monotonic(), verb)
        decisions = self.decisions[job]
        decisions.append(decision)
        if qmp.tries(command, **arguments) is None:
            decisions.remove(decision)

    def summary(self):
        return (f"{self.commands} commands ({self.refused} refused, slowest "
                f"{self.slowest[0]:.2f} s: {self.slowest[1]}), {self.events.count} events, "
                f"{self.events.lives} jobs {self.events.by_end}, {dict(self.tally)}")

    # --- the daemons ----------------------------------------------------------

    def start(self):
        self.small.mkdir()
        self.mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "soak", str(self.small)],
            check=False, capture_output=True).returncode == 0
        names = ["watch", *(f"lane{i}" for i in range(self.lane_count)),
                 *(f"m{i}" for i in range(self.monitor_count))]
        words = []
        for name in names:
            words += ["--qmp", f"unix:{self.folder}/{name}"]
        for name, limit in (("fast", 64 * MIB), ("slow", 3 * MIB)):
            words += ["--object", f"throttle-group,id={name},limits.bps-total={limit}"]
        self.nbd = self.folder / "nbd"
        self.daemon = self.program.start(
            "storage-daemon", *words,
            "--nbd-server", f"addr.type=unix,addr.path={self.nbd}")
        self.peer_nbd = self.folder / "peer-nbd"
        self.peer_daemon = self.program.start(
            "storage-daemon", "--qmp", f"unix:{self.folder}/peer",
            "--nbd-server", f"addr.type=unix,addr.path={self.peer_nbd}")
        self.events = Events(lambda name: name.endswith("m"), self.complain)
        self.monitors = {
            name: Monitor(self, name, self.folder / name,
                          self.events.take if name == "watch" else None)
            for name in names}
        self.peer = Monitor(self, "peer", self.folder / "peer")
        self.watch = self.monitors["watch"]
        self.has_qcow2 = self._can_qcow2()

    def _can_qcow2(self):
        path = self.folder / "probe.qcow2"
        make_qcow2(path, MIB)
        added = self.watch.tries("blockdev-add", driver="qcow2", node_name="probe",
                                 file={"driver": "file", "filename": str(path)})
        if added is None:
            return False
        self.watch.execute("blockdev-del", node_name="probe")
        return True

    def usage(self):
        """File descriptors, threads and resident bytes of the daemon."""
        folder = f"/proc/{self.daemon.popen.pid}"
        with open(f"{folder}/statm", encoding="ascii") as statm:
            resident = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return len(os.listdir(f"{folder}/fd")), len(self.threads()), resident

    def threads(self):
        """The names of the daemon's threads, but for two kinds that are kept in case there
        is work: the kernel's of io_uring, and the pool of helpers that open and close
        files, which is as large as it had to be and never shrinks."""
        names = []
        for entry in os.scandir(f"/proc/{self.daemon.popen.pid}/task"):
            with contextlib.suppress(OSError), open(f"{entry.path}/comm", encoding="utf-8") as comm:
                name = comm.read().strip()
                if not name.startswith(("iou-", "blocking-")):
                    names.append(name)
        return sorted(names)

    # --- a run ----------------------------------------------------------------

    def run(self):
        """Returns None, or what went wrong."""
        try:
            self.start()
            # What is made once and kept, such as the server's threads, is no leak.
            self.phase("warm-up", min(5, self.seconds / 6))
            base = self.settled()
            if not self.complaints:
                self.phase("soak", self.seconds)
            if not self.complaints:
                self.nothing_is_leaked(base)
            self.quit()
        except Stopped:
            pass
        except Exception as error:  # pylint: disable=broad-except
            self.complain(f"{type(error).__name__}: {error}")
        finally:
            self.program.end_all()
            if getattr(self, "mounted", False):
                subprocess.run(["umount", str(self.small)], check=False)
        return self.report() if self.complaints else None

    def phase(self, name, seconds):
        self.ending.clear()
        self.note("SOAK", f"phase {name}")
        self.lanes = [Lane(self, number, name) for number in range(self.lane_count)]
        threads = [threading.Thread(target=self.guarded, args=(lane.run,), name=lane.name)
                   for lane in self.lanes]
        chaos = [Chaos(self, self.monitors[f"m{number}"], self.random(f"{name} m{number}"))
                 for number in range(self.monitor_count)]
        threads += [threading.Thread(target=self.guarded, args=(one.run,)) for one in chaos]
        threads.append(threading.Thread(
            target=self.guarded, args=(self.harass_peer, self.random(f"{name} peer"))))
        for thread in threads:
            thread.start()
        self.ending.wait(seconds)
        self.ending.set()
        for thread in threads:
            thread.join(PATIENCE * 3)
            if thread.is_alive():
                self.complain(f"{thread.name} does not end")
                raise Stopped
        if not self.complaints:
            self.clear()
        self.one_story()

    def guarded(self, function, *arguments):
        try:
            function(*arguments)
        except Stopped:
            pass
        except Exception as error:  # pylint: disable=broad-except
            self.complain(f"{threading.current_thread().name}: {type(error).__name__}: {error}")

    def harass_peer(self, chance):
        """Cuts what is connected to the peer off, now and then."""
        while not self.ending.wait(1 + chance.random() * 4):
            self.peer.tries("nbd-server-stop")
            time.sleep(chance.choice((0, 0.05, 0.5)))
            self.peer.execute("nbd-server-start", addr={
                "type": "unix", "data": {"path": str(self.peer_nbd)}})
            for lane in self.lanes:
                lane.export_on_peer()

    def clear(self):
        """Ends what the monitors have left, in any state."""
        deadline = time.monotonic() + PATIENCE
        while True:
            jobs = self.watch.execute("query-jobs")
            if not jobs:
                break
            for job in jobs:
                self.watch.tries({"pending": "job-finalize", "concluded": "job-dismiss"}.get(
                    job["status"], "job-cancel"), id=job["id"])
            if time.monotonic() > deadline:
                self.complain(f"jobs that do not end: {jobs}")
                raise Stopped
            time.sleep(0.02)
        self.watch.tries("object-del", id="junk")
        while True:
            exports = self.watch.execute("query-block-exports")
            for export in exports:
                self.watch.tries("block-export-del", id=export["id"], mode="hard")
            nodes = self.watch.execute("query-named-block-nodes")
            for node in nodes:
                if not node["node-name"].startswith("#"):
                    self.watch.tries("blockdev-del", node_name=node["node-name"])
            if not nodes and not exports:
                break
            if time.monotonic() > deadline:
                self.complain(f"left behind: exports {exports}, nodes "
                              f"{[node['node-name'] for node in nodes]}")
                raise Stopped
            time.sleep(0.02)
        if self.events.listed():
            # The events of what is gone may still be on their way.
            with self.events.lock:
                self.events.lock.wait_for(lambda: not self.events.jobs, PATIENCE)
        if self.events.listed():
            self.complain(f"no null of {self.events.listed()}")
        for node in self.peer.execute("query-named-block-nodes"):
            self.complain(f"left behind on the peer: {node['node-name']}")

    def one_story(self):
        """All monitors have seen the same events."""
        deadline = time.monotonic() + PATIENCE
        story = self.watch.events
        for name, monitor in self.monitors.items():
            while len(monitor.events) < len(story) and time.monotonic() < deadline:
                time.sleep(0.02)
            for number, (one, other) in enumerate(zip(story, monitor.events, strict=False)):
                if one != other:
                    self.complain(f"event {number}: {one} for watch, {other} for {name}")
                    return
            if len(monitor.events) != len(story):
                self.complain(f"{name} saw {len(monitor.events)} events, watch {len(story)}")
                return
        for monitor in self.monitors.values():
            monitor.events.clear()

    def settled(self):
        """The usage once it has not changed for a while."""
        usage, since = self.usage(), time.monotonic()
        deadline = since + PATIENCE
        while time.monotonic() < min(since + 1, deadline):
            time.sleep(0.05)
            now = self.usage()
            if now[:2] != usage[:2]:
                usage, since = now, time.monotonic()
        return self.usage()

    def nothing_is_leaked(self, base):
        deadline = time.monotonic() + 30
        while True:
            usage = self.usage()
            if usage[0] <= base[0] and usage[1] <= base[1]:
                break
            if time.monotonic() > deadline:
                names = []
                for entry in os.scandir(f"/proc/{self.daemon.popen.pid}/fd"):
                    with contextlib.suppress(OSError):
                        names.append(os.readlink(entry.path))
                self.complain(f"leaked: file descriptors, threads {base[:2]} -> {usage[:2]}: "
                              f"{self.threads()} {sorted(names)}")
                return
            time.sleep(0.05)
        self.tally["MiB grown"] = (usage[2] - base[2]) // MIB
        if usage[2] > base[2] + GROWTH:
            self.complain(f"leaked: memory {base[2] // MIB} -> {usage[2] // MIB} MiB")

    def quit(self):
        for process, monitor in ((self.daemon, self.watch), (self.peer_daemon, self.peer)):
            if not process.alive():
                self.complain(f"a daemon has ended with {process.popen.returncode}: "
                              f"{process.errors()[-2000:]}")
                continue
            if not self.complaints:
                monitor.execute("quit")
                status = process.wait(PATIENCE)
                if status:
                    self.complain(f"quit: status {status}")
            if "panicked" in process.errors():
                self.complain(f"a panic: {process.errors()[-4000:]}")
        for monitor in self.monitors.values():
            monitor.close()
        self.peer.close()


def make_qcow2(path, size):
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), str(size)],
                   check=True, stdin=subprocess.DEVNULL)


class Target:
    """A node of one kind, with its data."""

    def __init__(self, node, path=None, qcow2=False, export=None):
        self.node, self.path, self.qcow2, self.export = node, path, qcow2, export
        self.on_peer = False

    def image(self, size):
        """The data, of a node that nobody uses any more."""
        if not self.qcow2:
            return self.path.read_bytes()[:size]
        raw = self.path.with_suffix(".raw")
        for command in (["qemu-img", "check", "-q", str(self.path)],
                        ["qemu-img", "convert", "-f", "qcow2", "-O", "raw",
                         str(self.path), str(raw)]):
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            # 3: clusters that are lost, which an image in use may have.
            if result.returncode not in (0, 3):
                raise AssertionError(f"{command}: {result.stdout}{result.stderr}")
        data = raw.read_bytes()
        raw.unlink()
        return data


class Lane:
    """A disk, its writer, and one job after another on it."""

    def __init__(self, soak, number, phase):
        self.soak, self.number = soak, number
        self.name = f"lane{number}"
        self.qmp = soak.monitors[self.name]
        self.chance = soak.random(f"{phase} {self.name}")
        self.phase = phase
        self.sectors = SECTORS + 3 * number
        self.size = self.sectors * SECTOR
        self.serial = 0
        self.lock = threading.Lock()
        self.peer_export = None
        self.record = Record(number, self.sectors)
        self.garbage = [sector_of(77, sector, 1) for sector in range(64)]

    # --- disks ----------------------------------------------------------------

    def make(self, kinds):
        """Adds a node of one of these kinds; None if it was refused."""
        self.serial += 1
        kind = self.chance.choice(kinds)
        node = f"n{self.number}-{self.serial}"
        folder = self.soak.small if kind == "small" else self.soak.folder
        path = folder / f"{self.phase}-{node}"
        target = Target(node, path)
        if kind == "qcow2":
            make_qcow2(path, self.size)
            target.qcow2 = True
        else:
            with open(path, "wb") as file:
                if kind != "small" and self.chance.random() < 0.5:
                    file.write(b"".join(self.garbage) * 4)
                file.truncate(self.size)
        file = {"driver": "file", "filename": str(path), "node-name": f"{node}-f"}
        if self.chance.random() < 0.5:
            file["discard"] = "unmap"
        options = {"node-name": node}
        if kind in ("file", "small"):
            options |= file | options
        elif kind in ("raw", "qcow2"):
            options |= {"driver": kind, "file": file}
        elif kind == "copy-on-read":
            options |= {"driver": kind, "file": file}
        elif kind == "throttle":
            options |= {"driver": "throttle", "file": file,
                        "throttle-group": self.chance.choice(("fast", "slow"))}
        elif kind == "blkdebug":
            options |= self._faulty(file)
        elif kind == "nbd":
            target.on_peer = True
            with self.lock:
                self.soak.peer.execute("blockdev-add", **(file | options))
                self.peer_export = node
            self.export_on_peer()
            options |= {"driver": "nbd", "export": node, "open-timeout": 2,
                        "reconnect-delay": self.chance.choice((0, 2)),
                        "server": {"type": "unix", "path": str(self.soak.peer_nbd)}}
        if self.qmp.tries("blockdev-add", **options) is None:
            if kind != "nbd":
                self.soak.complain(f"{self.name}: {options}: refused")
            self.remove_files(target)
            return None
        self.soak.tally[kind] += 1
        return target

    def _faulty(self, file):
        """A node over blkdebug with errors, each rule of its own kind."""
        chance = self.chance
        rules = []
        for _ in range(chance.randrange(3)):
            rule = {"event": chance.choice(("pwritev", "none", "write_aio", "read_aio",
                                            "flush_to_disk", "pwritev_zero")),
                    "errno": chance.choice((5, 5, 28)), "once": chance.random() < 0.85}
            if rule["event"] == "none":
                rule["iotype"] = chance.choice(("read", "write", "flush", "write-zeroes",
                                                "block-status"))
            if chance.random() < 0.6:
                rule["sector"] = chance.randrange(self.sectors)
            if chance.random() < 0.5:
                rule["immediately"] = True
            if chance.random() < 0.3:
                rule["delay-ns"] = chance.randrange(1, 200) * 10**6
            rules.append(rule)
        debug = {"driver": "blkdebug", "image": file} | ({"inject-error": rules} if rules else {})
        if chance.random() < 0.5:
            return {"driver": "raw", "file": debug | {"node-name": f"{file['node-name']}d"}}
        return debug

    def export_on_peer(self):
        with self.lock:
            if self.peer_export:
                self.soak.peer.tries("block-export-add", id=f"p{self.number}", type="nbd",
                                     node_name=self.peer_export, writable=True)

    def remove(self, target):
        """Takes a node that nobody needs out; others may be using it for a while."""
        deadline, pause = time.monotonic() + PATIENCE, 0.05
        while True:
            try:
                self.qmp.execute("blockdev-del", node_name=target.node)
                return
            except QmpError as error:
                if "ind node" in error.desc:
                    return
            for export in self.qmp.execute("query-block-exports"):
                if export["node-name"].startswith(target.node) and export["id"][0] == "x":
                    self.qmp.tries("block-export-del", id=export["id"], mode="hard")
            if time.monotonic() > deadline:
                self.soak.complain(f"{self.name}: {target.node} cannot be deleted: "
                                   f"{self.qmp.execute('query-named-block-nodes')}")
                raise Stopped
            time.sleep(pause)
            pause = min(pause * 1.5, 2)

    def remove_files(self, target):
        if target.on_peer:
            with self.lock:
                self.peer_export = None
                deadline = time.monotonic() + PATIENCE
                while self.soak.peer.tries("blockdev-del", node_name=target.node) is None:
                    self.soak.peer.tries("block-export-del", id=f"p{self.number}", mode="hard")
                    if time.monotonic() > deadline:
                        self.soak.complain(f"{target.node} stays on the peer")
                        raise Stopped
                    time.sleep(0.02)
        target.path.unlink(missing_ok=True)

    # --- a lane's life --------------------------------------------------------

    def run(self):
        soak = self.soak
        kinds = ["file", "raw", "throttle"] + ["qcow2"] * soak.has_qcow2
        disk = self.make(kinds)
        if disk.qcow2 or self.garbage:
            self._zero(disk)
        self.qmp.execute("block-export-add", type="nbd", id=self.name, name=self.name,
                         node_name=disk.node, writable=True)
        writer = Writer(self.record, soak.random(f"{self.phase} writer{self.number}"),
                        soak.nbd, self.name, soak.complain, PATIENCE)
        writer.start()
        try:
            while not soak.ending.is_set():
                kinds = ["file", "raw", "throttle", "blkdebug", "blkdebug", "copy-on-read"]
                kinds += ["qcow2"] * soak.has_qcow2
                kinds += ["nbd"] * (not disk.on_peer) + ["small"] * (
                    soak.mounted and "small" not in str(disk.path))
                target = self.make(kinds)
                if target:
                    disk = self.mirror(disk, target, writer)
            writer.pause()
            writer.stop()
            soak.tally["writes"] += writer.acked
            soak.tally["failed requests"] += writer.failed
            soak.tally["cuts"] += writer.cuts
            soak.tally["reads"] += writer.reads
            if not soak.complaints:
                self.check_disk()
                self.qmp.execute("block-export-del", id=self.name, mode="hard")
                self.remove(disk)
                self.remove_files(disk)
        finally:
            writer.stop()

    def _zero(self, disk):
        """A fresh disk, which may hold rubbish, begins as zeroes."""
        if not disk.qcow2:
            with open(disk.path, "r+b") as file:
                file.write(bytes(self.size))

    def check_disk(self):
        """Nothing that was acknowledged is missing, as its user sees it."""
        for _ in range(20):
            try:
                client = Client(self.soak.nbd, self.name, PATIENCE)
            except Cut as error:
                self.soak.complain(f"{self.name}: last reading: {error}")
                return
            data = client.read_all(self.size)
            client.close()
            if data is not None:
                break
            # An injected error, or a peer that is away.
            time.sleep(0.2)
        else:
            self.soak.tally["disks that could not be read"] += 1
            return
        now = time.monotonic()
        wrong = self.record.is_of_one_instant(data, now, now)
        if wrong:
            self.soak.complain(f"{self.name}: at the end: {wrong}")

    def options(self):
        chance = self.chance
        policy = ("report", "ignore", "stop", "enospc")
        def maybe(*values):
            return chance.choice((None, *values))
        return {
            "sync": chance.choice(("full", "full", "full", "top")),
            "speed": maybe(0, MIB, 8 * MIB),
            "granularity": maybe(512, 4096, 65536, MIB),
            "buf_size": maybe(0, 65536, MIB),
            "on_source_error": maybe(*policy), "on_target_error": maybe(*policy),
            "copy_mode": maybe("background", "write-blocking"),
            "filter_node_name": maybe(f"filter{self.number}"),
            "auto_dismiss": maybe(True, False), "unmap": maybe(True, False),
        }

    def mirror(self, disk, target, writer):
        """One job; returns the disk that the writer uses after it."""
        soak, qmp = self.soak, self.qmp
        manual = self.chance.random() < 0.35
        job = f"job{self.number}{'m' if manual else ''}"
        options = self.options()
        if options["sync"] == "top" and not target.qcow2:
            # What it leaves out must be the same already.
            with open(target.path, "r+b") as file:
                file.truncate(0)
                file.truncate(self.size)
        soak.events.over.pop(job, None)
        soak.decisions[job] = []
        started = time.monotonic()
        self.record.forget(started)
        if qmp.tries("blockdev-mirror", job_id=job, device=disk.node, target=target.node,
                     auto_finalize=not manual, **options) is None:
            soak.tally["mirrors refused"] += 1
            self.remove(target)
            self.remove_files(target)
            return disk
        soak.tally["mirrors"] += 1
        still = self.chance.random() < 0.3
        over = self.see_through(job, writer, still, started)
        if over is None:
            raise Stopped
        path, end = over.path, over.end
        node = next(export["node-name"] for export in qmp.execute("query-block-exports")
                    if export["id"] == self.name)
        completed = end is not None and "error" not in end["data"] and (
            end["event"] == "BLOCK_JOB_COMPLETED")
        # The node that is exported is the target itself, or what is above it.
        pivoted = node.startswith(target.node)
        soak.note(self.name, f"{job}: {path} {end} on {node}, decisions {soak.decisions[job]}")
        verbs = {verb for _, verb in soak.decisions[job]}
        if pivoted and (not completed or "complete" not in verbs):
            soak.complain(f"{self.name}: {job} pivoted: {end}, {soak.decisions[job]}, {path}")
        if completed and not pivoted and "cancel" not in verbs:
            soak.complain(f"{self.name}: {job} did not pivot: {end}, {soak.decisions[job]}")
        if completed and "ready" not in path:
            soak.complain(f"{self.name}: {job} completed without being ready: {path}")
        old = disk if pivoted else target
        if completed:
            soak.tally["pivots" if pivoted else "copies"] += 1
            self.compare(job, disk, target, old, over, writer)
        else:
            self.remove(old)
        if still:
            writer.resume()
        self.remove_files(old)
        return target if pivoted else disk

    def compare(self, job, disk, target, old, over, writer):
        """A completed job's images: the one left behind is of one instant."""
        soak = self.soak
        decided = min(at for at, _ in soak.decisions[job])
        ended = over.times["concluded"]
        # Somebody else may have ended the job while the writer was still at work.
        quiet = writer.quiet_since is not None and writer.quiet_since < decided
        if quiet and not (disk.qcow2 or target.qcow2):
            one, other = (x.path.read_bytes()[:self.size] for x in (disk, target))
            if one != other:
                unsure = self.record.unsure()
                wrong = [s for s in range(self.sectors) if s not in unsure
                         and one[s * SECTOR:(s + 1) * SECTOR] != other[s * SECTOR:(s + 1) * SECTOR]]
                if wrong:
                    soak.complain(f"{self.name}: {job}: {len(wrong)} sectors differ: {wrong[:20]}")
            soak.tally["compared byte by byte"] += 1
        self.remove(old)
        wrong = self.record.is_of_one_instant(old.image(self.size), decided, ended)
        if wrong:
            soak.complain(f"{self.name}: {job}: {'source' if old is disk else 'target'} "
                          f"{old.node}: {wrong}")

    def decide(self, job, verb, command, **arguments):
        self.soak.decided(self.qmp, job, verb, command, **arguments)

    def see_through(self, job, writer, still, started):
        """Waits for a job's end and helps it along. Returns what it was."""
        soak, qmp, events = self.soak, self.qmp, self.soak.events
        patience = self.chance.random() * 1.5
        manners = self.chance.choice(("complete", "complete", "soft", "force"))
        helped = decided = False
        while True:
            with events.lock:
                over = events.over.get(job)
                if over:
                    return over
                now = events.jobs.get(job)
                status = now.status if now else None
                ready = now.times.get("ready") if now else None
            if soak.complaints:
                return None
            at = time.monotonic()
            late = soak.ending.is_set()
            if at - started > PATIENCE:
                soak.complain(f"{self.name}: {job} does not end: {now.path[-20:] if now else None}, "
                              f"{qmp.execute('query-jobs')}")
                return None
            if ready and not decided and (at - ready > patience or late):
                decided = True
                if still:
                    writer.pause()
                if manners == "complete":
                    self.decide(job, "complete", "job-complete", id=job)
                elif manners == "soft":
                    self.decide(job, "cancel", "block-job-cancel", device=job)
                else:
                    qmp.tries("job-cancel", id=job)
            if (at - started > HELP or late) and not helped:
                helped = True
                qmp.tries("block-job-set-speed", device=job, speed=0)
            if at - started > HELP or late:
                if status == "pending":
                    qmp.tries("job-finalize", id=job)
                elif status == "concluded":
                    qmp.tries("job-dismiss", id=job)
                elif at - started > ENOUGH:
                    qmp.tries("job-cancel", id=job)
                elif status in ("paused", "standby"):
                    qmp.tries("job-resume", id=job)
                time.sleep(0.1)
            with events.lock:
                events.lock.wait(0.05)


class Chaos:
    """A person at a monitor who cannot make up their mind."""

    def __init__(self, soak, qmp, chance):
        self.soak, self.qmp, self.chance = soak, qmp, chance

    def run(self):
        verbs = ([self.verb] * 10 + [self.look] * 4 + [self.junk] * 4 + [self.export] * 3
                 + [self.limits] + [self.nonsense])
        while not self.soak.ending.wait(self.chance.random() ** 3 * 0.3):
            self.chance.choice(verbs)()

    def job(self):
        names = list(self.soak.events.listed()) * 3
        return self.chance.choice((*names, "job0", "job1m", "junk0", "nobody"))

    def verb(self):
        chance, qmp, job = self.chance, self.qmp, self.job()
        what = chance.choice(
            ["pause", "resume", "resume", "speed", "change", "finalize", "dismiss"] * 5
            + ["complete"] * 2 + ["soft", "force", "block-force"])
        if what in ("pause", "resume"):
            if chance.random() < 0.5:
                qmp.tries(f"job-{what}", id=job)
            else:
                qmp.tries(f"block-job-{what}", device=job)
        elif what in ("finalize", "dismiss"):
            qmp.tries(f"{chance.choice(('job', 'block-job'))}-{what}", id=job)
        elif what == "speed":
            qmp.tries("block-job-set-speed", device=job, speed=chance.choice(
                (0, 0, -1, 1, 65536, MIB, 16 * MIB, (1 << 63) - 1)))
        elif what == "change":
            qmp.tries("block-job-change", id=job, type=chance.choice(("mirror", "mirror", "commit")),
                      copy_mode=chance.choice(("background", "write-blocking", "write-blocking")))
        elif what == "complete":
            if chance.random() < 0.5:
                self.soak.decided(qmp, job, what, "job-complete", id=job)
            else:
                self.soak.decided(qmp, job, what, "block-job-complete", device=job)
        elif what == "soft":
            self.soak.decided(qmp, job, "cancel", "block-job-cancel", device=job)
        elif what == "force":
            qmp.tries("job-cancel", id=job)
        else:
            qmp.tries("block-job-cancel", device=job, force=True)

    def look(self):
        what = self.chance.choice(("query-jobs", "query-block-jobs", "query-block-exports",
                                   "query-named-block-nodes", "query-block", "query-version"))
        rows = self.qmp.execute(what)
        for row in rows if what in ("query-jobs", "query-block-jobs") else ():
            if row.get("current-progress", 0) > row.get("total-progress", 0) or (
                    row.get("offset", 0) > row.get("len", 0)):
                self.soak.complain(f"{what}: done more than all: {row}")

    def junk(self):
        """Nodes and jobs whose data nobody cares for."""
        chance, qmp = self.chance, self.qmp
        one, other = (f"junk-{chance.randrange(4)}" for _ in range(2))
        what = chance.random()
        if what < 0.4:
            qmp.tries("blockdev-add", driver="null-co", node_name=one, size=chance.choice(
                (0, MIB, MIB, MIB + 512)), latency_ns=chance.choice((0, 10**5, 10**7)),
                read_zeroes=chance.choice((True, False)))
        elif what < 0.65:
            qmp.tries("blockdev-del", node_name=one)
        elif what < 0.95:
            manual = chance.random() < 0.4
            qmp.tries("blockdev-mirror", device=one, target=other,
                      job_id=f"junk{chance.randrange(2)}{'m' if manual else ''}",
                      auto_finalize=not manual, auto_dismiss=chance.random() < 0.7,
                      sync=chance.choice(("full", "top", "none")),
                      speed=chance.choice((0, 65536, MIB)),
                      copy_mode=chance.choice(("background", "write-blocking")),
                      filter_node_name=chance.choice((None, "junk-filter")))
        else:
            qmp.tries("blockdev-reopen", options=[{
                "driver": "null-co", "node-name": one, "size": MIB,
                "read-only": chance.choice((True, False))}])

    def node(self):
        nodes = [node["node-name"] for node in self.qmp.execute("query-named-block-nodes")]
        return self.chance.choice((*nodes, "nowhere"))

    def export(self):
        chance, name = self.chance, f"x{self.chance.randrange(4)}"
        if chance.random() < 0.5:
            self.qmp.tries("block-export-add", type="nbd", id=name, name=name,
                           node_name=self.node(), writable=chance.random() < 0.2)
        else:
            self.qmp.tries("block-export-del", id=name,
                           mode=chance.choice((None, "safe", "hard")))

    def limits(self):
        self.qmp.tries("qom-set", path=f"/objects/{self.chance.choice(('fast', 'slow'))}",
                       property="limits", value={"bps-total": self.chance.choice(
                           (0, 2 * MIB, 16 * MIB)), "iops-total": self.chance.choice((0, 0, 500))})

    def nonsense(self):
        """What is refused at any time."""
        chance, qmp = self.chance, self.qmp
        what = chance.randrange(5)
        if what == 0:
            verb = chance.choice(("object-add", "object-del"))
            qmp.tries(verb, id="junk", qom_type="throttle-group" if verb[7] == "a" else None)
        elif what == 1:
            node = self.node()
            qmp.tries("blockdev-mirror", device=node, target=node, sync="full", job_id="same")
        elif what == 2:
            qmp.tries("blockdev-add", driver="raw", node_name="lane0", file="nowhere")
            qmp.tries("blockdev-add", driver="null-co", node_name="no name")
        elif what == 3:
            qmp.tries("block-export-add", type="nbd", id="lane0", node_name=self.node())
        else:
            qmp.tries("blockdev-mirror", device=self.node(), target="nowhere", sync="full",
                      job_id=self.job())
