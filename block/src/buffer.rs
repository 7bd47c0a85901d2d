//! Memory that I/O goes to and comes from.
//!
//! An [`IoVec`] is a scatter-gather list that keeps its memory alive by itself:
//! guest memory by its mapping, a job's buffer by its allocation. So an
//! operation can hold on to it until the kernel is done, whoever stops waiting.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;
use std::sync::Arc;

use smallvec::SmallVec;

/// Keeps the memory behind an [`IoVec`] mapped.
///
/// # Safety
///
/// The memory that an `IoVec` made with this owner points to must stay mapped
/// and writable until the owner is dropped, at the same address.
pub unsafe trait MemoryOwner: Send + Sync + 'static {}

#[derive(Clone, Copy, Debug)]
struct Segment {
    base: NonNull<u8>,
    len: usize,
}

/// A scatter-gather list over memory that it keeps alive.
///
/// Its bytes may be changed by others at any time (the guest), so they are only
/// copied, never borrowed. Cloning is cheap and shares the memory.
///
/// Copies race with those others. So they are made of relaxed atomic accesses,
/// each word read or written once: a copy may be a mixture of old and new, and
/// must be checked after it was made, but it is a value like any other. The guest
/// and the kernel are outside Rust's memory model, for which this is all that can
/// be said. What is left of it on paper: two of our own threads that copy the same
/// memory at once (a guest may give it to two requests) may meet with accesses of
/// different size, a word and a byte at the end of a list.
#[derive(Clone)]
pub struct IoVec {
    segments: SmallVec<[Segment; 4]>,
    len: usize,
    owner: Arc<dyn MemoryOwner>,
}

// SAFETY: the segments point into memory that `owner` (Send + Sync) keeps
// mapped; access is by atomic copies only, so no thread holds a reference.
unsafe impl Send for IoVec {}
// SAFETY: as for Send; no method hands out a reference to the bytes.
unsafe impl Sync for IoVec {}

