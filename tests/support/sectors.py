"""Sectors that say which write they are of, and a client that writes them by NBD.

A `Record` knows what a disk may hold: every write with the times at which it was
sent and answered. So an image can be compared with it that was frozen at an instant
nobody knows, while writes went on: some instant must explain all of its sectors.
"""
import socket
import struct
import threading
import time
import zlib

SECTOR = 512
HEAD = struct.Struct("<8sIIQ")
MAGIC = b"diptych!"
ZEROES = bytes(SECTOR)
NEVER = float("inf")

REQUEST = struct.Struct(">IHHQQI")
REQUEST_MAGIC, SIMPLE_MAGIC = 0x25609513, 0x67446698
READ, WRITE, FLUSH, TRIM, WRITE_ZEROES = 0, 1, 3, 4, 6
FUA, NO_HOLE = 1, 2
GO = 7


def sector_of(disk, sector, generation):
    head = HEAD.pack(MAGIC, disk, sector, generation)
    head += struct.pack("<I", zlib.crc32(head))
    return (head * (SECTOR // len(head) + 1))[:SECTOR]


def describe(data):
    if data == ZEROES:
        return "zeroes"
    magic, disk, sector, generation = HEAD.unpack_from(data)
    if magic != MAGIC:
        return f"rubbish {data[:16].hex()}"
    whole = data == sector_of(disk, sector, generation)
    return f"disk {disk} sector {sector} generation {generation}{'' if whole else ', torn'}"


class Write:
    """One write, of data or of zeroes. `state`: `flying`, `done`, `vague` (answered,
    but may have done nothing: a trim), or `lost` (failed, or never answered: may still
    take effect at any later time)."""

    __slots__ = ("generation", "zero", "began", "ended", "state")

    def __init__(self, generation, zero, began):
        self.generation, self.zero, self.began = generation, zero, began
        self.ended, self.state = NEVER, "flying"

    def __repr__(self):
        return (f"{'zeroes' if self.zero else 'data'} {self.generation} {self.state} "
                f"{self.began:.3f}..{self.ended:.3f}")


class Record:
    """What a disk may hold. One writer, which never has two requests in flight that
    touch the same sector; any number of readers."""

    def __init__(self, disk, sectors):
        self.disk, self.sectors = disk, sectors
        self.lock = threading.Lock()
        self.generation = 0
        first = Write(0, True, 0.0)
        first.state, first.ended = "done", 0.0
        self.history = [[first] for _ in range(sectors)]

    def begin(self, first, count, zero):
        with self.lock:
            self.generation += 1
            write = Write(self.generation, zero, time.monotonic())
            for sector in range(first, first + count):
                self.history[sector].append(write)
            return write

    def end(self, write, state):
        with self.lock:
            write.ended, write.state = time.monotonic(), state

    def _windows(self, sector, data):
        """When the sector may have held this: a list of (from, to)."""
        windows, end = [], NEVER
        for write in reversed(self.history[sector]):
            same = data == ZEROES if write.zero else (
                data == sector_of(self.disk, sector, write.generation))
            if same:
                windows.append((write.began, NEVER if write.state == "lost" else end))
            if write.state == "done":
                end = min(end, write.ended)
        return windows

    def fits(self, first, data, earliest, latest):
        """What is wrong with data read at some time between these, or None. Each
        sector may be of another instant."""
        with self.lock:
            for index in range(len(data) // SECTOR):
                part = data[index * SECTOR:(index + 1) * SECTOR]
                windows = self._windows(first + index, part)
                if not any(begin <= latest and end >= earliest for begin, end in windows):
                    return self._complaint(first + index, part, earliest, latest)
        return None

    def is_of_one_instant(self, image, earliest, latest):
        """What is wrong with an image frozen at one instant between these, or None."""
        low, high, low_at, high_at = earliest, latest, None, None
        several = []
        with self.lock:
            for sector in range(self.sectors):
                part = image[sector * SECTOR:(sector + 1) * SECTOR]
                windows = self._windows(sector, part)
                if not windows:
                    return self._complaint(sector, part, earliest, latest)
                if len(windows) > 1:
                    several.append((sector, part, windows))
                    continue
                begin, end = windows[0]
                if begin > low:
                    low, low_at = begin, sector
                if end < high:
                    high, high_at = end, sector
                if low > high:
                    return (self._complaint(sector, part, earliest, latest)
                            + f"; no instant: sector {low_at} is of {low:.3f} or later, "
                              f"sector {high_at} of {high:.3f} or earlier")
            for sector, part, windows in several:
                if not any(begin <= high and end >= low for begin, end in windows):
                    return self._complaint(sector, part, low, high)
        return None

    def _complaint(self, sector, part, earliest, latest):
        return (f"disk {self.disk}, sector {sector}: {describe(part)} cannot be of "
                f"{earliest:.3f}..{latest:.3f}: {self.history[sector][-6:]}")

    def unsure(self):
        """Sectors on which a lost write may still take effect."""
        with self.lock:
            return {sector for sector, writes in enumerate(self.history)
                    if any(write.state == "lost" for write in writes)}

    def forget(self, before):
        """Drops what cannot be seen in an image of this time or later."""
        with self.lock:
            for sector, writes in enumerate(self.history):
                for index in range(len(writes) - 1, 0, -1):
                    if writes[index].state == "done" and writes[index].ended < before:
                        self.history[sector] = [
                            write for write in writes[:index] if write.state == "lost"
                        ] + writes[index:]
                        break


class Cut(Exception):
    """The connection ended, or was never made."""


class Client:
    """A connection to an export: fixed newstyle, simple replies."""

    def __init__(self, path, export, patience):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(patience)
        self.cookie = 0
        try:
            self.socket.connect(str(path))
            magic, option, _ = struct.unpack(">8s8sH", self.take(18))
            assert (magic, option) == (b"NBDMAGIC", b"IHAVEOPT")
            name = export.encode()
            data = struct.pack(">I", len(name)) + name + bytes(2)
            self.socket.sendall(struct.pack(">I", 3) + b"IHAVEOPT"
                                + struct.pack(">II", GO, len(data)) + data)
            while True:
                _, _, kind, length = struct.unpack(">QIII", self.take(20))
                data = self.take(length)
                if kind == 1:
                    break
                if kind & 0x80000000:
                    raise Cut(f"export {export}: {data.decode(errors='replace')}")
                if struct.unpack_from(">H", data)[0] == 0:
                    self.size, self.flags = struct.unpack_from(">QH", data, 2)
        except OSError as error:
            self.socket.close()
            raise Cut(str(error)) from error
        except Cut:
            self.socket.close()
            raise

    def take(self, length):
        data = bytearray()
        while len(data) < length:
            more = self.socket.recv(length - len(data))
            if not more:
                raise Cut("end of file")
            data += more
        return bytes(data)

    def send(self, command, offset=0, length=0, payload=b"", flags=0):
        self.cookie += 1
        self.socket.sendall(REQUEST.pack(REQUEST_MAGIC, flags, command, self.cookie, offset,
                                         length) + payload)
        return self.cookie

    def reply(self):
        magic, error, cookie = struct.unpack(">IIQ", self.take(16))
        assert magic == SIMPLE_MAGIC, hex(magic)
        return error, cookie

    def read_all(self, size, step=1 << 20):
        """The whole of a disk; None if a read failed. Nothing else may be in flight."""
        data = []
        for offset in range(0, size, step):
            length = min(step, size - offset)
            self.send(READ, offset, length)
            if self.reply()[0]:
                return None
            data.append(self.take(length))
        return b"".join(data)

    def close(self):
        self.socket.close()


class Writer(threading.Thread):
    """Keeps a disk busy and checks what it reads, until it is stopped.

    `complain` takes a text. What a request may take is `patience`, in seconds."""

    # How many requests may be under way, one of these at a time.
    depths = (1, 4, 16)

    def __init__(self, record, random, path, export, complain, patience):
        super().__init__(name=f"writer of {export}", daemon=True)
        self.record, self.random, self.path, self.export = record, random, path, export
        self.complain, self.patience = complain, patience
        self.ending = threading.Event()
        self.wanted = threading.Event()
        self.wanted.set()
        self.quiet = threading.Event()
        self.quiet_since = None
        self.acked = self.failed = self.cuts = self.reads = 0

    def pause(self):
        """Returns once nothing is in flight, or the writer has given up."""
        self.wanted.clear()
        if self.quiet.wait(self.patience * 2):
            self.quiet_since = time.monotonic()

    def resume(self):
        self.quiet_since = None
        self.quiet.clear()
        self.wanted.set()

    def stop(self):
        self.ending.set()
        self.wanted.set()
        self.join(self.patience * 2)

    def run(self):
        try:
            while not self.ending.is_set():
                self._connection()
        except Exception as error:  # pylint: disable=broad-except
            self.complain(f"{self.name}: {type(error).__name__}: {error}")
        finally:
            self.quiet.set()

    def _connection(self):
        client = Client(self.path, self.export, self.patience)
        flying = {}
        try:
            while True:
                go_on = self.wanted.is_set() and not self.ending.is_set()
                if go_on:
                    self.quiet.clear()
                    depth = self.random.choice(self.depths)
                    while len(flying) < depth:
                        self._send(client, flying)
                    if self.random.random() < 0.0005:
                        self.cuts += 1
                        return
                elif not flying:
                    if self.ending.is_set():
                        return
                    self.quiet.set()
                    self.wanted.wait(0.05)
                    continue
                self._receive(client, flying)
                if self.random.random() < 0.02:
                    time.sleep(self.random.random() * 0.02)
        finally:
            client.close()
            for _, _, _, write, _ in flying.values():
                if write:
                    self.record.end(write, "lost")

    def _place(self):
        """Where the next request goes: first sector, and how many."""
        count = min(self.random.choice((1, 1, 2, 7, 8, 8, 16, 64)), self.record.sectors)
        first = self.random.randrange(self.record.sectors - count + 1)
        if self.random.random() < 0.3:
            first -= first % 8
        return first, count

    def _send(self, client, flying):
        first, count = self._place()
        for _, begin, length, _, _ in flying.values():
            if begin < first + count and first < begin + length:
                return
        what = self.random.random()
        offset, length = first * SECTOR, count * SECTOR
        write, flags = None, 0
        now = time.monotonic()
        if what < 0.2:
            command = READ
            cookie = client.send(READ, offset, length)
        elif what < 0.22:
            command, count = FLUSH, 0
            cookie = client.send(FLUSH)
        elif what < 0.32:
            command = TRIM if what < 0.25 else WRITE_ZEROES
            flags = self.random.choice((0, NO_HOLE)) if command == WRITE_ZEROES else 0
            write = self.record.begin(first, count, True)
            cookie = client.send(command, offset, length, flags=flags)
        else:
            command = WRITE
            write = self.record.begin(first, count, False)
            data = b"".join(sector_of(self.record.disk, sector, write.generation)
                            for sector in range(first, first + count))
            flags = FUA if self.random.random() < 0.05 else 0
            cookie = client.send(WRITE, offset, length, data, flags)
        flying[cookie] = (command, first, count, write, now)

    def _receive(self, client, flying):
        error, cookie = client.reply()
        command, first, count, write, began = flying.pop(cookie)
        if error:
            self.failed += 1
        if command == READ:
            if not error:
                self.reads += 1
                data = client.take(count * SECTOR)
                wrong = self.record.fits(first, data, began, time.monotonic())
                if wrong:
                    self.complain(f"{self.name}: read: {wrong}")
        elif write:
            if error:
                self.record.end(write, "lost")
            elif command == TRIM:
                self.record.end(write, "vague")
            else:
                self.record.end(write, "done")
                self.acked += 1
