//! The content of a side-car file: loaded once, then replaced as a whole again and again.
//!
//! When, and what regions are hot, does not live here (`core`).
//!
//! # Why there is always a whole state
//!
//! A *commit* writes what has changed to blocks that nothing durable leads to, syncs, and
//! only then writes the superblock that leads there, to the place of the one before the
//! last, and syncs again. So there is the old state or the new one, whatever is lost or
//! torn. Blocks of the old one are free once the new superblock is known to be durable.
//! If that is never known (the second sync failed), both count as used.
//!
//! The intent alone is written in place. If it is torn, every region counts as hot.

use std::collections::HashSet;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::BLOCK;
use super::format::{
    Directory, Entry, Extent, FIRST_FREE, FormatError, Hot, INTENT, MAX_BITMAPS, MAX_BITS,
    MAX_DIRECTORY, MAX_GENERATION, PAGE_BITS, PAGE_WORDS, Page, SUPERBLOCKS, Superblock, Use,
    decode_intent, decode_table, encode_intent, encode_table, pages, table_len,
};
use crate::dirty_bitmap::{BitmapError, DirtyBitmap};

/// Blocks that a file may have: more than two full states need.
const MAX_BLOCKS: u32 = 1 << 20;

/// Where a side-car file is: a file, or what tests put in its place. It blocks.
pub(crate) trait Storage: Send + 'static {
    /// Fills `into` from `block` on; with zeroes where the file has ended.
    fn read(&self, block: u32, into: &mut [u8]) -> io::Result<()>;

    /// Writes `from` at `block`; the file becomes as long as that needs.
    fn write(&self, block: u32, from: &[u8]) -> io::Result<()>;

    /// Makes all that was written durable.
    fn sync(&self) -> io::Result<()>;

    /// Makes sure that there is room for `blocks` blocks in all.
    fn reserve(&self, blocks: u32) -> io::Result<()>;

    /// Takes the file away, so that it is not found any more: durably.
    fn remove(&self) -> io::Result<()>;
}

/// Why a file cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LoadError {
    /// It cannot be read.
    #[error("it cannot be read")]
    Read(#[from] io::Error),
    /// It says nothing that can be understood.
    #[error(transparent)]
    Format(#[from] FormatError),
}

/// What a bitmap is at one moment.
#[derive(Clone, Debug)]
pub(crate) struct BitmapState {
    pub(crate) name: String,
    pub(crate) enabled: bool,
    pub(crate) inconsistent: bool,
    pub(crate) bits: Arc<DirtyBitmap>,
    /// What was written since it was frozen.
    pub(crate) successor: Option<Arc<DirtyBitmap>>,
}

/// Which pages of a bitmap a commit writes.
#[derive(Clone, Copy, Debug)]
pub(super) enum Changed<'a> {
    All,
    /// Those that these ranges of the disk touch, in bytes.
    In(&'a [Range<u64>]),
}

/// What a commit is of, besides the bitmaps.
#[derive(Clone, Debug)]
pub(super) struct Disk {
    pub(super) identity: String,
    pub(super) layer: String,
    /// Bytes.
    pub(super) size: u64,
    pub(super) resizing: bool,
    pub(super) usage: Use,
}

/// A bitmap as it was found.
#[derive(Debug)]
pub(crate) struct LoadedBitmap {
    pub(crate) name: String,
    pub(crate) granularity: u64,
    pub(crate) enabled: bool,
    /// The bits, of a disk of the directory's size; `None` if it is inconsistent.
    pub(crate) bits: Option<Arc<DirtyBitmap>>,
}

/// Tells one state of a file from others, and from those of a file that takes its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Version {
    generation: u64,
    /// The checksum of the directory, which has those of all that it leads to.
    directory: u32,
}

/// The content of a bitmap, and where it is.
type BitsAndTable = (Arc<DirtyBitmap>, Vec<Page>);

/// An open side-car file.
#[derive(Debug)]
pub(super) struct Store<S> {
    pub(super) storage: S,
    /// The one that is known to be durable, and which of the two it is.
    superblock: Superblock,
    slot: usize,
    /// The highest that any attempt had.
    last_generation: u64,
    directory: Directory,
    /// Beside the entries of the directory.
    tables: Vec<Vec<Page>>,
    /// Blocks of states that may be durable by now though a sync failed.
    suspects: HashSet<u32>,
}