impl IoVec {
    /// A list over `segments` (address, length in bytes), whose memory `owner`
    /// keeps alive.
    ///
    /// # Safety
    ///
    /// Each segment must lie in memory that stays readable and writable as long
    /// as `owner` lives.
    pub unsafe fn new(
        segments: impl IntoIterator<Item = (NonNull<u8>, usize)>,
        owner: Arc<dyn MemoryOwner>,
    ) -> Self {
        let segments: SmallVec<[Segment; 4]> = segments
            .into_iter()
            .filter(|(_, len)| *len > 0)
            .map(|(base, len)| Segment { base, len })
            .collect();
        let len = segments.iter().map(|s| s.len).sum();
        Self {
            segments,
            len,
            owner,
        }
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The kernel's form of the list. Valid as long as `self` or a clone lives.
    pub fn to_iovecs(&self) -> SmallVec<[libc::iovec; 4]> {
        self.segments
            .iter()
            .map(|s| libc::iovec {
                iov_base: s.base.as_ptr().cast(),
                iov_len: s.len,
            })
            .collect()
    }

    /// Whether each segment begins at a multiple of `address` and is a multiple
    /// of `len` long (powers of two, in bytes): what O_DIRECT wants of memory.
    pub fn is_aligned(&self, address: usize, len: usize) -> bool {
        self.segments
            .iter()
            .all(|s| (s.base.as_ptr() as usize) & (address - 1) == 0 && s.len & (len - 1) == 0)
    }

    /// Gives `visit` the segments of bytes `offset..offset + len`, in order.
    fn walk(&self, offset: usize, len: usize, mut visit: impl FnMut(Segment)) {
        let end = offset.checked_add(len).expect("slice end fits usize");
        assert!(
            end <= self.len,
            "slice {offset}+{len} of {} bytes",
            self.len
        );
        let mut skip = offset;
        let mut left = len;
        for segment in &self.segments {
            if left == 0 {
                break;
            }
            if skip >= segment.len {
                skip -= segment.len;
                continue;
            }
            let take = left.min(segment.len - skip);
            visit(Segment {
                // SAFETY: skip < segment.len, so this stays in the segment.
                base: unsafe { segment.base.add(skip) },
                len: take,
            });
            left -= take;
            skip = 0;
        }
    }

    /// The part of `len` bytes from `offset`.
    ///
    /// # Panics
    ///
    /// If it is not inside the list.
    pub fn slice(&self, offset: usize, len: usize) -> Self {
        let mut segments = SmallVec::new();
        self.walk(offset, len, |segment| segments.push(segment));
        Self {
            segments,
            len,
            owner: Arc::clone(&self.owner),
        }
    }

    /// Copies bytes `offset..offset + into.len()` out.
    ///
    /// # Panics
    ///
    /// If they are not inside the list.
    pub fn copy_to(&self, offset: usize, into: &mut [u8]) {
        let mut done = 0;
        self.walk(offset, into.len(), |segment| {
            // SAFETY: the segment is alive (owner).
            unsafe { shared::load(segment.base, &mut into[done..done + segment.len]) }
            done += segment.len;
        });
    }

    /// Copies `from` in at `offset`.
    ///
    /// # Panics
    ///
    /// If it does not fit.
    pub fn copy_from(&self, offset: usize, from: &[u8]) {
        let mut done = 0;
        self.walk(offset, from.len(), |segment| {
            // SAFETY: the segment is alive and writable (owner).
            unsafe { shared::store(segment.base, &from[done..done + segment.len]) }
            done += segment.len;
        });
    }

    /// Copies all of `from` in at `offset`. Where both share memory, the result
    /// is either's.
    ///
    /// # Panics
    ///
    /// If it does not fit.
    pub fn copy_from_iov(&self, offset: usize, from: &Self) {
        let mut done = 0;
        for part in &from.segments {
            let mut at = part.base;
            self.walk(offset + done, part.len, |segment| {
                // SAFETY: both segments are alive (owners), this one is writable, and no
                // more is taken than is left of the other.
                unsafe {
                    shared::copy(segment.base, at, segment.len);
                    at = at.add(segment.len);
                }
            });
            done += part.len;
        }
    }

    /// Sets all bytes to `byte`.
    pub fn fill(&self, byte: u8) {
        let block = [byte; BLOCK];
        let mut done = 0;
        while done < self.len {
            let n = BLOCK.min(self.len - done);
            self.copy_from(done, &block[..n]);
            done += n;
        }
    }

    /// Whether all bytes are zero at this moment.
    pub fn is_zero(&self) -> bool {
        let mut block = [0; BLOCK];
        let mut done = 0;
        while done < self.len {
            let n = BLOCK.min(self.len - done);
            self.copy_to(done, &mut block[..n]);
            if block[..n].iter().any(|b| *b != 0) {
                return false;
            }
            done += n;
        }
        true
    }
}

/// Copies go through the stack in pieces of this many bytes.
const BLOCK: usize = 4096;

/// The only accesses to memory that others write meanwhile.
mod shared {
    use std::ptr::NonNull;
    use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

    const WORD: usize = size_of::<u64>();

    /// Bytes before the first whole word of `len` bytes at `at`.
    fn unaligned(at: NonNull<u8>, len: usize) -> usize {
        at.as_ptr().align_offset(WORD).min(len)
    }

    /// Copies out as many bytes as `into` has.
    ///
    /// # Safety
    ///
    /// They must stay readable and writable meanwhile.
    pub(super) unsafe fn load(from: NonNull<u8>, into: &mut [u8]) {
        let (first, rest) = into.split_at_mut(unaligned(from, into.len()));
        let mut at = from;
        for byte in first {
            // SAFETY: there is a byte of `from` for each of `into`; no alignment.
            unsafe {
                *byte = AtomicU8::from_ptr(at.as_ptr()).load(Ordering::Relaxed);
                at = at.add(1);
            }
        }
        let (words, last) = rest.as_chunks_mut::<WORD>();
        for word in words {
            // SAFETY: as above, for eight bytes, and `at` is aligned by now.
            unsafe {
                let value = AtomicU64::from_ptr(at.as_ptr().cast()).load(Ordering::Relaxed);
                *word = value.to_ne_bytes();
                at = at.add(WORD);
            }
        }
        for byte in last {
            // SAFETY: as for the first bytes.
            unsafe {
                *byte = AtomicU8::from_ptr(at.as_ptr()).load(Ordering::Relaxed);
                at = at.add(1);
            }
        }
    }

