//! `diptych job`: block jobs for people and for scripts, over any QMP socket.
//!
//! Everything here is a client: it uses what the other side's `query-commands`
//! offers, be it diptych or QEMU, and believes it no more than it must (see
//! [`crate::client`]).
//!
//! - [`server`]: the connection, and what the other side offers
//! - [`jobs`]: what it says about its jobs
//! - [`follow`]: jobs on their way to an end
//! - [`report`]: telling the user, as bars, lines or JSON
//! - [`mirror`], [`target`], [`nbd_uri`]: starting a mirror, and its target's nodes
//! - [`compare`]: comparing two nodes
//! - [`backup`]: backups into a directory
//! - [`verbs`], [`list`]: the other subcommands
//! - [`interrupt`][]: Ctrl-C

mod backup;
mod compare;
mod error;
mod follow;
mod interrupt;
mod jobs;
mod list;
mod mirror;
mod nbd_uri;
mod rate;
mod report;
mod server;
mod size;
mod target;
mod verbs;

use std::process::ExitCode;
use std::time::Duration;

use clap::Subcommand;

use crate::monitor::QmpAddress;
use crate::stdio::print_line;
use error::JobError;
use report::Report;
use server::Server;

pub(crate) use interrupt::Interrupts;
pub(crate) use list::table;
pub(crate) use nbd_uri::NbdUri;
pub(crate) use report::with_causes;

/// What the process ends with, but for 2 (usage) and 128+N (signal N).
mod status {
    /// It was done; a job that was followed ended well.
    pub const DONE: u8 = 0;
    /// A job failed, or a command was refused.
    pub const FAILED: u8 = 1;
    /// A job that was followed was cancelled.
    pub const CANCELLED: u8 = 3;
    /// There is no usable connection (any more).
    pub const LOST: u8 = 4;
    /// Two nodes that were compared differ.
    pub const DIFFERS: u8 = 5;
    /// A signal's number is added.
    pub const SIGNAL_BASE: u8 = 128;
}

const EXIT_STATUS: &str = "\
Exit status:
  0      done: the job ended well, or is where it was asked to be
  1      the job failed, or the server refused; a line on stderr says why
  2      a mistake on the command line; nothing was asked of the server
  3      the job was cancelled
  4      no connection, or it or stdout was lost: what became of the job is not known
  5      `compare` only: all was compared, and the nodes differ
  128+N  ended by signal N (130: Ctrl-C); the job goes on, but for that of `backup`

A monitor socket serves one client at a time: to watch a job here and pause it
there, give the server two --qmp sockets.";

/// Arguments of `diptych job`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXIT_STATUS)]
pub struct JobArgs {
    /// The monitor socket of diptych or QEMU
    #[arg(
        long,
        global = true,
        value_name = "unix:PATH",
        env = "DIPTYCH_QMP",
        hide_env_values = true
    )]
    qmp: Option<QmpAddress>,

    /// Print one JSON object per line: events and progress of the jobs, and
    /// what came of it
    #[arg(long, global = true)]
    json: bool,

    /// How long the server may take to answer, 1 to 3600
    #[arg(
        long,
        global = true,
        value_name = "SECONDS",
        default_value_t = 30,
        value_parser = clap::value_parser!(u16).range(1..=3600)
    )]
    timeout: u16,

    #[command(subcommand)]
    command: JobCommand,
}

#[derive(Debug, Subcommand)]
enum JobCommand {
    /// Mirror a disk to a node, a file or an NBD export
    #[command(after_help = EXIT_STATUS)]
    Mirror(Box<mirror::MirrorArgs>),
    /// Compare two nodes, also while they are in use: a mirror that is ready, a backup
    /// and its snapshot, two images
    #[command(after_help = EXIT_STATUS)]
    Compare(compare::CompareArgs),
    /// Back disks up into a directory, all at one instant: full, or what was written since
    /// the last backup. `diptych restore` makes images of them
    #[command(after_help = backup::EXIT_STATUS)]
    Backup(Box<backup::BackupArgs>),
    /// List the jobs
    List,
    /// Follow a job to its end, or all there are
    #[command(after_help = EXIT_STATUS)]
    Watch(verbs::WatchArgs),
    /// Pause a job
    Pause(verbs::IdArgs),
    /// Let a paused job go on
    Resume(verbs::IdArgs),
    /// Cancel a job, and wait until it has ended
    #[command(after_help = EXIT_STATUS)]
    Cancel(verbs::CancelArgs),
    /// Complete a mirror that is ready (pivot to its target), and wait until that
    /// is done
    #[command(after_help = EXIT_STATUS)]
    Complete(verbs::EndArgs),
    /// Finalize a job that waits for it, and wait until that is done
    #[command(after_help = EXIT_STATUS)]
    Finalize(verbs::EndArgs),
    /// Take a job that has ended off the list
    Dismiss(verbs::IdArgs),
    /// Limit the speed of a job
    SetSpeed(verbs::SetSpeedArgs),
}

/// Tells a mistake on the command line that is known before there are arguments, where
/// `words`, the command line, ask for JSON.
pub fn usage_mistake(words: &[String], message: &str) {
    let is_json = words.iter().any(|word| word == "--json");
    let subcommand = words.iter().skip(1).find(|word| !word.starts_with('-'));
    if is_json && subcommand.is_some_and(|word| word == "job") {
        // Its status says the same.
        let _ = print_line(&report::failure("usage", message).to_string());
    }
}

/// Runs a subcommand. Mistakes and failures are told here, since they differ in
/// the exit status.
pub fn main(args: JobArgs) -> ExitCode {
    let mut report = Report::new(args.json);
    match run(args, &mut report) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            report.failed(&error);
            ExitCode::from(error.status())
        }
    }
}

fn run(args: JobArgs, report: &mut Report) -> Result<u8, JobError> {
    let address = args.qmp.ok_or(JobError::NoAddress)?;
    if let JobCommand::Mirror(mirror) = &args.command {
        mirror.check()?;
    }
    if let JobCommand::Backup(backup) = &args.command {
        backup.check()?;
    }
    let patience = Duration::from_secs(args.timeout.into());
    let path = address.path().ok_or_else(|| {
        JobError::Usage("A client needs the path of a socket: --qmp unix:PATH".to_owned())
    })?;
    let mut server = Server::connect(path, patience)?;
    match args.command {
        JobCommand::Mirror(args) => mirror::run(&args, &mut server, report),
        JobCommand::Compare(args) => compare::run(&args, &mut server, report),
        JobCommand::Backup(args) => backup::run(&args, &mut server, report),
        JobCommand::List => list::run(&mut server, report),
        JobCommand::Watch(args) => verbs::watch(&args, &mut server, report),
        JobCommand::Pause(args) => verbs::pause(&args, &mut server, report),
        JobCommand::Resume(args) => verbs::resume(&args, &mut server, report),
        JobCommand::Cancel(args) => verbs::cancel(&args, &mut server, report),
        JobCommand::Complete(args) => verbs::complete(&args, &mut server, report),
        JobCommand::Finalize(args) => verbs::finalize(&args, &mut server, report),
        JobCommand::Dismiss(args) => verbs::dismiss(&args, &mut server, report),
        JobCommand::SetSpeed(args) => verbs::set_speed(&args, &mut server, report),
    }
}
