//! `diptych job compare`: whether two nodes hold the same.

use std::time::Instant;

use serde_json::{Value, json};

use super::error::JobError;
use super::follow::{Ending, Follower, Goal};
use super::mirror::{ON_ERROR, cancel, id_for};
use super::report::{Report, size};
use super::server::Server;
use super::size::Size;
use super::status;
use crate::client::ClientError;

/// Arguments of `job compare`.
#[derive(Debug, clap::Args)]
pub struct CompareArgs {
    /// What to compare: a guest's disk or a node
    #[arg(long, value_name = "NODE")]
    source: String,

    /// What to compare it with: a guest's disk or a node
    #[arg(long, value_name = "NODE")]
    target: String,

    /// A dirty bitmap of the source that has recorded what was written to it since it was
    /// the same as the target: since a backup was made, say. What is dirty in it is left out
    #[arg(long, value_name = "NAME")]
    bitmap: Option<String>,

    /// Do not wait. The job stays listed at its end, until `job dismiss`
    #[arg(long)]
    detach: bool,

    /// Ctrl-C (SIGINT, SIGTERM, SIGHUP) cancels the job. Without it the job goes on
    #[arg(long, conflicts_with = "detach")]
    cancel_on_interrupt: bool,

    /// The job's id [default: compare- and the source]
    #[arg(long, value_name = "ID")]
    job_id: Option<String>,

    /// Most bytes per second to read of each, as 100M
    #[arg(long, value_name = "SIZE")]
    speed: Option<Size>,

    /// What an error of the source does; ignore: the rest is compared, and the job fails
    /// at its end
    #[arg(long, value_name = "ACTION", value_parser = ON_ERROR)]
    on_source_error: Option<String>,

    /// What an error of the target does
    #[arg(long, value_name = "ACTION", value_parser = ON_ERROR)]
    on_target_error: Option<String>,

    /// How many differing ranges to list; all are counted
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(0..=1024))]
    max_differences: Option<u32>,
}

impl CompareArgs {
    fn command_arguments(&self, job_id: &str) -> Value {
        let mut arguments = json!({
            "job-id": job_id,
            "device": self.source,
            "target": self.target,
            // Its result is read when it has ended.
            "auto-dismiss": false,
        });
        let text = |value: &Option<String>| value.clone().map(Value::from);
        let optional = [
            ("bitmap", text(&self.bitmap)),
            ("speed", self.speed.map(|Size(size)| Value::from(size))),
            ("on-source-error", text(&self.on_source_error)),
            ("on-target-error", text(&self.on_target_error)),
            ("max-differences", self.max_differences.map(Value::from)),
        ];
        for (name, value) in optional {
            if let Some(value) = value {
                arguments[name] = value;
            }
        }
        arguments
    }
}

/// `job compare`
pub fn run(args: &CompareArgs, server: &mut Server, report: &mut Report) -> Result<u8, JobError> {
    let job_id = match &args.job_id {
        Some(id) => id.clone(),
        None => id_for("compare", &args.source),
    };
    server.run("blockdev-compare", args.command_arguments(&job_id))?;
    if args.detach {
        report.reached(&job_id, "started", "started")?;
        return Ok(status::DONE);
    }
    let begun = Instant::now();
    let mut follower = Follower::new(server, report, [job_id.as_str()]);
    let followed = follower.run(Goal::End);
    let job = follower.jobs().first().cloned();
    let (ending, found) = match followed {
        Ok(()) => (
            job.as_ref().and_then(|job| job.ending().cloned()),
            job.map(|job| job.job.raw["comparison"].clone()),
        ),
        Err(JobError::Interrupted { .. }) if args.cancel_on_interrupt => {
            report.note(&format!("Cancelling job '{job_id}'"))?;
            server.interrupts().acknowledge();
            (cancel(&job_id, begun, server, report)?, None)
        }
        Err(error) => return Err(error.leaving([job_id.as_str()])),
    };
    match server.run("job-dismiss", json!({"id": job_id})) {
        // Somebody else may have done it.
        Ok(_) | Err(JobError::Client(ClientError::Refused { .. })) => {}
        Err(error) => return Err(error),
    }
    let ending = ending.unwrap_or(Ending::Gone);
    if ending != Ending::Completed {
        return Ok(ending.status());
    }
    tell(&found.unwrap_or_default(), report)
}

/// Tells what a comparison that has ended well has found.
fn tell(found: &Value, report: &mut Report) -> Result<u8, JobError> {
    let (Some(differences), Some(true)) =
        (found["differences"].as_u64(), found["complete"].as_bool())
    else {
        return Err(JobError::Answer {
            command: "query-jobs",
        });
    };
    let skipped = match found["skipped-bytes"].as_u64() {
        Some(bytes) if bytes > 0 => {
            format!(", not counting {} that the bitmap leaves out", size(bytes))
        }
        _ => String::new(),
    };
    if differences == 0 {
        report.line(&format!("The nodes are the same{skipped}"))?;
        return Ok(status::DONE);
    }
    let bytes = found["differing-bytes"].as_u64().unwrap_or(0);
    let first = found["first-difference"].as_u64().unwrap_or(0);
    report.line(&format!(
        "The nodes differ in {differences} {} of {} in all, the first at byte {first}{skipped}",
        if differences == 1 { "range" } else { "ranges" },
        size(bytes),
    ))?;
    let ranges = found["ranges"].as_array().map(Vec::as_slice);
    for range in ranges.unwrap_or_default() {
        if let (Some(offset), Some(length)) = (range["offset"].as_u64(), range["length"].as_u64()) {
            report.line(&format!("  {length} bytes at {offset}"))?;
        }
    }
    Ok(status::DIFFERS)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        args: CompareArgs,
    }

    fn parse(words: &[&str]) -> Result<CompareArgs, clap::Error> {
        let line = [&["compare", "--source", "#block3", "--target", "t"], words].concat();
        Line::try_parse_from(line).map(|line| line.args)
    }

    #[test]
    fn only_what_was_said_is_asked_for() {
        let args = parse(&[]).unwrap();
        assert_eq!(
            args.command_arguments(&id_for("compare", &args.source)),
            json!({
                "job-id": "compare-block3", "device": "#block3", "target": "t",
                "auto-dismiss": false,
            })
        );
        let args = parse(&[
            "--bitmap=b0",
            "--speed=1M",
            "--on-source-error=stop",
            "--on-target-error=ignore",
            "--max-differences=0",
        ])
        .unwrap();
        assert_eq!(
            args.command_arguments("j"),
            json!({
                "job-id": "j", "device": "#block3", "target": "t", "auto-dismiss": false,
                "bitmap": "b0", "speed": 1 << 20, "on-source-error": "stop", "on-target-error": "ignore",
                "max-differences": 0,
            })
        );
        assert!(parse(&["--max-differences=1025"]).is_err());
    }

    #[test]
    fn the_status_tells_what_differs_from_what_is_not_known() {
        let mut report = Report::new(true);
        let mut tell = |found: Value| super::tell(&found, &mut report);
        let same = json!({"differences": 0, "complete": true});
        assert_eq!(tell(same).unwrap(), status::DONE);
        let other = json!({"differences": 2, "complete": true, "ranges": [3, {"offset": -1}]});
        assert_eq!(tell(other).unwrap(), status::DIFFERS);
        for nonsense in [
            json!({}),
            json!(null),
            json!({"differences": 0, "complete": false}),
        ] {
            assert_eq!(tell(nonsense).unwrap_err().status(), status::LOST);
        }
    }
}
