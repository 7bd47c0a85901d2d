//! What a block driver (protocol, format or filter) has to do.
//!
//! Drivers are called by `Node` only, which has checked bounds
//! and rights before.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use crate::bitmaps::kept::ImageFile;
use crate::buffer::IoVec;
use crate::copy_source::{CopySource, FileRange};
use crate::debug_event::DebugEvent;
use crate::drivers::ReopenError;
use crate::drivers::copy_before_write::Snapshot;
use crate::error::{IoError, IoOp};
use crate::node::{Child, Node, NodeOptions};
use crate::options::DriverOptions;
use crate::permissions::{PermissionError, Permissions};
use crate::throttle::ThrottleGroup;

/// A future on the current thread's executor. Not `Send`: an operation ends on
/// the thread it began on, because its ring is there.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;

/// How a write is to be done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WriteFlags {
    /// Force unit access: the data is on stable storage when the write ends.
    pub fua: bool,
    /// The visible content does not change (copy-on-read, a mirror's target
    /// under the same data): allowed with write-unchanged rights.
    pub unchanged: bool,
}

/// How zeroes are to be written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ZeroFlags {
    /// As [`WriteFlags::fua`].
    pub fua: bool,
    /// The range may be unmapped, if it then reads as zeroes.
    pub may_unmap: bool,
    /// Fail with `EOPNOTSUPP` where zeroes would have to be written as data.
    pub no_fallback: bool,
}

/// What an extent is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExtentFlags {
    /// Holds data that has to be read.
    pub data: bool,
    /// Reads as zeroes.
    pub zero: bool,
    /// Allocated in this layer (not taken from a backing image).
    pub allocated: bool,
}

/// A run of bytes of one kind, from the start of the range that was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Length in bytes: at least 1, at most what was asked for.
    pub len: u64,
    /// What it is.
    pub flags: ExtentFlags,
}

/// What a node wants of requests. All in bytes; alignments are powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Smallest unit that the storage can do without reading around it. A
    /// request of any 512-byte multiple is accepted all the same.
    pub request_alignment: u32,
    /// Best unit for zero writes and discards; 0 if it does not matter.
    pub zero_alignment: u32,
    /// Largest request that makes sense in one piece; 0 for no limit.
    pub max_transfer: u32,
    /// Cluster size of a format; `None` if it has no clusters.
    pub cluster_size: Option<u32>,
    /// Zeroes with `may_unmap` are cheap (no data is written).
    pub can_zero_fast: bool,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            request_alignment: 512,
            zero_alignment: 0,
            max_transfer: 0,
            cluster_size: None,
            can_zero_fast: false,
        }
    }
}

/// Which requests [`BlockDriver::cancel_in_flight`] lets fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CancelReach {
    /// Those that wait for something of their own accord: a server's return, a limit
    /// of their rate.
    Waiting,
    /// Also those that a server has been sent, if it is silent: what became of them
    /// does not matter any more. They may be carried out later all the same, and
    /// others that the server was sent are as lost to it.
    Hanging,
}

/// Part that a child plays for its parent node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ChildRole {
    /// `file`: where a format or filter keeps its data.
    File,
    /// `data-file`: where a format keeps the data, if not in `file`.
    DataFile,
    /// `backing`: what shows through unallocated ranges.
    Backing,
    /// `target`: a second image that a filter writes.
    Target,
    /// `image`: what `blkdebug` shows.
    Image,
}

impl ChildRole {
    /// The name that QEMU's options use.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::DataFile => "data-file",
            Self::Backing => "backing",
            Self::Target => "target",
            Self::Image => "image",
        }
    }
}

/// What an open node is to become.
#[derive(Clone, Copy, Debug)]
pub struct Reopen<'a> {
    /// Name of the node, for errors.
    pub node: &'a str,
    /// What holds for the node whatever its driver.
    pub options: NodeOptions,
    /// Fall back to read-only where the file does not allow writing.
    pub auto_read_only: bool,
    /// The driver's own options; the same driver's.
    pub driver: &'a DriverOptions,
    /// Those that it was opened or last reopened with.
    pub old: &'a DriverOptions,
    /// Its children by then.
    pub children: &'a [(ChildRole, Arc<Node>)],
    /// The group that a throttle filter's options name.
    pub throttle_group: Option<&'a Arc<ThrottleGroup>>,
}

