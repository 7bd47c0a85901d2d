//! What can be done to a job, and watching what becomes of it.

use serde_json::{Map, Value, json};

use super::error::JobError;
use super::follow::{Ending, Follower, Goal};
use super::report::Report;
use super::server::Server;
use super::size::Size;
use super::{status, target};

/// A job.
#[derive(Debug, clap::Args)]
pub struct IdArgs {
    /// Its id
    id: String,
}

/// Arguments of `job watch`.
#[derive(Debug, clap::Args)]
pub struct WatchArgs {
    /// Its id; all jobs if left out
    id: Option<String>,
}

/// Arguments of `job cancel`.
#[derive(Debug, clap::Args)]
pub struct CancelArgs {
    /// Its id
    id: String,

    /// Cancel even a mirror that is ready, at once. Without it, such a mirror
    /// copies what is left and ends well, without a pivot: its target is a copy of
    /// that moment
    #[arg(long)]
    force: bool,

    /// Take this node away when the job has ended: that of the target, which is of
    /// no use any more
    #[arg(long, value_name = "NODE", conflicts_with = "detach")]
    delete_node: Option<String>,

    /// Do not wait until it has ended
    #[arg(long)]
    detach: bool,
}

/// Arguments of `job complete` and `job finalize`.
#[derive(Debug, clap::Args)]
pub struct EndArgs {
    /// Its id
    id: String,

    /// Do not wait until it has ended
    #[arg(long)]
    detach: bool,
}

/// Arguments of `job set-speed`.
#[derive(Debug, clap::Args)]
pub struct SetSpeedArgs {
    /// Its id
    id: String,

    /// Bytes per second, as 100M; 0 takes the limit away
    speed: Size,
}

/// `job watch`
pub fn watch(args: &WatchArgs, server: &mut Server, report: &mut Report) -> Result<u8, JobError> {
    let jobs = server.jobs()?;
    let ids: Vec<&str> = match &args.id {
        Some(id) if !jobs.iter().any(|job| job.id == *id) => {
            return Err(JobError::NoJob(id.clone()));
        }
        Some(id) => vec![id],
        None => jobs.iter().map(|job| job.id.as_str()).collect(),
    };
    if ids.is_empty() {
        report.line("There are no jobs")?;
        return Ok(status::DONE);
    }
    let mut follower = Follower::new(server, report, ids.iter().copied());
    let followed = follower.run(Goal::End);
    followed.map_err(|error| error.leaving(ids))?;
    Ok(follower.status())
}

/// `job pause`
pub fn pause(args: &IdArgs, server: &mut Server, report: &mut Report) -> Result<u8, JobError> {
    act(
        args,
        server,
        report,
        &["job-pause", "block-job-pause"],
        "paused",
    )
}

/// `job resume`
pub fn resume(args: &IdArgs, server: &mut Server, report: &mut Report) -> Result<u8, JobError> {
    act(
        args,
        server,
        report,
        &["job-resume", "block-job-resume"],
        "resumed",
    )
}

/// `job dismiss`
pub fn dismiss(args: &IdArgs, server: &mut Server, report: &mut Report) -> Result<u8, JobError> {
    act(
        args,
        server,
        report,
        &["job-dismiss", "block-job-dismiss"],
        "dismissed",
    )
}

