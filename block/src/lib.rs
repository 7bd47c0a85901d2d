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

mod buffer;
mod driver;
mod error;
mod options;
mod permissions;
pub mod runtime;
mod sync;
#[allow(dead_code, reason = "the file driver is its user")]
mod uring;

pub use buffer::{AlignedBuffer, IoVec, MemoryOwner};
pub use driver::{
    BlockDriver, BoxFuture, ChildRole, Extent, ExtentFlags, Limits, WriteFlags, ZeroFlags,
};
pub use error::{IoError, IoErrorKind, IoOp};
pub use options::{
    BlockdevOptions, BlockdevRef, CacheOptions, DetectZeroes, DiscardMode, DriverOptions,
    FileOptions, NullCoOptions, RawOptions,
};
pub use permissions::{Perm, PermissionError, Permissions};
