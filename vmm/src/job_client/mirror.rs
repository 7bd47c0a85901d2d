//! `diptych job mirror`: the target's nodes, the job, and what becomes of both.

use std::time::Instant;

use clap::ValueEnum;
use serde_json::{Value, json};

use super::error::JobError;
use super::follow::{Ending, Follower, Goal};
use super::report::Report;
use super::server::{Node, Server};
use super::size::Size;
use super::target::{self, CreatedFile, OpenOptionsOfTarget, Target};
use super::{status, verbs};
use crate::client::ClientError;

/// A switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum OnOff {
    On,
    Off,
}

/// Arguments of `job mirror`.
#[derive(Debug, clap::Args)]
pub struct MirrorArgs {
    /// What to mirror: a guest's disk or a node
    source: String,

    /// Where to: a node, the path of a file or block device, nbd://HOST:PORT/EXPORT,
    /// or nbd+unix:///EXPORT?socket=PATH. For all but a node, nodes are added, and
    /// taken away again when the job fails or is cancelled while this program
    /// follows it. A path that is also the name of a node is written as ./PATH
    target: String,

    /// When ready, pivot: the source's users go on with the target. Waits until
    /// that is done
    #[arg(long, conflicts_with_all = ["copy_only", "detach"])]
    complete: bool,

    /// When ready, end without a pivot: the target is a copy of that moment
    #[arg(long, conflicts_with_all = ["wait", "detach"])]
    copy_only: bool,

    /// Wait until the job has ended, whoever ends it, instead of until it is ready
    #[arg(long, conflicts_with = "detach")]
    wait: bool,

    /// Do not wait at all
    #[arg(long)]
    detach: bool,

    /// Ctrl-C (SIGINT, SIGTERM, SIGHUP) cancels the job. Without it the job goes on
    #[arg(long, conflicts_with = "detach")]
    cancel_on_interrupt: bool,

    /// Make the target's file if there is none: sparse, and of the source's size
    #[arg(long)]
    create: bool,

    /// Format of a target that is no node
    #[arg(long, value_name = "DRIVER", default_value = "raw")]
    target_format: String,

    /// Name for the target's node [default: made from the job's id]
    #[arg(long, value_name = "NAME")]
    target_node_name: Option<String>,

    /// Open the target's file past the page cache (O_DIRECT)
    #[arg(long)]
    target_direct: bool,

    /// The job's id [default: mirror- and the source]
    #[arg(long, value_name = "ID")]
    job_id: Option<String>,

    /// What to copy: everything, what the topmost image has, or only what is
    /// written from now on
    #[arg(long, value_name = "MODE", default_value = "full", value_parser = ["full", "top", "none"])]
    sync: String,

    /// Whether the guest's writes wait for the target; auto: when they have to
    #[arg(long, value_name = "MODE", value_parser = ["background", "write-blocking", "auto"])]
    copy_mode: Option<String>,

    /// Most bytes per second to copy, as 100M
    #[arg(long, value_name = "SIZE")]
    speed: Option<Size>,

    /// Bytes that are copied together at least, a power of two from 512 to 64M
    #[arg(long, value_name = "SIZE")]
    granularity: Option<Size>,

    /// Bytes on their way at most
    #[arg(long, value_name = "SIZE")]
    buf_size: Option<Size>,

    /// What an error of the source does
    #[arg(long, value_name = "ACTION", value_parser = ON_ERROR)]
    on_source_error: Option<String>,

    /// What an error of the target does
    #[arg(long, value_name = "ACTION", value_parser = ON_ERROR)]
    on_target_error: Option<String>,

    /// Whether zeroes may be unallocated on the target
    #[arg(long, value_name = "SWITCH")]
    unmap: Option<OnOff>,

    /// Name for the node that the job puts above the source
    #[arg(long, value_name = "NAME")]
    filter_node_name: Option<String>,

    /// The node that the target takes the place of [default: the source]
    #[arg(long, value_name = "NODE")]
    replaces: Option<String>,

