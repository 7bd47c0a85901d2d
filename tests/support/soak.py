"""A storage daemon under random use: jobs, verbs, writers and faults, and a checker.

Each lane has a disk, exported by NBD to a writer, that is mirrored or backed up again and
again to targets of all kinds; whoever of the monitors is quickest decides how a job ends. What
must hold whatever they do:

- the events of a job are a path through the state machine, with one end event, and all
  monitors see the same ones in the same order (`legal`);
- refusals are of the classes that QMP clients know, and every command is answered;
- a disk that a job leaves behind, the source after a pivot or the target after a soft
  cancel, explains itself as one instant between the decision and the end (`sectors`);
- with its writer stopped, source and target are equal byte by byte;
- a backup that ends well is of the instant of its command, incremental ones too, whatever
  became of those before;
- no acknowledged write is ever missing from the disk that the writer uses;
- ids can be used again at once, and in the end nothing is left: jobs, nodes, exports,
  file descriptors, threads, memory; and the daemon ends well.

Random numbers come from a seed, one sequence per thread: what each thread wants is the
same in each run, how they meet is not.
"""
import collections
import contextlib
import os
import random
import subprocess
import threading
import time

from support.legal import Events
from support.program import Program
from support.soak_chaos import Chaos
from support.soak_lane import Lane, make_qcow2
from support.soak_monitor import PATIENCE, Monitor, Stopped

MIB = 1 << 20
GROWTH = 128 * MIB


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
