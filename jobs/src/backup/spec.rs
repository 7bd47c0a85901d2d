//! What a backup is asked to do, and the checks that need nothing but that.

use std::sync::Arc;

use block::runtime::IothreadHandle;
use block::{CbwPolicy, Node, cluster_of, fine_cluster};

use crate::{OnError, TxnKey};

use super::error::BackupError;

/// Default of `max-workers`.
const MAX_WORKERS: i64 = 64;
/// Largest `min-cluster-size` in bytes.
const MAX_CLUSTER: u64 = 1 << 30;
/// Which data is copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackupSync {
    /// All that the source shows.
    Full,
    /// Only what the topmost layer holds.
    Top,
    /// Nothing but what the guest is about to change.
    None,
    /// What a bitmap says.
    Bitmap,
    /// What a bitmap says, which is cleared on success.
    Incremental,
}

impl BackupSync {
    /// The name on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Top => "top",
            Self::None => "none",
            Self::Bitmap => "bitmap",
            Self::Incremental => "incremental",
        }
    }
}

/// What becomes of the bitmap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BitmapMode {
    /// After a success it has what was written since the start; else also what it had.
    OnSuccess,
    /// It has what it had, and what was written since the start.
    Never,
    /// It has what was written since the start, and what was not copied.
    Always,
}

/// `x-perf`. Both bounds are of what is copied beside the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackupPerf {
    /// Most requests in flight.
    pub max_workers: i64,
    /// Most bytes of one request; 0 for no bound.
    pub max_chunk: i64,
    /// Least bytes per cluster: a power of two, or 0.
    pub min_cluster_size: u64,
}

impl Default for BackupPerf {
    fn default() -> Self {
        Self {
            max_workers: MAX_WORKERS,
            max_chunk: 0,
            min_cluster_size: 0,
        }
    }
}

/// A backup to start: the arguments of `blockdev-backup`, resolved.
#[derive(Clone, Debug)]
pub struct BackupSpec {
    /// Id of the job. The caller fills in the device's name where the user gave none.
    pub job_id: String,
    /// The node that is copied as it is at the start.
    pub source: Arc<Node>,
    /// The node that becomes the copy.
    pub target: Arc<Node>,
    /// What to copy.
    pub sync: BackupSync,
    /// Name of a bitmap of the source.
    pub bitmap: Option<String>,
    /// What becomes of that.
    pub bitmap_mode: Option<BitmapMode>,
    /// Write the target compressed.
    pub compress: bool,
    /// Speed limit in bytes per second; 0: none.
    pub speed: i64,
    /// What a failed read does.
    pub on_source_error: OnError,
    /// What a failed write does.
    pub on_target_error: OnError,
    /// What becomes of a guest's request if the copy before it fails or takes long.
    pub policy: CbwPolicy,
    /// Name of the filter node; `None`: one of the graph's own, not listed.
    pub filter_node_name: Option<String>,
    /// Discard on the source what has been copied.
    pub discard_source: bool,
    /// Where what guests are about to change is saved until the job has copied it, instead
    /// of on the target: a node as large as the source that reads as zeroes and that
    /// nobody else uses.
    pub scratch: Option<Arc<Node>>,
    /// How much at a time.
    pub perf: BackupPerf,
    /// Finalize by itself.
    pub auto_finalize: bool,
    /// Vanish by itself when concluded.
    pub auto_dismiss: bool,
    /// The transaction to join; by default one of its own.
    pub txn: Option<TxnKey>,
    /// Where the job runs; `None`: an iothread of its own.
    pub home: Option<IothreadHandle>,
}

impl BackupSpec {
    /// A full backup with QEMU's defaults.
    pub fn new(job_id: impl Into<String>, source: Arc<Node>, target: Arc<Node>) -> Self {
        Self {
            job_id: job_id.into(),
            source,
            target,
            sync: BackupSync::Full,
            bitmap: None,
            bitmap_mode: None,
            compress: false,
            speed: 0,
            on_source_error: OnError::Report,
            on_target_error: OnError::Report,
            policy: CbwPolicy::default(),
            filter_node_name: None,
            discard_source: false,
            scratch: None,
            perf: BackupPerf::default(),
            auto_finalize: true,
            auto_dismiss: true,
            txn: None,
            home: None,
        }
    }

