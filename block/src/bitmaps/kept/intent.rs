//! Which regions of a disk may be written at the moment: the meeting place of writers
//! and the keeper.
//!
//! What makes a region hot durably, and saves its bits before it cools, is the keeper
//! (`core`).
//!
//! # The protocol
//!
//! A region is *cold* (0), *idle* or *hot*. A write may go to the storage only while
//! the regions that it touches are not cold, and these are marked in the side-car, durably,
//! before they cease to be cold. Writers do this:
//!
//! 1. count themselves in;
//! 2. look at each region: if it is hot, that is all; if it is idle they make it hot; if it
//!    is cold they count themselves out, ask the keeper, wait, and begin again;
//! 3. write; mark the bitmaps;
//! 4. count themselves out.
//!
//! The keeper cools a region so: it makes it idle; later, if it is still idle, waits until
//! all who were counted in have left; saves the bits durably; and makes it cold, if it is
//! *still* idle. Only then is its mark removed from the side-car.
//!
//! Whoever looked before it was idle was counted in by then, so has left, and its bits are
//! saved. Whoever looked after that has made it hot: then it does not become cold. All
//! steps are sequentially consistent.
//!
//! "All who were counted in" are waited for in two halves, as in sleepable RCU: there are
//! two counts, of which `epoch` tells newcomers which to take. The keeper turns newcomers to
//! the other one, waits until nobody is left in the first, and does the same again, since a
//! writer may have looked at `epoch` long before it counted itself in. So writers that keep
//! coming do not delay it.

use std::sync::Arc;

use crate::gate::ShardIndex;
use crate::sync::atomic::{
    AtomicBool, AtomicU8, AtomicU64, AtomicUsize,
    Ordering::{Relaxed, SeqCst},
};
use crate::sync::{Mutex, lock};
use crate::wait::Waiters;

use super::format::{Hot, MAX_REGIONS};

/// Must not be written.
const COLD: u8 = 0;
/// May be written, and nobody has begun to since the keeper looked last.
const IDLE: u8 = 1;
/// May be written.
const HOT: u8 = 2;

/// Regions are at least this large, as a power of two: 1 MiB.
const MIN_SHIFT: u32 = 20;
/// A disk of this many of the smallest regions has larger ones.
const WANTED_REGIONS: u64 = 2048;
/// Up to 64 MiB, as long as there are not too many.
const USUAL_MAX_SHIFT: u32 = 26;

#[cfg(not(shuttle))]
const SHARDS: usize = 16;
#[cfg(shuttle)]
const SHARDS: usize = 2;

/// Regions that there are: in the model few, since each is a place to switch threads.
#[cfg(not(shuttle))]
const REGIONS: usize = MAX_REGIONS;
#[cfg(shuttle)]
const REGIONS: usize = 3;

#[repr(align(128))]
#[derive(Default)]
struct Shard([AtomicUsize; 2]);

/// The regions of a disk.
pub(crate) struct Intent {
    /// Region size. The last possible region reaches to the end of the disk, however
    /// large that becomes.
    shift: u32,
    regions: Box<[AtomicU8]>,
    /// Whether bitmaps are kept at all; else writers do not even look. Set by who has room
    /// for bitmaps, on main, or before the node is used; cleared by the keeper's thread when
    /// nothing is to be kept any more, and, while there is none, by who starts one or finds
    /// nothing to be kept.
    armed: AtomicBool,
    /// How often it was armed, and the number of that by which all writers that were under
    /// way then had ended. Written by who arms.
    armings: AtomicU64,
    counted: AtomicU64,
    /// Which half of `shards` newcomers count themselves in. Moved on by the keeper.
    epoch: AtomicUsize,
    /// Writers that are counted in.
    shards: [Shard; SHARDS],
    /// A leaf lock.
    asked: Mutex<Asked>,
    /// Rounds of the keeper in which it made regions hot, or nothing was to be kept any
    /// more; and in which it could not.
    served: AtomicU64,
    refused: AtomicU64,
    /// There is no keeper.
    deserted: AtomicBool,
    waiters: Waiters,
}

