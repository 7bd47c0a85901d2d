//! `blockdev-backup` and `drive-backup`, alone and as actions of a transaction: their
//! arguments are read, then what they name is found or opened, and then they are
//! prepared in a drained section of all sources together.

use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use block::{
    AttachmentKind, Backend, BackendUser, CbwPolicy, Drained, Graph, GraphError, Node, OnCbwError,
};
use jobs::backup::{
    BackupError, BackupPerf, BackupSpec, BackupSync, BitmapMode, FleecingInfo, PreparedBackup,
    prepare_backup, start_backup,
};
use jobs::mirror::SyncMode;
use jobs::{OnError, TxnKey};
use serde_json::{Value, json};

use super::blockdev::drivers::{ON_CBW_ERROR, cbw_policy};
use super::mirror::target::{self, Mode, Target, Wanted};
use super::mirror::{MODES, ON_ERROR, device_on};
use super::{Outcome, bounded, done};
use crate::monitor::Monitor;
use crate::monitor::args::Args;
use crate::monitor::error::{ErrorClass, QmpError};

const SYNC_MODES: &[(&str, BackupSync)] = &[
    ("top", BackupSync::Top),
    ("full", BackupSync::Full),
    ("none", BackupSync::None),
    ("incremental", BackupSync::Incremental),
    ("bitmap", BackupSync::Bitmap),
];

/// Default of `cbw-timeout` in seconds with `fleecing`.
const FLEECING_TIMEOUT: u32 = 10;

const BITMAP_MODES: &[(&str, BitmapMode)] = &[
    ("on-success", BitmapMode::OnSuccess),
    ("never", BitmapMode::Never),
    ("always", BitmapMode::Always),
];

pub(super) async fn blockdev_backup(monitor: Rc<Monitor>, args: Args) -> Outcome {
    let backup = BackupArgs::blockdev(args)?;
    backup.find(&monitor).await?.start(&monitor).await
}

pub(super) async fn drive_backup(monitor: Rc<Monitor>, args: Args) -> Outcome {
    let backup = BackupArgs::drive(args)?;
    backup.find(&monitor).await?.start(&monitor).await
}

/// The arguments of a backup, read.
pub(super) struct BackupArgs {
    job_id: Option<String>,
    device: String,
    sync: BackupSync,
    speed: Option<i64>,
    bitmap: Option<String>,
    bitmap_mode: Option<BitmapMode>,
    compress: Option<bool>,
    on_source_error: Option<OnError>,
    on_target_error: Option<OnError>,
    on_cbw_error: Option<OnCbwError>,
    cbw_timeout: Option<u32>,
    auto_finalize: Option<bool>,
    auto_dismiss: Option<bool>,
    filter_node_name: Option<String>,
    discard_source: Option<bool>,
    perf: BackupPerf,
    /// `fleecing`: the directory of the scratch file.
    scratch_directory: Option<PathBuf>,
    target: TargetArg,
}

enum TargetArg {
    /// A node.
    Node(String),
    /// A file or an address.
    Place {
        target: String,
        format: Option<String>,
        mode: Option<Mode>,
    },
}

impl BackupArgs {
    /// Those of `blockdev-backup`.
    pub(super) fn blockdev(args: Args) -> Result<Self, QmpError> {
        Self::take(args, |args| {
            Ok(TargetArg::Node(args.required_str("target")?))
        })
    }

    /// Those of `drive-backup`.
    pub(super) fn drive(args: Args) -> Result<Self, QmpError> {
        Self::take(args, |args| {
            Ok(TargetArg::Place {
                target: args.required_str("target")?,
                format: args.optional_str("format")?,
                mode: args.optional_enum("mode", MODES)?,
            })
        })
    }

