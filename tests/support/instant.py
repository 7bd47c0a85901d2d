"""Whether an image shows the embedded guest's disk at one instant.

The guest writes its disk block after block (`order=sequential`), and each write has
a number, its generation, one higher than that of the write before. So of the newest
write in an image follows what every other block has to hold, except those of the
writes that were under way just then, as many as the guest says that were ever (its
`lag`): each of these is there, or is not.
"""
import struct

SECTOR = 512
BLOCK = 4096
MAGIC = int.from_bytes(b"diptych1", "little")

# Slow enough that no write is still under way when its block's turn comes again.
WORKLOAD = "queues=4 depth=32 order=sequential mix=w1 fill=all rate=6000"
OPTIONS = ("--iothread", "id=a", "--iothread", "id=b")
DISK_OPTIONS = ",queues=4,iothread=a+b"


class NotOneInstant(AssertionError):
    """What is wrong with an image."""


def generations(image):
    """The generation of each block of an image, given as bytes; 0 for zeroes."""
    found = []
    sectors = BLOCK // SECTOR
    for number in range(len(image) // BLOCK):
        heads = [struct.unpack_from("<3Q", image, number * BLOCK + at * SECTOR)
                 for at in range(sectors)]
        first = number * sectors
        generation = heads[0][2]
        blank = (0, 0, 0)
        expected = [(MAGIC, first + at, generation) if generation else blank
                    for at in range(sectors)]
        if heads != expected:
            raise NotOneInstant(f"block {number} is torn or misplaced: {heads}")
        found.append(generation)
    return found


def newest(image):
    """The newest write in an image."""
    return max(generations(image))


def check(image, lag, earliest=0, latest=float("inf")):
    """Fails unless the image shows one instant, at which the newest write was one of
    these. Every block has been written in its turn at least twice."""
    found = generations(image)
    blocks = len(found)
    # What was overtaken by so many may have been passed over, too.
    if lag >= blocks // 2:
        raise NotOneInstant(f"nothing can be said: {lag} writes overtook one")
    last = max(found)
    if not earliest <= last <= latest:
        raise NotOneInstant(f"the newest write is {last}, not of {earliest}..{latest}")
    place = found.index(last)
    lost = []
    for back in range(blocks):
        number = (place - back) % blocks
        generation = last - back
        under_way = {generation - blocks} if back <= lag else set()
        if found[number] not in {generation} | under_way:
            lost.append((number, found[number], generation))
    if lost:
        raise NotOneInstant(
            f"newest write {last} in block {place}, lag {lag}; {len(lost)} blocks of other "
            f"writes (block, found, expected): {lost[:8]}")
