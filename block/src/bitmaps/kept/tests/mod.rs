//! Tests of the side-car file: power cuts at every flush, lost and torn writes, hostile
//! content.

mod file;
mod giving_up;
mod power_cut;

use std::collections::{HashMap, HashSet};
use std::io;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};

use super::BLOCK;
use super::core::{Snapshot, Source};
use super::format::{INTENT, Stamp};
use super::store::Storage;
use crate::buffer::IoVec;
use crate::driver::{BlockDriver, BoxFuture, Extent, Limits, WriteFlags, ZeroFlags};
use crate::error::IoError;
use crate::node::{Node, NodeOptions};

/// Numbers that look random and are the same each time.
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(super) fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % limit
    }

    pub(super) fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// What was done to a storage.
#[derive(Clone, Debug)]
pub(super) enum Done {
    Write(u32, Vec<u8>),
    Sync,
    Remove,
}

/// A way in which a storage lies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Lie {
    #[default]
    None,
    /// A flush after the intent was written does nothing.
    IntentIsNotFlushed,
    /// A flush after anything else than the intent or a superblock was written does nothing.
    PagesAreNotFlushed,
}

#[derive(Debug, Default)]
struct State {
    /// What it was at first.
    base: HashMap<u32, Vec<u8>>,
    log: Vec<Done>,
    content: HashMap<u32, Vec<u8>>,
    removed: bool,
    lie: Lie,
    last_written: u32,
    /// Writes and flushes that still succeed.
    good: Option<u64>,
    /// Blocks that cannot be written.
    bad: HashSet<u32>,
    /// Blocks of which it has none yet cannot be had.
    full: bool,
}

/// A storage in memory that remembers each write and flush.
#[derive(Clone, Debug, Default)]
pub(super) struct Recorder(Arc<Mutex<State>>);

impl Recorder {
    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn lying(lie: Lie) -> Self {
        let this = Self::default();
        this.lock().lie = lie;
        this
    }

    /// Lets all but the next `good` writes and flushes fail.
    pub(super) fn fail_after(&self, good: u64) {
        self.lock().good = Some(good);
    }

    /// From now on these blocks cannot be written, and no others.
    pub(super) fn break_blocks(&self, blocks: &[u32]) {
        self.lock().bad = blocks.iter().copied().collect();
    }

    /// Whether there is no room for what was never written.
    pub(super) fn set_full(&self, full: bool) {
        self.lock().full = full;
    }

    pub(super) fn log_len(&self) -> usize {
        self.lock().log.len()
    }

    /// What is left if the power is cut after `count` steps: what was flushed, and of the
    /// rest what `random` leaves of it, in sectors. `None`: the file was taken away.
    pub(super) fn after_power_cut(&self, count: usize, random: &mut Random) -> Option<Self> {
        let state = self.lock();
        let log = &state.log[..count];
        let flushed = log
            .iter()
            .rposition(|done| matches!(done, Done::Sync))
            .map_or(0, |place| place + 1);
        let mut content = state.base.clone();
        let mut gone = false;
        let loss = random.below(3);
        for (step, done) in log.iter().enumerate() {
            match done {
                Done::Sync => {}
                Done::Remove => gone = true,
                Done::Write(block, data) => {
                    let old = content.entry(*block).or_insert_with(|| vec![0; BLOCK]);
                    for (sector, data) in data.chunks(512).enumerate() {
                        // All is lost, or nothing, or some.
                        let kept = step < flushed || loss == 1 || (loss == 2 && random.one_in(2));
                        if kept {
                            old[sector * 512..][..data.len()].copy_from_slice(data);
                        }
                    }
                }
            }
        }
        let left = Self::default();
        {
            let mut left = left.lock();
            left.base = content.clone();
            left.content = content;
            left.lie = state.lie;
        }
        (!gone).then_some(left)
    }

    fn may(&self) -> io::Result<()> {
        let mut state = self.lock();
        match &mut state.good {
            None => Ok(()),
            Some(0) => Err(io::Error::from_raw_os_error(libc::EIO)),
            Some(left) => {
                *left -= 1;
                Ok(())
            }
        }
    }
}

