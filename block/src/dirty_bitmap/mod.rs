//! Which parts of a disk were written: one bit per chunk, set and cleared by
//! several threads at once without a lock, and quick to scan when sparse.
//!
//! Names, persistence and the states that users see of a bitmap do not live
//! here.
//!
//! # Levels
//!
//! Level 0 has a bit per chunk. Each level above has a bit per word of the level
//! below, which says that the word *may* have set bits. So a scan skips 64 clean
//! chunks per bit, 4096 per bit of level 2, and so on: 2 TiB at 64 KiB are 4 MiB
//! of level 0, and a scan of a clean one reads 16 words.
//!
//! # Why a scan misses nothing
//!
//! A summary bit too many costs time, a missing one loses data. `set` sets the
//! bit and then those above it, each unless it is set already, always up to the
//! top (the thread that set the one below may not have got there yet). Only
//! *pruning* clears summary bits: after it has cleared one, it looks at the word
//! below again and restores the bit if the word is not zero. In between, a bit
//! may be out of a scanner's sight. So prunings are counted, and a scan during
//! which there was one is not trusted: it is repeated, and at last done without
//! the summaries.

use std::ops::Range;

use crate::sync::atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst};

#[cfg(test)]
mod tests;

const WORD: u64 = 64;

/// Most memory that level 0 may take: 2^31 chunks, which is 1 TiB at 512 bytes
/// and 128 TiB at 64 KiB.
const MAX_CHUNKS: u64 = 1 << 31;

/// Levels are added until one has no more words than this.
const TOP_WORDS: usize = 16;

/// How often a scan is repeated before it does without summaries.
const SCAN_TRIES: usize = 4;

/// Why there can be no such bitmap.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BitmapError {
    /// The granularity is not a power of two in 512 bytes to 2 GiB.
    #[error("Granularity must be power of 2 and at least 512")]
    Granularity(u64),
    /// It would take too much memory.
    #[error(
        "Dirty bitmap of {size} bytes at granularity {granularity} needs {chunks} bits, more than \
         {MAX_CHUNKS}: choose a granularity of at least {remedy}"
    )]
    TooLarge {
        /// Size of the disk in bytes.
        size: u64,
        /// Chunk size in bytes that was asked for.
        granularity: u64,
        /// Number of chunks.
        chunks: u64,
        /// Smallest granularity that is accepted for this size, in bytes.
        remedy: u64,
    },
    /// There is not enough memory for it.
    #[error("Not enough memory for a dirty bitmap of {bytes} bytes")]
    Memory {
        /// Memory that was asked for, in bytes.
        bytes: u64,
    },
}

/// A dirty bitmap. Any thread may do anything at any time.
pub struct DirtyBitmap {
    size: u64,
    shift: u32,
    chunks: u64,
    /// Level 0 and its summaries; see the module's head.
    levels: Vec<Box<[AtomicU64]>>,
    /// Number of dirty chunks, modulo 2^64: each change adds and subtracts what
    /// it changed, so it is exact when no change is under way.
    dirty: AtomicU64,
    /// Prunings under way.
    pruning: AtomicUsize,
    /// Prunings begun, ever.
    pruned: AtomicUsize,
}

impl DirtyBitmap {
    /// Smallest granularity in bytes.
    pub const MIN_GRANULARITY: u64 = 512;
    /// Largest granularity in bytes.
    pub const MAX_GRANULARITY: u64 = 1 << 31;

    /// A clean bitmap of a disk of `size` bytes in chunks of `granularity` bytes.
    pub fn new(size: u64, granularity: u64) -> Result<Self, BitmapError> {
        Self::with_top_words(size, granularity, TOP_WORDS)
    }

    /// As [`new`](Self::new), with levels up to one of `top_words`: tests have
    /// many levels on small disks.
    fn with_top_words(size: u64, granularity: u64, top_words: usize) -> Result<Self, BitmapError> {
        if !granularity.is_power_of_two()
            || !(Self::MIN_GRANULARITY..=Self::MAX_GRANULARITY).contains(&granularity)
        {
            return Err(BitmapError::Granularity(granularity));
        }
        let chunks = size.div_ceil(granularity);
        if chunks > MAX_CHUNKS {
            return Err(BitmapError::TooLarge {
                size,
                granularity,
                chunks,
                remedy: size.div_ceil(MAX_CHUNKS).next_power_of_two(),
            });
        }
        let mut levels = Vec::new();
        let mut bits = chunks;
        loop {
            let words = bits.div_ceil(WORD) as usize;
            levels.push(zeroed(words)?);
            if words <= top_words {
                break;
            }
            bits = words as u64;
        }
        Ok(Self {
            size,
            shift: granularity.trailing_zeros(),
            chunks,
            levels,
            dirty: AtomicU64::new(0),
            pruning: AtomicUsize::new(0),
            pruned: AtomicUsize::new(0),
        })
    }

