//! The steps of the demo, and what is measured on the way.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use guest::mailbox::{Order, Status};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use super::child::{Vm, VmWatch};
use super::images::Images;
use super::mailbox::Mailbox;
use super::report::Report;
use super::summary::Summary;
use super::verify::verify;
use super::{CopyMode, DemoArgs};
use crate::client::{Client, Watch};

/// How long the guest writes in each phase that has no end of its own.
const BEFORE: Duration = Duration::from_millis(700);
const READY: Duration = Duration::from_millis(500);
const AFTER: Duration = Duration::from_millis(700);
/// How long a mirror in the background may race with the guest's writes before
/// the demo makes them wait for it.
const RACE: Duration = Duration::from_secs(3);
/// The guest's writes are random and this small: a coarser mirror would copy
/// much more than was written.
const GRANULARITY: u64 = 4096;
/// How long anything may take that should take no time.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long a job may go without any progress.
const JOB_PATIENCE: Duration = Duration::from_secs(60);

const JOB: &str = "demo";
const TARGET_NODE: &str = "mirror-target";

/// The phases, by the numbers that the guest is told.
pub const PHASES: [&str; 5] = ["before", "copying", "ready", "pivot", "after"];
const COPYING: u64 = 1;
const READY_PHASE: u64 = 2;
const PIVOT: u64 = 3;
const AFTER_PIVOT: u64 = 4;

/// What the host measured.
#[derive(Clone, Copy, Debug)]
pub struct Measured {
    /// From the command to READY.
    pub to_ready: Duration,
    /// Bytes copied until then.
    pub copied_bytes: u64,
    /// When the mirror was switched to write-blocking, since the guest wrote
    /// faster than it copied; from the command on.
    pub switched: Option<Duration>,
    /// From `job-complete` until the job had pivoted.
    pub pivot: Duration,
}

/// Runs the demo on images that are ready, and compares them in the end.
/// `tsc_khz` is for the guest's clock, 0 if not known.
pub fn run(
    args: &DemoArgs,
    images: &Images,
    tsc_khz: u32,
    interrupted: &Arc<AtomicBool>,
) -> anyhow::Result<Summary> {
    let mailbox = Mailbox::open(images.mailbox()).context("Cannot open the guest's mailbox")?;
    // Half of the disk is written before; the mirror has data to copy and holes
    // to skip. The rest is random writes and reads all over it.
    let workload = format!(
        "mailbox=1 depth=32 mix=w80,r20 fill={} rate={} tsc_khz={tsc_khz}",
        args.size / 2,
        args.rate
    );
    let vm = Vm::start(images, args.size, &workload)?;
    let client = Client::connect_when_there(vm.qmp(), PATIENCE, vm.watch(interrupted))?;
    let mut demo = Demo {
        client,
        mailbox,
        progress: progress_bar(args.size),
    };
    let measured = demo.mirror(args, images)?;
    demo.finish()?;
    let status = vm.wait(PATIENCE, interrupted)?;
    demo.progress.finish_and_clear();
    drop(demo);
    match status {
        Some(status) if status.success() => {}
        Some(status) => bail!("The guest failed: {}", vm.last_words(status)),
        None => bail!(
            "The guest did not power off within {} s",
            PATIENCE.as_secs()
        ),
    }
    let report = Report::find(&vm.serial()?)?;
    let disk = report
        .disks
        .first()
        .context("The guest's report has no disk")?;
    let verdict = verify(images.source(), images.target(), report.block, disk)?;
    Ok(Summary::new(args, images, measured, &report, verdict))
}

struct Demo {
    client: Client<VmWatch>,
    mailbox: Mailbox,
    progress: ProgressBar,
}

impl Demo {
    /// From the guest's start to some time after the pivot.
    fn mirror(&mut self, args: &DemoArgs, images: &Images) -> anyhow::Result<Measured> {
        self.progress.set_message("the guest fills its disk");
        self.wait_for_guest("start", |status| status.filled)?;
        self.progress.set_message("the guest writes");
        self.let_write(BEFORE)?;

        self.client.execute(
            "blockdev-add",
            json!({
                "driver": "raw",
                "node-name": TARGET_NODE,
                "discard": "unmap",
                "file": {"driver": "file", "filename": images.target(), "discard": "unmap"},
            }),
        )?;
        self.enter(COPYING)?;
        let start = Instant::now();
        self.client.execute(
            "blockdev-mirror",
            json!({
                "job-id": JOB,
                "device": "vda",
                "target": TARGET_NODE,
                "sync": "full",
                "copy-mode": args.copy_mode.as_str(),
                "granularity": GRANULARITY,
            }),
        )?;
        self.progress.set_message("copying while the guest writes");
        let mut switched = None;
        let in_background = args.copy_mode == CopyMode::Background;
        let copied_bytes = loop {
            let may_switch = in_background && switched.is_none();
            let deadline = may_switch.then_some(start + RACE);
            if let Some(copied_bytes) = self.wait_for_ready(deadline)? {
                break copied_bytes;
            }
            self.progress
                .set_message("the guest is faster: its writes wait for the mirror now");
            self.client.execute(
                "block-job-change",
                json!({"id": JOB, "type": "mirror", "copy-mode": "write-blocking"}),
            )?;
            switched = Some(start.elapsed());
        };
        let to_ready = start.elapsed();
        self.enter(READY_PHASE)?;
        self.progress.set_message("ready, the guest writes");
        self.let_write(READY)?;

        self.enter(PIVOT)?;
        self.progress.set_message("pivot");
        let start = Instant::now();
        self.client.execute("job-complete", json!({"id": JOB}))?;
        self.wait_for_completion()?;
        let pivot = start.elapsed();
        self.enter(AFTER_PIVOT)?;
        self.progress.set_message("the guest writes to the mirror");
        self.let_write(AFTER)?;
        Ok(Measured {
            to_ready,
            copied_bytes,
            switched,
            pivot,
        })
    }

