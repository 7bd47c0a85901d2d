//! `diptych job backup`: full and incremental backups of disks at one instant, into a
//! directory that keeps account of them.
//!
//! - [`disks`]: what the server has of the disks, and whether an incremental backup can
//!   follow the last one
//! - [`attempt`]: what a backup has on the server and in the directory until it is whole,
//!   and its removal
//!
//! What makes this safe whatever ends when: each backup begins a bitmap of its own, which
//! is named after it, at the same instant; the bitmap of the one before goes on recording,
//! and is only removed when the manifest knows the new one. So the bitmap of the last
//! backup in the manifest always has all that was written since. What a backup has left
//! that did not end is in no manifest, and the next one removes it.

mod attempt;
mod disks;

use std::path::PathBuf;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use self::attempt::Attempt;
use self::disks::DiskState;
use super::error::JobError;
use super::follow::{Ending, Follower};
use super::mirror::{ON_ERROR, id_for};
use super::report::{Report, clean, size, with_causes};
use super::server::Server;
use super::size::Size;
use super::{status, verbs};
use crate::backup_set::{Directory, Kind, Manifest, SetError, manifest};

/// What the process ends with.
pub const EXIT_STATUS: &str = "\
Exit status:
  0      done: the backups of all disks are whole
  1      a job failed, or something was refused; a line on stderr says why
  2      a mistake on the command line
  3      the backup was cancelled: by Ctrl-C (SIGINT, SIGTERM, SIGHUP), or by somebody else
  4      no connection, or it or stdout was lost
  128+N  ended by signal N before anything had begun

But for 0 there is no backup, and what was made for it is taken away again; what could not
be is removed by the next one. (4 because of stdout: `diptych restore DIR --list` tells.)";

/// Arguments of `job backup`.
#[derive(Debug, clap::Args)]
pub struct BackupArgs {
    /// What to back up: guests' disks or nodes, all of them as they are at one instant
    #[arg(required = true, value_name = "DISK")]
    disks: Vec<String>,

    /// The directory of the backups, which is made if it is not there. The server has to
    /// run on the same host and be allowed to write files in it
    #[arg(long, value_name = "DIR")]
    to: PathBuf,

    /// Only what was written since the last backup in the directory. Without it: all
    #[arg(long)]
    incremental: bool,

    /// Read the files that an incremental backup stands on, and look at their hashes,
    /// before it begins
    #[arg(long, requires = "incremental")]
    verify: bool,

    /// Save what the guest is about to change into a file without a name in this
    /// directory, so that it never waits for the backup's. It should be as fast as the disk
    #[arg(long, value_name = "DIR")]
    fleecing: Option<PathBuf>,

    /// The job's id; with several disks, its beginning [default: backup- and the disk]
    #[arg(long, value_name = "ID")]
    job_id: Option<String>,

    /// Most bytes per second to copy of each disk, as 100M
    #[arg(long, value_name = "SIZE")]
    speed: Option<Size>,

    /// How long a request of the guest waits for its copy, before the backup fails instead
    /// (0: for ever) [default: 10 with --fleecing]
    #[arg(long, value_name = "SECONDS")]
    cbw_timeout: Option<u32>,

    /// What an error of a disk does
    #[arg(long, value_name = "ACTION", value_parser = ON_ERROR)]
    on_source_error: Option<String>,

    /// What an error of a backup's file does
    #[arg(long, value_name = "ACTION", value_parser = ON_ERROR)]
    on_target_error: Option<String>,

    /// Bytes that one bit of a new bitmap stands for [default: the server's, often 64K]
    #[arg(long, value_name = "SIZE")]
    granularity: Option<Size>,
}

impl BackupArgs {
    /// What clap does not see.
    pub fn check(&self) -> Result<(), JobError> {
        let mut disks = self.disks.clone();
        disks.sort();
        disks.dedup();
        if disks.len() != self.disks.len() || disks.iter().any(String::is_empty) {
            let text = "A disk is named twice, or has no name";
            return Err(JobError::Usage(text.to_owned()));
        }
        Ok(())
    }

    fn kind(&self) -> Kind {
        match self.incremental {
            true => Kind::Incremental,
            false => Kind::Full,
        }
    }

    fn job_id(&self, disk: &str) -> String {
        match &self.job_id {
            Some(id) if self.disks.len() == 1 => id.clone(),
            Some(id) => id_for(id, disk),
            None => id_for("backup", disk),
        }
    }

