//! `--daemonize`: the process that was started waits until another one, which
//! goes on in the background, is ready or has failed.
//!
//! The other one is this program started again, not a fork: no thread, lock or
//! event loop is left over from before. It is told so by a variable of its
//! environment, says on its stdout when it is ready, and its stderr is the caller's
//! until then.

use std::env;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{self, Command, ExitCode, ExitStatus, Stdio};

use anyhow::Context;
use rustix::process::{getppid, setsid};
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};

/// Holds the process id of the one that waits.
const VARIABLE: &str = "DIPTYCH_DAEMON_OF";
/// What the one in the background says when it is ready.
const READY: &[u8] = b"ready\n";

/// The process that waits for this one to be ready, if this is the one in the
/// background.
pub(crate) fn launcher() -> Option<u32> {
    let parent = u32::try_from(getppid()?.as_raw_nonzero().get()).ok()?;
    let told = env::var(VARIABLE).ok()?.parse::<u32>().ok()?;
    // A variable that somebody else left means nothing.
    (told == parent).then_some(told)
}

/// Starts the program again in the background, and waits until it is ready or has
/// failed; then its status is that of this process, and it has said why.
pub(super) fn launch() -> anyhow::Result<ExitCode> {
    let program = env::current_exe().unwrap_or_else(|_| "/proc/self/exe".into());
    let mut words = env::args_os();
    let mut command = Command::new(program);
    if let Some(name) = words.next() {
        command.arg0(name);
    }
    let mut child = command
        .args(words)
        .env(VARIABLE, process::id().to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("Cannot start the process in the background")?;
    let mut said = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        // Nothing else is said there, so that this ends.
        let limit = READY.len() as u64;
        stdout
            .take(limit)
            .read_to_end(&mut said)
            .context("Cannot hear from the process in the background")?;
    }
    if said == READY {
        return Ok(ExitCode::SUCCESS);
    }
    let status = child
        .wait()
        .context("Cannot wait for the process in the background")?;
    Ok(code_of(status))
}

fn code_of(status: ExitStatus) -> ExitCode {
    let signal = status.signal().map(|signal| 128 + signal);
    match status.code().or(signal).map(u8::try_from) {
        // It ended without having been ready.
        Some(Ok(0)) | Some(Err(_)) | None => ExitCode::FAILURE,
        Some(Ok(code)) => ExitCode::from(code),
    }
}

/// Leaves the terminal and the group of the one that waits. To be called in the
/// background, first of all.
pub(super) fn detach() -> io::Result<()> {
    setsid()?;
    Ok(())
}

/// Lets the one that waits end, and goes on without its terminal.
///
/// Errors: it does not wait any more.
pub(super) fn ready() -> anyhow::Result<()> {
    let null = File::options()
        .read(true)
        .write(true)
        .open("/dev/null")
        .context("Cannot open /dev/null")?;
    let mut stdout = io::stdout().lock();
    stdout
        .write_all(READY)
        .and_then(|()| stdout.flush())
        .context("Nobody waits for this process to be ready")?;
    dup2_stdin(&null)
        .and_then(|()| dup2_stdout(&null))
        .and_then(|()| dup2_stderr(&null))
        .context("Cannot leave the terminal")
}
