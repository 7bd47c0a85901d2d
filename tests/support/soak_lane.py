"""What the soak does with one disk: targets of all kinds, a writer, one job after another,
and what must be true of the images that they leave behind."""
import subprocess
import threading
import time

from support.program import QmpError
from support.sectors import SECTOR, Client, Cut, Record, Writer, sector_of
from support.soak_monitor import PATIENCE, Stopped

MIB = 1 << 20
SECTORS = 2 * MIB // SECTOR
# A job that its monitors do not end in this time is helped, then cancelled.
HELP, ENOUGH = 3, 10


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
                if target and self.chance.random() < 0.4:
                    self.backups(disk, target, writer)
                elif target:
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

    def maybe(self, *values):
        return self.chance.choice((None, *values))

    def common_options(self):
        maybe, policy = self.maybe, ("report", "ignore", "stop", "enospc")
        return {
            "speed": maybe(0, MIB, 8 * MIB),
            "on_source_error": maybe(*policy), "on_target_error": maybe(*policy),
            "filter_node_name": maybe(f"filter{self.number}"),
            "auto_dismiss": maybe(True, False),
        }

    def options(self):
        maybe = self.maybe
        return self.common_options() | {
            "sync": self.chance.choice(("full", "full", "full", "top")),
            "granularity": maybe(512, 4096, 65536, MIB),
            "buf_size": maybe(0, 65536, MIB),
            "copy_mode": maybe("background", "write-blocking"),
            "unmap": maybe(True, False),
        }

    def backups(self, disk, target, writer):
        """A full backup and incremental ones on top of it, into one image."""
        bitmap = f"b{self.number}"
        sync, taken = "full", None
        for _ in range(self.chance.randrange(1, 5)):
            if self.soak.ending.is_set():
                break
            if sync == "full":
                self.qmp.tries("block-dirty-bitmap-remove", node=disk.node, name=bitmap)
            taken = self.backup(sync, disk, target, writer, bitmap)
            if taken:
                sync = "incremental"
        self.qmp.tries("block-dirty-bitmap-remove", node=disk.node, name=bitmap)
        self.remove(target)
        if taken:
            earliest, latest = taken
            wrong = self.record.is_of_one_instant(target.image(self.size), earliest, latest)
            if wrong:
                self.soak.complain(f"{self.name}: backup in {target.node} "
                                   f"of {earliest:.3f}..{latest:.3f}: {wrong}")
        self.remove_files(target)

    def backup(self, sync, disk, target, writer, bitmap):
        """One job. Returns the times between which its instant was, or None if it did
        not end well: then the image is of no use until another has."""
        soak, qmp, maybe = self.soak, self.qmp, self.maybe
        manual = self.chance.random() < 0.35
        job = f"job{self.number}{'m' if manual else ''}"
        arguments = self.common_options() | {
            "job_id": job, "device": disk.node, "target": target.node, "sync": sync,
            "auto_finalize": not manual,
            "on_cbw_error": maybe("break-guest-write", "break-snapshot"),
            "cbw_timeout": maybe(0, 1),
            "x_perf": maybe({"max-workers": self.chance.choice((1, 2, 64)),
                             "max-chunk": self.chance.choice((0, 65536, MIB))}),
        }
        if sync == "incremental":
            arguments["bitmap"] = bitmap
        actions = [{"type": "blockdev-backup", "data": {
            name.replace("_", "-"): value for name, value in arguments.items()
            if value is not None}}]
        if sync == "full":
            actions.insert(0, {"type": "block-dirty-bitmap-add", "data": {
                "node": disk.node, "name": bitmap,
                "granularity": self.chance.choice((512, 65536, 131072))}})
        soak.events.over.pop(job, None)
        soak.decisions[job] = []
        earliest = time.monotonic()
        self.record.forget(earliest)
        if qmp.tries("transaction", actions=actions) is None:
            soak.tally["backups refused"] += 1
            return None
        latest = time.monotonic()
        soak.tally["backups"] += 1
        over = self.see_through(job, writer, False, earliest)
        if over is None:
            raise Stopped
        if "ready" in over.path:
            soak.complain(f"{self.name}: {job}, a backup, was ready: {over.path}")
        end = over.end
        if end is None or "error" in end["data"] or end["event"] != "BLOCK_JOB_COMPLETED":
            return None
        soak.tally[f"{sync} backups"] += 1
        return earliest, latest

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
