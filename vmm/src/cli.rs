//! The command line: subcommands, logging, exit codes.
//!
//! Each subcommand's own arguments stand beside its code.

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser, Subcommand};
use tracing_subscriber::EnvFilter;

use crate::stdio::{complain, print_line};
use crate::{demo, guest, job_client, restore, run, storage_daemon};

/// Status of the process when it was told something that it cannot do.
pub const EXIT_USAGE: u8 = 2;

/// What `diptych` can be asked to do.
#[derive(Debug, Parser)]
#[command(
    name = "diptych",
    version,
    about = "A small KVM virtual machine monitor whose disks are mirrored and backed up while the guest runs",
    propagate_version = true
)]
struct Cli {
    /// What to log on stderr: error, warn, info, debug, trace or off; also per
    /// part, as in `warn,jobs=debug`
    #[arg(
        long,
        global = true,
        value_name = "FILTER",
        env = "DIPTYCH_LOG",
        default_value = "warn",
        value_parser = log_filter
    )]
    log_level: String,

    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Boot a guest on KVM
    Run(Box<run::RunArgs>),
    /// Serve images, block jobs and QMP without a guest
    StorageDaemon(storage_daemon::StorageDaemonArgs),
    /// Start, watch and steer block jobs of a running diptych or QEMU
    Job(job_client::JobArgs),
    /// Make an image of the backups that `diptych job backup` wrote
    Restore(restore::RestoreArgs),
    /// Mirror the disk of a small guest while it writes, pivot, and prove that
    /// nothing was lost
    Demo(demo::DemoArgs),
    /// Write the embedded guest's kernel to a file
    #[command(hide = true)]
    Guest(guest::GuestArgs),
}

/// Parses the command line and runs the subcommand.
///
/// Errors: those of the subcommand; a usage mistake ends the process with
/// status 2 before anything is started.
pub fn main() -> anyhow::Result<ExitCode> {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return Ok(explain(&error)),
    };
    init_logging(&cli.log_level)?;
    match cli.command {
        Command::Run(args) => run::main(*args),
        Command::StorageDaemon(args) => storage_daemon::main(args),
        Command::Job(args) => Ok(job_client::main(args)),
        Command::Restore(args) => Ok(restore::main(&args)),
        Command::Demo(args) => demo::main(args),
        Command::Guest(args) => guest::main(args),
    }
}

/// Prints help or the version where that was asked for, else one line that says
/// what is wrong with the arguments.
fn explain(error: &clap::Error) -> ExitCode {
    match error.kind() {
        ErrorKind::DisplayHelp
        | ErrorKind::DisplayVersion
        | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            // Whoever closed the pipe does not want it.
            let _ = match error.render().to_string().strip_prefix("error: ") {
                // What an option takes, which is no error.
                Some(help) => print_line(help.trim_end()),
                None => error.print(),
            };
        }
        _ => {
            let subcommand = std::env::args_os()
                .nth(1)
                .and_then(|word| word.into_string().ok())
                .filter(|word| Cli::command().find_subcommand(word).is_some())
                .map(|word| word + " ")
                .unwrap_or_default();
            let message = one_line(&error.render().to_string());
            let words = std::env::args_os().map(|word| word.to_string_lossy().into_owned());
            job_client::usage_mistake(&words.collect::<Vec<_>>(), &message);
            complain(format_args!(
                "diptych: {message}; see diptych {subcommand}--help"
            ));
        }
    }
    u8::try_from(error.exit_code()).map_or(ExitCode::from(EXIT_USAGE), ExitCode::from)
}

/// What clap says in several lines, without the usage and in the form of
/// diptych's own errors.
fn one_line(text: &str) -> String {
    let mut message = String::new();
    let lines = text
        .lines()
        .map(str::trim)
        .take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more information"))
        .filter(|line| !line.is_empty());
    for line in lines {
        let line = line.strip_prefix("error: ").unwrap_or(line);
        let line = line.strip_prefix("tip: ").unwrap_or(line);
        if !message.is_empty() {
            let joined = message.ends_with(':') || line.starts_with('[');
            message.push_str(if joined { " " } else { "; " });
        }
        message.push_str(line);
    }
    if let Some(first) = message.get_mut(..1) {
        first.make_ascii_uppercase();
    }
    message
}

/// Checks a log filter.
fn log_filter(text: &str) -> Result<String, String> {
    EnvFilter::try_new(text)
        .map(|_| text.to_owned())
        .map_err(|error| format!("{error}; try info"))
}

/// Sends log lines to stderr, in colour where that is a terminal.
fn init_logging(filter: &str) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(filter).map_err(|error| {
        anyhow::anyhow!("Bad log filter '{filter}' ({error}); try --log-level info")
    })?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        // It would be told on stderr, and panic if that is what does not work.
        .log_internal_errors(false)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usage_mistakes_are_explained_in_one_line() {
        for (words, message) in [
            (&["fly"][..], "Unrecognized subcommand 'fly'"),
            (
                &["storage-daemon"],
                "The following required arguments were not provided: <--qmp <unix:PATH>|--monitor",
            ),
            (
                &["run", "--kernal", "k"],
                "Unexpected argument '--kernal' found; a similar argument exists: '--kernel'",
            ),
            (
                &["run", "--on-reboot", "fly"],
                "Invalid value 'fly' for '--on-reboot <ACTION>' [possible values: exit, reset]",
            ),
            (
                &["run", "--memory", "12Q"],
                "Invalid value '12Q' for '--memory <SIZE>': '12Q' is not a size; give MiB, or a number with K, M, G or T behind it",
            ),
            (&["demo", "--log-level", "a=b=c"], "Invalid value 'a=b=c'"),
        ] {
            let error = Cli::try_parse_from([&["diptych"], words].concat()).unwrap_err();
            let line = one_line(&error.render().to_string());
            assert!(line.starts_with(message), "{line}");
            assert_eq!(line.lines().count(), 1, "{line}");
            assert_eq!(error.exit_code(), i32::from(EXIT_USAGE));
        }
    }
}