#[derive(Default)]
struct Asked {
    regions: Vec<u32>,
    wake: Option<Arc<dyn Fn() + Send + Sync>>,
}

impl std::fmt::Debug for Intent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Intent")
            .field("shift", &self.shift)
            .field("armed", &self.armed)
            .finish_non_exhaustive()
    }
}

/// A writer that is counted in. Dropped after the bitmaps are marked.
#[derive(Debug)]
#[must_use = "the write counts until this is dropped"]
pub(crate) struct Writing<'a> {
    /// The intent, the place of its count, if it is counted.
    counted: Option<(&'a Intent, ShardIndex, usize)>,
}

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        if let Some((intent, shard, half)) = self.counted {
            intent.shard(shard)[half].fetch_sub(1, SeqCst);
        }
    }
}

/// The regions could not be made hot: the write must not go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Refused;

/// One time at which an intent was armed.
#[derive(Clone, Copy, Debug)]
#[must_use = "until it is told that all are counted, nothing can rely on it"]
pub(crate) struct Arming(u64);

/// What the keeper has to wait for before regions that were idle may cool.
#[derive(Debug)]
pub(super) struct GracePeriod {
    /// The halves that are still to be waited for.
    left: usize,
    waiting_for: usize,
}

impl Intent {
    /// All cold, for a disk of `size` bytes; not armed.
    pub(crate) fn new(size: u64) -> Self {
        Self::with_shift(shift_for(size))
    }

    pub(super) fn with_shift(shift: u32) -> Self {
        Self {
            shift,
            regions: (0..REGIONS).map(|_| AtomicU8::new(COLD)).collect(),
            armed: AtomicBool::new(false),
            armings: AtomicU64::new(0),
            counted: AtomicU64::new(0),
            epoch: AtomicUsize::new(0),
            shards: Default::default(),
            asked: Mutex::default(),
            served: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            deserted: AtomicBool::new(true),
            waiters: Waiters::default(),
        }
    }

    fn shard(&self, shard: ShardIndex) -> &[AtomicUsize; 2] {
        &self.shards[shard.index() % SHARDS].0
    }

