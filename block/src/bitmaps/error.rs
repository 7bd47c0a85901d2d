//! Why a named bitmap cannot be had, or changed. Texts that QEMU has are QEMU's.

use crate::dirty_bitmap::BitmapError;

/// A refused or failed operation on named bitmaps. Nothing has been changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NamedBitmapError {
    /// An empty name.
    #[error("Bitmap name cannot be empty")]
    EmptyName,
    /// A name of more than 1023 bytes.
    #[error("Bitmap name too long: {0}")]
    NameTooLong(String),
    /// The node has a bitmap of that name.
    #[error("Bitmap already exists: {0}")]
    Exists(String),
    /// Nothing keeps bitmaps of the node when it is closed.
    #[error("Can't store persistent bitmaps to {0}: Operation not supported")]
    NotKept(String),
    /// As many bitmaps of the node are kept as can be, or they would take too much memory.
    #[error("Too many persistent bitmaps for node '{0}': remove some")]
    TooMany(String),
    /// It is kept, and its node is read-only.
    #[error("Bitmap '{0}' is readonly and cannot be modified")]
    ReadOnly(String),
    /// The node has no bitmap of that name.
    #[error("Dirty bitmap '{0}' not found")]
    NotFound(String),
    /// There is no node, and no device on one, of that name.
    #[error("Node '{0}' not found")]
    NodeNotFound(String),
    /// A job or export uses it, or it is being removed.
    #[error("Bitmap '{0}' is currently in use by another operation and cannot be used")]
    Busy(String),
    /// Writes may be missing in it: it can only be removed.
    #[error("Bitmap '{0}' is inconsistent and cannot be used")]
    Inconsistent(String),
    /// Bitmaps of disks of other sizes are to be merged.
    #[error(
        "Bitmaps are of different sizes (destination size is {target}, source size is {from}) and \
         can't be merged"
    )]
    Sizes {
        /// Size in bytes of the disk of the one.
        target: u64,
        /// Size in bytes of the disk of the other.
        from: u64,
    },
    /// There can be no such bitmap.
    #[error(transparent)]
    Bitmap(#[from] BitmapError),
}