    /// The arguments of a job, but for disk and target.
    fn job_arguments(&self) -> Result<Value, JobError> {
        let mut arguments = json!({});
        let text = |value: &Option<String>| value.clone().map(Value::from);
        let fleecing = self.fleecing.as_ref().map(|directory| {
            // The server has another current directory.
            let path = std::path::absolute(directory).unwrap_or_else(|_| directory.clone());
            let text = path.to_str().ok_or_else(|| {
                JobError::Usage("The directory for --fleecing is not in UTF-8".to_owned())
            })?;
            Ok::<_, JobError>(json!({"directory": text}))
        });
        // Who gives a bound wants the guest to go on.
        let policy = self.cbw_timeout.map(|_| Value::from("break-snapshot"));
        let optional = [
            ("speed", self.speed.map(|Size(size)| Value::from(size))),
            ("on-source-error", text(&self.on_source_error)),
            ("on-target-error", text(&self.on_target_error)),
            ("on-cbw-error", policy),
            ("cbw-timeout", self.cbw_timeout.map(Value::from)),
            ("fleecing", fleecing.transpose()?),
        ];
        for (name, value) in optional {
            if let Some(value) = value {
                arguments[name] = value;
            }
        }
        Ok(arguments)
    }
}

/// `job backup`
pub fn run(args: &BackupArgs, server: &mut Server, report: &mut Report) -> Result<u8, JobError> {
    for command in ["transaction", "blockdev-backup", "block-dirty-bitmap-add"] {
        if !server.has(command) {
            return Err(JobError::NoCommand(vec![command]));
        }
    }
    if args.incremental && !server.has(disks::RANGES) {
        return Err(JobError::NoCommand(vec![disks::RANGES]));
    }
    // Both are diptych's own; an argument cannot be asked for as a command can.
    if args.fleecing.is_some() && !server.has(disks::RANGES) {
        return Err(JobError::NoFleecing);
    }
    let directory = Directory::lock(&args.to)?;
    if directory.path().to_str().is_none() {
        return Err(JobError::Usage(format!(
            "Directory '{}' is not in UTF-8, as a monitor wants it",
            directory.path().display()
        )));
    }
    let mut manifest = directory.manifest_or_new(random_name)?;
    let states = disks::look(&args.disks, &directory, &manifest, server)?;
    let names = args.disks.iter().map(String::as_str);
    manifest.check_room(names).map_err(|why| SetError::Full {
        path: directory.join(manifest::NAME),
        why,
    })?;
    directory.complete(&manifest)?;
    disks::tidy(&states, &directory, &manifest, server)?;
    if args.incremental {
        for state in &states {
            disks::check_chain(state, &directory, &manifest, args.verify, server)?;
        }
    }
    for name in directory.strangers(&manifest)? {
        report.note(&format!(
            "File '{name}' is of no backup in the manifest, which may be an older one: remove it \
             if it is not needed"
        ))?;
    }
    // Half-done would leave something behind; every answer has its deadline.
    server.interrupts().defer();
    directory.begin(&manifest)?;
    let begun = (Instant::now(), seconds_since_1970());
    let mut attempt = Attempt::new(args, &directory, &manifest, &states)?;
    let made = make(args, &mut attempt, server, report);
    // Whatever came of it: what is left is taken down, also if a signal comes.
    server.interrupts().acknowledge();
    server.interrupts().defer();
    let kept = made.and_then(|made| {
        if let Made::Whole = made {
            let written = attempt.note(&mut manifest, begun)?;
            directory.put_manifest(&written)?;
        }
        Ok(made)
    });
    let old = match kept {
        // From now on it counts.
        Ok(Made::Whole) => {
            directory.sync()?;
            // The next backup does it, if this does not.
            if let Err(error) = directory.complete(&manifest) {
                report
                    .note(&with_causes(&error))
                    .map_err(JobError::of_backup)?;
            }
            attempt.old_bitmaps()
        }
        Ok(Made::Not(ending)) => {
            // How it ended is known without that, too.
            let _ = attempt.explain(server, report);
            attempt.take_down(server)?;
            return Ok(ending.status());
        }
        Err(error) => {
            // The first error is what the user has to know.
            if let Err(second) = attempt.take_down(server) {
                let text =
                    format!("Not everything could be taken down, the next backup does: {second}");
                let _ = report.note(&text);
            }
            return Err(error.of_backup());
        }
    };
    for (node, name) in old {
        // The next backup removes it, if this does not.
        if let Err(error) = disks::remove_bitmap(&node, &name, server) {
            report.note(&format!("Bitmap '{name}' is left for now: {error}"))?;
        }
    }
    tell(args, &manifest, report).map_err(JobError::of_backup)?;
    Ok(status::DONE)
}

/// What became of an attempt.
enum Made {
    /// Everything is there, under names that are not the last ones.
    Whole,
    /// A job did not end well.
    Not(Ending),
}

fn make(
    args: &BackupArgs,
    attempt: &mut Attempt<'_>,
    server: &mut Server,
    report: &mut Report,
) -> Result<Made, JobError> {
    attempt.prepare(server)?;
    attempt.start(args, server, report)?;
    server.interrupts().heed();
    let ending = follow(&attempt.job_ids(), server, report)?;
    if ending != Ending::Completed {
        return Ok(Made::Not(ending));
    }
    attempt.collect(server, report)?;
    Ok(Made::Whole)
}