    /// Size of the disk in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Chunk size in bytes.
    pub fn granularity(&self) -> u64 {
        1 << self.shift
    }

    /// Marks every chunk that `len` bytes at `offset` touch. What is past the
    /// end is ignored.
    pub fn set(&self, offset: u64, len: u64) {
        let end = offset.saturating_add(len).min(self.size);
        if offset >= end {
            return;
        }
        self.set_chunks(offset >> self.shift, end.div_ceil(self.granularity()));
    }

    /// Marks all.
    pub fn set_all(&self) {
        self.set_chunks(0, self.chunks);
    }

    /// Marks every chunk that a dirty chunk of `other` touches. What `other` has past
    /// the end is ignored.
    pub fn merge(&self, other: &Self) {
        let mut at = 0;
        while let Some(range) = other.next_dirty(at) {
            self.set(range.start, range.end - range.start);
            at = range.end;
        }
    }

    /// The bits, 64 chunks in a word, the first one in its lowest bit. A disk without
    /// chunks has none.
    pub fn words(&self) -> impl Iterator<Item = u64> {
        self.levels[0].iter().map(|word| word.load(SeqCst))
    }

    /// Adds the words from `first` on to what is in `into`; past the end there is nothing.
    pub(crate) fn add_words_to(&self, first: usize, into: &mut [u64]) {
        let words = self.levels[0].iter().skip(first);
        for (into, word) in into.iter_mut().zip(words) {
            *into |= word.load(SeqCst);
        }
    }

    /// Marks what is set in `words`, the first of which is word `first`. What is past
    /// the end is ignored.
    pub(crate) fn set_words(&self, first: usize, words: &[u64]) {
        for (index, bits) in (first..).zip(words) {
            let start = (index as u64).saturating_mul(WORD);
            let mut bits = *bits;
            while bits != 0 && start < self.chunks {
                let from = u64::from(bits.trailing_zeros());
                let run = u64::from((!(bits >> from)).trailing_zeros());
                self.set_chunks(
                    (start + from).min(self.chunks),
                    (start + from + run).min(self.chunks),
                );
                bits &= u64::MAX.checked_shl((from + run) as u32).unwrap_or(0);
            }
        }
    }

    /// Clears every chunk that lies *wholly* in `len` bytes at `offset` (the last
    /// one of the disk ends where the disk does), and gives the number of bytes
    /// that were dirty.
    ///
    /// Whoever copies has to clear a chunk before reading it: a write that ends
    /// after this marks it again.
    pub fn clear(&self, offset: u64, len: u64) -> u64 {
        let mut bytes = 0;
        self.clear_chunks(self.inside(offset, len), |chunks| {
            bytes += self.bytes_of(chunks);
        });
        bytes
    }

    /// As [`clear`](Self::clear), but gives the ranges in bytes that were dirty,
    /// in order, neighbours joined. The caller bounds `len`.
    pub fn take(&self, offset: u64, len: u64) -> Vec<Range<u64>> {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        self.clear_chunks(self.inside(offset, len), |chunks| {
            let range = self.range_of(chunks);
            match ranges.last_mut() {
                Some(last) if last.end == range.start => last.end = range.end,
                _ => ranges.push(range),
            }
        });
        ranges
    }

    /// Clears all.
    pub fn clear_all(&self) {
        self.clear_chunks(0..self.chunks, |_| {});
    }

    /// Whether the chunk that holds byte `offset` is dirty; past the end it is
    /// not.
    pub fn is_dirty(&self, offset: u64) -> bool {
        let chunk = offset >> self.shift;
        offset < self.size
            && self.levels[0][(chunk / WORD) as usize].load(SeqCst) >> (chunk % WORD) & 1 != 0
    }

    /// Whether nothing is dirty. A chunk whose `set` has returned is seen.
    pub fn is_clean(&self) -> bool {
        self.find_dirty(0).is_none()
    }