    fn take(
        mut args: Args,
        target: impl FnOnce(&mut Args) -> Result<TargetArg, QmpError>,
    ) -> Result<Self, QmpError> {
        let taken = Self {
            job_id: args.optional_str("job-id")?,
            device: args.required_str("device")?,
            sync: args.required_enum("sync", SYNC_MODES)?,
            speed: args.optional_i64("speed")?,
            bitmap: args.optional_str("bitmap")?,
            bitmap_mode: args.optional_enum("bitmap-mode", BITMAP_MODES)?,
            compress: args.optional_bool("compress")?,
            on_source_error: args.optional_enum("on-source-error", ON_ERROR)?,
            on_target_error: args.optional_enum("on-target-error", ON_ERROR)?,
            on_cbw_error: args.optional_enum("on-cbw-error", ON_CBW_ERROR)?,
            cbw_timeout: args.optional_u32("cbw-timeout")?,
            auto_finalize: args.optional_bool("auto-finalize")?,
            auto_dismiss: args.optional_bool("auto-dismiss")?,
            filter_node_name: args.optional_str("filter-node-name")?,
            discard_source: args.optional_bool("discard-source")?,
            perf: match args.optional_object("x-perf")? {
                Some(args) => perf(args)?,
                None => BackupPerf::default(),
            },
            scratch_directory: match args.optional_object("fleecing")? {
                Some(args) => Some(scratch_directory(args)?),
                None => None,
            },
            target: target(&mut args)?,
        };
        args.finish()?;
        Ok(taken)
    }

    /// Finds the source, and finds or opens the target.
    ///
    /// Cancel: what was opened is closed.
    pub(super) async fn find(self, monitor: &Monitor) -> Result<ReadyBackup, QmpError> {
        let graph = &monitor.graph;
        let (source, target, opened) = match &self.target {
            TargetArg::Node(target) => (graph.find(&self.device)?, graph.find(target)?, None),
            TargetArg::Place {
                target,
                format,
                mode,
            } => {
                let source = graph.find(&self.device)?;
                graph.check_no_job(&source)?;
                let wanted = Wanted {
                    target: target.clone(),
                    format: format.clone(),
                    node_name: None,
                    mode: mode.unwrap_or(Mode::AbsolutePaths),
                    sync: match self.sync {
                        BackupSync::Full => SyncMode::Full,
                        BackupSync::Top => SyncMode::Top,
                        BackupSync::None => SyncMode::None,
                        BackupSync::Bitmap => SyncMode::Bitmap,
                        BackupSync::Incremental => SyncMode::Incremental,
                    },
                };
                let opened = {
                    let _alone = monitor.graph_commands.lock().await;
                    target::open(graph, &source, wanted).await?
                };
                // The device may stand on another node by now.
                let source = graph.find(&self.device)?;
                (source, opened.node(), Some(opened))
            }
        };
        // A job without an id is called like the device on its source; where there is
        // none, the empty id is refused.
        let policy = self.policy();
        let scratch = match self.scratch_directory {
            Some(directory) => Some(Scratch::open(graph, directory, source.size()).await?),
            None => None,
        };
        let job_id = self.job_id.unwrap_or_else(|| device_on(graph, &source));
        let spec = BackupSpec::new(job_id, source, target);
        let spec = BackupSpec {
            sync: self.sync,
            bitmap: self.bitmap,
            bitmap_mode: self.bitmap_mode,
            compress: self.compress.unwrap_or(spec.compress),
            speed: self.speed.unwrap_or(spec.speed),
            on_source_error: self.on_source_error.unwrap_or(spec.on_source_error),
            on_target_error: self.on_target_error.unwrap_or(spec.on_target_error),
            policy,
            filter_node_name: self.filter_node_name,
            discard_source: self.discard_source.unwrap_or(spec.discard_source),
            scratch: scratch.as_ref().map(Scratch::node),
            perf: self.perf,
            auto_finalize: self.auto_finalize.unwrap_or(spec.auto_finalize),
            auto_dismiss: self.auto_dismiss.unwrap_or(spec.auto_dismiss),
            ..spec
        };
        Ok(ReadyBackup {
            spec,
            _opened: opened,
            _scratch: scratch,
        })
    }

