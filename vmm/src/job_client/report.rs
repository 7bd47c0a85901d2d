//! Telling the user: progress bars where stderr is a terminal, plain lines where
//! not, or JSON for scripts. Results go to stdout, progress and notes to stderr;
//! all of JSON goes to stdout.

use std::collections::HashMap;
use std::io::{self, IsTerminal};
use std::time::{Duration, Instant};

use indicatif::{HumanBytes, HumanDuration, MultiProgress, ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use super::error::JobError;
use super::follow::{Ending, Followed};
use crate::client::{Event, printable};
use crate::stdio::{complain, print_line};

/// How often a bar is drawn anew, a line printed, an object printed.
const BAR_INTERVAL: Duration = Duration::from_millis(200);
const LINE_INTERVAL: Duration = Duration::from_secs(2);
const JSON_INTERVAL: Duration = Duration::from_secs(1);
/// How often jobs are looked at for lines: a new phase is told at once.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);
/// Characters of the server's that are shown at most.
const TEXT_MAX: usize = 1000;

/// See the module.
#[derive(Debug)]
pub struct Report(Style);

#[derive(Debug)]
enum Style {
    Bars {
        all: MultiProgress,
        bars: HashMap<String, ProgressBar>,
    },
    /// What was said last of each job, and when.
    Lines(HashMap<String, (String, Instant)>),
    Json,
}

impl Report {
    /// In JSON, or as fits stderr.
    pub fn new(json: bool) -> Self {
        Self(if json {
            Style::Json
        } else if io::stderr().is_terminal() {
            Style::Bars {
                all: MultiProgress::new(),
                bars: HashMap::new(),
            }
        } else {
            Style::Lines(HashMap::new())
        })
    }

    /// Whether everything is to be JSON.
    pub fn is_json(&self) -> bool {
        matches!(self.0, Style::Json)
    }

    /// How often to tell of progress.
    pub fn interval(&self) -> Duration {
        match self.0 {
            Style::Bars { .. } => BAR_INTERVAL,
            Style::Lines(_) => LOOK_INTERVAL,
            Style::Json => JSON_INTERVAL,
        }
    }

    /// Prints a line of a result; not with JSON.
    pub fn line(&mut self, line: &str) -> Result<(), JobError> {
        match &self.0 {
            Style::Bars { all, .. } => Ok(all.suspend(|| print_line(line))?),
            Style::Lines(_) => Ok(print_line(line)?),
            Style::Json => Ok(()),
        }
    }

    /// Prints an object; only with JSON.
    pub fn object(&mut self, object: &Value) -> Result<(), JobError> {
        if self.is_json() {
            print_line(&object.to_string())?;
        }
        Ok(())
    }

    /// An event of a job that is followed.
    pub fn event(&mut self, event: &Event) -> Result<(), JobError> {
        self.object(&json!({"event": event.name, "data": event.data, "timestamp": event.timestamp}))
    }

    /// Something that a person should know, and that is no result.
    pub fn note(&mut self, text: &str) -> Result<(), JobError> {
        let text = clean(text);
        match &self.0 {
            Style::Bars { all, .. } => {
                all.suspend(|| complain(format_args!("diptych: {text}")));
            }
            Style::Lines(_) => complain(format_args!("diptych: {text}")),
            Style::Json => print_line(&json!({"note": text}).to_string())?,
        }
        Ok(())
    }

    /// How far a job is.
    pub fn progress(&mut self, followed: &Followed) -> Result<(), JobError> {
        let job = &followed.job;
        match &mut self.0 {
            Style::Bars { all, bars } => {
                let bar = bars
                    .entry(job.id.clone())
                    .or_insert_with(|| all.add(new_bar(&job.id)));
                bar.set_message(state(followed));
                bar.set_length(job.total);
                bar.set_position(job.current);
            }
            Style::Lines(said) => {
                let phase = followed.phase();
                let (last, when) = said
                    .entry(job.id.clone())
                    .or_insert_with(|| (String::new(), Instant::now()));
                let is_new = phase != *last;
                // What does not move is said once.
                let moves = !matches!(phase, "ready" | "paused" | "pending");
                if is_new || (moves && when.elapsed() >= LINE_INTERVAL) {
                    phase.clone_into(last);
                    *when = Instant::now();
                    complain(format_args!(
                        "{}: {} % ({} of {}), {}",
                        clean(&job.id),
                        percent(job.current, job.total),
                        size(job.current),
                        size(job.total),
                        state(followed)
                    ));
                }
            }
            Style::Json => {
                let mut progress = json!({
                    "job": job.id,
                    "type": job.kind,
                    "status": job.status,
                    "phase": followed.phase(),
                    "current": job.current,
                    "total": job.total,
                    "percent": percent(job.current, job.total),
                    "bytes-per-second": followed.rate.per_second(),
                    "seconds-left": time_left(followed).map(|left| left.as_secs()),
                });
                if let Some(rate) = job.dirty_rate {
                    progress["dirty-bytes-per-second"] = Value::from(rate);
                }
                print_line(&json!({"progress": progress}).to_string())?;
            }
        }
        Ok(())
    }

    /// A job has ended. A failure goes to stderr.
    pub fn ended(&mut self, followed: &Followed) -> Result<(), JobError> {
        let job = &followed.job;
        if let Style::Bars { bars, .. } = &mut self.0
            && let Some(bar) = bars.remove(&job.id)
        {
            bar.finish_and_clear();
        }
        let Some(ending) = followed.ending() else {
            return Ok(());
        };
        let seconds = followed.begun.elapsed().as_secs_f64();
        let (outcome, error) = match ending {
            Ending::Completed => ("completed", None),
            Ending::Failed(error) => ("failed", Some(error.as_str())),
            Ending::Cancelled => ("cancelled", None),
            Ending::Gone => ("unknown", None),
        };
        let mut result = json!({
            "job": job.id,
            "type": job.kind,
            "outcome": outcome,
            "current": job.current,
            "total": job.total,
            "seconds": seconds,
        });
        if let Some(error) = error {
            result["error"] = Value::from(error);
        }
        for name in ["comparison", "fleecing"] {
            if let Some(found) = job.raw.get(name) {
                result[name] = found.clone();
            }
        }
        self.object(&json!({"result": result}))?;
        let id = clean(&job.id);
        match ending {
            Ending::Completed => self.line(&format!(
                "{id}: completed ({} in {seconds:.1} s{})",
                size(job.current),
                waits(&job.raw["fleecing"]).unwrap_or_default()
            )),
            Ending::Cancelled => self.line(&format!("{id}: cancelled")),
            Ending::Failed(error) => {
                complain(format_args!("diptych: Job '{id}' failed: {}", clean(error)));
                Ok(())
            }
            Ending::Gone => {
                complain(format_args!(
                    "diptych: Job '{id}' has gone; how it ended is not known"
                ));
                Ok(())
            }
        }
    }

    /// What was asked for is reached, and the job is still there. `text` is for
    /// people.
    pub fn reached(&mut self, id: &str, outcome: &str, text: &str) -> Result<(), JobError> {
        if let Style::Bars { bars, .. } = &mut self.0
            && let Some(bar) = bars.remove(id)
        {
            bar.finish_and_clear();
        }
        self.object(&json!({"result": {"job": id, "outcome": outcome}}))?;
        self.line(&format!("{}: {}", clean(id), clean(text)))
    }

    /// It was not done.
    pub fn failed(&mut self, error: &JobError) {
        if let Style::Bars { all, .. } = &self.0 {
            // Only drawing can fail.
            let _ = all.clear();
        }
        // Names in it may be the server's, or a manifest's.
        let text = clean(&with_causes(error));
        let outcome = match error.status() {
            super::status::FAILED => "failed",
            super::status::LOST => "lost",
            crate::cli::EXIT_USAGE => "usage",
            _ => "interrupted",
        };
        if !matches!(error, JobError::Output(_) | JobError::OutputOfBackup(_)) {
            // Nothing is left to do about an error here.
            let _ = self.object(&failure(outcome, &text));
        }
        complain(format_args!("diptych: {text}"));
    }
}

/// What JSON says of an error that is not a job's.
pub fn failure(outcome: &str, error: &str) -> Value {
    json!({"result": {"outcome": outcome, "error": error}})
}

/// An error and its causes.
pub fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

fn new_bar(id: &str) -> ProgressBar {
    let template = "{prefix} {bar:24} {percent:>3} % {bytes:>10} of {total_bytes}, {wide_msg}";
    let style =
        ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(0).with_style(style).with_prefix(clean(id))
}

/// Phase, rates and the time left.
fn state(followed: &Followed) -> String {
    let mut text = clean(followed.phase());
    let moves = matches!(followed.phase(), "copying" | "comparing" | "running");
    if let Some(rate) = followed.rate.per_second().filter(|_| moves) {
        text.push_str(&format!(", {}/s", size(rate)));
    }
    if let Some(left) = time_left(followed).filter(|_| moves) {
        text.push_str(&format!(", {} left", HumanDuration(left)));
    }
    if let Some(rate) = followed.job.dirty_rate {
        text.push_str(&format!(", the guest writes {}/s", size(rate)));
    }
    text
}

fn time_left(followed: &Followed) -> Option<Duration> {
    let job = &followed.job;
    followed
        .rate
        .time_for(job.total.saturating_sub(job.current))
}

/// How guests had to wait for a backup that fleeces, for after the time it took.
fn waits(fleecing: &Value) -> Option<String> {
    let longest = fleecing["longest-stall-ns"].as_u64()?;
    Some(match fleecing["stalls"].as_u64()? {
        0 => "; the guest never waited".to_owned(),
        count => format!(
            "; the guest waited {count} {}, {:.1} ms at most",
            if count == 1 { "time" } else { "times" },
            Duration::from_nanos(longest).as_secs_f64() * 1000.0
        ),
    })
}

/// Text of the server's, fit for a terminal.
pub fn clean(text: &str) -> String {
    printable(text, TEXT_MAX)
}

/// Bytes for people.
pub fn size(bytes: u64) -> HumanBytes {
    HumanBytes(bytes)
}

/// Whole percents: 100 only when nothing is left.
pub fn percent(current: u64, total: u64) -> u64 {
    if total == 0 {
        return 0;
    }
    let percent = u128::from(current.min(total)) * 100 / u128::from(total);
    u64::try_from(percent).unwrap_or(100)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guests_waits_are_told() {
        let of = |stalls: u64| waits(&json!({"stalls": stalls, "longest-stall-ns": 1_200_000}));
        assert_eq!(of(0).unwrap(), "; the guest never waited");
        assert_eq!(of(1).unwrap(), "; the guest waited 1 time, 1.2 ms at most");
        assert_eq!(of(3).unwrap(), "; the guest waited 3 times, 1.2 ms at most");
        assert_eq!(waits(&Value::Null), None);
    }

    #[test]
    fn percents_are_whole_and_bounded() {
        for (current, total, expected) in [
            (0, 0, 0),
            (1, 3, 33),
            (999, 1000, 99),
            (5, 4, 100),
            (u64::MAX - 1, u64::MAX, 99),
            (u64::MAX, u64::MAX, 100),
        ] {
            assert_eq!(percent(current, total), expected);
        }
    }
}