impl<S: Storage> Store<S> {
    /// Makes a file without bitmaps. What `storage` held is lost. It is durable when this
    /// returns, as far as the file's name is.
    pub(super) fn create(storage: S, disk: &Disk) -> io::Result<Self> {
        let empty = [0; BLOCK];
        for block in SUPERBLOCKS {
            storage.write(block, &empty)?;
        }
        storage.write(INTENT, &encode_intent(0, 20, &[]))?;
        let mut store = Self {
            storage,
            superblock: Superblock {
                generation: 0,
                directory: Extent::default(),
                usage: disk.usage,
                broken: false,
            },
            slot: 1,
            last_generation: 0,
            directory: Directory::default(),
            tables: Vec::new(),
            suspects: HashSet::new(),
        };
        store.commit(disk, &[])?;
        Ok(store)
    }

    /// Reads the superblock and the directory.
    pub(super) fn open(storage: S) -> Result<Self, LoadError> {
        let mut latest: Option<(usize, Superblock)> = None;
        for (slot, place) in SUPERBLOCKS.into_iter().enumerate() {
            let mut block = [0; BLOCK];
            storage.read(place, &mut block)?;
            let Some(superblock) = Superblock::decode(&block) else {
                continue;
            };
            let superblock = superblock?;
            if latest
                .as_ref()
                .is_none_or(|(_, known)| known.generation < superblock.generation)
            {
                latest = Some((slot, superblock));
            }
        }
        let (slot, superblock) = latest.ok_or(FormatError::NoSuperblock)?;
        if superblock.generation > MAX_GENERATION {
            return Err(FormatError::Generation(superblock.generation).into());
        }
        let extent = superblock.directory;
        if u64::from(extent.len) > MAX_DIRECTORY || !is_valid(extent) {
            return Err(FormatError::Directory.into());
        }
        let bytes = read_extent(&storage, extent)?.ok_or(FormatError::Directory)?;
        let directory = Directory::decode(&bytes).ok_or(FormatError::Directory)?;
        Ok(Self {
            storage,
            superblock,
            slot,
            last_generation: superblock.generation,
            tables: vec![Vec::new(); directory.entries.len()],
            directory,
            suspects: HashSet::new(),
        })
    }

    pub(super) fn version(&self) -> Version {
        Version {
            generation: self.superblock.generation,
            directory: self.superblock.directory.crc,
        }
    }

    pub(super) fn usage(&self) -> Use {
        self.superblock.usage
    }

    /// Whether it was given up, since writes are missing in it.
    pub(super) fn is_broken(&self) -> bool {
        self.superblock.broken
    }

    pub(super) fn directory(&self) -> &Directory {
        &self.directory
    }

    /// Reads the bitmaps. One whose table is damaged is inconsistent; all chunks of a
    /// damaged page are dirty. If nothing is to be `trusted`, all are inconsistent.
    pub(super) fn load(&mut self, trusted: bool) -> Result<Vec<LoadedBitmap>, LoadError> {
        let mut loaded = Vec::with_capacity(self.directory.entries.len());
        let mut memory = 0u64;
        for (index, entry) in self.directory.entries.iter().enumerate() {
            let bits = match trusted && !entry.inconsistent && !self.superblock.broken {
                true => self.load_bits(entry, &mut memory)?,
                false => None,
            };
            loaded.push(LoadedBitmap {
                name: entry.name.clone(),
                granularity: entry.granularity,
                enabled: entry.enabled,
                bits: bits.map(|(bits, table)| {
                    self.tables[index] = table;
                    bits
                }),
            });
        }
        Ok(loaded)
    }