/// Follows the jobs to their ends. If one does not end well the others are cancelled, and so
/// are all at a signal. Gives the worst of the ends.
fn follow(ids: &[String], server: &mut Server, report: &mut Report) -> Result<Ending, JobError> {
    let names = ids.iter().map(String::as_str);
    let mut follower = Follower::new(server, report, names);
    let mut stopped = false;
    loop {
        let followed = follower.run_until(|jobs| {
            let ended = |good: fn(&Ending) -> bool| {
                jobs.iter()
                    .filter(|job| job.ending().is_some_and(good))
                    .count()
            };
            ended(|_| true) == jobs.len()
                || (!stopped && ended(|ending| *ending != Ending::Completed) > 0)
        });
        match followed {
            Ok(()) => {}
            Err(JobError::Interrupted { .. }) if !stopped => {
                follower.server.interrupts().acknowledge();
                follower.report.note("Cancelling the backup")?;
            }
            Err(error) => return Err(error),
        }
        let left: Vec<String> = follower
            .jobs()
            .iter()
            .filter(|job| job.ending().is_none())
            .map(|job| job.job.id.clone())
            .collect();
        if left.is_empty() {
            break;
        }
        stopped = true;
        for id in left {
            match verbs::ask_to_cancel(follower.server, &id, true) {
                // It may just have ended.
                Ok(()) | Err(JobError::Client(crate::client::ClientError::Refused { .. })) => {}
                Err(error) => return Err(error),
            }
        }
    }
    let endings: Vec<Ending> = follower
        .jobs()
        .iter()
        .filter_map(|job| job.ending().cloned())
        .collect();
    let worst = |ending: &Ending| match ending {
        Ending::Failed(_) => 3,
        Ending::Gone => 2,
        Ending::Cancelled => 1,
        Ending::Completed => 0,
    };
    let ending = endings.into_iter().max_by_key(worst);
    Ok(ending.unwrap_or(Ending::Gone))
}

/// Tells what there is now.
fn tell(args: &BackupArgs, manifest: &Manifest, report: &mut Report) -> Result<(), JobError> {
    for name in &args.disks {
        let Some((disk, entry)) = manifest
            .disk(name)
            .and_then(|disk| Some((disk, disk.entries.last()?)))
        else {
            continue;
        };
        let path = args.to.join(&entry.file);
        report.object(&json!({"backup": {
            "disk": disk.name,
            "point": entry.point,
            "kind": entry.kind.name(),
            "parent": entry.parent,
            // A name that is not in UTF-8 cannot be told as it is.
            "file": path.to_string_lossy(),
            "size": entry.size,
            "data-bytes": entry.data_bytes,
            "ranges": entry.ranges.as_ref().map(|ranges| ranges.count),
            "bitmap": entry.bitmap,
            "bitmap-persistent": entry.bitmap_persistent,
        }}))?;
        let of = match &entry.ranges {
            Some(ranges) => format!(
                "{} in {} {}",
                size(ranges.bytes),
                ranges.count,
                if ranges.count == 1 { "range" } else { "ranges" }
            ),
            None => format!(
                "{} of data, {} in all",
                size(entry.data_bytes),
                size(entry.size)
            ),
        };
        report.line(&format!(
            "{}: point {}, {}, {of}: {}",
            clean(name),
            entry.point,
            entry.kind.name(),
            path.display()
        ))?;
    }
    Ok(())
}

fn seconds_since_1970() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |time| time.as_secs())
}

/// Eight random digits.
fn random_name() -> String {
    use std::hash::{BuildHasher as _, Hasher as _, RandomState};
    let number = RandomState::new().build_hasher().finish();
    format!("{:08x}", number & 0xffff_ffff)
}

/// The disks as the server has them when an attempt begins.
type States = [DiskState];

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        args: BackupArgs,
    }

    fn parse(words: &[&str]) -> Result<BackupArgs, clap::Error> {
        let line = [&["backup", "--to", "/b"], words].concat();
        Line::try_parse_from(line).map(|line| line.args)
    }

    #[test]
    fn only_what_was_said_is_asked_for() {
        let args = parse(&["d"]).unwrap();
        assert_eq!(args.job_arguments().unwrap(), json!({}));
        assert_eq!(args.job_id("#block1"), "backup-block1");
        let args = parse(&[
            "d",
            "e",
            "--speed=1M",
            "--fleecing=/f",
            "--cbw-timeout=3",
            "--job-id=j",
            "--on-source-error=stop",
            "--on-target-error=enospc",
        ]);
        let args = args.unwrap();
        assert_eq!(
            args.job_arguments().unwrap(),
            json!({
                "speed": 1 << 20, "fleecing": {"directory": "/f"}, "cbw-timeout": 3,
                "on-cbw-error": "break-snapshot", "on-source-error": "stop",
                "on-target-error": "enospc",
            })
        );
        assert_eq!(args.job_id("d"), "j-d");
    }

    #[test]
    fn wishes_that_make_no_sense_are_refused() {
        assert!(parse(&[]).is_err());
        assert!(parse(&["d", "--verify"]).is_err());
        assert!(parse(&["d", "d"]).unwrap().check().is_err());
        assert!(parse(&[""]).unwrap().check().is_err());
    }
}