    /// Lets the guest end; it reads everything back first.
    fn finish(&mut self) -> anyhow::Result<()> {
        self.progress.set_message("the guest verifies its disk");
        let order = Order {
            phase: AFTER_PIVOT,
            finish: true,
        };
        self.mailbox.order(order).context("Cannot reach the guest")
    }

    /// Tells the guest that a phase begins, and waits until it knows.
    fn enter(&mut self, phase: u64) -> anyhow::Result<()> {
        let order = Order {
            phase,
            finish: false,
        };
        self.mailbox
            .order(order)
            .context("Cannot reach the guest")?;
        self.wait_for_guest("begin the next phase", |status| status.phase == phase)
    }

    fn wait_for_guest(
        &mut self,
        what: &str,
        mut until: impl FnMut(Status) -> bool,
    ) -> anyhow::Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if self.guest()?.is_some_and(&mut until) {
                return Ok(());
            }
            thread::sleep(Duration::from_millis(2));
        }
        bail!("The guest did not {what} within {} s", PATIENCE.as_secs())
    }

    /// Time for the guest alone.
    fn let_write(&mut self, time: Duration) -> anyhow::Result<()> {
        let end = Instant::now() + time;
        while Instant::now() < end {
            self.guest()?;
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// The guest's last word, if there is one.
    ///
    /// Errors: the guest has ended or met an error, or the demo is interrupted.
    fn guest(&mut self) -> anyhow::Result<Option<Status>> {
        self.client.watch().check().map_err(anyhow::Error::msg)?;
        let status = self.mailbox.status().context("Cannot read the mailbox")?;
        if let Some(status) = status {
            ensure!(
                status.errors == 0,
                "The guest met {} failed requests or wrong blocks",
                status.errors
            );
        }
        Ok(status)
    }

    /// Waits for the job to be ready, and shows its progress. Gives the bytes
    /// copied; `None` at the deadline.
    fn wait_for_ready(&mut self, deadline: Option<Instant>) -> anyhow::Result<Option<u64>> {
        let mut last = (0, Instant::now());
        loop {
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return Ok(None);
            }
            while let Some(event) = self.client.next_event(Duration::from_millis(20))? {
                match event.name.as_str() {
                    "BLOCK_JOB_READY" => {
                        return Ok(Some(event.data["offset"].as_u64().unwrap_or(0)));
                    }
                    "BLOCK_JOB_COMPLETED" => bail!("The mirror failed: {}", reason(&event.data)),
                    _ => {}
                }
            }
            self.guest()?;
            let jobs = self.client.execute("query-jobs", json!({}))?;
            if let Some(job) = jobs.as_array().and_then(|jobs| jobs.first()) {
                let number = |name: &str| job[name].as_u64().unwrap_or(0);
                let current = number("current-progress");
                self.progress.set_length(number("total-progress"));
                self.progress.set_position(current);
                if current != last.0 {
                    last = (current, Instant::now());
                }
            }
            ensure!(
                last.1.elapsed() < JOB_PATIENCE,
                "The mirror made no progress for {} s",
                JOB_PATIENCE.as_secs()
            );
        }
    }

    /// Waits for the job to have pivoted.
    fn wait_for_completion(&mut self) -> anyhow::Result<()> {
        let deadline = Instant::now() + JOB_PATIENCE;
        while Instant::now() < deadline {
            let Some(event) = self.client.next_event(Duration::from_millis(20))? else {
                continue;
            };
            if event.name == "BLOCK_JOB_COMPLETED" {
                ensure!(
                    event.data["error"].is_null(),
                    "The mirror failed at the pivot: {}",
                    reason(&event.data)
                );
                return Ok(());
            }
        }
        bail!(
            "The mirror did not pivot within {} s",
            JOB_PATIENCE.as_secs()
        )
    }
}

fn reason(data: &Value) -> &str {
    data["error"].as_str().unwrap_or("no reason given")
}

/// A bar on stderr, if that is a terminal.
fn progress_bar(size: u64) -> ProgressBar {
    let style = ProgressStyle::with_template("{bar:32} {bytes:>10}/{total_bytes:<10} {msg}")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(size).with_style(style)
}
