//! What the demo says in the end, for people and for scripts.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use indicatif::HumanBytes;
use serde::Serialize;

use super::images::Images;
use super::report::{self, Report};
use super::scenario::{Measured, PHASES};
use super::verify::Verdict;
use super::{CopyMode, DemoArgs};

/// The result. Times in milliseconds, rates per second.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Summary {
    /// Whether target, source (as of the pivot) and the guest's record agree.
    pub identical: bool,
    size_bytes: u64,
    copy_mode: CopyMode,
    depth: u32,
    ready_ms: f64,
    /// When the mirror was switched to write-blocking, because the guest wrote
    /// faster than it copied.
    #[serde(skip_serializing_if = "Option::is_none")]
    switched_ms: Option<f64>,
    copied_bytes: u64,
    copy_bytes_per_second: u64,
    pivot_ms: f64,
    /// The longest time that the guest had requests under way and no answer,
    /// from just before the pivot until just after.
    pivot_stall_ms: f64,
    phases: Vec<PhaseSummary>,
    /// Requests that failed in the guest.
    failed_requests: u64,
    /// Blocks that the guest did not find as it had written them.
    wrong_blocks: u64,
    verdict: Verdict,
    #[serde(skip_serializing_if = "Option::is_none")]
    kept: Option<[PathBuf; 2]>,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct PhaseSummary {
    name: &'static str,
    ms: f64,
    writes: u64,
    writes_per_second: u64,
    reads_verified: u64,
    p50_ms: f64,
    p99_ms: f64,
    slowest_ms: f64,
    stall_ms: f64,
}

impl Summary {
    /// Puts together what was measured and found.
    pub fn new(
        args: &DemoArgs,
        images: &Images,
        measured: Measured,
        report: &Report,
        verdict: Verdict,
    ) -> Self {
        let count = |of: fn(&report::Disk) -> u64| report.disks.iter().map(of).sum::<u64>();
        let failed_requests = count(|disk| disk.failed);
        let wrong_blocks = count(|disk| disk.bad);
        let phases: Vec<_> = PHASES
            .iter()
            .zip(&report.phases)
            .map(|(name, phase)| PhaseSummary::new(name, phase))
            .collect();
        let pivot_stall_ms = phases
            .iter()
            .find(|phase| phase.name == "pivot")
            .map_or(0.0, |phase| phase.stall_ms);
        Self {
            identical: verdict.is_identical()
                && failed_requests == 0
                && wrong_blocks == 0
                && phases.len() == PHASES.len(),
            size_bytes: args.size,
            copy_mode: args.copy_mode,
            depth: report.disks.iter().map(|disk| disk.depth).sum(),
            ready_ms: ms(measured.to_ready),
            switched_ms: measured.switched.map(ms),
            copied_bytes: measured.copied_bytes,
            copy_bytes_per_second: per_second(measured.copied_bytes, measured.to_ready),
            pivot_ms: ms(measured.pivot),
            pivot_stall_ms,
            phases,
            failed_requests,
            wrong_blocks,
            verdict,
            kept: images
                .are_kept()
                .then(|| [images.source().to_owned(), images.target().to_owned()]),
        }
    }
}

impl PhaseSummary {
    fn new(name: &'static str, phase: &report::Phase) -> Self {
        let us_in_ms = |us: u64| us as f64 / 1000.0;
        Self {
            name,
            ms: us_in_ms(phase.us),
            writes: phase.w,
            writes_per_second: per_second(phase.w, Duration::from_micros(phase.us)),
            reads_verified: phase.r,
            p50_ms: us_in_ms(phase.p50),
            p99_ms: us_in_ms(phase.p99),
            slowest_ms: us_in_ms(phase.slowest),
            stall_ms: us_in_ms(phase.stall),
        }
    }
}

fn ms(time: Duration) -> f64 {
    time.as_micros() as f64 / 1000.0
}

fn per_second(number: u64, time: Duration) -> u64 {
    let us = time.as_micros().max(1);
    u64::try_from(u128::from(number) * 1_000_000 / us).unwrap_or(u64::MAX)
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut row = |name: &str, value: fmt::Arguments<'_>| writeln!(f, "{name:<16}{value}");
        row("disk", format_args!("{}", HumanBytes(self.size_bytes)))?;
        row(
            "mirror",
            format_args!(
                "{} copied, {}/s, {}",
                HumanBytes(self.copied_bytes),
                HumanBytes(self.copy_bytes_per_second),
                self.copy_mode.as_str()
            ),
        )?;
        if let Some(switched_ms) = self.switched_ms {
            row(
                "",
                format_args!("write-blocking after {switched_ms:.0} ms: the guest was faster"),
            )?;
        }
        row("time to ready", format_args!("{:.0} ms", self.ready_ms))?;
        row(
            "pivot",
            format_args!(
                "{:.1} ms, longest stall of the guest {:.1} ms",
                self.pivot_ms, self.pivot_stall_ms
            ),
        )?;
        writeln!(
            f,
            "\n{:<16}{:>9}{:>10}{:>10}{:>10}{:>11}{:>9}",
            "the guest", "ms", "writes", "writes/s", "reads", "p99 ms", "stall ms"
        )?;
        for phase in &self.phases {
            writeln!(
                f,
                "  {:<14}{:>9.0}{:>10}{:>10}{:>10}{:>11.1}{:>9.1}",
                phase.name,
                phase.ms,
                phase.writes,
                phase.writes_per_second,
                phase.reads_verified,
                phase.p99_ms,
                phase.stall_ms
            )?;
        }
        writeln!(
            f,
            "\n{:<16}{} blocks; {} rewritten after the pivot",
            "compared", self.verdict.blocks, self.verdict.rewritten_after_pivot
        )?;
        if let Some([source, target]) = &self.kept {
            writeln!(f, "{:<16}{}", "kept", source.display())?;
            writeln!(f, "{:<16}{}", "", target.display())?;
        }
        if !self.identical {
            writeln!(
                f,
                "{:<16}{} failed requests, {} wrong blocks, {} lost, {} damaged; {}",
                "faults",
                self.failed_requests,
                self.wrong_blocks,
                self.verdict.lost,
                self.verdict.damaged,
                self.verdict.first_fault.as_deref().unwrap_or("-")
            )?;
        }
        let answer = if self.identical { "yes" } else { "NO" };
        writeln!(f, "identical: {answer}")
    }
}
