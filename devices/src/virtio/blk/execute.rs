//! From a checked request to node operations.

use block::{InFlight, IoError, IoErrorKind, IoVec, WriteFlags, ZeroFlags};

use super::request::{Command, DiskRange, Status};
use super::stats::Kind;

/// Requests go to the node in pieces of this many bytes at most: a guest may
/// describe 4 GiB in one, and nothing below should have to think of that.
const MAX_PIECE: usize = 16 << 20;

impl Command {
    /// How it is counted, and with how many bytes; `None` if it is not.
    pub(super) fn accounting(&self) -> Option<(Kind, u64)> {
        let total = |ranges: &[DiskRange]| ranges.iter().map(|range| range.len).sum();
        match self {
            Self::Read { data, .. } => Some((Kind::Read, data.len() as u64)),
            Self::Write { data, .. } => Some((Kind::Write, data.len() as u64)),
            Self::Flush => Some((Kind::Flush, 0)),
            Self::Discard(ranges) => Some((Kind::Discard, total(ranges))),
            Self::WriteZeroes(ranges) => Some((Kind::WriteZeroes, total(ranges))),
            Self::GetId { .. } | Self::Refuse(_) => None,
        }
    }

    /// Does it on the node that `node` has entered. With `fua`, what it writes
    /// is durable when it ends.
    ///
    /// Cancel: as the node's operations say.
    // By reference: a future keeps each argument twice, and large tasks cost.
    pub(super) async fn execute(&self, node: &InFlight, fua: bool) -> Result<(), IoError> {
        match self {
            Self::Read { offset, data } => {
                if data.len() <= MAX_PIECE {
                    return node.read(*offset, data.clone()).await;
                }
                for (start, piece) in pieces(data) {
                    node.read(offset + start as u64, piece).await?;
                }
            }
            Self::Write { offset, data } => {
                let flags = WriteFlags {
                    fua,
                    unchanged: false,
                };
                if data.len() <= MAX_PIECE {
                    return node.write(*offset, data.clone(), flags).await;
                }
                for (start, piece) in pieces(data) {
                    node.write(offset + start as u64, piece, flags).await?;
                }
            }
            Self::Flush => node.flush().await?,
            Self::Discard(ranges) => {
                for range in ranges {
                    node.discard(range.offset, range.len).await?;
                }
            }
            Self::WriteZeroes(ranges) => {
                for range in ranges {
                    let flags = ZeroFlags {
                        fua,
                        may_unmap: range.unmap,
                        no_fallback: false,
                    };
                    node.write_zeroes(range.offset, range.len, flags).await?;
                }
            }
            // Answered without the node.
            Self::GetId { .. } | Self::Refuse(_) => {}
        }
        Ok(())
    }
}

/// Where the pieces of `data` begin.
fn pieces(data: &IoVec) -> impl Iterator<Item = (usize, IoVec)> {
    (0..data.len())
        .step_by(MAX_PIECE)
        .map(|start| (start, data.slice(start, MAX_PIECE.min(data.len() - start))))
}

/// What the driver is told of a failed request.
pub(super) fn status_of(error: &IoError) -> Status {
    match error.kind() {
        IoErrorKind::NotSupported => Status::Unsupported,
        IoErrorKind::NoSpace
        | IoErrorKind::InvalidRange
        | IoErrorKind::ReadOnly
        | IoErrorKind::Cancelled
        | IoErrorKind::Other => Status::IoErr,
    }
}
