//! `diptych run`: puts a guest's machine, block graph, jobs and monitor together.

use std::process::ExitCode;

/// Arguments of `diptych run`.
#[derive(Debug, clap::Args)]
pub struct RunArgs {}

/// Boots the guest and serves it until it ends.
pub fn main(_args: RunArgs) -> anyhow::Result<ExitCode> {
    anyhow::bail!("This build cannot run guests yet")
}