    fn load_bits(
        &self,
        entry: &Entry,
        memory: &mut u64,
    ) -> Result<Option<BitsAndTable>, LoadError> {
        let size = self.directory.size;
        let granularity = entry.granularity;
        let bad = |why: &dyn std::fmt::Display| {
            tracing::error!(bitmap = entry.name, "a bitmap cannot be loaded: {why}");
            Ok(None)
        };
        // Users may have none that is larger.
        let usual = DirtyBitmap::MIN_GRANULARITY..=1 << 31;
        if !granularity.is_power_of_two() || !usual.contains(&granularity) {
            return bad(&BitmapError::Granularity(granularity));
        }
        let chunks = size.div_ceil(granularity);
        *memory = memory.saturating_add(chunks / 8);
        if *memory > MAX_BITS {
            return bad(&"all together need too much memory");
        }
        let bits = match DirtyBitmap::new(size, granularity) {
            Ok(bits) => bits,
            Err(error) => return bad(&error),
        };
        let count = pages(chunks);
        let table = if entry.table.block == 0 {
            vec![Page::default(); count]
        } else {
            if entry.table.len as usize != table_len(count) || !is_valid(entry.table) {
                return bad(&"its table has a wrong size or place");
            }
            let bytes = read_extent(&self.storage, entry.table)?;
            match bytes.and_then(|bytes| decode_table(&bytes, count)) {
                Some(table) => table,
                None => return bad(&"its table is damaged"),
            }
        };
        let mut damaged = 0;
        let mut block = vec![0; BLOCK];
        let mut words = [0; PAGE_WORDS];
        for (index, page) in table.iter().enumerate().filter(|(_, page)| page.block != 0) {
            let mut whole = (FIRST_FREE..MAX_BLOCKS).contains(&page.block);
            if whole {
                self.storage.read(page.block, &mut block)?;
                whole = crc32fast::hash(&block) == page.crc;
            }
            if whole {
                for (word, bytes) in words.iter_mut().zip(block.chunks_exact(8)) {
                    *word = u64::from_le_bytes(bytes.try_into().unwrap_or_default());
                }
            } else {
                damaged += 1;
                words = [u64::MAX; PAGE_WORDS];
            }
            bits.set_words(index * PAGE_WORDS, &words);
        }
        if damaged > 0 {
            tracing::error!(
                bitmap = entry.name,
                damaged,
                "parts of a bitmap are damaged, and count as dirty as a whole"
            );
        }
        Ok(Some((Arc::new(bits), table)))
    }

    /// The regions that may have been written since their pages were. `None`: the
    /// superblock is older than the intent, so nothing can be trusted.
    pub(super) fn load_hot(&self) -> io::Result<Option<Hot>> {
        let mut block = [0; BLOCK];
        self.storage.read(INTENT, &mut block)?;
        Ok(match decode_intent(&block) {
            None => Some(Hot::All),
            Some((generation, _)) if generation > self.superblock.generation => None,
            Some((_, hot)) => Some(hot),
        })
    }

    /// Makes these regions hot, and no others: durable if it says `durably`. The file
    /// counts as in use from then on.
    pub(super) fn write_hot(&mut self, shift: u32, words: &[u64], durably: bool) -> io::Result<()> {
        let intent = encode_intent(self.superblock.generation, shift, words);
        self.storage.write(INTENT, &intent)?;
        let opened = match self.superblock.usage {
            Use::Open => None,
            // If only the intent gets through: nobody has written the image by then.
            Use::Closed(_) => Some(self.write_superblock(Superblock {
                usage: Use::Open,
                ..self.superblock
            })?),
        };
        if durably {
            self.storage.sync()?;
            if let Some(opened) = opened {
                self.superblock_is_durable(opened);
            }
        }
        Ok(())
    }

    /// No region is hot. Durable with the next sync.
    pub(super) fn write_cold(&mut self, shift: u32) -> io::Result<()> {
        let intent = encode_intent(self.superblock.generation, shift, &[]);
        self.storage.write(INTENT, &intent)
    }

    /// The image was not written since its bits were saved, or is as `usage` says; and no
    /// region is hot. Durably.
    pub(super) fn write_closed(&mut self, usage: Use, shift: u32) -> io::Result<()> {
        let intent = encode_intent(self.superblock.generation, shift, &[]);
        self.storage.write(INTENT, &intent)?;
        let closed = self.write_superblock(Superblock {
            usage,
            ..self.superblock
        })?;
        self.storage.sync()?;
        self.superblock_is_durable(closed);
        Ok(())
    }

    /// The bitmaps are good for nothing any more: durably.
    pub(super) fn write_broken(&mut self) -> io::Result<()> {
        let broken = self.write_superblock(Superblock {
            broken: true,
            ..self.superblock
        })?;
        self.storage.sync()?;
        self.superblock_is_durable(broken);
        Ok(())
    }