    /// Dirty bytes, a partial last chunk counted as a whole one. Exact when no
    /// change is under way; else a glimpse, good for progress only.
    pub fn count_bytes(&self) -> u64 {
        self.count_chunks() << self.shift
    }

    /// Dirty chunks; see [`count_bytes`](Self::count_bytes).
    pub fn count_chunks(&self) -> u64 {
        let count = self.dirty.load(SeqCst);
        // A clear may have been counted before the set that it undid.
        if count > self.chunks { 0 } else { count }
    }

    /// The first run of dirty chunks that ends after byte `from`, in bytes: from
    /// its first dirty byte not before `from`'s chunk, up to the next clean
    /// chunk or the end of the disk. Takes time for the length of the run: see
    /// [`next_dirty_area`](Self::next_dirty_area) for a bounded one.
    pub fn next_dirty(&self, from: u64) -> Option<Range<u64>> {
        self.next_dirty_area(from, u64::MAX)
    }

    /// As [`next_dirty`](Self::next_dirty), but no longer than `max_len` bytes
    /// (rounded up to a chunk).
    ///
    /// A chunk whose `set` has returned before this call is found, unless it is
    /// cleared meanwhile. While others clear, a later run than the first may be
    /// given, but never `None` with something dirty from `from` on.
    pub fn next_dirty_area(&self, from: u64, max_len: u64) -> Option<Range<u64>> {
        if from >= self.size {
            return None;
        }
        let first = self.find_dirty(from >> self.shift)?;
        let most = max_len.div_ceil(self.granularity()).max(1);
        let limit = first.saturating_add(most).min(self.chunks);
        let end = self.find_clean(first + 1, limit);
        Some(self.range_of(first..end))
    }

    /// Start in bytes of the first clean chunk of those that `range` (in bytes)
    /// touches. Takes as long as the range is, whatever the size of the disk.
    pub fn next_clean(&self, range: &Range<u64>) -> Option<u64> {
        let first = range.start >> self.shift;
        let limit = range.end.div_ceil(self.granularity()).min(self.chunks);
        if first >= limit {
            return None;
        }
        let chunk = self.find_clean(first, limit);
        (chunk < limit).then_some(chunk << self.shift)
    }

    /// Chunks that lie wholly in a range of bytes.
    fn inside(&self, offset: u64, len: u64) -> Range<u64> {
        let end = offset.saturating_add(len);
        let first = offset.div_ceil(self.granularity());
        let last = if end >= self.size {
            self.chunks
        } else {
            end >> self.shift
        };
        first.min(last)..last
    }

    fn range_of(&self, chunks: Range<u64>) -> Range<u64> {
        let end = u128::from(chunks.end) << self.shift;
        // Only the last chunk may reach past the end of the disk, or of u64.
        let end = u64::try_from(end).unwrap_or(u64::MAX).min(self.size);
        chunks.start << self.shift..end
    }

    fn bytes_of(&self, chunks: Range<u64>) -> u64 {
        let range = self.range_of(chunks);
        range.end - range.start
    }

    fn set_chunks(&self, first: u64, end: u64) {
        let mut added = 0;
        for (word, mask) in words(first..end) {
            let before = self.levels[0][word].fetch_or(mask, SeqCst);
            added += u64::from((mask & !before).count_ones());
            self.mark_above(0, word);
        }
        if added > 0 {
            self.dirty.fetch_add(added, SeqCst);
        }
    }

    /// Sets the summary bits above word `index` of `level`, up to the top.
    fn mark_above(&self, level: usize, mut index: usize) {
        for words in &self.levels[level + 1..] {
            let bit = 1 << (index as u64 % WORD);
            index /= WORD as usize;
            if words[index].load(SeqCst) & bit == 0 {
                words[index].fetch_or(bit, SeqCst);
            }
        }
    }

