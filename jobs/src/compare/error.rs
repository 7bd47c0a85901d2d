//! Why a comparison cannot be started.

use block::{BitmapError, GraphError, NamedBitmapError};

use crate::JobError;

/// A refused comparison. Nothing has changed.
#[derive(Debug, thiserror::Error)]
pub enum CompareError {
    /// Both are one.
    #[error("Cannot compare node '{0}' with itself")]
    SameNode(String),
    /// A mirror between the two has not copied everything once.
    #[error(
        "The mirror between nodes '{0}' and '{1}' is not ready yet: compare them when it is, or \
         when it has ended"
    )]
    NotReady(String, String),
    /// `max-differences` is too large.
    #[error("Parameter 'max-differences' expects at most {most}", most = super::MAX_DIFFERENCES)]
    MaxDifferences,
    /// `device` has no bitmap of that name.
    #[error("Bitmap '{0}' could not be found")]
    NoSuchBitmap(String),
    /// What the guest writes meanwhile would not be in the bitmap.
    #[error("Bitmap '{0}' is disabled and does not record what is written: enable it")]
    NotRecording(String),
    /// The bitmap is in use, or good for nothing.
    #[error(transparent)]
    NamedBitmap(#[from] NamedBitmapError),
    /// The bitmaps would be too large.
    #[error("Cannot track the writes to the nodes")]
    Bitmap(#[from] BitmapError),
    /// A job-level refusal: the id, the speed.
    #[error(transparent)]
    Job(#[from] JobError),
    /// The graph refused an attachment.
    #[error(transparent)]
    Graph(#[from] GraphError),
}
