//! `blockdev-mirror`

use std::rc::Rc;

use block::{BackendInfo, Graph, Node};
use jobs::OnError;
use jobs::mirror::{MirrorError, MirrorSpec, SyncMode, start_mirror};

use super::jobs::COPY_MODES;
use super::{Outcome, done};
use crate::monitor::Monitor;
use crate::monitor::args::Args;
use crate::monitor::error::{ErrorClass, QmpError};

const SYNC_MODES: &[(&str, SyncMode)] = &[
    ("top", SyncMode::Top),
    ("full", SyncMode::Full),
    ("none", SyncMode::None),
    ("incremental", SyncMode::Incremental),
    ("bitmap", SyncMode::Bitmap),
];

/// `auto` is QEMU's name for its default of guest devices.
const ON_ERROR: &[(&str, OnError)] = &[
    ("report", OnError::Report),
    ("ignore", OnError::Ignore),
    ("enospc", OnError::Enospc),
    ("stop", OnError::Stop),
    ("auto", OnError::Enospc),
];

/// The id of the device on `node`; empty if there is none.
fn device_on(graph: &Graph, node: &Node) -> String {
    let on_it = |backend: &BackendInfo| !backend.name.is_empty() && backend.node == node.name();
    let device = graph.backends().into_iter().find(on_it);
    device.map_or_else(String::new, |backend| backend.name)
}

pub(super) async fn blockdev_mirror(monitor: Rc<Monitor>, mut args: Args) -> Outcome {
    let job_id = args.optional_str("job-id")?;
    let device = args.required_str("device")?;
    let target = args.required_str("target")?;
    let replaces = args.optional_str("replaces")?;
    let sync = args.required_enum("sync", SYNC_MODES)?;
    let speed = args.optional_i64("speed")?;
    let granularity = args.optional_u32("granularity")?;
    let buf_size = args.optional_i64("buf-size")?;
    let on_source_error = args.optional_enum("on-source-error", ON_ERROR)?;
    let on_target_error = args.optional_enum("on-target-error", ON_ERROR)?;
    let unmap = args.optional_bool("unmap")?;
    let filter_node_name = args.optional_str("filter-node-name")?;
    let copy_mode = args.optional_enum("copy-mode", COPY_MODES)?;
    let auto_finalize = args.optional_bool("auto-finalize")?;
    let auto_dismiss = args.optional_bool("auto-dismiss")?;
    args.finish()?;

    // Not one at a time with other commands: what is found here is looked at again
    // when the guest's requests have ended, and nothing is awaited after that.
    let graph = &monitor.graph;
    let source = graph.find(&device)?;
    graph.check_root_node(&source)?;
    // A job without an id is called like the device on the node, whichever of the two
    // was named; a node alone has none, and the empty id is refused.
    let job_id = job_id.unwrap_or_else(|| device_on(graph, &source));
    let defaults = MirrorSpec::new(job_id, source, graph.find(&target)?);
    let spec = MirrorSpec {
        replaces,
        sync,
        speed: speed.unwrap_or(defaults.speed),
        granularity: granularity.unwrap_or(defaults.granularity),
        buf_size: buf_size.unwrap_or(defaults.buf_size),
        on_source_error: on_source_error.unwrap_or(defaults.on_source_error),
        on_target_error: on_target_error.unwrap_or(defaults.on_target_error),
        unmap: unmap.unwrap_or(defaults.unmap),
        filter_node_name,
        copy_mode: copy_mode.unwrap_or(defaults.copy_mode),
        auto_finalize: auto_finalize.unwrap_or(defaults.auto_finalize),
        auto_dismiss: auto_dismiss.unwrap_or(defaults.auto_dismiss),
        ..defaults
    };
    start_mirror(graph, monitor.jobs(), spec)
        .await
        .map_err(|error: MirrorError| QmpError::with_causes(ErrorClass::Generic, &error))?;
    done()
}