    /// What becomes of guests' requests. A backup that fleeces is there for the guest's
    /// sake: by default none waits for long, and none fails.
    fn policy(&self) -> CbwPolicy {
        let (mut on_error, mut timeout) = (self.on_cbw_error, self.cbw_timeout);
        if self.scratch_directory.is_some() {
            on_error = on_error.or(Some(OnCbwError::BreakSnapshot));
            timeout = timeout.or(Some(FLEECING_TIMEOUT));
        }
        cbw_policy(on_error, timeout)
    }
}

/// `fleecing`
fn scratch_directory(mut args: Args) -> Result<PathBuf, QmpError> {
    let directory = args.required_str("directory")?;
    args.finish()?;
    Ok(directory.into())
}

/// A scratch file that was made for a backup. Dropped, it goes if the job does not have it.
struct Scratch {
    graph: Rc<Graph>,
    hold: Arc<Backend>,
}

impl Scratch {
    async fn open(graph: &Rc<Graph>, directory: PathBuf, size: u64) -> Result<Self, QmpError> {
        let shown = directory.display().to_string();
        let opened = graph.open_scratch(directory, size, Arc::new(ScratchHold));
        let opened = bounded("Making the scratch file for fleecing", opened).await?;
        let hold = opened.map_err(|error: GraphError| {
            QmpError::generic(format!(
                "Cannot make a scratch file for fleecing in '{shown}': {error}"
            ))
        })?;
        Ok(Self {
            graph: Rc::clone(graph),
            hold,
        })
    }

    fn node(&self) -> Arc<Node> {
        self.hold.root()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        self.graph.detach(&self.hold);
    }
}

struct ScratchHold;

impl BackendUser for ScratchHold {
    fn holds_requests(&self) -> bool {
        false
    }

    fn kind(&self) -> AttachmentKind {
        AttachmentKind::Job
    }

    fn describe(&self) -> String {
        "a backup that is being started".to_owned()
    }
}

/// `x-perf`. Copying within a file system is done where it can be, whatever
/// `use-copy-range` says.
fn perf(mut args: Args) -> Result<BackupPerf, QmpError> {
    let default = BackupPerf::default();
    args.optional_bool("use-copy-range")?;
    let perf = BackupPerf {
        max_workers: args
            .optional_i64("max-workers")?
            .unwrap_or(default.max_workers),
        max_chunk: args.optional_i64("max-chunk")?.unwrap_or(default.max_chunk),
        min_cluster_size: args
            .optional_u64("min-cluster-size")?
            .unwrap_or(default.min_cluster_size),
    };
    args.finish()?;
    Ok(perf)
}

/// A backup whose nodes are there.
pub(super) struct ReadyBackup {
    spec: BackupSpec,
    /// Keeps a target open that was opened for it, until the job has it.
    _opened: Option<Target>,
    /// The same of its scratch file.
    _scratch: Option<Scratch>,
}

impl ReadyBackup {
    /// The node to be drained.
    pub(super) fn source(&self) -> &Arc<Node> {
        &self.spec.source
    }

    /// Prepares it in a drained section of its source, as a member of `txn` if that is
    /// given. The source is copied as it is in that section.
    pub(super) fn prepare(
        self,
        monitor: &Monitor,
        txn: Option<TxnKey>,
        drained: &Drained,
    ) -> Result<PreparedBackup, QmpError> {
        let spec = BackupSpec { txn, ..self.spec };
        prepare_backup(&monitor.graph, monitor.jobs(), spec, drained).map_err(refusal)
    }

    async fn start(self, monitor: &Monitor) -> Outcome {
        start_backup(&monitor.graph, monitor.jobs(), self.spec)
            .await
            .map_err(refusal)?;
        done()
    }
}

fn refusal(error: BackupError) -> QmpError {
    QmpError::with_causes(ErrorClass::Generic, &error)
}

/// What queries show of a backup that fleeces.
pub(super) fn fleecing(info: &FleecingInfo) -> Value {
    let ns = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
    json!({
        "scratch-bytes": info.scratch_bytes,
        "scratch-bytes-max": info.most_scratch_bytes,
        "stalls": info.stalls.count,
        "longest-stall-ns": ns(info.stalls.longest),
        "total-stall-ns": ns(info.stalls.total),
    })
}
