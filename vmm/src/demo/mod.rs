//! `diptych demo`: the main job on the embedded guest, in a few seconds.
//!
//! A child process runs `diptych run` with the embedded guest, which writes
//! verified data to its disk all the time. The disk is mirrored live over QMP,
//! the guest pivots to the mirror and goes on writing there, and in the end
//! three things are compared: the source, the target, and what the guest knows
//! that it wrote. Nothing here reaches into the child but QMP, the image files
//! and the guest's serial port: the demo sees what any user sees.
//!
//! - [`child`]: the process and its private directory
//! - [`images`]: the files, and what happens to them in the end
//! - [`mailbox`]: orders to the guest
//! - [`report`]: what the guest says at its end
//! - [`scenario`]: the steps
//! - [`verify`]: the proof
//! - [`summary`]: the table, and the same as JSON

mod child;
mod images;
mod mailbox;
mod report;
mod scenario;
mod summary;
mod verify;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use self::images::Images;
use crate::stdio::{complain, print_line};

/// Exit status after a signal, as a shell would show SIGINT.
const EXIT_INTERRUPTED: u8 = 130;

/// Arguments of `diptych demo`.
#[derive(Debug, clap::Args)]
pub struct DemoArgs {
    /// Size of the guest's disk, a multiple of 64 KiB from 1M to 64G; as 256M
    /// or 1G
    #[arg(long, default_value = "256M", value_name = "SIZE", value_parser = parse_size)]
    size: u64,

    /// Where to put the guest's disk: a path where nothing is, or an empty
    /// file. The mirror goes beside it, as PATH.mirror. By default both are in
    /// a temporary directory
    #[arg(long, value_name = "PATH")]
    disk: Option<PathBuf>,

    /// Keep both images and say where they are
    #[arg(long)]
    keep: bool,

    /// Print the result as one JSON object
    #[arg(long)]
    json: bool,

    /// How the mirror treats writes of the guest while it copies
    #[arg(long, default_value = "background", value_name = "MODE")]
    copy_mode: CopyMode,

    /// Writes per second that the guest makes at most; 0 for as many as it can
    #[arg(long, default_value_t = 0, value_name = "N")]
    rate: u64,
}

/// The mirror's copy mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
enum CopyMode {
    /// Writes go to the source, and are copied later
    Background,
    /// Writes go to both before they are acknowledged
    WriteBlocking,
}

impl CopyMode {
    fn as_str(self) -> &'static str {
        match self {
            Self::Background => "background",
            Self::WriteBlocking => "write-blocking",
        }
    }
}

/// Runs the demo. Succeeds if the images and the guest's record agree.
///
/// Errors: whatever kept the demo from its end. A disagreement is no error, but
/// a status of 1.
pub fn main(args: DemoArgs) -> anyhow::Result<ExitCode> {
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        signal_hook::flag::register(signal, Arc::clone(&interrupted))
            .context("Cannot catch signals")?;
    }
    let tsc_khz = child::check_kvm()?;
    let images = Images::create(args.disk.as_deref(), args.size, args.keep)?;
    let outcome = scenario::run(&args, &images, tsc_khz, &interrupted);
    if interrupted.load(Ordering::Relaxed) {
        complain(format_args!(
            "diptych: Interrupted; the guest was stopped and temporary files removed"
        ));
        return Ok(ExitCode::from(EXIT_INTERRUPTED));
    }
    let summary = outcome?;
    let text = match args.json {
        true => serde_json::to_string(&summary)?,
        false => summary.to_string().trim_end().to_owned(),
    };
    print_line(&text).context("Cannot print the summary")?;
    Ok(if summary.identical {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// A size in bytes, with k, M or G.
fn parse_size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'k' | b'K') => (&text[..text.len() - 1], 10),
        Some(b'M') => (&text[..text.len() - 1], 20),
        Some(b'G') => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    let size = digits
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(1 << shift))
        .ok_or("a size is expected, as 256M")?;
    if !(1 << 20..=64 << 30).contains(&size) || !size.is_multiple_of(64 << 10) {
        return Err("the size is a multiple of 64k from 1M to 64G".into());
    }
    Ok(size)
}

#[cfg(test)]
mod tests {
    use super::parse_size;

    #[test]
    fn sizes_have_units_and_bounds() {
        assert_eq!(parse_size("256M"), Ok(256 << 20));
        assert_eq!(parse_size("1048576"), Ok(1 << 20));
        assert_eq!(parse_size("1G"), Ok(1 << 30));
        for wrong in [
            "",
            "M",
            "-1M",
            "512k",
            "65G",
            "1048577",
            "99999999999999999999G",
        ] {
            assert!(parse_size(wrong).is_err(), "{wrong}");
        }
    }
}
