//! What a side-car file looks like: its blocks, to and from bytes.
//!
//! Which blocks are written when does not live here (`store`).
//!
//! # Layout
//!
//! Everything is in blocks of 4 KiB, numbers are little-endian.
//!
//! | block | holds |
//! |---|---|
//! | 0 and 1 | the *superblock*, twice: the valid one with the higher generation counts |
//! | 2 | the *intent*: regions of the disk that may have been written since pages were saved |
//! | others | the directory, tables and pages that the superblock leads to |
//!
//! The *directory* lists the bitmaps. Each has a *table* with the place and the checksum
//! of each of its *pages*: 32768 bits each. A page without a place is clean. The
//! superblock has the checksum of the directory, and that has those of the tables.
//!
//! All that is read is taken for hostile: sizes are bounded before memory is asked for.

use super::BLOCK;

/// Largest number of bitmaps in a file.
pub(crate) const MAX_BITMAPS: usize = 1024;
/// Most memory that the bits of all bitmaps of a file may take, in bytes.
pub(crate) const MAX_BITS: u64 = 1 << 30;
/// Longest directory in bytes.
pub(super) const MAX_DIRECTORY: u64 = 2 << 20;
/// Longest identity or layer in bytes.
const MAX_TEXT: usize = 4096;

/// Where superblocks are.
pub(super) const SUPERBLOCKS: [u32; 2] = [0, 1];
/// Where the intent is.
pub(super) const INTENT: u32 = 2;
/// First block that is free for anything.
pub(super) const FIRST_FREE: u32 = 3;

/// Words of 64 bits in a page.
pub(super) const PAGE_WORDS: usize = BLOCK / 8;
/// Bits in a page.
pub(super) const PAGE_BITS: u64 = BLOCK as u64 * 8;
/// Bytes of a table for each page.
const ENTRY: usize = 8;

/// Most regions of an intent.
pub(crate) const MAX_REGIONS: usize = (BLOCK - INTENT_HEADER) * 8;
const INTENT_HEADER: usize = 32;

/// No file has been written so often, and none will be so often again.
pub(super) const MAX_GENERATION: u64 = u64::MAX / 2;

const SUPER_MAGIC: &[u8; 8] = b"DIPTYBMS";
const INTENT_MAGIC: &[u8; 8] = b"DIPTYBMI";
const VERSION: u32 = 1;

/// Content that cannot be what this program wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum FormatError {
    /// No superblock.
    #[error("it has no valid superblock")]
    NoSuperblock,
    /// Of a later version of this program.
    #[error("its format has version {0}, and only 1 is known here")]
    Version(u32),
    /// The directory is damaged.
    #[error("its directory is damaged")]
    Directory,
    /// After this one there are not enough.
    #[error("its generation {0} cannot be right")]
    Generation(u64),
}

/// What the image was when the file was last closed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Stamp {
    /// Length of the image's file in bytes.
    pub(crate) len: u64,
    /// When it was last written: seconds since 1970, and nanoseconds.
    pub(crate) mtime: (i64, u32),
}

/// Whether the image may have been written since the file was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Use {
    /// By who has the file in use; the intent tells where.
    Open,
    /// Not by who had it: if the image is not this any more, others wrote it.
    Closed(Stamp),
}

/// The root of everything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Superblock {
    pub(super) generation: u64,
    pub(super) directory: Extent,
    pub(super) usage: Use,
    /// Writes are missing: the bitmaps are good for nothing any more.
    pub(super) broken: bool,
}

/// A run of blocks, and the checksum of the bytes in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Extent {
    /// First block; 0 if there is none.
    pub(super) block: u32,
    /// Bytes.
    pub(super) len: u32,
    pub(super) crc: u32,
}

impl Extent {
    /// The blocks.
    pub(super) fn blocks(self) -> std::ops::Range<u32> {
        let count = self.len.div_ceil(BLOCK as u32);
        self.block..self.block.saturating_add(count)
    }
}

/// Where a page is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Page {
    /// Its block; 0 if it is clean.
    pub(super) block: u32,
    pub(super) crc: u32,
}

/// What the directory says of a bitmap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) name: String,
    /// Chunk size: a power of two.
    pub(super) granularity: u64,
    pub(super) enabled: bool,
    pub(super) inconsistent: bool,
    /// The table; none if all pages are clean.
    pub(super) table: Extent,
}