    /// Fails if there may be no room to write all bitmaps of so many chunks while all that
    /// was written before is still there.
    pub(super) fn reserve(&self, chunks: impl Iterator<Item = u64>) -> io::Result<()> {
        let (mut all_pages, mut runs, mut bitmaps) = (0, 0, 0);
        for chunks in chunks {
            let pages = pages(chunks);
            all_pages += pages as u64;
            runs += table_len(pages).div_ceil(BLOCK) as u64;
            bitmaps += 1;
        }
        runs += Directory::longest(bitmaps).div_ceil(BLOCK as u64);
        // There are two states at a time. What has to be in a row may not find its place
        // between others.
        let state = all_pages + 2 * runs;
        let used = self.used();
        let highest = used.iter().max().map_or(FIRST_FREE, |block| block + 1);
        let (highest, first) = (u64::from(highest), u64::from(FIRST_FREE));
        let blocks = u32::try_from((highest + state).max(first + 2 * state))
            .ok()
            .filter(|blocks| *blocks <= MAX_BLOCKS)
            .ok_or_else(|| io::Error::from_raw_os_error(libc::EFBIG))?;
        self.storage.reserve(blocks)
    }

    /// Writes these bitmaps, and no others are there any more. `Changed::In` is for those
    /// that are there and have changed in these ranges only.
    ///
    /// After an error the old state holds, or this one.
    pub(super) fn commit(
        &mut self,
        disk: &Disk,
        bitmaps: &[(BitmapState, Changed<'_>)],
    ) -> io::Result<()> {
        if bitmaps.len() > MAX_BITMAPS {
            return Err(io::Error::from_raw_os_error(libc::EFBIG));
        }
        let mut free = Free {
            used: self.used(),
            next: FIRST_FREE,
        };
        let mut directory = Directory {
            identity: disk.identity.clone(),
            layer: disk.layer.clone(),
            size: disk.size,
            resizing: disk.resizing,
            entries: Vec::with_capacity(bitmaps.len()),
        };
        let mut tables = Vec::with_capacity(bitmaps.len());
        for (bitmap, changed) in bitmaps {
            let (entry, table) = self.write_bitmap(bitmap, *changed, &mut free)?;
            directory.entries.push(entry);
            tables.push(table);
        }
        let extent = self.write_extent(&directory.encode(), &mut free)?;
        self.storage.sync()?;
        let blocks = referred(extent, &directory, &tables);
        self.suspects.extend(blocks.iter().copied());
        let superblock = self.write_superblock(Superblock {
            generation: 0,
            directory: extent,
            usage: disk.usage,
            broken: false,
        })?;
        self.storage.sync()?;
        self.directory = directory;
        self.tables = tables;
        self.superblock_is_durable(superblock);
        Ok(())
    }

    fn write_bitmap(
        &self,
        bitmap: &BitmapState,
        changed: Changed<'_>,
        free: &mut Free,
    ) -> io::Result<(Entry, Vec<Page>)> {
        let granularity = bitmap.bits.granularity();
        let mut entry = Entry {
            name: bitmap.name.clone(),
            granularity,
            enabled: bitmap.enabled,
            inconsistent: bitmap.inconsistent,
            table: Extent::default(),
        };
        if bitmap.inconsistent {
            return Ok((entry, Vec::new()));
        }
        let count = pages(bitmap.bits.size().div_ceil(granularity));
        let known = self
            .directory
            .entries
            .iter()
            .position(|known| known.name == bitmap.name)
            .filter(|index| self.tables[*index].len() == count);
        let (mut table, wanted) = match (known, changed) {
            (Some(known), Changed::In(ranges)) => {
                entry.table = self.directory.entries[known].table;
                let wanted = ranges.iter().map(|range| {
                    let page = |offset: u64| offset / granularity / PAGE_BITS;
                    page(range.start) as usize..(page(range.end.max(1) - 1) as usize + 1).min(count)
                });
                let mut wanted: Vec<usize> = wanted.flatten().collect();
                wanted.sort_unstable();
                wanted.dedup();
                (self.tables[known].clone(), wanted)
            }
            _ => (vec![Page::default(); count], (0..count).collect()),
        };
        let whole = wanted.len() == count;
        let mut rewrite = whole;
        for index in wanted {
            let page = self.write_page(bitmap, index, free)?;
            rewrite |= page != table[index];
            table[index] = page;
        }
        if rewrite {
            entry.table = match table.iter().any(|page| page.block != 0) {
                true => self.write_extent(&encode_table(&table), free)?,
                false => Extent::default(),
            };
        }
        Ok((entry, table))
    }

    fn write_page(&self, bitmap: &BitmapState, index: usize, free: &mut Free) -> io::Result<Page> {
        let mut words = [0; PAGE_WORDS];
        bitmap.bits.add_words_to(index * PAGE_WORDS, &mut words);
        if let Some(successor) = &bitmap.successor {
            successor.add_words_to(index * PAGE_WORDS, &mut words);
        }
        if words.iter().all(|word| *word == 0) {
            return Ok(Page::default());
        }
        let mut block = [0; BLOCK];
        for (bytes, word) in block.chunks_exact_mut(8).zip(&words) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        let page = Page {
            block: free.take(1)?,
            crc: crc32fast::hash(&block),
        };
        self.storage.write(page.block, &block)?;
        Ok(page)
    }

    fn write_extent(&self, bytes: &[u8], free: &mut Free) -> io::Result<Extent> {
        let blocks = bytes.len().div_ceil(BLOCK);
        let extent = Extent {
            block: free.take(blocks as u32)?,
            len: bytes.len() as u32,
            crc: crc32fast::hash(bytes),
        };
        let mut padded = bytes.to_vec();
        padded.resize(blocks * BLOCK, 0);
        self.storage.write(extent.block, &padded)?;
        Ok(extent)
    }

    /// Writes it to the place of the older one, as the next generation.
    fn write_superblock(&mut self, superblock: Superblock) -> io::Result<Superblock> {
        self.last_generation += 1;
        let superblock = Superblock {
            generation: self.last_generation,
            ..superblock
        };
        self.storage
            .write(SUPERBLOCKS[1 - self.slot], &superblock.encode())?;
        Ok(superblock)
    }

    fn superblock_is_durable(&mut self, superblock: Superblock) {
        self.superblock = superblock;
        self.slot = 1 - self.slot;
        self.suspects.clear();
    }

    /// Blocks that are not free.
    fn used(&self) -> HashSet<u32> {
        let mut used = referred(self.superblock.directory, &self.directory, &self.tables);
        used.extend(&self.suspects);
        used
    }
}

/// Blocks that a state consists of.
fn referred(directory: Extent, content: &Directory, tables: &[Vec<Page>]) -> HashSet<u32> {
    let mut blocks: HashSet<u32> = directory.blocks().collect();
    // What has not been loaded may lead anywhere, and is written anew or not at all.
    let loaded = content.entries.iter().zip(tables);
    for (entry, table) in loaded.filter(|(_, table)| !table.is_empty()) {
        blocks.extend(entry.table.blocks());
        blocks.extend(table.iter().map(|page| page.block));
    }
    blocks
}

/// Blocks for what is new.
struct Free {
    used: HashSet<u32>,
    /// None below are free.
    next: u32,
}

impl Free {
    /// The first of `count` free blocks in a row.
    fn take(&mut self, count: u32) -> io::Result<u32> {
        let mut first = self.next;
        let mut at = first;
        while at - first < count {
            if at >= MAX_BLOCKS {
                return Err(io::Error::from_raw_os_error(libc::ENOSPC));
            }
            if self.used.contains(&at) {
                first = at + 1;
            }
            at += 1;
        }
        self.used.extend(first..at);
        if first == self.next {
            self.next = at;
        }
        Ok(first)
    }
}

fn is_valid(extent: Extent) -> bool {
    let blocks = extent.blocks();
    blocks.start >= FIRST_FREE && blocks.end <= MAX_BLOCKS && !blocks.is_empty()
}

/// The bytes of an extent of bounded length; `None` if they are damaged.
fn read_extent<S: Storage>(storage: &S, extent: Extent) -> io::Result<Option<Vec<u8>>> {
    let mut bytes = vec![0; extent.blocks().len() * BLOCK];
    storage.read(extent.block, &mut bytes)?;
    bytes.truncate(extent.len as usize);
    Ok((crc32fast::hash(&bytes) == extent.crc).then_some(bytes))
}
