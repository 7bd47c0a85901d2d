//! What the guest counts in each phase of a run.
//!
//! The host says when a phase begins (see [`crate::mailbox`]); a run without
//! a host has one phase.

use crate::histogram::Histogram;

/// The most phases that are told apart; later ones count into the last.
pub const MAX_PHASES: usize = 8;

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Writes self-describing sectors.
    Write,
    /// Reads, and checks against the record.
    Read,
    /// Asks for stable storage.
    Flush,
    /// Discards: the content is open afterwards.
    Discard,
    /// Writes zeroes without data.
    WriteZeroes,
}

impl Operation {
    /// All of them, in the order of the numbers below.
    pub const ALL: [Self; 5] = [
        Self::Write,
        Self::Read,
        Self::Flush,
        Self::Discard,
        Self::WriteZeroes,
    ];

    /// Its place in arrays.
    pub fn index(self) -> usize {
        match self {
            Self::Write => 0,
            Self::Read => 1,
            Self::Flush => 2,
            Self::Discard => 3,
            Self::WriteZeroes => 4,
        }
    }
}

/// The counts of one phase. A request counts where it ends.
#[derive(Clone, Debug)]
pub struct Phase {
    /// When the phase began, in ns of the guest's clock.
    pub start_ns: u64,
    /// When it ended; the same as the start while it runs.
    pub end_ns: u64,
    /// Requests acknowledged, by [`Operation::index`].
    pub requests: [u64; 5],
    /// Bytes written with data.
    pub written_bytes: u64,
    /// Latencies of writes with data.
    pub writes: Histogram,
    /// The slowest request of any kind, in ns.
    pub slowest_ns: u64,
    /// The longest time without any request ending while some were under way,
    /// in ns.
    pub stall_ns: u64,
}

impl Phase {
    /// A phase in which nothing has happened.
    pub const fn new() -> Self {
        Self {
            start_ns: 0,
            end_ns: 0,
            requests: [0; 5],
            written_bytes: 0,
            writes: Histogram::new(),
            slowest_ns: 0,
            stall_ns: 0,
        }
    }

    /// Counts an acknowledged request of `bytes` that took `ns`.
    pub fn count(&mut self, operation: Operation, bytes: u64, ns: u64) {
        self.requests[operation.index()] += 1;
        self.slowest_ns = self.slowest_ns.max(ns);
        if operation == Operation::Write {
            self.written_bytes += bytes;
            self.writes.add(ns);
        }
    }

    /// Counts a time in which no request ended although some were under way.
    pub fn stalled(&mut self, ns: u64) {
        self.stall_ns = self.stall_ns.max(ns);
    }
}

impl Default for Phase {
    fn default() -> Self {
        Self::new()
    }
}

/// All phases of a run; one is current.
#[derive(Clone, Debug)]
pub struct Phases {
    phases: [Phase; MAX_PHASES],
    current: usize,
}

impl Phases {
    /// A run that has not begun.
    pub const fn new() -> Self {
        Self {
            phases: [const { Phase::new() }; MAX_PHASES],
            current: 0,
        }
    }

    /// Begins the first phase.
    pub fn begin(&mut self, now_ns: u64) {
        self.phases[0].start_ns = now_ns;
        self.phases[0].end_ns = now_ns;
    }

    /// Ends the current phase and goes to phase `number`, unless that is in
    /// the past or past the last one.
    pub fn enter(&mut self, number: usize, now_ns: u64) {
        if number <= self.current || number >= MAX_PHASES {
            return;
        }
        self.phases[self.current].end_ns = now_ns;
        // Phases left out have no length.
        for phase in &mut self.phases[self.current + 1..=number] {
            phase.start_ns = now_ns;
            phase.end_ns = now_ns;
        }
        self.current = number;
    }

    /// Ends the last phase.
    pub fn end(&mut self, now_ns: u64) {
        self.current_mut().end_ns = now_ns;
    }

    /// The number of the current phase.
    pub fn current(&self) -> usize {
        self.current
    }

    /// The current phase.
    pub fn current_mut(&mut self) -> &mut Phase {
        &mut self.phases[self.current]
    }

    /// Those that have begun, in order.
    pub fn begun(&self) -> &[Phase] {
        &self.phases[..=self.current]
    }
}

impl Default for Phases {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_follow_each_other_and_never_go_back() {
        let mut phases = Phases::new();
        phases.begin(10);
        phases.current_mut().count(Operation::Write, 4096, 7);
        phases.enter(2, 30);
        phases.enter(1, 40);
        phases.current_mut().count(Operation::Read, 4096, 9);
        phases.enter(MAX_PHASES, 45);
        phases.end(50);
        let begun = phases.begun();
        assert_eq!(begun.len(), 3);
        let lengths: Vec<_> = begun.iter().map(|p| p.end_ns - p.start_ns).collect();
        assert_eq!(lengths, [20, 0, 20]);
        assert_eq!(begun[0].requests, [1, 0, 0, 0, 0]);
        assert_eq!(begun[0].written_bytes, 4096);
        assert_eq!(begun[2].requests, [0, 1, 0, 0, 0]);
        assert_eq!(begun[2].slowest_ns, 9);
    }

    #[test]
    fn the_longest_stall_stays() {
        let mut phase = Phase::new();
        [5, 90, 3].into_iter().for_each(|ns| phase.stalled(ns));
        assert_eq!(phase.stall_ns, 90);
    }
}
