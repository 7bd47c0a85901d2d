//! The order in which the tables of an image reach its storage.
//!
//! An image must be consistent whenever the process or the machine stops: each
//! cluster that is in use is counted. (Counted and not in use is a leak, which
//! costs space only.) `imago` writes tables in the right order for most cases, but
//!
//! - it knows no barriers: what it wrote first may become durable last;
//! - it enters a new table in its parent (the first level table, the reference
//!   count table, the header) at once, while the count of its cluster is still in
//!   memory. After a crash that cluster would be taken for free, and overwritten.
//!
//! So the writes are told apart here by what they hit. Between writes of different
//! kinds that depend on each other the storage is flushed, and before a table is
//! entered in its parent its clusters are counted on the storage.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use imago::storage::drivers::CommonStorageHelper;

use super::file::GrowingFile;
use super::header::{Header, TableAt, tables};
use crate::buffer::{AlignedBuffer, IoVec};
use crate::error::{IoError, IoOp};
use crate::node::SECTOR_SIZE;

/// The offset in an entry of the first level table.
const L1_OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// The offset in an entry of the reference count table.
const REFTABLE_OFFSET: u64 = !0x1ff;

/// What a write hits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// The header.
    Header,
    /// The reference count table.
    Reftable,
    /// The first level table.
    L1,
    /// A block of reference counts.
    Refblock,
    /// A second level table.
    L2,
    /// Anything else: data that is copied on write, tables that nothing refers to yet.
    /// Only what refers to it has to wait for it.
    Data,
}

/// Orders the writes to one image's file. Any thread.
#[derive(Debug)]
pub(super) struct WriteOrder {
    cluster_bits: u32,
    refcount_order: u32,
    /// Held while the storage is flushed: whatever depends on that waits. A lock for
    /// tasks, which wait for nothing else but the flush while they hold it.
    barrier: tokio::sync::Mutex<()>,
    /// Where data is copied on write, if not to the image's own file.
    data_file: Option<Arc<GrowingFile>>,
    /// Leaf lock, held for a few instructions.
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// To the second level tables.
    l1: Pointers,
    /// To the blocks of reference counts.
    reftable: Pointers,
    /// What was written since the storage was flushed.
    unflushed: Unflushed,
}

/// A table of places in the file, as it is on the storage.
#[derive(Debug, Default)]
struct Pointers {
    at: TableAt,
    /// What the table's entries have of flags is left out.
    mask: u64,
    /// By index; 0 for none.
    places: Vec<u64>,
    /// The same, for look-ups.
    set: HashSet<u64>,
}

impl Pointers {
    fn new(at: TableAt, bytes: &[u8], mask: u64) -> Self {
        let places: Vec<u64> = entries(bytes).map(|entry| entry & mask).collect();
        Self {
            at,
            mask,
            set: places.iter().copied().filter(|place| *place != 0).collect(),
            places,
        }
    }