    /// Counts a write of `len` bytes (not 0) at `offset` in, as soon as its regions are
    /// hot. Cancel: nothing is counted; regions may become hot.
    pub(crate) async fn enter(&self, offset: u64, len: u64) -> Result<Writing<'_>, Refused> {
        loop {
            let (served, refused) = (self.served.load(SeqCst), self.refused.load(SeqCst));
            match self.try_enter(offset, len) {
                Ok(writing) => return Ok(writing),
                Err(cold) => self.ask(&cold),
            }
            let answered = || {
                if !self.any_cold(offset, len) || !self.armed.load(SeqCst) {
                    return Some(Ok(()));
                }
                if self.deserted.load(SeqCst) || self.refused.load(SeqCst) != refused {
                    return Some(Err(Refused));
                }
                // It may have been hot, and be cold again: then it is asked for once more.
                (self.served.load(SeqCst) != served).then_some(Ok(()))
            };
            self.waiters.until(answered).await?;
        }
    }

    /// As [`enter`](Self::enter), but gives the cold regions instead of waiting.
    pub(super) fn try_enter(&self, offset: u64, len: u64) -> Result<Writing<'_>, Vec<u32>> {
        if !self.armed.load(SeqCst) {
            return Ok(Writing { counted: None });
        }
        let shard = ShardIndex::current();
        let half = self.epoch.load(SeqCst) % 2;
        self.shard(shard)[half].fetch_add(1, SeqCst);
        let writing = Writing {
            counted: Some((self, shard, half)),
        };
        let mut cold = Vec::new();
        for region in self.touched(offset, len) {
            let state = &self.regions[region];
            loop {
                match state.load(SeqCst) {
                    HOT => break,
                    COLD => {
                        cold.push(region as u32);
                        break;
                    }
                    _ => {
                        let hot = state.compare_exchange(IDLE, HOT, SeqCst, SeqCst);
                        if hot.is_ok() {
                            break;
                        }
                    }
                }
            }
        }
        match cold.is_empty() {
            true => Ok(writing),
            false => Err(cold),
        }
    }

    fn any_cold(&self, offset: u64, len: u64) -> bool {
        let mut touched = self.touched(offset, len);
        touched.any(|region| self.regions[region].load(SeqCst) == COLD)
    }

    fn touched(&self, offset: u64, len: u64) -> std::ops::RangeInclusive<usize> {
        let region = |at: u64| (at >> self.shift).min(self.regions.len() as u64 - 1) as usize;
        region(offset)..=region(offset.saturating_add(len.max(1) - 1))
    }

    /// Asks the keeper to make these hot.
    pub(super) fn ask(&self, cold: &[u32]) {
        let wake = {
            let mut asked = lock(&self.asked);
            asked.regions.extend_from_slice(cold);
            asked.wake.clone()
        };
        if let Some(wake) = wake {
            wake();
        }
    }

    /// There is a keeper, to be told so when somebody has asked.
    pub(super) fn keeper_is_there(&self, wake: Arc<dyn Fn() + Send + Sync>) {
        lock(&self.asked).wake = Some(wake);
        self.deserted.store(false, SeqCst);
    }

    /// Nobody answers any more: who needs a cold region is refused.
    pub(super) fn keeper_is_gone(&self) {
        self.deserted.store(true, SeqCst);
        let wake = lock(&self.asked).wake.take();
        drop(wake);
        self.waiters.wake();
    }

    /// From now on writers wait for regions to be hot. All are cold, unless it was armed
    /// already. Gives what [`all_are_counted`](Self::all_are_counted) is to be told when
    /// those that are under way, which are not counted, have ended.
    pub(super) fn arm(&self) -> Arming {
        if !self.armed.load(SeqCst) {
            self.armings.fetch_add(1, SeqCst);
            self.armed.store(true, SeqCst);
        }
        Arming(self.armings.load(SeqCst))
    }

    /// Writers that were under way when it was armed have ended.
    pub(super) fn all_are_counted(&self, since: Arming) {
        self.counted.fetch_max(since.0, SeqCst);
    }

    /// Whether no write can pass it by: what bitmaps rely on.
    pub(super) fn is_complete(&self) -> bool {
        self.is_armed() && self.counted.load(SeqCst) == self.armings.load(SeqCst)
    }

    /// Nothing is to be kept any more: writers do not wait.
    pub(super) fn disarm(&self) {
        self.armed.store(false, SeqCst);
        for state in &self.regions {
            state.store(COLD, SeqCst);
        }
        lock(&self.asked).regions.clear();
        // If it is armed again before they look, they have to ask again.
        self.served.fetch_add(1, SeqCst);
        self.waiters.wake();
    }

    pub(crate) fn is_armed(&self) -> bool {
        self.armed.load(SeqCst)
    }

    /// Region size, as a power of two.
    pub(super) fn shift(&self) -> u32 {
        self.shift
    }

    /// What was asked for since the last time.
    pub(super) fn take_asked(&self) -> Vec<u32> {
        let mut asked = std::mem::take(&mut lock(&self.asked).regions);
        asked.sort_unstable();
        asked.dedup();
        asked
    }

    /// These are marked durably: they may be written.
    pub(super) fn heat(&self, regions: &[u32]) {
        for region in regions {
            if let Some(state) = self.regions.get(*region as usize) {
                state.store(HOT, SeqCst);
            }
        }
        self.served.fetch_add(1, SeqCst);
        self.waiters.wake();
    }

    /// They could not be marked: who waits is told.
    pub(super) fn refuse(&self) {
        self.refused.fetch_add(1, SeqCst);
        self.waiters.wake();
    }

    /// One bit for each region that is not cold, and for these.
    pub(super) fn words(&self, and: &[u32]) -> Vec<u64> {
        let mut words = vec![0; MAX_REGIONS / 64];
        let warm = self
            .regions
            .iter()
            .enumerate()
            .filter(|(_, state)| state.load(SeqCst) != COLD)
            .map(|(region, _)| region);
        for region in warm.chain(and.iter().map(|region| *region as usize)) {
            if let Some(word) = words.get_mut(region / 64) {
                *word |= 1 << (region % 64);
            }
        }
        words
    }

    pub(super) fn any_warm(&self) -> bool {
        self.regions.iter().any(|state| state.load(Relaxed) != COLD)
    }

    /// Regions that nobody has begun to write since the last call, which may be cooled
    /// after a grace period. The others are looked at by the next call.
    pub(super) fn take_idle(&self) -> Vec<u32> {
        let mut idle = Vec::new();
        for (region, state) in self.regions.iter().enumerate() {
            match state.load(SeqCst) {
                IDLE => idle.push(region as u32),
                // Only the keeper makes it anything else.
                HOT => state.store(IDLE, SeqCst),
                _ => {}
            }
        }
        idle
    }

    /// Begins to wait for all writers who may have seen a region hot before this call.
    pub(super) fn grace_period(&self) -> GracePeriod {
        GracePeriod {
            left: 2,
            waiting_for: self.epoch.fetch_add(1, SeqCst) % 2,
        }
    }

    /// Whether they have all left. To be asked again later, if not.
    pub(super) fn has_passed(&self, period: &mut GracePeriod) -> bool {
        while period.left > 0 {
            let half = period.waiting_for;
            let counted: usize = self.shards.iter().map(|s| s.0[half].load(SeqCst)).sum();
            if counted > 0 {
                return false;
            }
            period.left -= 1;
            if period.left > 0 {
                period.waiting_for = self.epoch.fetch_add(1, SeqCst) % 2;
            }
        }
        true
    }

    /// Of `regions`, whose bits are saved, those that are still idle become cold: their
    /// marks may be removed. Gives the number.
    pub(super) fn cool(&self, regions: &[u32]) -> usize {
        let cooled = regions.iter().filter(|region| {
            self.regions
                .get(**region as usize)
                .is_some_and(|state| state.compare_exchange(IDLE, COLD, SeqCst, SeqCst).is_ok())
        });
        cooled.count()
    }

    /// The bytes of a disk of `size` bytes that a region covers.
    pub(super) fn range(&self, region: u32, size: u64) -> std::ops::Range<u64> {
        region_range(self.shift, region as usize, size)
    }
}