    /// Whether sync mode, bitmap and bitmap mode go together, and what the mode is.
    pub(super) fn check_bitmap_mode(&self) -> Result<Option<BitmapMode>, BackupError> {
        use {BackupSync as Sync, BitmapMode as Mode};
        let mut mode = self.bitmap_mode;
        if matches!(self.sync, Sync::Bitmap | Sync::Incremental) && self.bitmap.is_none() {
            return Err(BackupError::BitmapRequired(self.sync.name()));
        }
        if self.sync == Sync::Incremental && *mode.get_or_insert(Mode::OnSuccess) != Mode::OnSuccess
        {
            return Err(BackupError::IncrementalMode);
        }
        Ok(mode)
    }

    /// Whether a bitmap means something here.
    pub(super) fn check_bitmap_use(&self, mode: BitmapMode) -> Result<(), BackupError> {
        match (self.sync, mode) {
            (BackupSync::None, _) => Err(BackupError::NoneWithBitmap),
            (BackupSync::Full | BackupSync::Top, BitmapMode::Never) => {
                Err(BackupError::NeverWith(self.sync.name()))
            }
            _ => Ok(()),
        }
    }

    /// Whether a bitmap says what is copied.
    pub(super) fn takes_from_bitmap(&self) -> bool {
        matches!(self.sync, BackupSync::Bitmap | BackupSync::Incremental)
    }

    /// Whether fleecing goes with the rest.
    pub(super) fn check_scratch(&self) -> Result<(), BackupError> {
        if self.scratch.is_none() {
            return Ok(());
        }
        match self.sync {
            BackupSync::Full | BackupSync::Bitmap | BackupSync::Incremental => {}
            sync => return Err(BackupError::FleecingSync(sync.name())),
        }
        if self.discard_source {
            return Err(BackupError::FleecingDiscard);
        }
        Ok(())
    }

    pub(super) fn check_perf(&self) -> Result<(), BackupError> {
        if !(1..=i64::from(i32::MAX)).contains(&self.perf.max_workers) {
            return Err(BackupError::MaxWorkers);
        }
        if self.perf.max_chunk < 0 {
            return Err(BackupError::MaxChunk);
        }
        Ok(())
    }

    /// Whether `max-chunk` has room for a cluster (as users know it).
    pub(super) fn check_chunk(&self, cluster: u64) -> Result<(), BackupError> {
        let max_chunk = self.perf.max_chunk;
        if max_chunk > 0 && u64::try_from(max_chunk).is_ok_and(|chunk| chunk < cluster) {
            return Err(BackupError::ChunkBelowCluster { max_chunk, cluster });
        }
        Ok(())
    }

    /// Bytes per cluster: of the account, and as users know it.
    ///
    /// A finished copy looks the same whatever its clusters are, if the target has none, and
    /// a scratch file has none: so a guest's write need not wait for more than it changes.
    /// (A copy of the topmost layer has whole clusters of that, and one of what guests change
    /// never is finished.)
    pub(super) fn clusters(&self) -> Result<(u64, u64), BackupError> {
        let least = self.perf.min_cluster_size;
        if least > 0 && !least.is_power_of_two() {
            return Err(BackupError::ClusterPowerOfTwo);
        }
        if least > MAX_CLUSTER {
            return Err(BackupError::ClusterTooLarge {
                given: least,
                max: MAX_CLUSTER,
            });
        }
        let cluster = cluster_of(&self.target, least);
        let whole = matches!(
            self.sync,
            BackupSync::Full | BackupSync::Bitmap | BackupSync::Incremental
        );
        let fine = match &self.scratch {
            Some(scratch) => fine_cluster(&self.source, scratch),
            None => fine_cluster(&self.source, &self.target).filter(|_| whole && least == 0),
        };
        Ok((fine.unwrap_or(cluster).min(cluster), cluster))
    }
}
