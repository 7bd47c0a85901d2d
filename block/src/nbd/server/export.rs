//! One export as its connections see it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::sectors::SectorGate;
use crate::backend::Backend;
use crate::bitmaps::NamedBitmap;
use crate::nbd::protocol::{BlockSizes, MAX_PAYLOAD, transmission_flag};
use crate::runtime::IothreadHandle;
use crate::wait::Waiters;

/// What an export of the server is made of.
pub(crate) struct NbdExportOptions {
    pub(crate) name: String,
    pub(crate) description: Option<String>,
    pub(crate) allocation_depth: bool,
    /// Held by whoever makes the export, until the last connection has gone.
    pub(crate) bitmaps: Vec<Arc<NamedBitmap>>,
    pub(crate) writable: bool,
    pub(crate) writethrough: bool,
    pub(crate) iothread: Option<IothreadHandle>,
    pub(crate) backend: Arc<Backend>,
}

/// An export. Any thread.
pub(crate) struct NbdExport {
    pub(super) name: String,
    pub(super) description: Option<String>,
    pub(super) allocation_depth: bool,
    pub(super) bitmaps: Vec<Arc<NamedBitmap>>,
    pub(super) writable: bool,
    pub(super) writethrough: bool,
    /// Who serves it; `None`: any thread of the server.
    pub(super) iothread: Option<IothreadHandle>,
    pub(super) backend: Arc<Backend>,
    /// In bytes, of whole sectors. Nobody may resize the node meanwhile.
    pub(super) size: u64,
    /// Orders requests for parts of sectors among the writes.
    pub(super) sectors: SectorGate,
    multi_conn: bool,
    /// Connections that have chosen this export and still may have requests in
    /// flight. Becomes more only while the server can find the export.
    connections: AtomicUsize,
    /// Those who wait for `connections` to become zero.
    unused: Waiters,
}

impl NbdExport {
    pub(super) fn new(options: NbdExportOptions, multi_conn: bool) -> Self {
        let size = options.backend.size();
        Self {
            name: options.name,
            description: options.description,
            allocation_depth: options.allocation_depth,
            bitmaps: options.bitmaps,
            writable: options.writable,
            writethrough: options.writethrough,
            iothread: options.iothread,
            backend: options.backend,
            size,
            sectors: SectorGate::default(),
            multi_conn,
            connections: AtomicUsize::new(0),
            unused: Waiters::default(),
        }
    }

    /// Connections that have chosen this export.
    pub(crate) fn connections(&self) -> usize {
        self.connections.load(Ordering::Acquire)
    }

    /// Waits until the last connection has gone, with its last request. Useful
    /// when no more can come. Cancel: nothing happens.
    pub(crate) async fn unused(&self) {
        self.unused
            .until(|| (self.connections() == 0).then_some(()))
            .await;
    }

    /// What the export can do, as it says to a client that has or has not asked
    /// for structured replies. § "Transmission flags".
    pub(super) fn flags(&self, structured: bool) -> u16 {
        let mut flags = transmission_flag::HAS_FLAGS
            | transmission_flag::SEND_FLUSH
            | transmission_flag::SEND_FUA
            | transmission_flag::SEND_CACHE;
        if self.writable {
            flags |= transmission_flag::SEND_TRIM
                | transmission_flag::SEND_WRITE_ZEROES
                | transmission_flag::SEND_FAST_ZERO;
        } else {
            flags |= transmission_flag::READ_ONLY;
        }
        if self.multi_conn {
            flags |= transmission_flag::CAN_MULTI_CONN;
        }
        if structured {
            flags |= transmission_flag::SEND_DF;
        }
        flags
    }

    /// Requests of any size are served; where the storage cannot do less than a
    /// block at a time, and the client will heed it, it is told so.
    pub(super) fn block_sizes(&self, heeded: bool) -> BlockSizes {
        const PREFERRED: u32 = 4096;
        let limits = self.backend.root().limits();
        let alignment = limits.request_alignment.clamp(1, 65536);
        let minimum = if heeded && alignment > 512 {
            alignment
        } else {
            1
        };
        let preferred = PREFERRED
            .max(alignment)
            .max(limits.zero_alignment)
            .min(MAX_PAYLOAD);
        BlockSizes {
            minimum,
            // A power of two is asked for.
            preferred: if preferred.is_power_of_two() {
                preferred
            } else {
                PREFERRED.max(alignment)
            },
            maximum: MAX_PAYLOAD,
        }
    }
}

/// A connection's hold on its export, until its last request has ended.
pub(super) struct ExportUse(Arc<NbdExport>);

impl ExportUse {
    /// Only while the server can find the export.
    pub(super) fn new(export: &Arc<NbdExport>) -> Self {
        export.connections.fetch_add(1, Ordering::AcqRel);
        Self(Arc::clone(export))
    }
}

impl std::ops::Deref for ExportUse {
    type Target = Arc<NbdExport>;

    fn deref(&self) -> &Arc<NbdExport> {
        &self.0
    }
}

impl Drop for ExportUse {
    fn drop(&mut self) {
        if self.0.connections.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.unused.wake();
        }
    }
}