/// The list of bitmaps, and what disk they are of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Directory {
    /// The image, as [`Image::identity`](super::image::Image::identity) tells it.
    pub(super) identity: String,
    /// The node on it that has the bitmaps.
    pub(super) layer: String,
    /// Size of the disk in bytes.
    pub(super) size: u64,
    /// It may have another size by now.
    pub(super) resizing: bool,
    pub(super) entries: Vec<Entry>,
}

/// Regions that may have been written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Hot {
    /// Any: nothing is known.
    All,
    /// Those whose bits are set, of `1 << shift` bytes each. The last possible one
    /// reaches to the end of the disk.
    Some {
        /// Region size.
        shift: u32,
        /// One bit per region, the first in the lowest bit.
        words: Vec<u64>,
    },
}

/// Number of pages of a bitmap with `chunks` bits.
pub(super) fn pages(chunks: u64) -> usize {
    // At most 65536: a bitmap has at most 2^31 chunks.
    chunks.div_ceil(PAGE_BITS) as usize
}

impl Superblock {
    pub(super) fn encode(&self) -> [u8; BLOCK] {
        let mut block = [0; BLOCK];
        let mut out = Writer(Vec::with_capacity(128));
        out.bytes(SUPER_MAGIC);
        out.u32(VERSION);
        out.u32(u32::from(self.broken));
        out.u64(self.generation);
        out.extent(self.directory);
        let (closed, stamp) = match self.usage {
            Use::Open => (0, Stamp::default()),
            Use::Closed(stamp) => (1, stamp),
        };
        out.u32(closed);
        out.u64(stamp.len);
        out.u64(stamp.mtime.0 as u64);
        out.u32(stamp.mtime.1);
        let crc = crc32fast::hash(&out.0);
        out.u32(crc);
        block[..out.0.len()].copy_from_slice(&out.0);
        block
    }

    /// `None` if it is none, or damaged.
    pub(super) fn decode(block: &[u8; BLOCK]) -> Option<Result<Self, FormatError>> {
        let mut input = Reader(block);
        if input.bytes(8)? != SUPER_MAGIC {
            return None;
        }
        let version = input.u32()?;
        let flags = input.u32()?;
        let generation = input.u64()?;
        let directory = input.extent()?;
        let closed = input.u32()?;
        let len = input.u64()?;
        let seconds = input.u64()? as i64;
        let nanoseconds = input.u32()?;
        let covered = BLOCK - input.0.len();
        if crc32fast::hash(&block[..covered]) != input.u32()? {
            return None;
        }
        if version != VERSION || flags > 1 || closed > 1 {
            return Some(Err(FormatError::Version(version)));
        }
        let usage = match closed {
            0 => Use::Open,
            _ => Use::Closed(Stamp {
                len,
                mtime: (seconds, nanoseconds),
            }),
        };
        Some(Ok(Self {
            generation,
            directory,
            usage,
            broken: flags == 1,
        }))
    }
}

impl Directory {
    /// Bytes of one of so many bitmaps at most.
    pub(super) fn longest(bitmaps: u64) -> u64 {
        let entry = super::super::MAX_NAME as u64 + 28;
        let all = 2 * (MAX_TEXT as u64 + 4) + 16 + bitmaps * entry;
        all.min(MAX_DIRECTORY)
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = Writer(Vec::new());
        out.text(&self.identity);
        out.text(&self.layer);
        out.u64(self.size);
        out.u32(u32::from(self.resizing));
        out.u32(self.entries.len() as u32);
        for entry in &self.entries {
            out.text(&entry.name);
            out.u64(entry.granularity);
            out.u32(u32::from(entry.enabled) | u32::from(entry.inconsistent) << 1);
            out.extent(entry.table);
        }
        out.0
    }

    /// `bytes` have the right checksum, so what is wrong with them was made so.
    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let mut input = Reader(bytes);
        let identity = input.text(MAX_TEXT)?;
        let layer = input.text(MAX_TEXT)?;
        let size = input.u64()?;
        let resizing = input.u32()? != 0;
        let count = input.u32()? as usize;
        if count > MAX_BITMAPS {
            return None;
        }
        let mut entries: Vec<Entry> = Vec::new();
        for _ in 0..count {
            let name = input.text(super::super::MAX_NAME)?;
            let granularity = input.u64()?;
            let flags = input.u32()?;
            let table = input.extent()?;
            let twice = entries.iter().any(|entry| entry.name == name);
            if name.is_empty() || twice || flags > 3 {
                return None;
            }
            entries.push(Entry {
                name,
                granularity,
                enabled: flags & 1 != 0,
                inconsistent: flags & 2 != 0,
                table,
            });
        }
        Some(Self {
            identity,
            layer,
            size,
            resizing,
            entries,
        })
    }
}

