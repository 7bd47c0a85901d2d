//! diptych's block layer: nodes, drivers, filters, dirty bitmaps, drain and
//! iothreads.
//!
//! What does not live here: jobs (they use this crate), devices and exports'
//! callers (they attach with a [`Backend`]), and QMP's wire form.
//!
//! # Threads
//!
//! - *main* owns the [`Graph`]: nodes are opened, attached, replaced and closed
//!   there, and nowhere else (`Graph` is not `Send`).
//! - *iothreads* do I/O. A [`Node`] belongs to none of them: any may submit, on
//!   its own io_uring.
//!
//! No lock of this crate is held across an await, a callback or I/O.

mod backend;
mod bitmaps;
mod buffer;
mod chain;
mod copy_source;
mod debug_event;
mod dirty_bitmap;
mod driver;
pub mod drivers;
mod error;
mod export;
mod gate;
mod graph;
mod latency;
pub mod leaf;
pub mod nbd;
mod node;
mod options;
mod permissions;
mod range_lock;
pub mod runtime;
mod sync;
#[cfg(any(test, feature = "test-util"))]
pub mod test_storage;
mod throttle;
mod uring;
mod wait;

pub use backend::{AttachmentKind, Backend, BackendUser, InFlight, Serves};
pub use bitmaps::{
    BitmapChange, BitmapHold, FrozenBitmap, KeptError, NamedBitmap, NamedBitmapError, NewBitmap,
    bitmap_file_beside,
};
pub use buffer::{AlignedBuffer, IoVec, MemoryOwner};
pub use chain::ChainExtent;
pub use copy_source::{CopySource, FileRange, Pieces};
pub use debug_event::DebugEvent;
pub use dirty_bitmap::{BitmapError, DirtyBitmap};
pub use driver::{
    BlockDriver, BoxFuture, CancelReach, ChildRole, Extent, ExtentFlags, ImageDetails, Limits,
    Reopen, Reopened, UnnamedBitmap, WriteFlags, ZeroFlags,
};
pub use drivers::copy_before_write::{
    CbwPolicy, Claim, CopyBeforeWriteDriver, Listening, OnCbwError, Saved, Saves, Snapshot,
    SnapshotAccount, SnapshotObserver, Stalls, broken_snapshot, cluster_of, fine_cluster,
    shown_snapshot,
};
pub use drivers::file::image_is_in_use;
pub use drivers::{OpenError, ReopenError};
pub use error::{IoError, IoErrorKind, IoOp, os_text};
pub use export::{
    BitmapRef, DeleteMode, ExportError, ExportInfo, ExportIothread, ExportKind, ExportOptions,
    Exports, ListenAddress, ListenError, NbdServerOptions,
};
pub use graph::{
    BackendInfo, BitmapInfo, BitmapRoom, BusyBackend, CopiedBitmaps, DEFAULT_DRAIN_TIMEOUT,
    Drained, DumpEdge, DumpNode, Graph, GraphDump, GraphError, GraphHandle, NodeChild, NodeInfo,
};
pub use latency::{Felt, GuestLatency};
pub use node::{Child, Node, NodeOptions, SECTOR_SIZE};
pub use options::{
    BackingRef, BlkdebugOptions, BlockdevOptions, BlockdevRef, CacheChoice, CacheOptions,
    ChildChoice, CopyBeforeWriteOptions, CopyOnReadOptions, DetectZeroes, DiscardMode,
    DriverOptions, EncryptOptions, FileOptions, InetAddress, NbdOptions, NullCoOptions,
    OptionValue, PreallocateOptions, Qcow2Options, RawOptions, SnapshotAccessOptions,
    SocketAddress, ThrottleOptions, Written,
};
pub use permissions::{Perm, PermissionError, Permissions};
pub use range_lock::{LockRange, RangeGuard, RangeLock};
pub use throttle::{
    GroupError, LimitsError, RateLimit, ThrottleGroup, ThrottleGroups, ThrottleLimits,
};
