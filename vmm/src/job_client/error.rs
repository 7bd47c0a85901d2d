//! Why a subcommand did not do what it was asked to.

use std::io;
use std::path::PathBuf;

use super::status;
use crate::backup_set::SetError;
use crate::cli::EXIT_USAGE;
use crate::client::ClientError;

/// See the module.
#[derive(Debug, thiserror::Error)]
pub enum JobError {
    /// No socket was named.
    #[error(
        "The following required arguments were not provided: --qmp <unix:PATH>; see diptych job --help"
    )]
    NoAddress,
    /// Something else on the command line that cannot be.
    #[error("{0}; see diptych job --help")]
    Usage(String),
    /// No connection, or a refusal.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// A command that the server does not have.
    #[error("The server cannot do this: it has no command '{}'", .0.join("' or '"))]
    NoCommand(Vec<&'static str>),
    /// A server that is not diptych, and `--fleecing`.
    #[error(
        "The server cannot save what guests overwrite in a file of its own: leave out --fleecing"
    )]
    NoFleecing,
    /// An answer that makes no sense.
    #[error("The server's answer to {command} is not understood")]
    Answer {
        /// What was asked.
        command: &'static str,
    },
    /// No job of that name.
    #[error("There is no job '{0}'; see diptych job list")]
    NoJob(String),
    /// The source is not there.
    #[error("The server has no disk or node '{0}'")]
    NoSource(String),
    /// The target is neither node nor file.
    #[error(
        "Target '{0}' is neither a node of the server nor a file; name an existing one, or give --create"
    )]
    NoTarget(String),
    /// The target's file cannot be made.
    #[error("Cannot create the target '{path}'", path = path.display())]
    Create {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A directory of backups cannot be used.
    #[error(transparent)]
    BackupSet(#[from] SetError),
    /// What an incremental backup would stand on is not there.
    #[error(
        "There can be no incremental backup of disk '{disk}': {why}; take a full one (without \
         --incremental)"
    )]
    BrokenChain {
        /// The disk.
        disk: String,
        /// What is not there.
        why: String,
    },
    /// A backup that its client has left goes on.
    #[error(
        "Node '{node}' of an earlier backup is still in use: wait for its job, or cancel it (diptych \
         job list --qmp {address})"
    )]
    StillRunning {
        /// The node.
        node: String,
        /// The server.
        address: String,
    },
    /// A signal came.
    #[error("Interrupted")]
    Interrupted {
        /// Its number.
        signal: u8,
    },
    /// A signal came, and jobs that were followed go on.
    #[error("Interrupted; {} on", go(.jobs))]
    Left {
        /// Its number.
        signal: u8,
        /// Their ids.
        jobs: Vec<String>,
    },
    /// Signals cannot be listened for.
    #[error("Cannot listen for signals")]
    Signals(#[source] io::Error),
    /// Nobody reads what is printed.
    #[error("Cannot print; a job that was started or asked for something goes on")]
    Output(#[from] io::Error),
    /// The same of a backup, whose jobs do not go on.
    #[error("Cannot print; `diptych restore DIR --list` tells which backups count")]
    OutputOfBackup(#[source] io::Error),
}

impl JobError {
    /// An interrupt says that these jobs go on; any other error stays as it is.
    pub fn leaving<'a>(self, jobs: impl IntoIterator<Item = &'a str>) -> Self {
        match self {
            Self::Interrupted { signal } => Self::Left {
                signal,
                jobs: jobs.into_iter().map(super::report::clean).collect(),
            },
            error => error,
        }
    }

    /// Of a backup, which its client has ended or taken away by now.
    pub fn of_backup(self) -> Self {
        match self {
            Self::Interrupted { .. } => SetError::Interrupted.into(),
            Self::Output(source) => Self::OutputOfBackup(source),
            error => error,
        }
    }

    /// What the process ends with.
    pub fn status(&self) -> u8 {
        match self {
            Self::NoAddress | Self::Usage(_) => EXIT_USAGE,
            // Everything was taken back.
            Self::BackupSet(SetError::Interrupted) => status::CANCELLED,
            Self::Client(ClientError::Refused { .. })
            | Self::NoCommand(_)
            | Self::NoFleecing
            | Self::NoJob(_)
            | Self::NoSource(_)
            | Self::NoTarget(_)
            | Self::BackupSet(_)
            | Self::BrokenChain { .. }
            | Self::StillRunning { .. }
            | Self::Create { .. }
            | Self::Signals(_) => status::FAILED,
            // What becomes of the job is not known here.
            Self::Client(_) | Self::Answer { .. } | Self::Output(_) | Self::OutputOfBackup(_) => {
                status::LOST
            }
            Self::Interrupted { signal } | Self::Left { signal, .. } => {
                status::SIGNAL_BASE.saturating_add(*signal)
            }
        }
    }
}

fn go(jobs: &[String]) -> String {
    match jobs {
        [job] => format!("job '{job}' goes"),
        _ => format!("jobs '{}' go", jobs.join("', '")),
    }
}