    /// A part of the table was written.
    fn written(&mut self, offset: u64, bytes: &[u8]) {
        let first = offset.saturating_sub(self.at.offset) as usize / 8;
        for (entry, known) in entries(bytes).zip(self.places.iter_mut().skip(first)) {
            let place = entry & self.mask;
            if place != *known {
                self.set.remove(known);
                if place != 0 {
                    self.set.insert(place);
                }
                *known = place;
            }
        }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Unflushed {
    tables: bool,
    refblocks: bool,
    data: bool,
}

impl Unflushed {
    fn any(self) -> bool {
        self.tables || self.refblocks || self.data
    }
}

impl WriteOrder {
    /// Reads what has to be known of an image that is to be written. `data_file`: where
    /// its data is, if not in `file`.
    pub(super) async fn load(
        header: &Header,
        file: &GrowingFile,
        data_file: Option<Arc<GrowingFile>>,
    ) -> Result<Self, IoError> {
        let order = Self {
            cluster_bits: header.cluster_bits,
            refcount_order: header.refcount_order,
            barrier: tokio::sync::Mutex::new(()),
            data_file,
            state: Mutex::default(),
        };
        let l1 = TableAt {
            offset: header.l1_offset,
            len: header.l1_entries * 8,
        };
        let reftable = TableAt {
            offset: header.reftable_offset,
            len: header.reftable_len,
        };
        order.load_tables(file, l1, reftable).await?;
        Ok(order)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads the tables that are not where they were. The header bounds their length.
    async fn load_tables(
        &self,
        file: &GrowingFile,
        l1: TableAt,
        reftable: TableAt,
    ) -> Result<(), IoError> {
        let (known_l1, known_reftable) = {
            let state = self.state();
            (state.l1.at, state.reftable.at)
        };
        if l1 != known_l1 {
            let mut bytes = file.read_vec(l1.offset, sectors(l1.len)).await?;
            bytes.truncate(l1.len as usize);
            self.state().l1 = Pointers::new(l1, &bytes, L1_OFFSET);
        }
        if reftable != known_reftable {
            let bytes = file
                .read_vec(reftable.offset, reftable.len as usize)
                .await?;
            self.state().reftable = Pointers::new(reftable, &bytes, REFTABLE_OFFSET);
        }
        Ok(())
    }

    fn kind(&self, offset: u64, len: u64) -> Kind {
        let cluster = offset & !((1 << self.cluster_bits) - 1);
        let state = self.state();
        if offset < SECTOR_SIZE {
            Kind::Header
        } else if state.reftable.at.touches(offset, len) {
            Kind::Reftable
        } else if state.l1.at.touches(offset, len) {
            Kind::L1
        } else if state.reftable.set.contains(&cluster) {
            Kind::Refblock
        } else if state.l1.set.contains(&cluster) {
            Kind::L2
        } else {
            Kind::Data
        }
    }

    /// Writes what `imago` writes, in its place in the order. `helper` keeps writes
    /// of the same range apart; the caller has locked its own in it.
    pub(super) async fn write(
        &self,
        file: &GrowingFile,
        helper: &CommonStorageHelper,
        offset: u64,
        iov: IoVec,
    ) -> Result<(), IoError> {
        let kind = self.kind(offset, iov.len() as u64);
        match kind {
            Kind::Data => {}
            // Freed clusters: nobody refers to them any more.
            Kind::Refblock => self.barrier(file, |unflushed| unflushed.tables).await?,
            // New clusters: they are counted, and their content is there.
            Kind::L2 => {
                let depends = |unflushed: Unflushed| unflushed.refblocks || unflushed.data;
                self.barrier(file, depends).await?;
            }
            Kind::Header | Kind::Reftable | Kind::L1 => {
                let pointed = self.pointed(file, kind, offset, &iov).await?;
                for cluster in pointed {
                    self.count(file, helper, cluster).await?;
                }
                self.barrier(file, Unflushed::any).await?;
            }
        }
        file.write(offset, iov.clone()).await?;
        {
            let mut state = self.state();
            let unflushed = &mut state.unflushed;
            match kind {
                Kind::Data => unflushed.data = true,
                Kind::Refblock => unflushed.refblocks = true,
                Kind::L2 | Kind::Header | Kind::Reftable | Kind::L1 => unflushed.tables = true,
            }
        }
        self.written(file, kind, offset, &iov).await
    }

    /// Writes zeroes that are copied on write.
    pub(super) async fn write_zeroes(
        &self,
        file: &GrowingFile,
        offset: u64,
        len: u64,
    ) -> Result<(), IoError> {
        file.write_zeroes(offset, len).await?;
        self.state().unflushed.data = true;
        Ok(())
    }

    /// What was written before this is durable before anything after it, if that
    /// `depends` on what there is.
    async fn barrier(
        &self,
        file: &GrowingFile,
        depends: impl Fn(Unflushed) -> bool,
    ) -> Result<(), IoError> {
        const DATA: Unflushed = Unflushed {
            tables: false,
            refblocks: false,
            data: true,
        };
        let _alone = self.barrier.lock().await;
        if let Some(data_file) = &self.data_file
            && depends(DATA)
        {
            data_file.flush_copied().await?;
        }
        let unflushed = {
            let mut state = self.state();
            match depends(state.unflushed) {
                true => std::mem::take(&mut state.unflushed),
                false => return Ok(()),
            }
        };
        let flushed = file.flush().await;
        if flushed.is_err() {
            let mut state = self.state();
            state.unflushed.tables |= unflushed.tables;
            state.unflushed.refblocks |= unflushed.refblocks;
            state.unflushed.data |= unflushed.data;
        }
        flushed
    }

    /// Clusters that a write of a table, or of the header, newly refers to.
    async fn pointed(
        &self,
        file: &GrowingFile,
        kind: Kind,
        offset: u64,
        iov: &IoVec,
    ) -> Result<Vec<u64>, IoError> {
        let bytes = bytes_of(iov);
        if kind == Kind::Header {
            let (l1, _) = tables(&bytes);
            let known = self.state().l1.at;
            // A new reference count table counts itself: `imago` has written the
            // blocks for it.
            if l1.offset == known.offset || l1.len == 0 {
                return Ok(Vec::new());
            }
            let first = l1.offset >> self.cluster_bits;
            let end = l1.offset.saturating_add(l1.len - 1) >> self.cluster_bits;
            return Ok((first..=end).collect());
        }
        let mask = match kind {
            Kind::L1 => L1_OFFSET,
            _ => REFTABLE_OFFSET,
        };
        let before = file.read_vec(offset, bytes.len()).await?;
        let table = self.state().reftable.at;
        let first = offset.saturating_sub(table.offset) / 8;
        Ok(entries(&bytes)
            .zip(entries(&before))
            .zip(first..)
            .filter(|((new, old), _)| new & mask != old & mask && new & mask != 0)
            .map(|((new, _), index)| ((new & mask) >> self.cluster_bits, index))
            // A block of reference counts may count itself, and is there already.
            .filter(|(cluster, index)| {
                kind != Kind::Reftable || cluster >> self.refblock_bits() != *index
            })
            .map(|(cluster, _)| cluster)
            .collect())
    }

    /// Logarithm of the clusters that one block of reference counts counts.
    fn refblock_bits(&self) -> u32 {
        self.cluster_bits + 3 - self.refcount_order
    }

    /// Lets the storage say that the cluster is in use. `imago` has counted it in
    /// memory, and writes the same count or a larger one later.
    async fn count(
        &self,
        file: &GrowingFile,
        helper: &CommonStorageHelper,
        cluster: u64,
    ) -> Result<(), IoError> {
        let block = {
            let state = self.state();
            let index = usize::try_from(cluster >> self.refblock_bits()).unwrap_or(usize::MAX);
            state.reftable.places.get(index).copied().unwrap_or(0)
        };
        if block == 0 {
            tracing::error!(cluster, "a cluster in use has no reference count");
            return Err(file
                .node()
                .error(IoOp::Write, cluster << self.cluster_bits, 0, libc::EIO));
        }
        let within = cluster & ((1 << self.refblock_bits()) - 1);
        let bit = within << self.refcount_order;
        let sector = block + bit / 8 / SECTOR_SIZE * SECTOR_SIZE;
        let _alone = helper
            .strong_write_blocker(sector..sector + SECTOR_SIZE)
            .await;
        let mut bytes = file.read_vec(sector, SECTOR_SIZE as usize).await?;
        if !count_in(&mut bytes, bit % (SECTOR_SIZE * 8), self.refcount_order) {
            return Ok(());
        }
        let iov = AlignedBuffer::new(bytes.len()).io_vec(bytes.len());
        iov.copy_from(0, &bytes);
        file.write(sector, iov).await?;
        self.state().unflushed.refblocks = true;
        Ok(())
    }

    /// Remembers where tables are by now.
    async fn written(
        &self,
        file: &GrowingFile,
        kind: Kind,
        offset: u64,
        iov: &IoVec,
    ) -> Result<(), IoError> {
        let bytes = match kind {
            Kind::Header | Kind::Reftable | Kind::L1 => bytes_of(iov),
            Kind::Refblock | Kind::L2 | Kind::Data => return Ok(()),
        };
        match kind {
            Kind::L1 => self.state().l1.written(offset, &bytes),
            Kind::Reftable => self.state().reftable.written(offset, &bytes),
            _ => {
                let (l1, reftable) = tables(&bytes);
                self.load_tables(file, l1, reftable).await?;
            }
        }
        Ok(())
    }
}

/// Makes the count at bit `at` 1 if it is 0, and says whether it was.
fn count_in(bytes: &mut [u8], at: u64, refcount_order: u32) -> bool {
    let byte = (at / 8) as usize;
    if refcount_order < 3 {
        // Counts of less than a byte begin at its lowest bit.
        let bits = 1u32 << refcount_order;
        let shift = (at % 8) as u32;
        let mask = (((1u32 << bits) - 1) << shift) as u8;
        if bytes[byte] & mask != 0 {
            return false;
        }
        bytes[byte] |= 1 << shift;
        return true;
    }
    let count = &mut bytes[byte..byte + (1 << (refcount_order - 3))];
    if count.iter().any(|b| *b != 0) {
        return false;
    }
    if let Some(last) = count.last_mut() {
        *last = 1;
    }
    true
}

/// Bytes that have to be read for `len` bytes, which are few enough for memory.
fn sectors(len: u64) -> usize {
    len.next_multiple_of(SECTOR_SIZE) as usize
}

fn bytes_of(iov: &IoVec) -> Vec<u8> {
    let mut bytes = vec![0; iov.len()];
    iov.copy_to(0, &mut bytes);
    bytes
}

/// The numbers of a table.
fn entries(bytes: &[u8]) -> impl Iterator<Item = u64> {
    let (words, _) = bytes.as_chunks::<8>();
    words.iter().map(|word| u64::from_be_bytes(*word))
}