/// The bytes of a disk of `size` bytes that region `region` of `1 << shift` covers.
fn region_range(shift: u32, region: usize, size: u64) -> std::ops::Range<u64> {
    let at = |region: usize| {
        (region as u64).checked_shl(shift).map_or(size, |at| {
            // Bits may have been shifted out.
            if at >> shift == region as u64 {
                at.min(size)
            } else {
                size
            }
        })
    };
    let end = match region + 1 >= MAX_REGIONS {
        true => size,
        false => at(region + 1),
    };
    at(region)..end
}

impl Hot {
    /// The ranges of a disk of `size` bytes that may have been written.
    pub(super) fn ranges(&self, size: u64) -> Vec<std::ops::Range<u64>> {
        match self {
            Self::All => std::iter::once(0..size).collect(),
            Self::Some { shift, words } => (0..MAX_REGIONS)
                .filter(|region| {
                    words
                        .get(region / 64)
                        .is_some_and(|w| w >> (region % 64) & 1 != 0)
                })
                .map(|region| region_range(*shift, region, size))
                .filter(|range| !range.is_empty())
                .collect(),
        }
    }
}

/// Size of the regions of a disk of `size` bytes: some thousand of 1 MiB to 64 MiB, or
/// larger ones if these are too many.
fn shift_for(size: u64) -> u32 {
    let log2 = |value: u64| value.next_power_of_two().trailing_zeros();
    // Half of them, so that the disk may grow.
    let least = log2(size.div_ceil(MAX_REGIONS as u64 / 2).max(1));
    let usual = log2(size.div_ceil(WANTED_REGIONS).max(1)).clamp(MIN_SHIFT, USUAL_MAX_SHIFT);
    usual.max(least)
}

