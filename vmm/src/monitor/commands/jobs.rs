//! Jobs: what there is, and the verbs.
//!
//! `job-*` and `block-job-*` do the same; they differ in the name of their
//! argument, in which jobs they see, and in the class of "no such job".

use std::rc::Rc;
use std::time::Duration;

use jobs::{CopyMode, Effects, JobChange, JobError, JobInfo, JobKey, JobStatus, JobsGuard};
use serde_json::{Value, json};

use super::backup::fleecing;
use super::compare::comparison;
use super::{Outcome, done};
use crate::monitor::Monitor;
use crate::monitor::args::Args;
use crate::monitor::error::QmpError;

/// How long a reply waits for a job to be finalized or cleaned up, so that the
/// events of that precede it. The verb has been accepted in any case.
const SETTLE: Duration = Duration::from_secs(10);

/// A family of commands.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Family {
    /// `job-*`
    Job,
    /// `block-job-*`
    BlockJob,
}

impl Family {
    fn find(self, guard: &JobsGuard<'_>, id: &str) -> Result<JobKey, JobError> {
        match self {
            Self::Job => guard.find(id),
            Self::BlockJob => guard.find_block_job(id),
        }
    }
}

/// Looks a job up and acts on it in one critical section.
fn act(
    monitor: &Monitor,
    family: Family,
    id: &str,
    verb: impl FnOnce(&mut JobsGuard<'_>, JobKey) -> Result<Effects, JobError>,
) -> Result<JobKey, QmpError> {
    let mut found = None;
    monitor.jobs.act(|guard| {
        let key = family.find(guard, id)?;
        found = Some(key);
        verb(guard, key)
    })?;
    found.ok_or_else(|| JobError::NotFound.into())
}

/// Defines a command that takes nothing but the job's name and needs no waiting.
macro_rules! verb {
    ($command:ident, $family:expr, $name:literal, $verb:ident) => {
        pub(super) async fn $command(monitor: Rc<Monitor>, mut args: Args) -> Outcome {
            let id = args.required_str($name)?;
            args.finish()?;
            act(&monitor, $family, &id, |guard, key| guard.$verb(key))?;
            done()
        }
    };
}

verb!(job_pause, Family::Job, "id", pause);
verb!(job_resume, Family::Job, "id", resume);
verb!(job_complete, Family::Job, "id", complete);
verb!(job_dismiss, Family::Job, "id", dismiss);
verb!(block_job_pause, Family::BlockJob, "device", pause);
verb!(block_job_resume, Family::BlockJob, "device", resume);
verb!(block_job_complete, Family::BlockJob, "device", complete);
verb!(block_job_dismiss, Family::BlockJob, "id", dismiss);

pub(super) async fn job_finalize(monitor: Rc<Monitor>, args: Args) -> Outcome {
    finalize(&monitor, Family::Job, args).await
}

pub(super) async fn block_job_finalize(monitor: Rc<Monitor>, args: Args) -> Outcome {
    finalize(&monitor, Family::BlockJob, args).await
}

async fn finalize(monitor: &Monitor, family: Family, mut args: Args) -> Outcome {
    let id = args.required_str("id")?;
    args.finish()?;
    let key = act(monitor, family, &id, |guard, key| guard.finalize(key))?;
    monitor.jobs.settle(key, SETTLE).await;
    done()
}

/// Always by force.
pub(super) async fn job_cancel(monitor: Rc<Monitor>, mut args: Args) -> Outcome {
    let id = args.required_str("id")?;
    args.finish()?;
    cancel(&monitor, Family::Job, &id, true).await
}

pub(super) async fn block_job_cancel(monitor: Rc<Monitor>, mut args: Args) -> Outcome {
    let id = args.required_str("device")?;
    let force = args.optional_bool("force")?.unwrap_or(false);
    args.finish()?;
    cancel(&monitor, Family::BlockJob, &id, force).await
}

async fn cancel(monitor: &Monitor, family: Family, id: &str, force: bool) -> Outcome {
    let key = act(monitor, family, id, |guard, key| guard.cancel(key, force))?;
    // A pending job ends at once.
    monitor.jobs.settle(key, SETTLE).await;
    done()
}

pub(super) async fn block_job_set_speed(monitor: Rc<Monitor>, mut args: Args) -> Outcome {
    let id = args.required_str("device")?;
    let speed = args.required_i64("speed")?;
    args.finish()?;
    act(&monitor, Family::BlockJob, &id, |guard, key| {
        guard.set_speed(key, speed)
    })?;
    done()
}

pub(super) async fn block_job_change(monitor: Rc<Monitor>, mut args: Args) -> Outcome {
    let id = args.required_str("id")?;
    let is_mirror = args.required_enum(
        "type",
        &[
            ("amend", false),
            ("backup", false),
            ("commit", false),
            ("create", false),
            ("mirror", true),
            ("stream", false),
        ],
    )?;
    let change = if is_mirror {
        let mode = args.required_enum("copy-mode", COPY_MODES)?;
        Some(JobChange::CopyMode(mode))
    } else {
        None
    };
    args.finish()?;
    let request = {
        let mut guard = monitor.jobs.lock();
        let key = guard.find_block_job(&id)?;
        guard.change(key, change)?
    };
    request.apply()?;
    done()
}

/// `copy-mode`
const COPY_MODES: &[(&str, CopyMode)] = &[
    ("background", CopyMode::Background),
    ("write-blocking", CopyMode::WriteBlocking),
];

pub(super) async fn query_jobs(monitor: Rc<Monitor>, args: Args) -> Outcome {
    args.finish()?;
    let jobs = monitor.jobs.query();
    Ok(jobs.iter().map(job_info).collect())
}

pub(super) async fn query_block_jobs(monitor: Rc<Monitor>, args: Args) -> Outcome {
    args.finish()?;
    let jobs = monitor.jobs.query();
    let block_jobs = jobs.iter().filter(|job| job.block_job);
    Ok(block_jobs.map(block_job_info).collect())
}

fn job_info(job: &JobInfo) -> Value {
    let mut info = json!({
        "id": job.id.as_str(),
        "type": job.job_type,
        "status": job.status.name(),
        "current-progress": job.current_progress,
        "total-progress": job.total_progress,
    });
    if let Some(error) = &job.error {
        info["error"] = Value::from(error.as_str());
    }
    if let Some(found) = &job.comparison {
        info["comparison"] = comparison(found);
    }
    if let Some(found) = &job.fleecing {
        info["fleecing"] = fleecing(found);
    }
    info
}

/// QEMU holds the guest's requests while a mirror waits to be finalized by hand,
/// and shows it as paused for that. Here the guest goes on meanwhile, but what
/// clients are shown is the same.
fn waits_in_drain(job: &JobInfo) -> bool {
    job.status == JobStatus::Pending && job.job_type == "mirror"
}

fn block_job_info(job: &JobInfo) -> Value {
    let mut info = json!({
        "device": job.id.as_str(),
        "type": job.job_type,
        "status": job.status.name(),
        "offset": job.current_progress,
        "len": job.total_progress,
        "busy": job.busy,
        "paused": job.paused || waits_in_drain(job),
        "ready": job.ready,
        "speed": job.speed,
        "io-status": job.io_status.name(),
        "auto-finalize": job.auto_finalize,
        "auto-dismiss": job.auto_dismiss,
    });
    if let Some(error) = &job.error {
        info["error"] = Value::from(error.as_str());
    }
    if let Some(found) = &job.comparison {
        info["comparison"] = comparison(found);
    }
    if let Some(found) = &job.fleecing {
        info["fleecing"] = fleecing(found);
    }
    if let Some(rates) = job
        .rates
        .filter(|rates| rates.dirty > 0 || rates.is_stalled)
    {
        // Not QEMU's: shown where there is something to say, since the guest writes.
        info["dirty-rate"] = Value::from(rates.dirty);
        info["copy-rate"] = Value::from(rates.copy);
        if let Some(eta) = rates.eta {
            info["eta"] = Value::from(eta);
        }
        if rates.is_stalled {
            info["converging"] = Value::from(false);
        }
    }
    if let Some(mode) = job.copy_mode {
        info["copy-mode"] = Value::from(mode.name());
    }
    // QEMU 7.2 does not know it: shown only where it says something.
    if job.actively_synced == Some(true) {
        info["actively-synced"] = Value::from(true);
    }
    info
}