    /// off: the job waits for `job finalize` at its end
    #[arg(long, value_name = "SWITCH")]
    auto_finalize: Option<OnOff>,

    /// off: the job stays listed when it has ended, until `job dismiss`
    #[arg(long, value_name = "SWITCH")]
    auto_dismiss: Option<OnOff>,
}

pub(super) const ON_ERROR: [&str; 5] = ["report", "ignore", "enospc", "stop", "auto"];

impl MirrorArgs {
    /// What can be checked without asking anybody.
    pub fn check(&self) -> Result<(), JobError> {
        let granularity = self.granularity.map_or(4096, |Size(size)| size);
        if !granularity.is_power_of_two() || !(512..=64 << 20).contains(&granularity) {
            return Err(JobError::Usage(format!(
                "Granularity {granularity} is no power of two from 512 to 64M"
            )));
        }
        Ok(())
    }

    fn job_id(&self) -> String {
        match &self.job_id {
            Some(id) => id.clone(),
            None => id_for("mirror", &self.source),
        }
    }

    /// The arguments of `blockdev-mirror`: what the user did not say is not
    /// said, so that older servers understand it.
    fn command_arguments(&self, job_id: &str, target: &str) -> Value {
        let mut arguments = json!({
            "job-id": job_id,
            "device": self.source,
            "target": target,
            "sync": self.sync,
        });
        let text = |value: &Option<String>| value.clone().map(Value::from);
        let size = |value: Option<Size>| value.map(|Size(size)| Value::from(size));
        let switch = |value: Option<OnOff>| value.map(|value| Value::from(value == OnOff::On));
        let optional = [
            ("copy-mode", text(&self.copy_mode)),
            ("speed", size(self.speed)),
            ("granularity", size(self.granularity)),
            ("buf-size", size(self.buf_size)),
            ("on-source-error", text(&self.on_source_error)),
            ("on-target-error", text(&self.on_target_error)),
            ("unmap", switch(self.unmap)),
            ("filter-node-name", text(&self.filter_node_name)),
            ("replaces", text(&self.replaces)),
            ("auto-finalize", switch(self.auto_finalize)),
            ("auto-dismiss", switch(self.auto_dismiss)),
        ];
        for (name, value) in optional {
            if let Some(value) = value {
                arguments[name] = value;
            }
        }
        arguments
    }
}

/// The id of a job about a disk or node that the user gave none.
pub(super) fn id_for(kind: &str, source: &str) -> String {
    // Names that servers make for nodes have characters that ids cannot.
    let fit = |c: &char| c.is_ascii_alphanumeric() || "-._".contains(*c);
    let source: String = source.chars().filter(fit).collect();
    format!("{kind}-{source}")
}

/// `job mirror`
pub fn run(args: &MirrorArgs, server: &mut Server, report: &mut Report) -> Result<u8, JobError> {
    let job_id = args.job_id();
    // Half-done would leave nodes behind; every answer has its deadline.
    server.interrupts().defer();
    let added = start(args, &job_id, server, report)?;
    if args.detach {
        let text = match &added {
            Some(node) => format!("started; its target is node '{node}'"),
            None => "started".to_owned(),
        };
        report.reached(&job_id, "started", &text)?;
        return Ok(status::DONE);
    }
    server.interrupts().heed();
    let begun = Instant::now();
    let ending = match follow(args, &job_id, added.as_deref(), server, report) {
        Err(JobError::Interrupted { .. }) if args.cancel_on_interrupt => {
            report.note(&format!("Cancelling job '{job_id}'"))?;
            server.interrupts().acknowledge();
            cancel(&job_id, begun, server, report)?
        }
        result => result.map_err(|error| error.leaving([job_id.as_str()]))?,
    };
    let Some(ending) = ending else {
        return Ok(status::DONE);
    };
    let is_of_no_use = match ending {
        Ending::Failed(_) | Ending::Cancelled => true,
        Ending::Completed => args.copy_only,
        // It may be in use.
        Ending::Gone => false,
    };
    if let Some(node) = added.filter(|_| is_of_no_use) {
        target::take_away(&node, server, report)?;
    }
    Ok(ending.status())
}