#[cfg(all(test, shuttle))]
mod tests {
    use std::sync::Arc;

    use shuttle::future::block_on;
    use shuttle::thread;

    use super::*;
    use crate::sync::atomic::AtomicU64;

    /// The parts of the protocol that must not be left out.
    #[derive(Clone, Copy, PartialEq, Eq)]
    enum Leave {
        Nothing,
        /// The wait for writers who may have seen a region hot.
        GracePeriod,
    }

    /// The regions that writes go to, each of which has a bit of its own.
    const WRITES: [u64; 4] = [0, 1, 0, 0];

    /// A disk and its bitmap.
    struct Disk {
        intent: Intent,
        /// Bits in memory, and in the file; marks of regions in the file.
        bits: AtomicU64,
        saved: AtomicU64,
        marks: AtomicU64,
        /// Writes that have been acknowledged.
        written: AtomicU64,
    }

    impl Disk {
        /// A crash at this moment loses nothing.
        fn check(&self) {
            // In the order in which they come to be true, so that each is seen by the next: a
            // mark goes after bits are saved.
            let written = self.written.load(SeqCst);
            let marks = self.marks.load(SeqCst);
            let saved = self.saved.load(SeqCst);
            for (bit, region) in WRITES.iter().enumerate() {
                let lost = written >> bit & 1 != 0 && (marks >> region | saved >> bit) & 1 == 0;
                assert!(!lost, "write {bit} is lost");
            }
        }

        fn write(&self, bit: usize) {
            let region = WRITES[bit];
            let writing = block_on(self.intent.enter(region << 20, 512)).expect("it is there");
            let may = self.marks.load(SeqCst) >> region & 1 != 0;
            assert!(may, "a region without a mark is written");
            self.bits.fetch_or(1 << bit, SeqCst);
            drop(writing);
            self.written.fetch_or(1 << bit, SeqCst);
            self.check();
        }

        fn serve(&self) {
            let asked = self.intent.take_asked();
            if !asked.is_empty() {
                self.marks.store(self.intent.words(&asked)[0], SeqCst);
                self.intent.heat(&asked);
            }
        }

        fn cool(&self, leave: Leave) {
            self.intent.take_idle();
            let idle = self.intent.take_idle();
            let mut period = self.intent.grace_period();
            while leave == Leave::Nothing && !self.intent.has_passed(&mut period) {
                self.serve();
                thread::yield_now();
            }
            self.saved.store(self.bits.load(SeqCst), SeqCst);
            if self.intent.cool(&idle) > 0 {
                self.marks.store(self.intent.words(&[])[0], SeqCst);
            }
        }
    }

    fn writers_and_a_keeper(leave: Leave) {
        let disk = Arc::new(Disk {
            intent: Intent::with_shift(20),
            bits: AtomicU64::new(0),
            saved: AtomicU64::new(0),
            marks: AtomicU64::new(0),
            written: AtomicU64::new(0),
        });
        disk.intent.keeper_is_there(Arc::new(|| ()));
        let armed = disk.intent.arm();
        disk.intent.all_are_counted(armed);
        let writers = [[0, 1], [2, 3]].map(|bits| {
            let disk = Arc::clone(&disk);
            thread::spawn(move || {
                for bit in bits {
                    disk.write(bit);
                }
            })
        });
        while disk.written.load(SeqCst) < (1 << WRITES.len()) - 1 {
            disk.serve();
            disk.cool(leave);
            disk.check();
            thread::yield_now();
        }
        for writer in writers {
            writer.join().expect("it is right");
        }
        disk.check();
    }

    #[test]
    fn shuttle_no_write_goes_to_a_region_without_a_mark_or_a_saved_bit() {
        shuttle::check_random(|| writers_and_a_keeper(Leave::Nothing), 2_000);
    }

    #[test]
    #[should_panic]
    fn shuttle_a_keeper_that_does_not_wait_for_writers_is_found_out() {
        shuttle::check_random(|| writers_and_a_keeper(Leave::GracePeriod), 20_000);
    }
}
