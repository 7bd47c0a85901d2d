#!/usr/bin/env python3
"""What a persistent bitmap costs a writer: fio over NBD with none, with one that goes with
the process, and with one that is kept.

    tests/bench/bitmaps.py [--rounds N] [--seconds S] [--directory DIR]...

4 KiB at random at depth 32 on 2 GiB, after a second in which all regions are written. The
rounds alternate, and the median is shown. Prints Markdown.
"""
import argparse
import json
import os
import pathlib
import statistics
import subprocess
import tempfile

from peers import daemon

SIZE = 2 << 30
KINDS = ("none", "plain", "persistent")


def measure(folder, kind, seconds):
    """Requests per second, and CPU seconds of the daemon for each million of them."""
    image = folder / "disk.raw"
    with open(image, "wb") as file:
        for _ in range(SIZE >> 20):
            file.write(os.urandom(4096) * 256)
    with daemon("diptych", folder) as running:
        options = {"driver": "file", "filename": str(image), "bitmap-file": f"{image}.bitmaps"}
        running.qmp.execute("blockdev-add", driver="raw", node_name="disk", file=options)
        uri = running.export("disk")
        if kind != "none":
            running.qmp.execute("block-dirty-bitmap-add", node="disk", name="b",
                                persistent=kind == "persistent")

        def fio(runtime):
            result = subprocess.run(
                ["fio", "--name=writer", "--ioengine=nbd", f"--uri={uri}",
                 "--rw=randwrite", "--bs=4k", "--iodepth=32", f"--size={SIZE}", "--time_based",
                 f"--runtime={runtime}", "--randrepeat=0", "--norandommap",
                 "--output-format=json"], cwd=folder, capture_output=True, check=True)
            return json.loads(result.stdout[result.stdout.index(b"{"):])["jobs"][0]["write"]

        first = fio(1)
        cpu = running.cpu_seconds()
        shown = fio(seconds)
        cpu = running.cpu_seconds() - cpu
    for path in folder.iterdir():
        if path.is_file():
            path.unlink()
    percentile = shown["clat_ns"]["percentile"]["99.000000"] / 1e6
    worst = first["clat_ns"]["max"] / 1e6
    return shown["iops"], cpu / shown["total_ios"] * 1e6, percentile, worst


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=4)
    parser.add_argument("--directory", action="append")
    arguments = parser.parse_args()
    for directory in arguments.directory or ["/dev/shm"]:
        results = {kind: [] for kind in KINDS}
        with tempfile.TemporaryDirectory(dir=directory, prefix="diptych-bench.") as folder:
            for number in range(arguments.rounds):
                # Whoever comes first has no advantage of it.
                first = number % len(KINDS)
                for kind in KINDS[first:] + KINDS[:first]:
                    results[kind].append(measure(pathlib.Path(folder), kind, arguments.seconds))
        print(f"\nIn {directory}, median of {arguments.rounds} rounds of {arguments.seconds} s:\n")
        print("| bitmap | writes | times that without | CPU for a write | p99 "
              "| longest while regions become hot |")
        print("|---|---|---|---|---|---|")
        columns = {kind: [statistics.median(column) for column in zip(*rows)]
                   for kind, rows in results.items()}
        for kind, (rate, cpu, percentile, worst) in columns.items():
            print(f"| {kind} | {rate / 1000:.1f}k/s | {rate / columns['none'][0]:.2f} "
                  f"| {cpu:.1f} us | {percentile:.1f} ms | {worst:.1f} ms |", flush=True)


if __name__ == "__main__":
    main()
