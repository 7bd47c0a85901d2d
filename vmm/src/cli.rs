//! The command line: subcommands, logging, exit codes.
//!
//! Each subcommand's own arguments stand beside its code.

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;

use crate::{demo, guest, run, storage_daemon};

/// What `diptych` can be asked to do.
#[derive(Debug, Parser)]
#[command(
    name = "diptych",
    version,
    about = "A small KVM virtual machine monitor whose disks can be mirrored while the guest runs",
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
        default_value = "warn"
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
    let cli = Cli::parse();
    init_logging(&cli.log_level)?;
    match cli.command {
        Command::Run(args) => run::main(*args),
        Command::StorageDaemon(args) => storage_daemon::main(args),
        Command::Demo(args) => demo::main(args),
        Command::Guest(args) => guest::main(args),
    }
}

/// Sends log lines to stderr, in colour where that is a terminal.
fn init_logging(filter: &str) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(filter).map_err(|error| {
        anyhow::anyhow!("Bad log filter '{filter}' ({error}); try --log-level info")
    })?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    Ok(())
}