/// Adds the target's nodes and starts the job. Gives the node that was added.
///
/// Errors: nothing is left behind, if the server says what it did.
fn start(
    args: &MirrorArgs,
    job_id: &str,
    server: &mut Server,
    report: &mut Report,
) -> Result<Option<String>, JobError> {
    for command in ["blockdev-mirror", "query-named-block-nodes"] {
        if !server.has(command) {
            return Err(JobError::NoCommand(vec![command]));
        }
    }
    let nodes = server.nodes()?;
    let target = Target::find(&args.target, &nodes)?;
    let mut created = None;
    if let Target::File(path) = &target {
        if args.create {
            let size = source_size(&args.source, &nodes, server)?;
            created = Some(CreatedFile::create(path, size)?);
        } else if !path.exists() {
            return Err(JobError::NoTarget(args.target.clone()));
        }
    }
    let name = match &target {
        Target::Node(name) => name.clone(),
        _ => match &args.target_node_name {
            Some(name) => name.clone(),
            None => target::free_node_name(job_id, &nodes),
        },
    };
    let how = OpenOptionsOfTarget {
        format: &args.target_format,
        direct: args.target_direct,
    };
    target::add(&target, &name, &how, server)?;
    let added = !matches!(target, Target::Node(_));
    let started = server.run("blockdev-mirror", args.command_arguments(job_id, &name));
    if let Err(error) = started {
        // Only a refusal says that there is no job.
        if matches!(error, JobError::Client(ClientError::Refused { .. })) {
            if added {
                target::take_away(&name, server, report)?;
            }
        } else if let Some(created) = created {
            created.keep();
        }
        return Err(error);
    }
    if let Some(created) = created {
        created.keep();
    }
    Ok(added.then_some(name))
}

fn source_size(source: &str, nodes: &[Node], server: &mut Server) -> Result<u64, JobError> {
    let node = match nodes.iter().find(|node| node.name == source) {
        Some(node) => Some(node.clone()),
        None => server.disk(source)?,
    };
    node.map(|node| node.size)
        .ok_or_else(|| JobError::NoSource(source.to_owned()))
}

/// Follows the job as far as the user wants; `None` if it is still there then.
fn follow(
    args: &MirrorArgs,
    job_id: &str,
    added: Option<&str>,
    server: &mut Server,
    report: &mut Report,
) -> Result<Option<Ending>, JobError> {
    let mut follower = Follower::new(server, report, [job_id]);
    follower.run(Goal::Ready)?;
    if ending_of(&follower).is_none() {
        if args.complete {
            follower.set_completing();
            let asked = verbs::ask_to_complete(follower.server, job_id);
            unless_ended(&mut follower, asked)?;
        } else if args.copy_only {
            let asked = verbs::ask_to_cancel(follower.server, job_id, false);
            unless_ended(&mut follower, asked)?;
        } else if args.wait {
            follower.report.note(&format!(
                "Job '{job_id}' is ready: source and target are equal, and stay so"
            ))?;
        } else {
            let address = follower.server.address();
            let delete = added.map(|node| format!(" --delete-node {node}"));
            let text = format!(
                "ready: source and target are equal, and stay so; next: \
                 diptych job complete --qmp {address} {job_id}, \
                 or diptych job cancel --qmp {address} {job_id}{}",
                delete.unwrap_or_default()
            );
            report.reached(job_id, "ready", &text)?;
            return Ok(None);
        }
        let goal = if args.wait { Goal::End } else { Goal::Pending };
        follower.run(goal)?;
    }
    let ending = ending_of(&follower);
    if ending.is_none() {
        verbs::tell_pending(server, report, job_id)?;
    }
    Ok(ending)
}

