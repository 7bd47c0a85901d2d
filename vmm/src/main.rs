//! The `diptych` binary: a KVM virtual machine monitor whose disks can be
//! mirrored while the guest runs.
//!
//! This file only names the modules and turns an outcome into an exit code;
//! what can be said on the command line is in [`cli`].

#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]

mod backup_set;
mod cli;
mod client;
mod config;
mod demo;
mod disks;
mod end_watchdog;
mod guest;
mod inherited;
mod job_client;
mod machine;
mod monitor;
mod restore;
mod run;
mod serial_backend;
mod set_up;
mod signals;
mod stdio;
mod storage_daemon;
mod terminal;
mod vm_control;

use std::process::ExitCode;

fn main() -> ExitCode {
    match cli::main() {
        Ok(code) => code,
        Err(error) => {
            // One line, whatever the causes: what, then why.
            stdio::complain(format_args!("diptych: {error:#}"));
            match error.downcast_ref::<config::ConfigError>() {
                Some(error) if error.is_usage() => ExitCode::from(cli::EXIT_USAGE),
                _ => ExitCode::FAILURE,
            }
        }
    }
}