    /// Copies `len` bytes from one place to another.
    ///
    /// # Safety
    ///
    /// They must stay readable there and writable here meanwhile.
    pub(super) unsafe fn copy(into: NonNull<u8>, from: NonNull<u8>, len: usize) {
        let first = unaligned(into, len);
        if first != unaligned(from, len) {
            // No word is aligned on both sides.
            let mut block = [0; super::BLOCK];
            for at in (0..len).step_by(block.len()) {
                let block = &mut block[..super::BLOCK.min(len - at)];
                // SAFETY: `at` and what follows of the block are less than `len`.
                unsafe {
                    load(from.add(at), block);
                    store(into.add(at), block);
                }
            }
            return;
        }
        let words = (len - first) / WORD;
        let rest = first + words * WORD;
        for at in (0..first).chain(rest..len) {
            // SAFETY: `at` is less than `len`; bytes need no alignment.
            unsafe {
                let value = AtomicU8::from_ptr(from.add(at).as_ptr()).load(Ordering::Relaxed);
                AtomicU8::from_ptr(into.add(at).as_ptr()).store(value, Ordering::Relaxed);
            }
        }
        for word in 0..words {
            let at = first + word * WORD;
            // SAFETY: as above, for eight bytes, and both are aligned from `first` on.
            unsafe {
                let value =
                    AtomicU64::from_ptr(from.add(at).as_ptr().cast()).load(Ordering::Relaxed);
                AtomicU64::from_ptr(into.add(at).as_ptr().cast()).store(value, Ordering::Relaxed);
            }
        }
    }

    /// Copies all of `from` in.
    ///
    /// # Safety
    ///
    /// As many bytes must stay readable and writable meanwhile.
    pub(super) unsafe fn store(into: NonNull<u8>, from: &[u8]) {
        let (first, rest) = from.split_at(unaligned(into, from.len()));
        let mut at = into;
        for byte in first {
            // SAFETY: there is a byte of `into` for each of `from`; no alignment.
            unsafe {
                AtomicU8::from_ptr(at.as_ptr()).store(*byte, Ordering::Relaxed);
                at = at.add(1);
            }
        }
        let (words, last) = rest.as_chunks::<WORD>();
        for word in words {
            // SAFETY: as above, for eight bytes, and `at` is aligned by now.
            unsafe {
                AtomicU64::from_ptr(at.as_ptr().cast())
                    .store(u64::from_ne_bytes(*word), Ordering::Relaxed);
                at = at.add(WORD);
            }
        }
        for byte in last {
            // SAFETY: as for the first bytes.
            unsafe {
                AtomicU8::from_ptr(at.as_ptr()).store(*byte, Ordering::Relaxed);
                at = at.add(1);
            }
        }
    }
}

impl std::fmt::Debug for IoVec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IoVec")
            .field("segments", &self.segments.len())
            .field("len", &self.len)
            .finish()
    }
}

/// Zeroed memory of our own, aligned for O_DIRECT.
pub struct AlignedBuffer {
    base: NonNull<u8>,
    layout: Layout,
}

// SAFETY: the buffer owns its memory and hands out no references.
unsafe impl Send for AlignedBuffer {}
// SAFETY: as above; access goes through IoVec's copies.
unsafe impl Sync for AlignedBuffer {}
// SAFETY: the memory lives, at one address, until the buffer is dropped.
unsafe impl MemoryOwner for AlignedBuffer {}

impl AlignedBuffer {
    /// Alignment that every device and file system we know accepts.
    pub const ALIGNMENT: usize = 4096;

    /// `len` zero bytes. The caller bounds `len`; 0 is rounded up to 1.
    pub fn new(len: usize) -> Arc<Self> {
        let layout = Layout::from_size_align(len.max(1), Self::ALIGNMENT)
            .expect("callers bound buffer sizes");
        // SAFETY: the layout has a size of at least 1.
        let base = unsafe { alloc_zeroed(layout) };
        let Some(base) = NonNull::new(base) else {
            std::alloc::handle_alloc_error(layout)
        };
        Arc::new(Self { base, layout })
    }

