//! What the guest believes to be on a disk.
//!
//! One word per block: the generation of the last acknowledged write (0 for
//! zeroes), and whether a request is on its way. A block has one request at a
//! time, so that what must be read back is never in doubt.
//!
//! The digest folds the whole record into one number, which the host computes
//! again from an image: equal digests mean that every acknowledged write is
//! there, and nothing else.

const BUSY: u64 = 1 << 63;
const UNKNOWN: u64 = 1 << 62;

/// The record of one disk, or of its first blocks. Generations stay below
/// 2^62: no machine gets there.
#[derive(Debug)]
pub struct Record<'a> {
    blocks: &'a mut [u64],
    last: u64,
}

/// A run of blocks: first block and how many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The first block.
    pub first: u64,
    /// How many.
    pub count: u64,
}

impl<'a> Record<'a> {
    /// The record of a disk of zeroes; `blocks` has one word per block, its
    /// content does not matter.
    pub fn new(blocks: &'a mut [u64]) -> Self {
        blocks.fill(0);
        Self { blocks, last: 0 }
    }

    /// How many blocks there are.
    pub fn blocks(&self) -> u64 {
        self.blocks.len() as u64
    }

    /// The newest generation handed out, 0 if none.
    pub fn last_generation(&self) -> u64 {
        self.last
    }

    /// Marks the run busy. Returns false, with nothing marked, if a block is
    /// busy already or outside.
    pub fn claim(&mut self, run: Run) -> bool {
        let Some(blocks) = self.run_mut(run) else {
            return false;
        };
        if blocks.iter().any(|block| block & BUSY != 0) {
            return false;
        }
        blocks.iter_mut().for_each(|block| *block |= BUSY);
        true
    }

    /// The generation of the next write.
    pub fn next_generation(&mut self) -> u64 {
        self.last += 1;
        self.last
    }

    /// What a claimed or idle block must read as: its generation, 0 for
    /// zeroes, `None` if a discard or a failed write leaves it open.
    pub fn expected(&self, block: u64) -> Option<u64> {
        let word = usize::try_from(block)
            .ok()
            .and_then(|block| self.blocks.get(block))?;
        (word & UNKNOWN == 0).then_some(word & !BUSY)
    }

    /// Ends a read: nothing has changed.
    pub fn finish_read(&mut self, run: Run) {
        self.update(run, |block| block & !BUSY);
    }

    /// Ends a write that was acknowledged; generation 0 for zeroes.
    pub fn finish_write(&mut self, run: Run, generation: u64) {
        self.update(run, |_| generation);
    }

    /// Ends a discard, or a write that failed: anything may be there now.
    pub fn finish_unknown(&mut self, run: Run) {
        self.update(run, |_| UNKNOWN);
    }

    /// Takes over what was found on a disk used before; later writes get
    /// larger generations.
    pub fn adopt(&mut self, block: u64, generation: u64) {
        self.last = self.last.max(generation);
        self.update(
            Run {
                first: block,
                count: 1,
            },
            |_| generation,
        );
    }

    /// The first block from `from` on that a discard or a failed write left
    /// open.
    pub fn next_unknown(&self, from: u64) -> Option<u64> {
        let from = usize::try_from(from).ok()?;
        let blocks = self.blocks.get(from..)?;
        let found = blocks.iter().position(|block| block & UNKNOWN != 0)?;
        Some((from + found) as u64)
    }

    /// The digest over all blocks, in order.
    pub fn digest(&self) -> u64 {
        let mut digest = Digest::new();
        for block in self.blocks.iter() {
            digest.add(block & !BUSY);
        }
        digest.finish()
    }

    fn run_mut(&mut self, run: Run) -> Option<&mut [u64]> {
        let first = usize::try_from(run.first).ok()?;
        let end = usize::try_from(run.first.checked_add(run.count)?).ok()?;
        self.blocks.get_mut(first..end)
    }

    fn update(&mut self, run: Run, word: impl Fn(u64) -> u64) {
        if let Some(blocks) = self.run_mut(run) {
            blocks.iter_mut().for_each(|block| *block = word(*block));
        }
    }
}

/// The digest of a disk: its blocks' generations, in order from block 0, each
/// taken with FNV-1a in steps of 64 bits instead of 8.
#[derive(Clone, Debug)]
pub struct Digest(u64);

impl Default for Digest {
    fn default() -> Self {
        Self::new()
    }
}

impl Digest {
    /// The digest of no blocks.
    pub fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    /// Adds the next block's generation (0 for zeroes).
    pub fn add(&mut self, generation: u64) {
        self.0 = (self.0 ^ generation)
            .wrapping_mul(0x0000_0100_0000_01b3)
            // A multiplication carries upwards only; the rotation lets high
            // bits reach the low ones.
            .rotate_left(31);
    }

    /// The digest of all blocks added.
    pub fn finish(&self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(first: u64, count: u64) -> Run {
        Run { first, count }
    }

    #[test]
    fn a_busy_block_cannot_be_claimed_again() {
        let mut words = [7; 8];
        let mut record = Record::new(&mut words);
        assert!(record.claim(run(2, 3)));
        assert!(!record.claim(run(4, 2)));
        assert!(record.claim(run(5, 1)), "a refused claim marks nothing");
        record.finish_read(run(2, 3));
        assert!(record.claim(run(4, 1)));
    }

    #[test]
    fn a_run_past_the_end_is_refused() {
        let mut words = [0; 8];
        let mut record = Record::new(&mut words);
        assert!(!record.claim(run(7, 2)));
        assert!(!record.claim(run(u64::MAX, 2)));
    }

    #[test]
    fn the_record_holds_what_was_acknowledged() {
        let mut words = [0; 4];
        let mut record = Record::new(&mut words);
        assert!(record.claim(run(0, 2)));
        let generation = record.next_generation();
        assert_eq!(record.expected(0), Some(0), "not acknowledged yet");
        record.finish_write(run(0, 2), generation);
        assert_eq!(record.expected(1), Some(1));
        record.finish_unknown(run(1, 1));
        assert_eq!(record.expected(1), None);
        assert_eq!(record.next_unknown(0), Some(1));
        assert_eq!(record.next_unknown(2), None);
        record.finish_write(run(0, 1), 0);
        assert_eq!(record.expected(0), Some(0), "zeroes were written");
        assert_eq!(record.expected(9), None);
    }

    #[test]
    fn adopted_blocks_are_older_than_the_next_write() {
        let mut words = [0; 4];
        let mut record = Record::new(&mut words);
        record.adopt(3, 41);
        record.adopt(2, 7);
        assert_eq!(record.expected(3), Some(41));
        assert_eq!(record.next_generation(), 42);
    }

    #[test]
    fn the_digest_is_the_same_from_record_and_image() {
        let mut words = [0; 3];
        let mut record = Record::new(&mut words);
        record.finish_write(run(1, 2), 5);
        assert!(record.claim(run(1, 1)), "busy does not count");
        let mut digest = Digest::new();
        [0, 5, 5].into_iter().for_each(|g| digest.add(g));
        assert_eq!(record.digest(), digest.finish());
    }

    #[test]
    fn the_digest_sees_order_and_number_of_blocks() {
        let of = |generations: &[u64]| {
            let mut digest = Digest::new();
            generations.iter().for_each(|&g| digest.add(g));
            digest.finish()
        };
        assert_ne!(of(&[1, 2]), of(&[2, 1]));
        assert_ne!(of(&[1]), of(&[1, 0]));
        assert_ne!(of(&[0]), of(&[0, 0]));
    }
}
