//! What a comparison is asked to do.

use std::sync::Arc;

use block::Node;
use block::runtime::IothreadHandle;

use crate::OnError;

/// Most differing ranges that are listed one by one.
pub const MAX_DIFFERENCES: u32 = 1024;
/// As many are listed if nothing is said.
const DEFAULT_DIFFERENCES: u32 = 16;

/// A comparison to start: the arguments of `blockdev-compare`, resolved.
#[derive(Clone, Debug)]
pub struct CompareSpec {
    /// Id of the job.
    pub job_id: String,
    /// One node.
    pub source: Arc<Node>,
    /// The other one.
    pub target: Arc<Node>,
    /// Name of a bitmap of the source, or of a node that it filters, that records: what is
    /// dirty in it is not compared. It is busy meanwhile.
    pub bitmap: Option<String>,
    /// Speed limit in bytes per second, of each side; 0: none.
    pub speed: i64,
    /// What a failed read of the source does.
    pub on_source_error: OnError,
    /// What a failed read of the target does.
    pub on_target_error: OnError,
    /// Finalize by itself.
    pub auto_finalize: bool,
    /// Vanish by itself when concluded.
    pub auto_dismiss: bool,
    /// How many differing ranges are listed, up to [`MAX_DIFFERENCES`]. All are counted.
    pub max_differences: u32,
    /// Where the job runs; `None`: an iothread of its own.
    pub home: Option<IothreadHandle>,
}

impl CompareSpec {
    /// A comparison with defaults.
    pub fn new(job_id: impl Into<String>, source: Arc<Node>, target: Arc<Node>) -> Self {
        Self {
            job_id: job_id.into(),
            source,
            target,
            bitmap: None,
            speed: 0,
            on_source_error: OnError::Report,
            on_target_error: OnError::Report,
            auto_finalize: true,
            auto_dismiss: true,
            max_differences: DEFAULT_DIFFERENCES,
            home: None,
        }
    }
}
