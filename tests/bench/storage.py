#!/usr/bin/env python3
"""Compares diptych's storage daemon with QEMU's, side by side in one run.

    tests/bench/storage.py [copy] [writer] [--rounds N] [--directory DIR]...

copy:   time and CPU seconds to mirror 2 GiB, raw to raw: full of data, half
        holes, all zeroes.
writer: a client that writes 4 KiB at random at depth 32 over NBD (fio): its
        rate and latencies with no job, while a mirror copies, and when it is
        ready, in background and in write-blocking mode.

Directories to put the images in: /dev/shm and target/bench unless given. The
rounds alternate between the two, and the median is shown. Prints Markdown.
"""
import argparse
import collections
import os
import pathlib
import shutil
import statistics
import subprocess
import tempfile
import time

from peers import TOOLS, daemon, turns

GIB = 1 << 30
SIZE = 2 * GIB
PIECE = 1 << 20
# How long a mirror may take to become ready under a writer, in seconds.
GIVE_UP = 20


def make_image(path, kind):
    """An image of SIZE bytes: `data`, `half` (every other MiB is a hole) or `zeroes`."""
    with open(path, "wb") as image:
        image.truncate(SIZE)
        block = os.urandom(PIECE)
        if kind == "zeroes":
            block = bytes(PIECE)
        step = 2 * PIECE if kind == "half" else PIECE
        for offset in range(0, SIZE, step):
            image.seek(offset)
            image.write(block)
        image.flush()
        os.fsync(image.fileno())


def make_target(path):
    path.unlink(missing_ok=True)
    with open(path, "wb") as image:
        image.truncate(SIZE)


def copy_once(tool, folder, source):
    """Mirrors once; returns (seconds until ready, CPU seconds of the daemon)."""
    target = folder / "target.raw"
    make_target(target)
    with daemon(tool, folder) as running:
        running.add_raw("source", source)
        running.add_raw("target", target)
        cpu, begin = running.cpu_seconds(), time.monotonic()
        running.qmp.execute("blockdev-mirror", job_id="j", device="source",
                            target="target", sync="full")
        running.qmp.event("BLOCK_JOB_READY", 300)
        elapsed = time.monotonic() - begin
        cpu = running.cpu_seconds() - cpu
        running.qmp.execute("block-job-cancel", device="j")
        running.qmp.event("BLOCK_JOB_COMPLETED", 60)
    subprocess.run(["cmp", source, target], check=True)
    return elapsed, cpu


def bench_copy(folder, rounds):
    print(f"\n### Mirror of 2 GiB, raw to raw, {place(folder)}\n")
    print("| image | diptych | QEMU | rate, times QEMU's | CPU diptych | CPU QEMU |")
    print("|---|---|---|---|---|---|")
    for kind in ("data", "half", "zeroes"):
        source = folder / "source.raw"
        make_image(source, kind)
        results = collections.defaultdict(list)
        for tool in turns(rounds, folder):
            results[tool].append(copy_once(tool, folder, source))
        source.unlink()
        ours, theirs = (median_of(results[tool]) for tool in TOOLS)
        print(f"| {kind} | {ours[0]:.2f} s | {theirs[0]:.2f} s | {theirs[0] / ours[0]:.1f} "
              f"| {ours[1]:.2f} s | {theirs[1]:.2f} s |", flush=True)


def median_of(pairs):
    return [statistics.median(column) for column in zip(*pairs)]


class Writer:
    """fio, writing through an export, with each request in a log."""

    def __init__(self, folder, uri):
        self.log = folder / "fio"
        self.folder = folder
        self.process = subprocess.Popen(
            ["fio", "--name=writer", "--ioengine=nbd", f"--uri={uri}", "--rw=randwrite",
             "--bs=4k", "--iodepth=32", f"--size={SIZE}", "--time_based", "--runtime=120",
             "--randrepeat=0", "--norandommap", f"--write_lat_log={self.log}",
             "--log_unix_epoch=1", "--disable_clat=1", "--disable_slat=1",
             "--output=/dev/null"], cwd=folder)

    def end(self):
        """Stops writing; returns [(end of the request in Unix ms, latency in ms)]."""
        self.process.send_signal(2)
        self.process.wait()
        requests = []
        for path in self.folder.glob("fio_*lat*.log"):
            with open(path, encoding="ascii") as lines:
                for line in lines:
                    when, latency = line.split(",", 2)[:2]
                    requests.append((int(when), int(latency) / 1e6))
            path.unlink()
        return requests