/// A verb whose success is all there is to know.
fn act(
    args: &IdArgs,
    server: &mut Server,
    report: &mut Report,
    commands: &[&'static str],
    done: &str,
) -> Result<u8, JobError> {
    one_of(server, commands, &args.id)?;
    report.reached(&args.id, done, done)?;
    Ok(status::DONE)
}

/// `job set-speed`
pub fn set_speed(
    args: &SetSpeedArgs,
    server: &mut Server,
    report: &mut Report,
) -> Result<u8, JobError> {
    let Size(speed) = args.speed;
    server.run(
        "block-job-set-speed",
        json!({"device": args.id, "speed": speed}),
    )?;
    let text = match speed {
        0 => "no limit".to_owned(),
        _ => format!("limited to {}/s", super::report::size(speed)),
    };
    report.reached(&args.id, "limited", &text)?;
    Ok(status::DONE)
}

/// `job cancel`: it is a success that the job was cancelled.
pub fn cancel(args: &CancelArgs, server: &mut Server, report: &mut Report) -> Result<u8, JobError> {
    ask_to_cancel(server, &args.id, args.force)?;
    if args.detach {
        report.reached(&args.id, "cancelling", "will be cancelled")?;
        return Ok(status::DONE);
    }
    // A copy that ends well may have to be finalized by hand.
    let goal = if args.force { Goal::End } else { Goal::Pending };
    let ending = follow_to_end(server, report, &args.id, goal, false)?;
    if let (Some(node), Some(_)) = (&args.delete_node, &ending) {
        target::take_away(node, server, report)?;
    }
    Ok(match ending {
        Some(Ending::Failed(_)) => status::FAILED,
        // Nothing more is known of a job that was cancelled before it began.
        Some(Ending::Completed | Ending::Cancelled | Ending::Gone) | None => status::DONE,
    })
}

/// Asks a job to end without a pivot. Without `force` a mirror that is ready
/// brings its copy to an end.
pub fn ask_to_cancel(server: &mut Server, id: &str, force: bool) -> Result<(), JobError> {
    // Jobs that are no block jobs (creation, …) know one kind of cancel only.
    let is_block_job = || json!({"device": id, "force": force});
    if !force && server.has("block-job-cancel") {
        match server.run("block-job-cancel", is_block_job()) {
            Err(JobError::Client(crate::client::ClientError::Refused { class, .. }))
                if class == "DeviceNotActive" && server.has("job-cancel") => {}
            result => return result.map(drop),
        }
    }
    if server.has("job-cancel") {
        return server.run("job-cancel", json!({"id": id})).map(drop);
    }
    server.run("block-job-cancel", is_block_job()).map(drop)
}

/// `job complete`
pub fn complete(args: &EndArgs, server: &mut Server, report: &mut Report) -> Result<u8, JobError> {
    ask_to_complete(server, &args.id)?;
    if args.detach {
        report.reached(&args.id, "completing", "will be completed")?;
        return Ok(status::DONE);
    }
    let ending = follow_to_end(server, report, &args.id, Goal::Pending, true)?;
    Ok(ending.map_or(status::DONE, |ending| ending.status()))
}

/// Asks a job to complete.
pub fn ask_to_complete(server: &mut Server, id: &str) -> Result<(), JobError> {
    one_of(server, &["job-complete", "block-job-complete"], id)
}

/// `job finalize`
pub fn finalize(args: &EndArgs, server: &mut Server, report: &mut Report) -> Result<u8, JobError> {
    one_of(server, &["job-finalize", "block-job-finalize"], &args.id)?;
    if args.detach {
        report.reached(&args.id, "finalizing", "will be finalized")?;
        return Ok(status::DONE);
    }
    let ending = follow_to_end(server, report, &args.id, Goal::End, false)?;
    Ok(ending.map_or(status::DONE, |ending| ending.status()))
}

/// Runs the first of some commands, all of the same meaning, that the server
/// has. `job-…` call the job `id`, `block-job-…` differ.
fn one_of(server: &mut Server, commands: &[&'static str], id: &str) -> Result<(), JobError> {
    let command = commands.iter().find(|command| server.has(command));
    let command = *command.ok_or_else(|| JobError::NoCommand(commands.to_vec()))?;
    let name = match command {
        "block-job-pause" | "block-job-resume" | "block-job-complete" => "device",
        _ => "id",
    };
    let mut arguments = Map::new();
    arguments.insert(name.to_owned(), Value::from(id));
    server.run(command, Value::Object(arguments)).map(drop)
}

/// Waits for a job's end; `None` if it waits to be finalized by hand, and `goal`
/// is no more than that.
fn follow_to_end(
    server: &mut Server,
    report: &mut Report,
    id: &str,
    goal: Goal,
    completing: bool,
) -> Result<Option<Ending>, JobError> {
    let mut follower = Follower::new(server, report, [id]);
    if completing {
        follower.set_completing();
    }
    let followed = follower.run(goal);
    followed.map_err(|error| error.leaving([id]))?;
    let ending = follower
        .jobs()
        .first()
        .and_then(|job| job.ending().cloned());
    if ending.is_none() {
        tell_pending(server, report, id)?;
    }
    Ok(ending)
}

/// Says that a job waits to be finalized.
pub fn tell_pending(server: &Server, report: &mut Report, id: &str) -> Result<(), JobError> {
    let text = format!(
        "waits to be finalized: diptych job finalize --qmp {} {id}",
        server.address()
    );
    report.reached(id, "pending", &text)
}
