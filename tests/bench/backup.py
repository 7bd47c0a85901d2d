#!/usr/bin/env python3
"""Backups by diptych's storage daemon and by QEMU's, side by side in one run.

    tests/bench/backup.py [copy] [incremental] [writer] [--rounds N] [--directory DIR]

copy:        time and CPU seconds of a full backup of 2 GiB, raw to raw.
incremental: the same of 1 % of 8 GiB, scattered.
writer:      a client that writes 4 KiB at random at depth 32 over NBD (fio) to a
             disk of 1 GiB: its rate and latencies with no job, and during a full
             backup to a target as fast as the disk, to one limited to 64 MiB/s,
             and to the limited one from a snapshot that is kept on a fast scratch
             image (fleecing).

The rounds alternate between the two, and the median is shown. Prints Markdown.
"""
import argparse
import collections
import os
import pathlib
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import storage
from peers import TOOLS, daemon, turns
from storage import GIB, Writer, make_image, median_of, phase, place

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from support.sectors import WRITE, Client  # noqa: E402

SLOW = 64 << 20
CLUSTER = 64 << 10
# How long a backup under a writer is looked at, in seconds.
LOOK = 25


def make_sparse(path, size):
    path.unlink(missing_ok=True)
    with open(path, "wb") as image:
        image.truncate(size)


def start(running, **arguments):
    running.qmp.execute("blockdev-backup", job_id="j", target="target", **arguments)


def finished(running, patience=300):
    event = running.qmp.event("BLOCK_JOB_COMPLETED", patience)
    assert "error" not in event["data"], event


def copy_once(tool, folder, source):
    """One full backup: (seconds, CPU seconds of the daemon)."""
    target = folder / "target.raw"
    make_sparse(target, storage.SIZE)
    with daemon(tool, folder) as running:
        running.add_raw("source", source)
        running.add_raw("target", target)
        cpu, begin = running.cpu_seconds(), time.monotonic()
        start(running, device="source", sync="full")
        finished(running)
        elapsed, cpu = time.monotonic() - begin, running.cpu_seconds() - cpu
    subprocess.run(["cmp", source, target], check=True)
    target.unlink()
    return elapsed, cpu