fn ending_of(follower: &Follower<'_>) -> Option<Ending> {
    let job = follower.jobs().first()?;
    job.ending().cloned()
}

/// A request that was refused because the job had just ended needs no mention:
/// its end will be told.
fn unless_ended(follower: &mut Follower<'_>, asked: Result<(), JobError>) -> Result<(), JobError> {
    let Err(error) = asked else { return Ok(()) };
    let jobs = follower.server.jobs()?;
    let id = follower.jobs().first().map(|job| job.job.id.clone());
    let is_there = jobs.iter().any(|job| {
        Some(&job.id) == id.as_ref()
            && matches!(
                job.status.as_str(),
                "created" | "running" | "paused" | "ready" | "standby"
            )
    });
    if is_there { Err(error) } else { Ok(()) }
}

/// Cancels the job, which is followed since `begun`, and waits for its end.
pub(super) fn cancel(
    job_id: &str,
    begun: Instant,
    server: &mut Server,
    report: &mut Report,
) -> Result<Option<Ending>, JobError> {
    match verbs::ask_to_cancel(server, job_id, true) {
        // It may just have ended.
        Ok(()) | Err(JobError::Client(ClientError::Refused { .. })) => {}
        Err(error) => return Err(error),
    }
    let mut follower = Follower::new(server, report, [job_id]);
    follower.set_begun(begun);
    follower.run(Goal::End)?;
    Ok(ending_of(&follower).map(|ending| match ending {
        // Its last words were heard before the signal came.
        Ending::Gone => Ending::Cancelled,
        ending => ending,
    }))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        args: MirrorArgs,
    }

    fn parse(words: &[&str]) -> Result<MirrorArgs, clap::Error> {
        Line::try_parse_from([&["mirror", "disk", "t"], words].concat()).map(|line| line.args)
    }

    #[test]
    fn only_what_was_said_is_asked_for() {
        let args = parse(&[]).unwrap();
        assert_eq!(
            args.command_arguments(&args.job_id(), "t"),
            json!({"job-id": "mirror-disk", "device": "disk", "target": "t", "sync": "full"})
        );
        let args = parse(&[
            "--job-id=j",
            "--sync=none",
            "--copy-mode=write-blocking",
            "--speed=1M",
            "--granularity=4K",
            "--buf-size=0",
            "--on-source-error=stop",
            "--on-target-error=enospc",
            "--unmap=off",
            "--filter-node-name=f",
            "--replaces=r",
            "--auto-finalize=off",
            "--auto-dismiss=on",
        ])
        .unwrap();
        assert_eq!(
            args.command_arguments(&args.job_id(), "t"),
            json!({
                "job-id": "j", "device": "disk", "target": "t", "sync": "none",
                "copy-mode": "write-blocking", "speed": 1 << 20, "granularity": 4096,
                "buf-size": 0, "on-source-error": "stop", "on-target-error": "enospc",
                "unmap": false, "filter-node-name": "f", "replaces": "r",
                "auto-finalize": false, "auto-dismiss": true,
            })
        );
    }

    #[test]
    fn a_node_that_the_server_named_gives_an_id_that_can_be_one() {
        let line = Line::try_parse_from(["mirror", "#block12", "t"]).unwrap();
        assert_eq!(line.args.job_id(), "mirror-block12");
    }

    #[test]
    fn wishes_that_contradict_each_other_are_refused() {
        for words in [
            &["--complete", "--copy-only"][..],
            &["--complete", "--detach"],
            &["--wait", "--detach"],
            &["--copy-only", "--wait"],
            &["--cancel-on-interrupt", "--detach"],
            &["--speed", "fast"],
            &["--sync", "some"],
            &["--unmap", "maybe"],
        ] {
            assert!(parse(words).is_err(), "{words:?}");
        }
        for granularity in ["1", "768", "128M", "0"] {
            let args = parse(&["--granularity", granularity]).unwrap();
            assert!(args.check().is_err(), "{granularity}");
        }
    }
}
