//! `blockdev-compare`: not QEMU's.

use std::rc::Rc;

use jobs::compare::{CompareError, CompareSpec, Comparison, start_compare};
use serde_json::{Value, json};

use super::mirror::{ON_ERROR, device_on};
use super::{Outcome, done};
use crate::monitor::Monitor;
use crate::monitor::args::Args;
use crate::monitor::error::{ErrorClass, QmpError};

pub(super) async fn blockdev_compare(monitor: Rc<Monitor>, mut args: Args) -> Outcome {
    let job_id = args.optional_str("job-id")?;
    let device = args.required_str("device")?;
    let target = args.required_str("target")?;
    let bitmap = args.optional_str("bitmap")?;
    let speed = args.optional_i64("speed")?;
    let on_source_error = args.optional_enum("on-source-error", ON_ERROR)?;
    let on_target_error = args.optional_enum("on-target-error", ON_ERROR)?;
    let auto_finalize = args.optional_bool("auto-finalize")?;
    let auto_dismiss = args.optional_bool("auto-dismiss")?;
    let max_differences = args.optional_u32("max-differences")?;
    args.finish()?;

    let graph = &monitor.graph;
    let source = graph.find(&device)?;
    let job_id = job_id.unwrap_or_else(|| device_on(graph, &source));
    let spec = CompareSpec::new(job_id, source, graph.find(&target)?);
    let spec = CompareSpec {
        bitmap,
        speed: speed.unwrap_or(spec.speed),
        on_source_error: on_source_error.unwrap_or(spec.on_source_error),
        on_target_error: on_target_error.unwrap_or(spec.on_target_error),
        auto_finalize: auto_finalize.unwrap_or(spec.auto_finalize),
        auto_dismiss: auto_dismiss.unwrap_or(spec.auto_dismiss),
        max_differences: max_differences.unwrap_or(spec.max_differences),
        ..spec
    };
    start_compare(graph, monitor.jobs(), spec)
        .map_err(|error: CompareError| QmpError::with_causes(ErrorClass::Generic, &error))?;
    done()
}

/// What queries and the history show of a comparison.
pub(super) fn comparison(found: &Comparison) -> Value {
    let ranges = found.ranges.iter();
    let ranges: Value = ranges
        .map(|range| json!({"offset": range.start, "length": range.end - range.start}))
        .collect();
    let mut shown = json!({
        "differences": found.differences,
        "differing-bytes": found.differing_bytes,
        "ranges": ranges,
        "undecided-bytes": found.undecided_bytes,
        "complete": found.is_complete,
    });
    if let Some(first) = found.first {
        shown["first-difference"] = Value::from(first);
    }
    if let Some(bytes) = found.skipped_bytes {
        shown["skipped-bytes"] = Value::from(bytes);
    }
    shown
}
