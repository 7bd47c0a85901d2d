//! `query-job-history`: jobs that have ended. Not QEMU's.

use std::rc::Rc;
use std::time::{SystemTime, UNIX_EPOCH};

use jobs::{EndedJob, JobOutcome};
use serde_json::{Value, json};

use super::Outcome;
use super::backup::fleecing;
use super::compare::comparison;
use crate::monitor::Monitor;
use crate::monitor::args::Args;

pub(super) async fn query_job_history(monitor: Rc<Monitor>, args: Args) -> Outcome {
    args.finish()?;
    Ok(monitor.jobs.history().iter().map(ended_job).collect())
}

fn ended_job(job: &EndedJob) -> Value {
    let mut shown = json!({
        "id": job.id.as_str(),
        "type": job.job_type,
        "created": timestamp(job.created),
        "ended": timestamp(job.ended),
        "current-progress": job.current_progress,
        "total-progress": job.total_progress,
        "result": match job.outcome {
            JobOutcome::Completed => "completed",
            JobOutcome::Cancelled => "cancelled",
            JobOutcome::Failed(_) => "failed",
        },
    });
    if let Some(found) = &job.comparison {
        shown["comparison"] = comparison(found);
    }
    if let Some(info) = &job.fleecing {
        shown["fleecing"] = fleecing(info);
    }
    let JobOutcome::Failed(failure) = &job.outcome else {
        return shown;
    };
    shown["error"] = Value::from(failure.message.as_str());
    shown["errno"] = Value::from(failure.errno);
    if let Some(request) = &failure.request {
        shown["operation"] = Value::from(request.side.name());
        shown["node-name"] = Value::from(&*request.node);
        shown["offset"] = Value::from(request.offset);
        shown["length"] = Value::from(request.len);
    }
    shown
}

/// As events have it.
fn timestamp(time: SystemTime) -> Value {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    json!({"seconds": since.as_secs(), "microseconds": since.subsec_micros()})
}
