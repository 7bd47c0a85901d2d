//! `blockdev-mirror` and `drive-mirror`

use std::rc::Rc;
use std::time::Duration;

use block::{BackendInfo, Graph, Node};
use jobs::mirror::{MirrorError, MirrorSpec, SyncMode, start_mirror};
use jobs::{CopyMode, OnError};

use self::target::{Mode, Wanted};
use super::{Outcome, done};
use crate::monitor::Monitor;
use crate::monitor::args::Args;
use crate::monitor::error::{ErrorClass, QmpError};

pub(super) mod target;

const SYNC_MODES: &[(&str, SyncMode)] = &[
    ("top", SyncMode::Top),
    ("full", SyncMode::Full),
    ("none", SyncMode::None),
    ("incremental", SyncMode::Incremental),
    ("bitmap", SyncMode::Bitmap),
];

pub(super) const MODES: &[(&str, Mode)] = &[
    ("existing", Mode::Existing),
    ("absolute-paths", Mode::AbsolutePaths),
];

/// `auto` is QEMU's name for its default of guest devices.
pub(super) const ON_ERROR: &[(&str, OnError)] = &[
    ("report", OnError::Report),
    ("ignore", OnError::Ignore),
    ("enospc", OnError::Enospc),
    ("stop", OnError::Stop),
    ("auto", OnError::Enospc),
];

/// The copy mode to begin with, and whether the mirror may change it by itself.
const START_MODES: &[(&str, (CopyMode, bool))] = &[
    ("background", (CopyMode::Background, false)),
    ("write-blocking", (CopyMode::WriteBlocking, false)),
    ("auto", (CopyMode::Background, true)),
];

/// What both commands take after `sync` and `mode`.
struct Tuning {
    speed: Option<i64>,
    granularity: Option<u32>,
    buf_size: Option<i64>,
    on_source_error: Option<OnError>,
    on_target_error: Option<OnError>,
    unmap: Option<bool>,
    filter_node_name: Option<String>,
    copy_mode: Option<(CopyMode, bool)>,
    auto_finalize: Option<bool>,
    auto_dismiss: Option<bool>,
    target_is_zero: Option<bool>,
    deadline: Option<u32>,
}

impl Tuning {
    /// `names_filter`: whether the command has `filter-node-name`.
    fn take(args: &mut Args, names_filter: bool) -> Result<Self, QmpError> {
        Ok(Self {
            speed: args.optional_i64("speed")?,
            granularity: args.optional_u32("granularity")?,
            buf_size: args.optional_i64("buf-size")?,
            on_source_error: args.optional_enum("on-source-error", ON_ERROR)?,
            on_target_error: args.optional_enum("on-target-error", ON_ERROR)?,
            unmap: args.optional_bool("unmap")?,
            filter_node_name: match names_filter {
                true => args.optional_str("filter-node-name")?,
                false => None,
            },
            copy_mode: args.optional_enum("copy-mode", START_MODES)?,
            auto_finalize: args.optional_bool("auto-finalize")?,
            auto_dismiss: args.optional_bool("auto-dismiss")?,
            target_is_zero: args.optional_bool("target-is-zero")?,
            deadline: args
                .optional_u32("deadline")?
                .filter(|seconds| *seconds > 0),
        })
    }

    fn apply(self, spec: MirrorSpec) -> MirrorSpec {
        let (copy_mode, switches) = self.copy_mode.unwrap_or((spec.copy_mode, false));
        MirrorSpec {
            speed: self.speed.unwrap_or(spec.speed),
            granularity: self.granularity.unwrap_or(spec.granularity),
            buf_size: self.buf_size.unwrap_or(spec.buf_size),
            on_source_error: self.on_source_error.unwrap_or(spec.on_source_error),
            on_target_error: self.on_target_error.unwrap_or(spec.on_target_error),
            unmap: self.unmap.unwrap_or(spec.unmap),
            filter_node_name: self.filter_node_name,
            copy_mode,
            switches,
            deadline: self
                .deadline
                .map(|seconds| Duration::from_secs(seconds.into())),
            auto_finalize: self.auto_finalize.unwrap_or(spec.auto_finalize),
            auto_dismiss: self.auto_dismiss.unwrap_or(spec.auto_dismiss),
            target_is_zero: self.target_is_zero.unwrap_or(spec.target_is_zero),
            ..spec
        }
    }
}

