//! The error of an I/O request: what was asked, where, and the errno.
//!
//! Errors of opening nodes and changing the graph are in `graph`.

use std::fmt;
use std::io;
use std::sync::Arc;

/// The kernel's text without the number that the standard library adds.
pub fn os_text(error: &io::Error) -> String {
    let text = error.to_string();
    match text.find(" (os error ") {
        Some(end) => text[..end].to_owned(),
        None => text,
    }
}

/// The operation a failed request wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoOp {
    /// Read into memory.
    Read,
    /// Write from memory.
    Write,
    /// Write zeroes.
    WriteZeroes,
    /// Discard.
    Discard,
    /// Flush to stable storage.
    Flush,
    /// Ask for block status.
    BlockStatus,
    /// Change the size.
    Truncate,
}

impl fmt::Display for IoOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::WriteZeroes => "write zeroes",
            Self::Discard => "discard",
            Self::Flush => "flush",
            Self::BlockStatus => "block status",
            Self::Truncate => "truncate",
        })
    }
}

/// What went wrong, as far as callers decide by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoErrorKind {
    /// No space left on the storage (`ENOSPC`, also `EDQUOT`).
    NoSpace,
    /// The range is not inside the node, or not aligned as it must be.
    InvalidRange,
    /// The node is read-only, or the user has no right to write.
    ReadOnly,
    /// The node, or what it stands on, cannot do this.
    NotSupported,
    /// The request was given up because its user asked for it.
    Cancelled,
    /// Anything else: see the errno.
    Other,
}

/// A failed request.
///
/// Cheap to clone, so that one failure can be told to several waiters.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{op} at offset {offset}, {len} bytes, of node '{node}' failed: {}", std::io::Error::from_raw_os_error(*.errno))]
pub struct IoError {
    /// What was asked.
    pub op: IoOp,
    /// Name of the node that failed (not of the filters above it).
    pub node: Arc<str>,
    /// Start of the failed request in bytes.
    pub offset: u64,
    /// Length of the failed request in bytes.
    pub len: u64,
    /// The kernel's error number, positive.
    pub errno: i32,
}

impl IoError {
    /// The kernel's text of what went wrong.
    pub(crate) fn cause(&self) -> String {
        os_text(&io::Error::from_raw_os_error(self.errno))
    }

    /// The class of this error.
    pub fn kind(&self) -> IoErrorKind {
        match self.errno {
            libc::ENOSPC | libc::EDQUOT => IoErrorKind::NoSpace,
            libc::EINVAL | libc::ERANGE => IoErrorKind::InvalidRange,
            libc::EROFS | libc::EPERM | libc::EACCES | libc::EBADF => IoErrorKind::ReadOnly,
            libc::EOPNOTSUPP | libc::ENOSYS => IoErrorKind::NotSupported,
            libc::ECANCELED => IoErrorKind::Cancelled,
            _ => IoErrorKind::Other,
        }
    }
}
