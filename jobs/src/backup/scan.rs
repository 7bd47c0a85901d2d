//! Where the body goes on, in what portions, and what it has learnt of what follows.
//!
//! Not here: what is left at all (`account`), and when the next operation may start (`body`).

use std::ops::Range;
use std::time::Duration;

use crate::copying::{Carrier, Copied, Look, Runs};

use super::account::Account;

/// Largest buffer, which is the largest request to a node.
pub(super) const MAX_REQUEST: u64 = 1 << 20;
/// Smallest request while the guest is active (clusters may be larger).
const MIN_REQUEST: u64 = 256 << 10;
/// Most bytes that one operation looks at, when all before were zeroes.
const MAX_LEAP: u64 = 1 << 30;
/// Short runs that are copied together: fewest and most, and the time that decides, since
/// guests wait for all of them.
const RUNS: (usize, usize) = (8, 256);
const RUNS_TIME: Duration = Duration::from_millis(10);

/// The scan of what is left. Home only.
pub(super) struct Scan {
    account: Account,
    /// Bytes on the disk, and in the largest request.
    size: u64,
    largest: u64,
    /// Where it goes on.
    cursor: u64,
    /// The source has data there.
    data: Range<u64>,
    /// How much to look at at once where extents are not known.
    leap: u64,
    /// Short runs can be copied together, as far as is known; so many at most; but not those
    /// that begin in this range.
    copies_runs: bool,
    runs: usize,
    one_by_one: Range<u64>,
}

impl Scan {
    /// From the start of a disk of `size` bytes, by requests of `largest` bytes at most.
    pub(super) fn new(account: Account, size: u64, largest: u64) -> Self {
        Self {
            account,
            size,
            largest,
            cursor: 0,
            data: 0..0,
            leap: largest,
            copies_runs: true,
            runs: RUNS.1,
            one_by_one: 0..0,
        }
    }

    /// Size of a request under this window: several fit in it, so that the guest never
    /// waits for a long one. A disk that is no larger than one request may be is copied in
    /// one go, as with QEMU: then bitmaps and progress are the same after a failure, too.
    pub(super) fn request_size(&self, window: u64) -> u64 {
        let most = self.largest;
        let cluster = self.account.cluster();
        let window = match self.size <= MAX_REQUEST {
            true => u64::MAX,
            false => window,
        };
        (window / 4).clamp(MIN_REQUEST.min(most), most).max(cluster) / cluster * cluster
    }

    /// The next range that is to be copied, and how to look at it.
    pub(super) fn next(&self, request: u64, carrier: &Carrier) -> Option<(Range<u64>, Look)> {
        let reach = self.leap.max(request);
        let next = self.account.next_todo(self.cursor, reach);
        let mut range = match next {
            Some(range) => range,
            None => self.account.next_todo(0, reach)?,
        };
        // What is not copied does not change, so what was found of it holds.
        let until = match self.data.contains(&range.start) {
            true => self.account.round_in(&(0..self.data.end)).end,
            false => 0,
        };
        if until > range.start {
            range.end = range.end.min(until).min(range.start + request);
            return Some((range, Look::Data));
        }
        let len = range.end - range.start;
        // Left over between what the guest has had copied: short, and likely data.
        if len < MIN_REQUEST {
            let look = carrier.look_at_written(&range, request);
            return Some((range, look));
        }
        Some((range, Look::Probe { request }))
    }

    /// How many runs are copied together with this one, which guests' requests have left
    /// over. `None`: it goes by itself.
    pub(super) fn runs_with(&self, range: &Range<u64>) -> Option<usize> {
        let goes = range.end - range.start < MIN_REQUEST
            && self.copies_runs
            && !self.one_by_one.contains(&range.start);
        goes.then_some(self.runs)
    }

    /// What is before `end` has been begun.
    pub(super) fn has_begun_to(&mut self, end: u64) {
        self.cursor = end;
    }

    /// What carrying a range to `end` has told of what follows.
    pub(super) fn learn(&mut self, end: u64, copied: Copied) {
        if copied.range.end < end {
            self.come_back_to(copied.range.end);
        }
        self.leap = match copied.was_zero {
            true => self.leap.saturating_mul(2).min(MAX_LEAP),
            false => self.largest,
        };
        if copied.data.end > self.data.end || !self.data.contains(&self.cursor) {
            self.data = copied.data;
        }
    }

    /// What has become of short runs in `range` has told, after so long.
    pub(super) fn learn_of_runs(&mut self, range: Range<u64>, became: &Runs, took: Duration) {
        match became {
            Runs::Copied(0) => self.one_by_one = range,
            Runs::Copied(_) if took > RUNS_TIME => self.runs = (self.runs / 2).max(RUNS.0),
            Runs::Copied(_) => self.runs = (self.runs * 2).min(RUNS.1),
            Runs::Impossible => self.copies_runs = false,
            Runs::Held => {}
        }
    }

    /// What was left there comes next, and not after all the others.
    pub(super) fn come_back_to(&mut self, start: u64) {
        self.cursor = self.cursor.min(start);
    }

    /// After a failure: from the start, and what was not copied together is tried so again.
    pub(super) fn start_over(&mut self) {
        self.cursor = 0;
        self.copies_runs = true;
    }
}