pub(super) async fn blockdev_mirror(monitor: Rc<Monitor>, mut args: Args) -> Outcome {
    let job_id = args.optional_str("job-id")?;
    let device = args.required_str("device")?;
    let target = args.required_str("target")?;
    let replaces = args.optional_str("replaces")?;
    let sync = args.required_enum("sync", SYNC_MODES)?;
    let tuning = Tuning::take(&mut args, true)?;
    args.finish()?;

    // Not one at a time with other commands: what is found here is looked at again
    // when the guest's requests have ended, and nothing is awaited after that.
    let graph = &monitor.graph;
    let source = root_node(graph, &device)?;
    // A job without an id is called like the device on its source; where there is
    // none, the empty id is refused.
    let job_id = job_id.unwrap_or_else(|| device_on(graph, &source));
    let spec = MirrorSpec {
        replaces,
        sync,
        ..MirrorSpec::new(job_id, source, graph.find(&target)?)
    };
    start(&monitor, tuning.apply(spec)).await
}

pub(super) async fn drive_mirror(monitor: Rc<Monitor>, mut args: Args) -> Outcome {
    let job_id = args.optional_str("job-id")?;
    let device = args.required_str("device")?;
    let target = args.required_str("target")?;
    let format = args.optional_str("format")?;
    let node_name = args.optional_str("node-name")?;
    let replaces = args.optional_str("replaces")?;
    let sync = args.required_enum("sync", SYNC_MODES)?;
    let mode = args.optional_enum("mode", MODES)?;
    let tuning = Tuning::take(&mut args, false)?;
    args.finish()?;

    let graph = &monitor.graph;
    let source = root_node(graph, &device)?;
    graph.check_not_blocked(&source)?;
    if replaces.is_some() && node_name.is_none() {
        return Err(QmpError::generic(
            "a node-name must be provided when replacing a named node of the graph",
        ));
    }
    let wanted = Wanted {
        target,
        format,
        node_name,
        mode: mode.unwrap_or(Mode::AbsolutePaths),
        sync,
    };
    let target = {
        let _alone = monitor.graph_commands.lock().await;
        target::open(graph, &source, wanted).await?
    };
    // The device may stand on another node by now.
    let source = root_node(graph, &device)?;
    // A job without an id is called like the device on its source; where there is
    // none, the empty id is refused.
    let job_id = job_id.unwrap_or_else(|| device_on(graph, &source));
    let spec = MirrorSpec {
        replaces,
        sync,
        target_is_zero: target.is_new(),
        ..MirrorSpec::new(job_id, source, target.node())
    };
    // The target is the job's from then on, and goes when nobody uses it.
    start(&monitor, tuning.apply(spec)).await
}

fn root_node(graph: &Graph, device: &str) -> Result<std::sync::Arc<Node>, QmpError> {
    let source = graph.find(device)?;
    graph.check_root_node(&source)?;
    Ok(source)
}

/// The id of the device on `node`; empty if there is none.
pub(super) fn device_on(graph: &Graph, node: &Node) -> String {
    let on_it = |backend: &BackendInfo| !backend.name.is_empty() && backend.node == node.name();
    let device = graph.backends().into_iter().find(on_it);
    device.map_or_else(String::new, |backend| backend.name)
}

async fn start(monitor: &Monitor, spec: MirrorSpec) -> Outcome {
    start_mirror(&monitor.graph, monitor.jobs(), spec)
        .await
        .map_err(|error: MirrorError| QmpError::with_causes(ErrorClass::Generic, &error))?;
    done()
}
