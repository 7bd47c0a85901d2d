//! Why a mirror cannot be started.

use block::{BitmapError, GraphError};

use crate::JobError;

/// A refused mirror. The guest's disk is as it was before.
///
/// Texts that QEMU's clients know are QEMU's.
#[derive(Debug, thiserror::Error)]
pub enum MirrorError {
    /// `granularity` is too small or too large.
    #[error("Parameter 'granularity' expects a value in range [512B, 64MB]")]
    GranularityRange,
    /// `granularity` is no power of two.
    #[error("Parameter 'granularity' expects a power of 2")]
    GranularityPowerOfTwo,
    /// `buf-size` is negative.
    #[error("Invalid parameter 'buf-size'")]
    BufSize,
    /// A sync mode that needs a bitmap of the user's.
    #[error("Sync mode '{0}' not supported")]
    SyncMode(&'static str),
    /// Source and target are one.
    #[error("Can't mirror node into itself")]
    SameNode,
    /// `replaces` names a node that does not show what the source shows.
    #[error(
        "Cannot replace '{replaces}' by a node mirrored from '{source_node}', because it cannot \
         be guaranteed that doing so would not lead to an abrupt change of visible data"
    )]
    Replaces {
        /// The node that was to be replaced.
        replaces: String,
        /// The node to be mirrored.
        source_node: String,
    },
    /// `replaces` names a node of another size.
    #[error("cannot replace image with a mirror image of different size")]
    ReplacesSize,
    /// The bitmap would be too large.
    #[error("Cannot track the writes to the source: use a larger granularity")]
    Bitmap(#[from] BitmapError),
    /// A job-level refusal: the id.
    #[error(transparent)]
    Job(#[from] JobError),
    /// The graph refused the filter or an attachment, or the source could not be
    /// drained.
    #[error(transparent)]
    Graph(#[from] GraphError),
}