/// A table as bytes.
pub(super) fn encode_table(pages: &[Page]) -> Vec<u8> {
    let mut out = Writer(Vec::with_capacity(pages.len() * ENTRY));
    for page in pages {
        out.u32(page.block);
        out.u32(page.crc);
    }
    out.0
}

/// A table of `count` pages; `None` if it is not as long.
pub(super) fn decode_table(bytes: &[u8], count: usize) -> Option<Vec<Page>> {
    if bytes.len() != table_len(count) {
        return None;
    }
    let mut input = Reader(bytes);
    (0..count)
        .map(|_| {
            Some(Page {
                block: input.u32()?,
                crc: input.u32()?,
            })
        })
        .collect()
}

/// Length in bytes of a table of `count` pages.
pub(super) fn table_len(count: usize) -> usize {
    count * ENTRY
}

/// The intent with these regions, while `generation` is the latest superblock.
pub(super) fn encode_intent(generation: u64, shift: u32, words: &[u64]) -> [u8; BLOCK] {
    let mut out = Writer(Vec::with_capacity(BLOCK));
    out.bytes(INTENT_MAGIC);
    out.u64(generation);
    out.u32(shift);
    out.u32(0);
    let mut bits = Writer(Vec::with_capacity(BLOCK));
    for word in words {
        bits.u64(*word);
    }
    bits.0.resize(BLOCK - INTENT_HEADER, 0);
    let mut crc = crc32fast::Hasher::new();
    crc.update(&out.0);
    crc.update(&bits.0);
    out.u32(crc.finalize());
    out.u32(0);
    out.bytes(&bits.0);
    let mut block = [0; BLOCK];
    block.copy_from_slice(&out.0);
    block
}

/// The generation and the regions of an intent; `None` if it is damaged.
pub(super) fn decode_intent(block: &[u8; BLOCK]) -> Option<(u64, Hot)> {
    let mut input = Reader(block);
    if input.bytes(8)? != INTENT_MAGIC {
        return None;
    }
    let generation = input.u64()?;
    let shift = input.u32()?;
    input.u32()?;
    let expected = input.u32()?;
    input.u32()?;
    let mut crc = crc32fast::Hasher::new();
    crc.update(&block[..24]);
    crc.update(input.0);
    if crc.finalize() != expected || shift >= 63 {
        return None;
    }
    let words = (0..MAX_REGIONS / 64)
        .map(|_| input.u64())
        .collect::<Option<_>>()?;
    Some((generation, Hot::Some { shift, words }))
}

struct Writer(Vec<u8>);

impl Writer {
    fn bytes(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    fn u32(&mut self, value: u32) {
        self.bytes(&value.to_le_bytes());
    }

    fn u64(&mut self, value: u64) {
        self.bytes(&value.to_le_bytes());
    }

    fn extent(&mut self, extent: Extent) {
        self.u32(extent.block);
        self.u32(extent.len);
        self.u32(extent.crc);
    }

    fn text(&mut self, text: &str) {
        // All are bounded far below.
        self.u32(text.len() as u32);
        self.bytes(text.as_bytes());
    }
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn bytes(&mut self, len: usize) -> Option<&'a [u8]> {
        let (bytes, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        Some(u32::from_le_bytes(self.bytes(4)?.try_into().ok()?))
    }

    fn u64(&mut self) -> Option<u64> {
        Some(u64::from_le_bytes(self.bytes(8)?.try_into().ok()?))
    }

    fn extent(&mut self) -> Option<Extent> {
        Some(Extent {
            block: self.u32()?,
            len: self.u32()?,
            crc: self.u32()?,
        })
    }

    fn text(&mut self, most: usize) -> Option<String> {
        let len = self.u32()? as usize;
        if len > most {
            return None;
        }
        String::from_utf8(self.bytes(len)?.to_vec()).ok()
    }
}