impl Reopen<'_> {
    /// The child in `role` by then.
    pub fn child(&self, role: ChildRole) -> Option<&Arc<Node>> {
        let found = self.children.iter().find(|(known, _)| *known == role);
        found.map(|(_, node)| node)
    }

    /// What becomes of a filter that shows `now`, and by then its child in `role`.
    pub(crate) fn filter(&self, role: ChildRole, now: &Arc<Node>) -> Reopened {
        let other = self.child(role).filter(|then| then.id() != now.id());
        Reopened {
            read_only: self.options.read_only,
            size: other.map(|node| node.size()),
        }
    }
}

/// What a node will be once it is reopened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reopened {
    /// Whether it refuses writes: asked for, or as a fallback.
    pub read_only: bool,
    /// Its size in bytes, if that becomes another one by this; `None`: it stays, or
    /// changes for other reasons (an image's file grows all the time).
    pub size: Option<u64>,
}

/// What the header of an image says, for who asks for more than its content.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImageDetails {
    /// Version of the format, 2 or 3.
    pub version: u32,
    /// Bits of a reference count.
    pub refcount_bits: u32,
    /// Reference counts may be wrong after a crash, by choice. Version 3.
    pub lazy_refcounts: bool,
    /// It was found to be corrupt. Version 3.
    pub corrupt: bool,
    /// It was not closed by who wrote it last. Version 3.
    pub dirty: bool,
    /// Name of the file with the data.
    pub data_file: Option<String>,
    /// The data file is a raw image as well.
    pub data_file_raw: bool,
    /// Name of the backing file, as it is in the header.
    pub backing_filename: Option<String>,
    /// Format of the backing file.
    pub backing_format: Option<String>,
}

/// A bitmap of a filter, as clients are told of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnnamedBitmap {
    /// Chunk size in bytes.
    pub granularity: u64,
    /// Dirty bytes, whole chunks.
    pub count: u64,
    /// Whether writes are marked in it.
    pub recording: bool,
}

