//! What `blockdev-add` can say of a node, as plain typed options.
//!
//! The wire form (JSON, `key=value`) and its error texts are `vmm`'s.

use std::path::PathBuf;

/// A node to be opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockdevOptions {
    /// Name; `None` lets the graph make one (`#block` and a number).
    pub node_name: Option<String>,
    /// Open for reading only. `None`: the default, writable.
    pub read_only: Option<bool>,
    /// Fall back to read-only where the file does not allow writing.
    pub auto_read_only: bool,
    /// Cache behaviour.
    pub cache: CacheOptions,
    /// What a discard does.
    pub discard: DiscardMode,
    /// What a write of zeroes as data does.
    pub detect_zeroes: DetectZeroes,
    /// The driver and its own options.
    pub driver: DriverOptions,
}

/// `cache.direct` and `cache.no-flush`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheOptions {
    /// Bypass the host's page cache (O_DIRECT).
    pub direct: bool,
    /// Ignore flushes: fast, and unsafe on a host crash.
    pub no_flush: bool,
}

/// `discard`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DiscardMode {
    /// Discards do nothing.
    #[default]
    Ignore,
    /// Discards free space.
    Unmap,
}

/// `detect-zeroes`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DetectZeroes {
    /// Data is written as it is.
    #[default]
    Off,
    /// Zeroes are written as zeroes.
    On,
    /// Zeroes are written as zeroes, and may be unmapped.
    Unmap,
}

/// A child: a node that exists, or one to be opened with its parent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BlockdevRef {
    /// An existing node's name.
    Name(String),
    /// Options of a new node, owned by its parent.
    Inline(Box<BlockdevOptions>),
}

/// Options of one driver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DriverOptions {
    /// A file or block device of the host.
    File(FileOptions),
    /// The raw format: another node's bytes, or a part of them.
    Raw(RawOptions),
    /// Reads as zeroes or garbage, forgets writes.
    NullCo(NullCoOptions),
}

/// Options of `file` and `host_device`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileOptions {
    /// Path of the file.
    pub filename: PathBuf,
    /// Image locking; `None` is `auto`: on where the file system has it.
    pub locking: Option<bool>,
    /// Driver `host_device` was asked for: the file must be a block device.
    pub host_device: bool,
}

/// Options of `raw`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RawOptions {
    /// Where the data is.
    pub file: BlockdevRef,
    /// First byte of the part that is shown.
    pub offset: u64,
    /// Length of that part in bytes; `None`: up to the end.
    pub size: Option<u64>,
}

/// Options of `null-co`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NullCoOptions {
    /// Size in bytes (QEMU's default: 1 GiB).
    pub size: u64,
    /// Time that each request takes, in nanoseconds.
    pub latency_ns: u64,
    /// Reads give zeroes; else buffers are left as they are.
    pub read_zeroes: bool,
}
