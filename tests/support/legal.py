"""What the events of jobs may be: each job's are a path through its state machine."""
import threading
import time

NEXT = {
    None: {"created"},
    "created": {"running", "aborting", "null"},
    "running": {"paused", "ready", "waiting", "aborting"},
    "paused": {"running"},
    "ready": {"standby", "waiting", "aborting"},
    "standby": {"ready"},
    "waiting": {"pending", "aborting"},
    "pending": {"concluded", "aborting"},
    "aborting": {"concluded"},
    "concluded": {"null"},
}
ENDS = ("BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED")


class Job:
    """One life of an id, from created to null."""

    def __init__(self, identifier):
        self.identifier = identifier
        self.path = []
        self.ready = self.pending = 0
        self.end = None
        self.times = {}

    @property
    def status(self):
        return self.path[-1] if self.path else None


class Events:
    """Checks the events of one monitor as they come. `manual(id)` says whether a job
    was started with auto-finalize off; `complain` takes a text."""

    def __init__(self, manual, complain):
        self.manual, self.complain = manual, complain
        self.lock = threading.Condition()
        self.jobs, self.over = {}, {}
        self.lives = self.count = 0
        self.by_end = {}

    def take(self, event):
        name, data = event["event"], event.get("data", {})
        with self.lock:
            self.count += 1
            if name == "JOB_STATUS_CHANGE":
                self._status(data["id"], data["status"])
            elif name.startswith("BLOCK_JOB_"):
                self._of_block_job(name, data)
            elif name != "BLOCK_EXPORT_DELETED":
                self._wrong(f"unexpected event {event}")
            self.lock.notify_all()

    def _wrong(self, text):
        self.complain(f"events: {text}")

    def _status(self, identifier, status):
        job = self.jobs.get(identifier)
        if job is None:
            job = self.jobs[identifier] = Job(identifier)
        before = job.status
        if status not in NEXT.get(before, ()):
            self._wrong(f"{identifier}: {before} -> {status} after {job.path}")
        if before == "pending" and self.manual(identifier) and not job.pending:
            self._wrong(f"{identifier}: left pending without BLOCK_JOB_PENDING")
        if status == "concluded":
            never_ran = "running" not in job.path
            if never_ran != (job.end is None):
                self._wrong(f"{identifier}: concluded with end event {job.end} after {job.path}")
        if status != "ready" and before == "ready" and not job.ready:
            self._wrong(f"{identifier}: left ready without BLOCK_JOB_READY")
        job.path.append(status)
        job.times.setdefault(status, time.monotonic())
        if status == "null":
            del self.jobs[identifier]
            self.over[identifier] = job
            self.lives += 1
            end = "none"
            if job.end:
                end = "failed" if "error" in job.end["data"] else (
                    "completed" if job.end["event"] == ENDS[0] else "cancelled")
            self.by_end[end] = self.by_end.get(end, 0) + 1

    def _of_block_job(self, name, data):
        identifier = data["id"] if name == "BLOCK_JOB_PENDING" else data["device"]
        job = self.jobs.get(identifier)
        if job is None:
            self._wrong(f"{name} {data} of a job that is not there")
            return
        if name == "BLOCK_JOB_READY":
            job.ready += 1
            if job.status != "ready" or job.ready > 1:
                self._wrong(f"{identifier}: {name} number {job.ready} after {job.path}")
        elif name == "BLOCK_JOB_PENDING":
            job.pending += 1
            if job.status != "pending" or job.pending > 1 or not self.manual(identifier):
                self._wrong(f"{identifier}: {name} number {job.pending} after {job.path}")
        elif name == "BLOCK_JOB_ERROR":
            if job.status not in ("running", "ready"):
                self._wrong(f"{identifier}: {name} in {job.status}")
        elif name in ENDS:
            if job.end:
                self._wrong(f"{identifier}: {name} after {job.end}")
            job.end = {"event": name, "data": data}
            failed = name == ENDS[1] or "error" in data
            if job.status != ("aborting" if failed else "pending"):
                self._wrong(f"{identifier}: {name} {data} in {job.status}")
            if data["offset"] > data["len"]:
                self._wrong(f"{identifier}: {name}: offset past the length: {data}")
        else:
            self._wrong(f"unexpected event {name} {data}")

    def now(self, identifier):
        with self.lock:
            return self.jobs.get(identifier)

    def listed(self):
        with self.lock:
            return {identifier: job.status for identifier, job in self.jobs.items()}