def incremental_once(tool, folder):
    """One incremental backup: (seconds, CPU seconds of the daemon)."""
    source, target = folder / "source.raw", folder / "target.raw"
    size = 8 * GIB
    for path in (source, target):
        make_sparse(path, size)
    with daemon(tool, folder) as running:
        running.add_raw("source", source)
        running.add_raw("target", target)
        running.qmp.execute("block-dirty-bitmap-add", node="source", name="b")
        running.export("source")
        client = Client(running.nbd, "disk", 60)
        data = os.urandom(CLUSTER)
        chosen = random.Random(1).sample(range(size // CLUSTER), size // CLUSTER // 100)
        for number in chosen:
            client.send(WRITE, number * CLUSTER, CLUSTER, data)
            assert client.reply()[0] == 0
        client.close()
        cpu, begin = running.cpu_seconds(), time.monotonic()
        start(running, device="source", sync="incremental", bitmap="b")
        finished(running)
        elapsed, cpu = time.monotonic() - begin, running.cpu_seconds() - cpu
    with open(source, "rb") as one, open(target, "rb") as other:
        for number in chosen:
            for image in (one, other):
                image.seek(number * CLUSTER)
            assert one.read(CLUSTER) == other.read(CLUSTER)
    source.unlink()
    target.unlink()
    return elapsed, cpu


def row(name, results):
    ours, theirs = (median_of(results[tool]) for tool in TOOLS)
    print(f"| {name} | {ours[0]:.2f} s | {theirs[0]:.2f} s | {ours[0] / theirs[0]:.2f} "
          f"| {ours[1]:.2f} s | {theirs[1]:.2f} s | {ours[1] / theirs[1]:.2f} |", flush=True)


def bench_copy(folder, rounds, what):
    print(f"\n### Backups, raw to raw, {place(folder)}\n")
    print("| what | diptych | QEMU | time, times QEMU's | CPU diptych | CPU QEMU "
          "| CPU, times QEMU's |")
    print("|---|---|---|---|---|---|---|")
    for kind in ("data", "half") if "copy" in what else ():
        source = folder / "source.raw"
        make_image(source, kind)
        results = collections.defaultdict(list)
        for tool in turns(rounds, folder):
            results[tool].append(copy_once(tool, folder, source))
        source.unlink()
        row(f"2 GiB, {kind}", results)
    if "incremental" in what:
        results = collections.defaultdict(list)
        for tool in turns(rounds, folder):
            results[tool].append(incremental_once(tool, folder))
        row("1 % of 8 GiB", results)


def add_throttled(running, name, path):
    running.qmp.execute("object-add", qom_type="throttle-group", id="slow",
                        limits={"bps-total": SLOW})
    running.qmp.execute("blockdev-add", driver="throttle", node_name=name, throttle_group="slow",
                        file={"driver": "raw", "file": {
                            "driver": "file", "filename": str(path), **running.file_options}})


def fleece(running, folder):
    """Puts a snapshot under the disk that the writer uses."""
    scratch = folder / "scratch.raw"
    make_sparse(scratch, storage.SIZE)
    running.add_raw("scratch", scratch)
    running.qmp.execute("blockdev-add", driver="copy-before-write", node_name="cbw",
                        file="source", target="scratch")
    running.qmp.execute("blockdev-reopen", options=[
        {"driver": "raw", "node-name": "top", "file": "cbw"}])
    running.qmp.execute("blockdev-add", driver="snapshot-access", node_name="snap", file="cbw")
    return "snap"


def write_once(tool, folder, kind, calm):
    """Returns {phase: (rate, p99, longest, seconds)}."""
    source, target = folder / "source.raw", folder / "target.raw"
    make_sparse(target, storage.SIZE)
    with daemon(tool, folder) as running:
        running.add_raw("source", source)
        running.qmp.execute("blockdev-add", driver="raw", node_name="top", file="source")
        if kind == "fast":
            running.add_raw("target", target)
        else:
            add_throttled(running, "target", target)
        writer = Writer(folder, running.export("top"))
        time.sleep(1.5)
        marks = [time.time()]
        time.sleep(calm)
        marks.append(time.time())
        device = fleece(running, folder) if kind == "fleecing" else "top"
        start(running, device=device, sync="full")
        try:
            finished(running, LOOK)
            ended = True
        except TimeoutError:
            ended = False
        marks.append(time.time())
        requests = writer.end()
        if not ended:
            running.qmp.execute("job-cancel", id="j")
            running.qmp.event("BLOCK_JOB_CANCELLED", 60)
    return {"no job": (*phase(requests, *marks[:2]), calm),
            "backup": (*phase(requests, *marks[1:]), marks[2] - marks[1] if ended else None)}


def bench_writer(folder, rounds, calm):
    print(f"\n### 4 KiB random writes at depth 32 over NBD during a full backup of 1 GiB, "
          f"{place(folder)}\n")
    print("| target | phase | diptych | QEMU | p99 diptych | p99 QEMU "
          "| longest diptych | longest QEMU |")
    print("|---|---|---|---|---|---|---|---|")
    storage.SIZE = GIB
    make_image(folder / "source.raw", "data")
    for kind in ("fast", "slow", "fleecing"):
        results = {tool: collections.defaultdict(list) for tool in TOOLS}
        for tool in turns(rounds, folder):
            for name, numbers in write_once(tool, folder, kind, calm).items():
                results[tool][name].append(numbers)
        for name in ("no job", "backup"):
            cells = []
            for tool in TOOLS:
                base = statistics.median(run[0] for run in results[tool]["no job"])
                cells.append(cell(name, results[tool][name], base))
            print(f"| {kind} | {name} | " + " | ".join(
                cells[tool][column] for column in range(3) for tool in range(2)) + " |",
                flush=True)
    (folder / "source.raw").unlink()


def cell(name, runs, base):
    """Rate, p99 and longest as text."""
    rate, p99, longest = (statistics.median(run[column] for run in runs) for column in range(3))
    text = f"{rate / 1e3:.1f}k/s"
    if name == "backup":
        took = [run[3] for run in runs]
        when = f"more than {LOOK} s" if None in took else f"{statistics.median(took):.1f} s"
        text += f" ({rate / base:.0%}), {when}"
    return [text, f"{p99:.2f} ms", f"{longest:.1f} ms"]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", choices=["copy", "incremental", "writer", []],
                        help="what to measure (default: all)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--calm", type=float, default=3,
                        help="seconds of writing without a job")
    parser.add_argument("--directory", type=pathlib.Path, default=pathlib.Path("/dev/shm"))
    args = parser.parse_args()
    for tool in ("fio", "qemu-storage-daemon"):
        if shutil.which(tool) is None:
            parser.error(f"{tool} is not installed: apt-get install fio qemu-system-common")
    what = args.what or ["copy", "incremental", "writer"]
    args.directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.directory, prefix="diptych-bench.") as folder:
        folder = pathlib.Path(folder)
        if "copy" in what or "incremental" in what:
            bench_copy(folder, args.rounds, what)
        if "writer" in what:
            bench_writer(folder, args.rounds, args.calm)


if __name__ == "__main__":
    main()