def phase(requests, begin, end):
    """(requests per second, p99 in ms, longest in ms) between two Unix times."""
    took = sorted(latency for when, latency in requests if begin * 1e3 <= when < end * 1e3)
    if not took:
        return 0.0, float("inf"), float("inf")
    return len(took) / (end - begin), took[int(len(took) * 0.99)], took[-1]


def write_once(tool, folder, copy_mode, calm):
    """Returns {phase: (rate, p99, longest, seconds)}; no `ready` if it never is."""
    source, target = folder / "source.raw", folder / "target.raw"
    make_target(target)
    phases = {}
    with daemon(tool, folder) as running:
        running.add_raw("source", source)
        running.add_raw("target", target)
        writer = Writer(folder, running.export("source"))
        time.sleep(2)
        marks = [time.time()]
        time.sleep(calm)
        marks.append(time.time())
        running.qmp.execute("blockdev-mirror", job_id="j", device="source", target="target",
                            sync="full", copy_mode=copy_mode)
        ready = True
        try:
            running.qmp.event("BLOCK_JOB_READY", GIVE_UP)
        except TimeoutError:
            ready = False
        marks.append(time.time())
        if ready:
            time.sleep(calm)
            marks.append(time.time())
        requests = writer.end()
        running.qmp.execute("job-cancel", id="j")
        running.qmp.event("BLOCK_JOB_CANCELLED", 60)
    for name, begin, end in zip(("no job", "copying", "ready"), marks, marks[1:]):
        phases[name] = (*phase(requests, begin, end), end - begin)
    return phases


def bench_writer(folder, rounds, calm):
    print(f"\n### 4 KiB random writes at depth 32 over NBD during a mirror of 2 GiB, "
          f"{place(folder)}\n")
    print("| mode | phase | diptych | QEMU | p99 diptych | p99 QEMU "
          "| longest diptych | longest QEMU |")
    print("|---|---|---|---|---|---|---|---|")
    make_image(folder / "source.raw", "data")
    for mode in ("background", "write-blocking"):
        results = {tool: collections.defaultdict(list) for tool in TOOLS}
        for tool in turns(rounds, folder):
            for name, numbers in write_once(tool, folder, mode, calm).items():
                results[tool][name].append(numbers)
        for name in ("no job", "copying", "ready"):
            cells = []
            for tool in TOOLS:
                runs = results[tool][name]
                base = statistics.median(run[0] for run in results[tool]["no job"])
                cells.append(cell(name, runs, base, rounds))
            print(f"| {mode} | {name} | " + " | ".join(
                cells[tool][column] for column in range(3) for tool in range(2)) + " |",
                flush=True)
    (folder / "source.raw").unlink()


def cell(name, runs, base, rounds):
    """Rate, p99 and longest as text."""
    if not runs:
        return ["never", "", ""]
    rate, p99, longest, seconds = (statistics.median(column) for column in zip(*runs))
    text = f"{rate / 1e3:.1f}k/s"
    if name != "no job":
        text += f" ({rate / base:.0%})"
    if name == "copying":
        text += f", {seconds:.1f} s"
    if len(runs) < rounds:
        text += f" ({len(runs)} of {rounds} runs)"
    return [text, f"{p99:.2f} ms", f"{longest:.1f} ms"]


def place(folder):
    kind = subprocess.run(["stat", "-f", "-c", "%T", folder], capture_output=True, text=True,
                          check=True).stdout.strip()
    return f"on {kind}"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", choices=["copy", "writer", []],
                        help="what to measure (default: both)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--calm", type=float, default=4,
                        help="seconds of writing without a job and when ready")
    parser.add_argument("--directory", action="append", type=pathlib.Path)
    args = parser.parse_args()
    for tool in ("fio", "qemu-storage-daemon"):
        if shutil.which(tool) is None:
            parser.error(f"{tool} is not installed: apt-get install fio qemu-system-common")
    own = pathlib.Path(__file__).resolve().parent.parent.parent / "target/bench"
    for directory in args.directory or [pathlib.Path("/dev/shm"), own]:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory, prefix="diptych-bench.") as folder:
            folder = pathlib.Path(folder)
            if "copy" in (args.what or ["copy"]):
                bench_copy(folder, args.rounds)
            if "writer" in (args.what or ["writer"]):
                bench_writer(folder, args.rounds, args.calm)


if __name__ == "__main__":
    main()
