//! What a disk did: counters for tests, the demo and the monitor.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// The kinds of requests that are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Read,
    Write,
    Flush,
    Discard,
    WriteZeroes,
}

const KINDS: usize = 5;

/// Counters of one kind of request, since the device was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpStats {
    /// Requests that have ended, failed ones included.
    pub requests: u64,
    /// Requests that ended in an error.
    pub failed: u64,
    /// Bytes of those that succeeded.
    pub bytes: u64,
    /// Time that all of them took together, from the moment they were taken
    /// from the ring.
    pub time: Duration,
}

/// Counters of a disk, over all its queues.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlkStats {
    /// Reads.
    pub read: OpStats,
    /// Writes.
    pub write: OpStats,
    /// Flushes; no bytes.
    pub flush: OpStats,
    /// Discards.
    pub discard: OpStats,
    /// Writes of zeroes.
    pub write_zeroes: OpStats,
}

#[derive(Default)]
struct OpCounters {
    requests: AtomicU64,
    failed: AtomicU64,
    bytes: AtomicU64,
    nanoseconds: AtomicU64,
}

/// Counters of one queue, written by its iothread alone, read by anybody. On
/// cache lines of their own, so that queues do not slow each other down.
#[derive(Default)]
#[repr(align(128))]
pub(super) struct QueueStats {
    ops: [OpCounters; KINDS],
    longest_nanoseconds: AtomicU64,
}

impl QueueStats {
    pub(super) fn account(&self, kind: Kind, bytes: u64, time: Duration, ok: bool) {
        let op = &self.ops[kind as usize];
        let nanoseconds = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        op.requests.fetch_add(1, Relaxed);
        if ok {
            op.bytes.fetch_add(bytes, Relaxed);
        } else {
            op.failed.fetch_add(1, Relaxed);
        }
        op.nanoseconds.fetch_add(nanoseconds, Relaxed);
        if nanoseconds > self.longest_nanoseconds.load(Relaxed) {
            self.longest_nanoseconds.fetch_max(nanoseconds, Relaxed);
        }
    }

    fn add_to(&self, kind: Kind, sum: &mut OpStats) {
        let op = &self.ops[kind as usize];
        sum.requests += op.requests.load(Relaxed);
        sum.failed += op.failed.load(Relaxed);
        sum.bytes += op.bytes.load(Relaxed);
        sum.time += Duration::from_nanos(op.nanoseconds.load(Relaxed));
    }

    pub(super) fn take_longest(&self) -> Duration {
        Duration::from_nanos(self.longest_nanoseconds.swap(0, Relaxed))
    }
}

/// The sum over `queues`.
pub(super) fn sum(queues: &[QueueStats]) -> BlkStats {
    let mut sum = BlkStats::default();
    for queue in queues {
        queue.add_to(Kind::Read, &mut sum.read);
        queue.add_to(Kind::Write, &mut sum.write);
        queue.add_to(Kind::Flush, &mut sum.flush);
        queue.add_to(Kind::Discard, &mut sum.discard);
        queue.add_to(Kind::WriteZeroes, &mut sum.write_zeroes);
    }
    sum
}