/// A protocol, format or filter driver: the behaviour of one node.
///
/// Threads: all I/O methods may be called on any iothread, by several at once.
/// Cancel: dropping a returned future leaves the operation's effect undefined
/// (all, part or nothing of the range), and frees no buffer the kernel still
/// uses. Bounds are checked by the caller.
pub trait BlockDriver: Send + Sync + 'static {
    /// QEMU's name of the driver: `file`, `raw`, `null-co`, …
    fn name(&self) -> &'static str;

    /// Current size in bytes. Never blocks.
    fn size(&self) -> u64;

    /// What the node wants of requests. Changes in a reopen only.
    fn limits(&self) -> Limits;

    /// Name of the file behind this node as QMP shows it; empty if none.
    fn filename(&self) -> String;

    /// Reads `iov.len()` bytes at `offset`.
    fn read<'a>(&'a self, offset: u64, iov: IoVec) -> BoxFuture<'a, Result<(), IoError>>;

    /// Writes `iov.len()` bytes at `offset`.
    fn write<'a>(
        &'a self,
        offset: u64,
        iov: IoVec,
        flags: WriteFlags,
    ) -> BoxFuture<'a, Result<(), IoError>>;

    /// Makes `len` bytes at `offset` read as zeroes.
    fn write_zeroes<'a>(
        &'a self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> BoxFuture<'a, Result<(), IoError>>;

    /// Tells that the content of the range is not needed any more.
    ///
    /// A hint: success may mean that nothing was done.
    fn discard<'a>(&'a self, offset: u64, len: u64) -> BoxFuture<'a, Result<(), IoError>>;

    /// Makes all writes that have ended before this call durable.
    fn flush<'a>(&'a self) -> BoxFuture<'a, Result<(), IoError>>;

    /// Whether a flush only takes what this node has in memory to the nodes below, and
    /// goes on there: then it is wanted whatever the node's `no-flush` says.
    fn flushes_below(&self) -> bool {
        self.is_filter()
    }

    /// Whether the node has something in memory that a flush or its [`close`](Self::close)
    /// has to write to the nodes below.
    fn is_dirty(&self) -> bool {
        false
    }

    /// Kind of the extent that begins at `offset`, as far as it is the same, at
    /// most `len` bytes (`len` is at least 1).
    fn block_status<'a>(&'a self, offset: u64, len: u64) -> BoxFuture<'a, Result<Extent, IoError>>;

    /// The range of a file that reading this range reads, if it does that and nothing
    /// else: drivers that count, delay, change or compose what is read have none, which
    /// is the default. Never blocks. It holds as long as a request counts.
    fn file_range(&self, offset: u64, len: u64) -> Option<FileRange> {
        let _ = (offset, len);
        None
    }

    /// Writes what `from` holds (its parts, and nothing between them) at `offset`.
    /// `false`: it cannot be done so, or failed, and any part of it may have been
    /// written; who reads and writes instead learns why. The default cannot.
    ///
    /// Cancel: as for a write, which may go on; the files stay open until it ends.
    fn copy_from<'a>(&'a self, offset: u64, from: CopySource) -> BoxFuture<'a, bool> {
        let _ = (offset, from);
        Box::pin(async { false })
    }

    /// Changes the size to `size` bytes. What is new then reads as zeroes, and
    /// [`size`](Self::size) gives the new size. A size that is not of whole sectors
    /// may be refused.
    ///
    /// Called with no other request in flight. The default passes it to what a
    /// filter shows, and else fails with `EOPNOTSUPP`. Cancel: the size is the old
    /// or the new one.
    fn resize<'a>(&'a self, size: u64) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move {
            match self.filtered() {
                Some(below) => below.resize(size).await,
                None => Err(IoError {
                    op: IoOp::Truncate,
                    node: self.name().into(),
                    offset: size,
                    len: 0,
                    errno: libc::EOPNOTSUPP,
                }),
            }
        })
    }

    /// As [`resize`](Self::resize), for a format that needs more room: `size` is more
    /// than the node has, other requests may be in flight, and the driver may take more
    /// of the nodes below than is asked for. The default does not.
    fn grow<'a>(&'a self, size: u64) -> BoxFuture<'a, Result<(), IoError>> {
        match self.filtered() {
            Some(below) => Box::pin(async move { below.grow(size).await }),
            None => self.resize(size),
        }
    }

    /// Gives back what [`grow`](Self::grow) took in advance. Called while nobody needs
    /// to write the node any more who did, and before the right to write the nodes below
    /// goes.
    fn release_reserve<'a>(&'a self) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async { Ok(()) })
    }

    /// The child that a filter shows: the same data, unchanged. `None` for all
    /// that are no filters.
    fn filtered(&self) -> Option<Arc<Node>> {
        None
    }

    /// The node that shows through the ranges that are not allocated here; `None`
    /// if there is none.
    fn backing(&self) -> Option<Arc<Node>> {
        None
    }

    /// The image on the host that everything is in, if there is one: where persistent bitmaps
    /// are kept beside.
    fn image_file(&self) -> Option<ImageFile> {
        self.filtered()
            .and_then(|below| below.driver().image_file())
    }

    /// What persistent bitmaps of the node are of, where others may be kept beside the same
    /// image: the driver, and what of the image it shows. `None`, which is the default: they
    /// are not kept.
    fn bitmap_layer(&self) -> Option<String> {
        None
    }

    /// The snapshot that the node keeps, if it is a `copy-before-write` filter.
    fn snapshot(&self) -> Option<&Arc<Snapshot>> {
        None
    }

    /// The node below whose snapshot this one shows, or which filters one that keeps it,
    /// if it is a `snapshot-access`.
    fn shown_snapshot(&self) -> Option<Arc<Node>> {
        None
    }

    /// What the header of the image says, if the format has one.
    fn image_details(&self) -> Option<ImageDetails> {
        None
    }

    /// The bitmap that a filter has about the node that it shows, if there is one that
    /// clients are to know of: what is still to be copied.
    fn recorded(&self) -> Option<UnnamedBitmap> {
        None
    }

    /// Bitmaps without a name about this node itself, that clients are to know of.
    fn own_bitmaps(&self) -> Vec<UnnamedBitmap> {
        Vec::new()
    }

    /// Whether this is a filter.
    fn is_filter(&self) -> bool {
        self.filtered().is_some()
    }

    /// Lets requests fail that may never end, as far as `reach` says: whoever waits
    /// for them would rather see them fail. Any thread; must not block.
    ///
    /// The default passes it to what a filter shows; formats pass it to their
    /// children.
    fn cancel_in_flight(&self, reach: CancelReach) {
        if let Some(below) = self.filtered() {
            below.cancel_in_flight(reach);
        }
    }

    /// A drained section waits for requests that may be under way in this node:
    /// those that it holds back to limit their rate must go on by themselves. (Those
    /// that wait for a lost server wait on: they would fail, and the section can be
    /// tried again.) Sections nest, and each begin has its end. Called with no lock
    /// held, on main.
    ///
    /// Requests may come all the same: of users that the section does not hold.
    fn drained_begin(&self) {}

    /// The section has ended. Any thread, no lock held.
    fn drained_end(&self) {}

    /// Whether a drained section has to wait for work of the node's own, which is not
    /// counted in any request. Asked again at least every 10 ms. Must not block.
    fn drained_poll(&self) -> bool {
        false
    }

    /// A step of the node above, or of this node itself, that a test may have
    /// waited for. Any thread; must not block.
    fn debug_event(&self, event: DebugEvent) {
        let _ = event;
    }

    /// What this node needs of the child in `role`, and lets others do with it,
    /// when its own users together need and share `users`.
    ///
    /// The default hands on what the users want, as filters do. Called on main,
    /// for each change of the graph; it must give the same for the same graph.
    fn child_permissions(&self, role: ChildRole, users: Permissions) -> Permissions {
        let _ = role;
        users
    }

    /// As [`child_permissions`](Self::child_permissions), of a node that nothing stands
    /// on: one that is not in place yet may want less.
    fn unused_child_permissions(&self, role: ChildRole) -> Permissions {
        self.child_permissions(role, Permissions::IDLE)
    }

    /// First half of a change of permissions: takes what `wanted` (all users of
    /// the node together) needs on top of what is held, and checks that no
    /// other process is against it. Nothing held so far is given up.
    ///
    /// Called on main. [`set_permissions`](Self::set_permissions) or
    /// [`abort_permissions`](Self::abort_permissions) follows. After an error
    /// all is as before, and neither is called. A node starts with
    /// [`Permissions::IDLE`].
    fn check_permissions(&self, wanted: Permissions) -> Result<(), PermissionError> {
        let _ = wanted;
        Ok(())
    }

    /// Second half: the last checked permissions hold from now on, and what they
    /// do not need is given up. Cannot fail.
    fn set_permissions(&self) {}

    /// Takes the last check back.
    fn abort_permissions(&self) {}

    /// First of three steps of `blockdev-reopen`: checks the new options, and opens
    /// what they need beside what is open. Requests go on as before.
    ///
    /// Called on main. [`reopen_commit`](Self::reopen_commit) or
    /// [`reopen_abort`](Self::reopen_abort) follows, also after an error, and when
    /// the future was dropped.
    fn reopen_prepare<'a>(
        &'a self,
        to: Reopen<'a>,
    ) -> BoxFuture<'a, Result<Reopened, ReopenError>> {
        Box::pin(async move {
            Err(ReopenError::NotSupported {
                driver: self.name(),
                node: to.node.to_owned(),
            })
        })
    }

    /// From here to [`reopen_commit`](Self::reopen_commit) or
    /// [`reopen_abort`](Self::reopen_abort), in the same turn of main, permissions
    /// are those of the node as it will be.
    fn reopen_begin(&self) {}

    /// What was prepared holds from now on. Cannot fail. Called on main with no
    /// request in flight, after the permissions were checked and the children
    /// changed, before [`set_permissions`](Self::set_permissions).
    fn reopen_commit(&self) {}

    /// Forgets what was prepared. Called on main; must not block.
    fn reopen_abort(&self) {}

    /// Whether the driver has layers: its node can stand on a backing image, and a
    /// reopen has to say which.
    fn has_layers(&self) -> bool {
        false
    }

    /// From now on the node has this backing image, or none. Called on main with no
    /// request in flight, after the graph was changed, for drivers that
    /// [have layers](Self::has_layers).
    fn set_backing(&self, backing: Option<Child>) {
        drop(backing);
    }

    /// Bytes that the image takes on its storage; `None` if that cannot be told. Cancel:
    /// nothing happens.
    fn allocated_size(&self) -> BoxFuture<'_, Option<u64>> {
        Box::pin(async { None })
    }

    /// Called after the last user has gone, before the driver is dropped; gives up
    /// what it holds. On a helper thread, where it may block; others may still hold
    /// the node, and requests that nobody waits for be in flight.
    fn close(&self) {}
}