    /// Size in bytes.
    pub(crate) fn len(&self) -> usize {
        self.layout.size()
    }

    /// The first `len` bytes as a list.
    ///
    /// # Panics
    ///
    /// If the buffer is shorter.
    pub fn io_vec(self: &Arc<Self>, len: usize) -> IoVec {
        assert!(len <= self.layout.size());
        // SAFETY: the memory is ours for as long as the Arc lives.
        unsafe { IoVec::new([(self.base, len)], Arc::clone(self) as Arc<dyn MemoryOwner>) }
    }
}

impl Drop for AlignedBuffer {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout, and nobody else has it.
        unsafe { dealloc(self.base.as_ptr(), self.layout) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scattered() -> IoVec {
        let buffer = AlignedBuffer::new(64);
        let base = buffer.base;
        // SAFETY: all segments lie in the buffer, which the list keeps alive.
        unsafe {
            IoVec::new(
                [(base, 8), (base.add(16), 0), (base.add(32), 24)],
                buffer as Arc<dyn MemoryOwner>,
            )
        }
    }

    #[test]
    fn copies_cross_segment_borders() {
        let iov = scattered();
        let bytes: Vec<u8> = (1..=32).collect();
        iov.copy_from(0, &bytes);
        let mut back = [0; 10];
        iov.copy_to(5, &mut back);
        assert_eq!(back[..], bytes[5..15]);
    }

    #[test]
    fn lists_are_copied_whatever_their_segments() {
        let from = scattered();
        from.copy_from(0, &(1..=32).collect::<Vec<u8>>());
        let into = AlignedBuffer::new(40).io_vec(40);
        into.copy_from_iov(3, &from.slice(2, 30));
        let other = scattered();
        other.copy_from_iov(1, &into.slice(3, 30));
        let mut back = [0; 32];
        other.copy_to(0, &mut back);
        let mut expected: Vec<u8> = (2..=32).collect();
        expected[0] = 0;
        expected.push(0);
        assert_eq!(back[..], expected);
        for (skip, len) in (0..20).flat_map(|skip| (0..12).map(move |len| (skip, len))) {
            into.fill(0);
            into.copy_from_iov(skip, &from.slice(5, len));
            let mut back = [0; 40];
            into.copy_to(0, &mut back);
            let mut expected = [0; 40];
            for (i, byte) in expected[skip..skip + len].iter_mut().enumerate() {
                *byte = i as u8 + 6;
            }
            assert_eq!(back, expected, "{len} bytes to {skip}");
        }
    }

    #[test]
    fn addresses_and_lengths_are_aligned_each_for_itself() {
        let iov = scattered();
        assert!(iov.is_aligned(32, 8));
        assert!(!iov.is_aligned(64, 8), "the second segment begins at 32");
        // As kernels want it that take memory at any word, but whole blocks only.
        assert!(!iov.is_aligned(4, 16), "segments of 8 and 24 bytes");
    }

    #[test]
    fn copies_begin_and_end_at_any_byte() {
        let all = AlignedBuffer::new(96).io_vec(96);
        let bytes: Vec<u8> = (1..=96).collect();
        for (from, len) in (0..10).flat_map(|from| (0..40).map(move |len| (from, len))) {
            all.fill(0);
            let part = &bytes[..len];
            all.copy_from(16 + from, part);
            let mut back = [0xff; 96];
            all.copy_to(0, &mut back);
            let mut expected = [0; 96];
            expected[16 + from..][..len].copy_from_slice(part);
            assert_eq!(back, expected, "{from}+{len}");
            let mut back = vec![0; len];
            all.copy_to(16 + from, &mut back);
            assert_eq!(back, part, "{from}+{len}");
        }
    }

    #[test]
    fn slice_sees_the_same_bytes() {
        let iov = scattered();
        iov.slice(7, 2).copy_from(0, &[1, 2]);
        let mut back = [0; 4];
        iov.copy_to(6, &mut back);
        assert_eq!(back, [0, 1, 2, 0]);
        assert!(!iov.is_zero());
        assert!(iov.slice(9, 23).is_zero());
    }

    #[test]
    #[should_panic(expected = "slice")]
    fn slice_past_the_end_is_refused() {
        scattered().slice(30, 3);
    }
}
