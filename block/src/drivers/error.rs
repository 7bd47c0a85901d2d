//! Why a driver cannot be opened.

use std::io;
use std::path::PathBuf;

use super::qcow2::{BackingFileError, HeaderError};
use crate::error::{IoError, os_text};
use crate::nbd::client::NbdError;

/// Why a driver cannot be opened.
///
/// [`OpenError::Open`] carries the kernel's answer in its text, since this is
/// what QEMU's QMP replies say.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The file cannot be opened.
    #[error("Could not open '{}': {}", path.display(), os_text(error))]
    Open {
        /// Path of the file.
        path: PathBuf,
        /// What the kernel said.
        error: io::Error,
    },
    /// A `blkdebug` filter cannot be opened.
    #[error(transparent)]
    Blkdebug(#[from] super::blkdebug::BlkdebugError),
    /// A `copy-before-write` filter cannot keep account of so large a disk.
    #[error("Cannot create block-copy-state: {0}")]
    Snapshot(#[from] crate::dirty_bitmap::BitmapError),
    /// The file is not of a kind that can be a disk: a FIFO, a character device, …
    #[error("'file' driver requires '{}' to be a regular file", path.display())]
    WrongKind {
        /// Path of the file.
        path: PathBuf,
    },
    /// `host_device` with something else than a block device.
    #[error(
        "'host_device' driver requires '{}' to be either a character or block device",
        path.display()
    )]
    NotADevice {
        /// Path of the file.
        path: PathBuf,
    },
    /// The file system cannot do what an option asks for.
    #[error("'{}' does not support {what}; {remedy}", path.display())]
    NotSupported {
        /// Path of the file.
        path: PathBuf,
        /// What it cannot do.
        what: &'static str,
        /// What the user may do about it.
        remedy: &'static str,
    },
    /// Size or alignment could not be found out.
    #[error("Cannot get {what} of '{}'", path.display())]
    Probe {
        /// Path of the file.
        path: PathBuf,
        /// What was asked for.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The part that `raw` is to show begins past the end.
    #[error("Offset ({offset}) cannot be greater than size of the containing file ({available})")]
    OffsetPastEnd {
        /// First byte to show.
        offset: u64,
        /// Size of the node below.
        available: u64,
    },
    /// The part that `raw` is to show ends past the end. (Two spaces, as in QEMU.)
    #[error(
        "The sum of offset ({offset}) and size ({size}) has to be smaller or equal to the  actual \
         size of the containing file ({available})"
    )]
    PastEnd {
        /// First byte to show.
        offset: u64,
        /// Bytes to show.
        size: u64,
        /// Size of the node below.
        available: u64,
    },
    /// The disk is larger than any can be.
    #[error("Could not refresh total sector count: File too large")]
    TooLarge,
    /// A size that `preallocate` is given is negative.
    #[error("Parameter '{0}' expects a non-negative number below 2^64")]
    NegativeSize(&'static str),
    /// `preallocate` counts in whole sectors.
    #[error("prealloc-align parameter of preallocate filter is not aligned to 512")]
    PreallocateAlignment,
    /// The file is no qcow2 image, or one that cannot be served.
    #[error(transparent)]
    Qcow2(HeaderError),
    /// `l2-cache-entry-size` is not one that the image can have.
    #[error(
        "L2 cache entry size must be a power of two between 512 and the cluster size \
         ({cluster_size})"
    )]
    L2CacheEntrySize {
        /// Of the image, in bytes.
        cluster_size: u64,
    },
    /// `lazy-refcounts` of an image of version 2.
    #[error("Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level")]
    LazyRefcounts,
    /// An image that is not encrypted is said to be.
    #[error("No encryption in image header, but options specified format '{0}'")]
    NotEncrypted(&'static str),
    /// An image that is encrypted otherwise than is said.
    #[error("Header reported '{found}' encryption format but options specify '{said}'")]
    OtherEncryption {
        /// By the header.
        found: &'static str,
        /// By the options.
        said: &'static str,
    },
    /// There are no objects with keys.
    #[error("No secret with id '{0}'")]
    NoSecret(String),
    /// The header of an image cannot be read.
    #[error("Could not read qcow2 header: {}", .0.cause())]
    ReadImage(IoError),
    /// The tables of an image cannot be read, or make no sense.
    #[error("Could not open the image in node '{file}': {error}")]
    Image {
        /// Name of the node it is in.
        file: String,
        /// What is wrong.
        error: io::Error,
    },
    /// The backing file that a header names is not opened.
    #[error(transparent)]
    BackingFile(#[from] BackingFileError),
    /// The image's data is in a file of its own, and that is not given.
    #[error("'data-file' is required for this image: give it explicitly")]
    DataFileRequired,
    /// A data file is given, and the image has its data in itself.
    #[error("'data-file' can only be set for images with an external data file")]
    DataFileUnexpected,
    /// The size that `raw` is to show is not of whole sectors.
    #[error("Specified size is not multiple of 512")]
    UnalignedSize,
    /// The part that `raw` is to show does not begin with a sector.
    #[error("Offset {offset} of node '{node}' is not a multiple of 512")]
    UnalignedOffset {
        /// Name of the node.
        node: String,
        /// What was given.
        offset: u64,
    },
    /// An NBD server's export cannot be used.
    #[error(transparent)]
    Nbd(#[from] NbdError),
}

/// Why an open node cannot have other options.
#[derive(Debug, thiserror::Error)]
pub enum ReopenError {
    /// An option that stays what it was when the node was opened.
    #[error("Cannot change the option '{0}'")]
    CannotChange(String),
    /// An option that was left out, and cannot go back to its default.
    #[error("Option '{0}' cannot be reset to its default value")]
    CannotReset(String),
    /// What backing image an image is to have is not said, though its header names one.
    #[error("backing is missing for '{0}'")]
    BackingMissing(String),
    /// A driver none of whose options can be changed.
    #[error("Block format '{driver}' used by node '{node}' does not support reopening files")]
    NotSupported {
        /// QEMU's name of the driver.
        driver: &'static str,
        /// Name of the node.
        node: String,
    },
    /// A file of that name is there, but it is not the one that is open.
    #[error(
        "'{}' is not the file any more that was opened as node '{node}'; put it back, or open it \
         as another node",
        path.display()
    )]
    AnotherFile {
        /// Path of the file.
        path: PathBuf,
        /// Name of the node.
        node: String,
    },
    /// It cannot be opened as it is to be.
    #[error(transparent)]
    Open(#[from] OpenError),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_error_reads_as_a_sentence() {
        let path = PathBuf::from("/a/b.img");
        let io = || io::Error::from_raw_os_error(libc::ENOENT);
        let cases = [
            (
                OpenError::Open {
                    path: path.clone(),
                    error: io(),
                },
                "Could not open '/a/b.img': No such file or directory",
            ),
            (
                OpenError::WrongKind { path: path.clone() },
                "'file' driver requires '/a/b.img' to be a regular file",
            ),
            (
                OpenError::NotADevice { path: path.clone() },
                "'host_device' driver requires '/a/b.img' to be either a character or block device",
            ),
            (
                OpenError::NotSupported {
                    path: path.clone(),
                    what: "O_DIRECT",
                    remedy: "use cache.direct=off",
                },
                "'/a/b.img' does not support O_DIRECT; use cache.direct=off",
            ),
            (
                OpenError::Probe {
                    path,
                    what: "the size",
                    source: io(),
                },
                "Cannot get the size of '/a/b.img'",
            ),
            (
                OpenError::PastEnd {
                    offset: 512,
                    size: 1024,
                    available: 1024,
                },
                "The sum of offset (512) and size (1024) has to be smaller or equal to the  actual \
                 size of the containing file (1024)",
            ),
            (
                OpenError::UnalignedOffset {
                    node: "r".into(),
                    offset: 7,
                },
                "Offset 7 of node 'r' is not a multiple of 512",
            ),
        ];
        for (error, text) in cases {
            assert_eq!(error.to_string(), text);
        }
    }
}