    /// Clears `chunks` and calls `dirty` with each run of them that was set.
    fn clear_chunks(&self, chunks: Range<u64>, mut dirty: impl FnMut(Range<u64>)) {
        let mut removed = 0;
        let mut pruning = false;
        for (word, mask) in words(chunks) {
            if self.levels[0][word].load(SeqCst) & mask == 0 {
                continue;
            }
            let before = self.levels[0][word].fetch_and(!mask, SeqCst);
            let mut was = before & mask;
            removed += u64::from(was.count_ones());
            if was != 0 && before & !mask == 0 && self.levels.len() > 1 {
                if !pruning {
                    pruning = true;
                    self.pruning.fetch_add(1, SeqCst);
                    self.pruned.fetch_add(1, SeqCst);
                }
                self.prune_above(word);
            }
            while was != 0 {
                let start = u64::from(was.trailing_zeros());
                let run = u64::from((!(was >> start)).trailing_zeros());
                let base = word as u64 * WORD;
                dirty(base + start..base + start + run);
                was &= u64::MAX.checked_shl((start + run) as u32).unwrap_or(0);
            }
        }
        if pruning {
            self.pruning.fetch_sub(1, SeqCst);
        }
        if removed > 0 {
            self.dirty.fetch_sub(removed, SeqCst);
        }
    }

    /// Clears the summary bits above word `index` of level 0, which has become
    /// zero, as far as nothing else is below them; restores them if the words
    /// are not zero any more. Only while counted in `pruning`.
    fn prune_above(&self, mut index: usize) {
        for level in 1..self.levels.len() {
            let bit = 1 << (index as u64 % WORD);
            let above = index / WORD as usize;
            let before = self.levels[level][above].fetch_and(!bit, SeqCst);
            if self.levels[level - 1][index].load(SeqCst) != 0 {
                self.mark_above(level - 1, index);
                return;
            }
            if before & !bit != 0 {
                return;
            }
            index = above;
        }
    }

    fn find_dirty(&self, from: u64) -> Option<u64> {
        for _ in 0..SCAN_TRIES {
            let pruned = self.pruned.load(SeqCst);
            let quiet = self.pruning.load(SeqCst) == 0;
            let found = self.find_bit(0, from);
            if found.is_some() || (quiet && self.pruned.load(SeqCst) == pruned) {
                return found;
            }
        }
        self.find_bit_without_summaries(0, from)
    }

    /// First set bit of `level` at or after `from`.
    fn find_bit(&self, level: usize, mut from: u64) -> Option<u64> {
        let words = &self.levels[level];
        if level + 1 == self.levels.len() {
            return self.find_bit_without_summaries(level, from);
        }
        loop {
            let index = (from / WORD) as usize;
            let bits = words.get(index)?.load(SeqCst) & (u64::MAX << (from % WORD));
            if bits != 0 {
                return Some(index as u64 * WORD + u64::from(bits.trailing_zeros()));
            }
            // The summary may be out of date: then look further.
            from = self.find_bit(level + 1, index as u64 + 1)? * WORD;
        }
    }

    fn find_bit_without_summaries(&self, level: usize, from: u64) -> Option<u64> {
        let start = (from / WORD) as usize;
        let mut mask = u64::MAX << (from % WORD);
        for (index, word) in self.levels[level].iter().enumerate().skip(start) {
            let bits = word.load(SeqCst) & mask;
            if bits != 0 {
                return Some(index as u64 * WORD + u64::from(bits.trailing_zeros()));
            }
            mask = u64::MAX;
        }
        None
    }

    /// First clean chunk at or after `from`, at most `limit`.
    fn find_clean(&self, from: u64, limit: u64) -> u64 {
        for (word, mask) in words(from..limit) {
            let clean = !self.levels[0][word].load(SeqCst) & mask;
            if clean != 0 {
                return word as u64 * WORD + u64::from(clean.trailing_zeros());
            }
        }
        limit
    }
}

impl std::fmt::Debug for DirtyBitmap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DirtyBitmap")
            .field("size", &self.size)
            .field("granularity", &self.granularity())
            .field("count_bytes", &self.count_bytes())
            .finish_non_exhaustive()
    }
}

/// The words that a range of bits touches, each with its bits.
fn words(bits: Range<u64>) -> impl Iterator<Item = (usize, u64)> {
    let end = bits.end;
    let mut at = bits.start;
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let word = at / WORD;
        let last = end.min((word + 1) * WORD);
        let count = last - at;
        let mask = (u64::MAX >> (WORD - count)) << (at % WORD);
        at = last;
        Some((word as usize, mask))
    })
}

fn zeroed(words: usize) -> Result<Box<[AtomicU64]>, BitmapError> {
    let mut level = Vec::new();
    level
        .try_reserve_exact(words)
        .map_err(|_| BitmapError::Memory {
            bytes: words as u64 * 8,
        })?;
    level.extend((0..words).map(|_| AtomicU64::new(0)));
    Ok(level.into_boxed_slice())
}
