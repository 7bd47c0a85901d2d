//! Why a backup cannot be started.

use block::{BitmapError, GraphError, NamedBitmapError};

use crate::JobError;

/// A refused backup. The guest's disk is as it was before.
///
/// Texts that QEMU's clients know are QEMU's.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// A sync mode that a bitmap chooses for, without one.
    #[error("must provide a valid bitmap name for '{0}' sync mode")]
    BitmapRequired(&'static str),
    /// Sync mode `incremental` with another bitmap mode than its own.
    #[error("Bitmap sync mode must be 'on-success' when using sync mode 'incremental'")]
    IncrementalMode,
    /// There is no bitmap of that name.
    #[error("Bitmap '{0}' could not be found")]
    NoSuchBitmap(String),
    /// The bitmap is in use, or good for nothing.
    #[error(transparent)]
    Bitmap(#[from] NamedBitmapError),
    /// A bitmap, and nothing said of what becomes of it.
    #[error("Bitmap sync mode must be given when providing a bitmap")]
    ModeRequired,
    /// A bitmap with a sync mode that copies no disk.
    #[error("sync mode 'none' does not produce meaningful bitmap outputs")]
    NoneWithBitmap,
    /// A bitmap that is neither looked at nor changed.
    #[error("Bitmap sync mode 'never' has no meaningful effect when combined with sync mode '{0}'")]
    NeverWith(&'static str),
    /// A bitmap mode without a bitmap.
    #[error("Cannot specify bitmap sync mode without a bitmap")]
    ModeWithoutBitmap,
    /// Source and target are one.
    #[error("Source and target cannot be the same")]
    SameNode,
    /// The target cannot be written compressed. (Ends in a space, as in QEMU, where the
    /// name of a device may follow.)
    #[error("Compression is not supported for this drive {0}")]
    Compression(String),
    /// `max-workers` is out of range.
    #[error("max-workers must be between 1 and {}", i32::MAX)]
    MaxWorkers,
    /// `max-chunk` is negative.
    #[error("max-chunk must be zero (which means no limit) or positive")]
    MaxChunk,
    /// `max-chunk` is less than what is copied at least.
    #[error("Required max-chunk ({max_chunk}) is less than backup cluster size ({cluster})")]
    ChunkBelowCluster {
        /// What was asked for, in bytes.
        max_chunk: i64,
        /// Bytes per cluster.
        cluster: u64,
    },
    /// `min-cluster-size` is no power of two.
    #[error("min-cluster-size needs to be a power of 2")]
    ClusterPowerOfTwo,
    /// `min-cluster-size` is too large.
    #[error("min-cluster-size too large: {given} > {max}")]
    ClusterTooLarge {
        /// What was asked for, in bytes.
        given: u64,
        /// Largest one, in bytes.
        max: u64,
    },
    /// Source and target differ in size.
    #[error("Source and target image have different sizes")]
    Sizes,
    /// The source is to be discarded, and somebody else uses it.
    #[error(
        "Cannot discard node '{0}' behind those who use it: leave 'discard-source' out, or detach \
         them"
    )]
    DiscardUsed(String),
    /// A sync mode whose snapshot is not read by the job.
    #[error("Fleecing does not go with sync mode '{0}': use 'full', 'bitmap' or 'incremental'")]
    FleecingSync(&'static str),
    /// What was copied is freed in the scratch file, not on the source.
    #[error("Fleecing does not go with 'discard-source'")]
    FleecingDiscard,
    /// The filter may not be there, or may not write the target.
    #[error("Could not create node: {0}")]
    Filter(GraphError),
    /// The filter cannot be put in above the source.
    #[error("Could not replace node: {0}")]
    Replace(GraphError),
    /// The bitmaps of the snapshot would be too large.
    #[error("Cannot keep account of what is copied: {0}")]
    Account(#[from] BitmapError),
    /// A job-level refusal: the id, the speed.
    #[error(transparent)]
    Job(#[from] JobError),
    /// The graph refused an attachment, or the source could not be drained.
    #[error(transparent)]
    Graph(#[from] GraphError),
}