impl Storage for Recorder {
    fn read(&self, block: u32, into: &mut [u8]) -> io::Result<()> {
        let state = self.lock();
        for (index, into) in into.chunks_mut(BLOCK).enumerate() {
            match state.content.get(&(block + index as u32)) {
                Some(data) => into.copy_from_slice(&data[..into.len()]),
                None => into.fill(0),
            }
        }
        Ok(())
    }

    fn write(&self, block: u32, from: &[u8]) -> io::Result<()> {
        self.may()?;
        let mut state = self.lock();
        for (index, data) in from.chunks(BLOCK).enumerate() {
            let block = block + index as u32;
            if state.bad.contains(&block) {
                return Err(io::Error::from_raw_os_error(libc::EIO));
            }
            if state.full && !state.content.contains_key(&block) {
                return Err(io::Error::from_raw_os_error(libc::ENOSPC));
            }
            state.content.insert(block, data.to_vec());
            state.log.push(Done::Write(block, data.to_vec()));
            state.last_written = block;
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.may()?;
        let mut state = self.lock();
        let lies = match state.lie {
            Lie::None => false,
            Lie::IntentIsNotFlushed => state.last_written == INTENT,
            Lie::PagesAreNotFlushed => state.last_written > INTENT,
        };
        if !lies {
            state.log.push(Done::Sync);
        }
        Ok(())
    }

    fn reserve(&self, blocks: u32) -> io::Result<()> {
        let mut state = self.lock();
        for block in 0..blocks {
            if state.full && !state.content.contains_key(&block) {
                return Err(io::Error::from_raw_os_error(libc::ENOSPC));
            }
            state.content.entry(block).or_insert_with(|| vec![0; BLOCK]);
        }
        Ok(())
    }

    fn remove(&self) -> io::Result<()> {
        self.may()?;
        let mut state = self.lock();
        state.removed = true;
        state.log.push(Done::Remove);
        Ok(())
    }
}

/// A disk that has a size and nothing else.
pub(super) struct Sized(pub(super) Arc<AtomicU64>);

impl BlockDriver for Sized {
    fn name(&self) -> &'static str {
        "test"
    }
    fn size(&self) -> u64 {
        self.0.load(SeqCst)
    }
    fn limits(&self) -> Limits {
        Limits::default()
    }
    fn filename(&self) -> String {
        String::new()
    }
    fn read<'a>(&'a self, _: u64, _: IoVec) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async { Ok(()) })
    }
    fn write<'a>(&'a self, _: u64, _: IoVec, _: WriteFlags) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async { Ok(()) })
    }
    fn write_zeroes<'a>(
        &'a self,
        _: u64,
        _: u64,
        _: ZeroFlags,
    ) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async { Ok(()) })
    }
    fn discard<'a>(&'a self, _: u64, _: u64) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async { Ok(()) })
    }
    fn flush<'a>(&'a self) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async { Ok(()) })
    }
    fn block_status<'a>(&'a self, _: u64, len: u64) -> BoxFuture<'a, Result<Extent, IoError>> {
        Box::pin(async move {
            Ok(Extent {
                len,
                flags: Default::default(),
            })
        })
    }
}

/// A node with a disk of `size` bytes.
pub(super) fn sized_node(size: u64) -> Arc<Node> {
    let driver = Box::new(Sized(Arc::new(AtomicU64::new(size))));
    Node::new("disk", driver, NodeOptions::default())
}

/// The bitmaps of a node, without an image.
pub(super) struct OfTestNode(pub(super) Arc<Node>);

impl Source for OfTestNode {
    fn bitmaps(&self) -> Snapshot {
        match self.0.kept_bitmaps() {
            Some(bitmaps) => Snapshot::Bitmaps(bitmaps),
            None => Snapshot::Changing,
        }
    }

    fn size(&self) -> u64 {
        self.0.size()
    }

    fn spoil(&self, _: &str) {
        for bitmap in self.0.named_bitmaps() {
            bitmap.spoil();
        }
    }

    fn stamp(&self, _: bool) -> io::Result<Option<Stamp>> {
        Ok(Some(Stamp::default()))
    }
}
