//! `diptych restore`: makes an image of the backups that `diptych job backup` wrote.
//!
//! - [`output`]: the file or device that is written, which has its name only when it is whole
//!
//! No monitor is asked, and nothing of the server's is needed: a directory of backups is
//! enough. What it holds may be damaged or hostile; see [`crate::backup_set`].

mod output;

use std::io::{self, IsTerminal};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use serde_json::json;

use self::output::Output;
use crate::backup_set::manifest::utc;
use crate::backup_set::{Directory, Disk, Entry, Manifest, SetError, piece};
use crate::cli::EXIT_USAGE;
use crate::client::{Watch as _, printable};
use crate::job_client::{Interrupts, table, with_causes};
use crate::stdio::{complain, print_line};

/// How often progress is told in JSON, and looked at.
const JSON_INTERVAL: Duration = Duration::from_secs(1);
/// Characters of a manifest's that are shown at most.
const TEXT_MAX: usize = 1000;

const EXIT_STATUS: &str = "\
Exit status:
  0      done
  1      a backup is damaged or missing, or the target cannot be written: a line on
         stderr names it, and there is no target (but for a device, see above)
  2      a mistake on the command line
  128+N  ended by signal N; there is no target";

/// Arguments of `diptych restore`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXIT_STATUS)]
pub struct RestoreArgs {
    /// The directory of the backups
    #[arg(value_name = "DIR")]
    from: PathBuf,

    /// The image to make: a raw file, sparse, which has this name only when all of it has
    /// been verified; or a block device, for which everything is verified before it is written
    #[arg(
        value_name = "TARGET",
        required_unless_present_any = ["list", "verify"],
        conflicts_with_all = ["list", "verify"]
    )]
    target: Option<PathBuf>,

    /// Which disk, if the directory has backups of several
    #[arg(long, value_name = "NAME")]
    disk: Option<String>,

    /// What the disk held at this point (the last one that is not after it) [default: the
    /// last one]
    #[arg(long, value_name = "NUMBER")]
    point: Option<u64>,

    /// List the backups
    #[arg(long, conflicts_with = "verify")]
    list: bool,

    /// Read the backups that would be restored, and look at their hashes
    #[arg(long)]
    verify: bool,

    /// Take the place of a file that is there, or write a block device
    #[arg(long)]
    force: bool,

    /// Print one JSON object per line
    #[arg(long)]
    json: bool,
}

/// Why there is no image.
#[derive(Debug, thiserror::Error)]
enum RestoreError {
    /// The directory, or what is in it.
    #[error(transparent)]
    Set(#[from] SetError),
    /// No such disk.
    #[error("There is no backup of disk '{wanted}'; there are: {there}")]
    NoDisk {
        /// What was asked for.
        wanted: String,
        /// What could be.
        there: String,
    },
    /// It does not say which.
    #[error("There are backups of several disks, name one with --disk: {0}")]
    WhichDisk(String),
    /// No such point.
    #[error("Disk '{disk}' has no backup of point {point} or before; see --list")]
    NoPoint {
        /// The disk.
        disk: String,
        /// What was asked for.
        point: u64,
    },
    /// The target is there.
    #[error("'{}' is there already: give --force to have its place taken", .0.display())]
    Exists(PathBuf),
    /// The target is a device.
    #[error("'{}' is a block device: give --force to have it overwritten", .0.display())]
    Device(PathBuf),
    /// The target is a part of the backups.
    #[error("'{}' is a file of the backups", .0.display())]
    Own(PathBuf),
    /// A program has the target open.
    #[error(
        "'{}' is in use by another program: end that, or take its disk out of it, first",
        .0.display()
    )]
    InUse(PathBuf),
    /// The target is neither.
    #[error("'{}' is neither a regular file nor a block device", .0.display())]
    WrongKind(PathBuf),
    /// The device is too small.
    #[error("'{path}' has {has} bytes, the disk {wanted}", path = path.display())]
    TooSmall {
        /// The device.
        path: PathBuf,
        /// Its size.
        has: u64,
        /// The disk's.
        wanted: u64,
    },
    /// The target cannot be written.
    #[error("Cannot {what} '{path}'", path = path.display())]
    Target {
        /// What was to be done.
        what: &'static str,
        /// The target.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Nobody reads what is printed.
    #[error("Cannot print")]
    Print(#[source] io::Error),
    /// Signals cannot be listened for.
    #[error("Cannot listen for signals")]
    Signals(#[source] io::Error),
}

/// Runs the subcommand. Failures are told here, since they differ in the exit status.
pub fn main(args: &RestoreArgs) -> ExitCode {
    let mut interrupts = match Interrupts::new() {
        Ok(interrupts) => interrupts,
        Err(error) => return failed(args, &RestoreError::Signals(error)),
    };
    match run(args, &mut interrupts) {
        Ok(()) => ExitCode::SUCCESS,
        Err(RestoreError::Set(SetError::Interrupted)) => {
            complain(format_args!("diptych: Interrupted"));
            ExitCode::from(128_u8.saturating_add(interrupts.last().number()))
        }
        Err(error) => failed(args, &error),
    }
}

fn failed(args: &RestoreArgs, error: &RestoreError) -> ExitCode {
    let text = printable(&with_causes(error), TEXT_MAX);
    let is_usage = matches!(error, RestoreError::WhichDisk(_));
    if args.json && !matches!(error, RestoreError::Print(_)) {
        let outcome = if is_usage { "usage" } else { "failed" };
        // The status says the same.
        let _ = print_line(&json!({"result": {"outcome": outcome, "error": text}}).to_string());
    }
    complain(format_args!("diptych: {text}"));
    match is_usage {
        true => ExitCode::from(EXIT_USAGE),
        false => ExitCode::FAILURE,
    }
}

fn run(args: &RestoreArgs, interrupts: &mut Interrupts) -> Result<(), RestoreError> {
    let directory = Directory::open(&args.from);
    let manifest = directory.manifest()?;
    let manifest = manifest.ok_or_else(|| SetError::NoManifest(args.from.clone()))?;
    if args.list {
        return list(args, &manifest);
    }
    let disk = find_disk(args, &manifest)?;
    let chain = disk
        .chain(args.point)
        .ok_or_else(|| RestoreError::NoPoint {
            disk: disk.name.clone(),
            point: args.point.unwrap_or(0),
        })?;
    let mut work = Work {
        directory: &directory,
        disk,
        interrupts,
        progress: Progress::new(args.json),
    };
    let Some(target) = &args.target else {
        work.verify(&chain)?;
        return work.tell(&chain, None);
    };
    let size = chain.last().map_or(0, |entry| entry.size);
    let mut output = Output::open(target, size, args.force, &directory, &manifest)?;
    if output.is_device() {
        // It cannot be taken back.
        work.verify(&chain)?;
        output.check_free()?;
    }
    work.write(&chain, &mut output)?;
    let is_device = output.is_device();
    output.finish()?;
    if is_device {
        // A file is another one by then; a device tells nobody that it was written.
        work.note(
            "Bitmaps of this disk do not know of what was restored: its next backup has to be a \
             full one",
        )?;
    }
    work.tell(&chain, Some(target))
}

fn find_disk<'a>(args: &RestoreArgs, manifest: &'a Manifest) -> Result<&'a Disk, RestoreError> {
    match (&args.disk, manifest.disks.as_slice()) {
        (_, []) => Err(SetError::Empty(args.from.clone()).into()),
        (Some(wanted), _) => disk_named(wanted, manifest),
        (None, [disk]) => Ok(disk),
        (None, _) => Err(RestoreError::WhichDisk(names(manifest))),
    }
}

fn disk_named<'a>(wanted: &str, manifest: &'a Manifest) -> Result<&'a Disk, RestoreError> {
    manifest.disk(wanted).ok_or_else(|| RestoreError::NoDisk {
        wanted: wanted.to_owned(),
        there: names(manifest),
    })
}

fn names(manifest: &Manifest) -> String {
    let names = manifest.disks.iter().map(|disk| disk.name.as_str());
    names.collect::<Vec<_>>().join(", ")
}

const HEAD: [&str; 7] = ["DISK", "POINT", "KIND", "ON", "TIME", "SIZE", "DATA"];

fn list(args: &RestoreArgs, manifest: &Manifest) -> Result<(), RestoreError> {
    let mut rows = vec![HEAD.map(str::to_owned)];
    let disks = match &args.disk {
        Some(wanted) => std::slice::from_ref(disk_named(wanted, manifest)?),
        None => manifest.disks.as_slice(),
    };
    for disk in disks {
        for entry in &disk.entries {
            if args.json {
                let object = json!({"backup": {
                    "disk": disk.name,
                    "point": entry.point,
                    "kind": entry.kind.name(),
                    "parent": entry.parent,
                    "time": utc(entry.time),
                    "size": entry.size,
                    "data-bytes": entry.data_bytes,
                    "file": entry.file,
                }});
                print_line(&object.to_string()).map_err(RestoreError::Print)?;
            }
            rows.push([
                printable(&disk.name, TEXT_MAX),
                entry.point.to_string(),
                entry.kind.name().to_owned(),
                entry
                    .parent
                    .map_or("-".to_owned(), |point| point.to_string()),
                utc(entry.time),
                HumanBytes(entry.size).to_string(),
                HumanBytes(entry.data_bytes).to_string(),
            ]);
        }
    }
    if !args.json {
        for line in table(&rows) {
            print_line(&line).map_err(RestoreError::Print)?;
        }
    }
    Ok(())
}

struct Work<'a> {
    directory: &'a Directory,
    disk: &'a Disk,
    interrupts: &'a mut Interrupts,
    progress: Progress,
}

impl Work<'_> {
    /// Reads the backups and looks at their hashes.
    fn verify(&mut self, chain: &[&Entry]) -> Result<(), RestoreError> {
        self.go_through(chain, "verifying", |_, _| Ok(()))
    }

    /// Writes what the disk held, and looks at the hashes.
    fn write(&mut self, chain: &[&Entry], output: &mut Output) -> Result<(), RestoreError> {
        self.go_through(chain, "restoring", |part, is_first| {
            output.put(part, is_first).map_err(|source| SetError::Io {
                what: "write",
                path: output.path().to_owned(),
                source,
            })
        })
    }

    fn go_through(
        &mut self,
        chain: &[&Entry],
        phase: &'static str,
        mut put: impl FnMut(&piece::Part<'_>, bool) -> Result<(), SetError>,
    ) -> Result<(), RestoreError> {
        let len = |range: &Range<u64>| range.end - range.start;
        // What is missing is found before anything is read. Nothing is kept: a chain may be
        // longer than what may be open, and lists be long.
        let mut total: u64 = 0;
        for entry in chain {
            self.interrupts.check().map_err(|_| SetError::Interrupted)?;
            self.directory.open_piece(entry)?;
            let ranges = self.directory.ranges(entry)?;
            total = ranges.iter().map(len).fold(total, u64::saturating_add);
        }
        self.progress.begin(phase, total);
        for (index, entry) in chain.iter().enumerate() {
            let ranges = self.directory.ranges(entry)?;
            let file = self.directory.open_piece(entry)?;
            let path = self.directory.join(&entry.file);
            let (progress, interrupts) = (&mut self.progress, &mut *self.interrupts);
            let found = piece::read(&file, &path, &ranges, |part| {
                interrupts.check().map_err(|_| SetError::Interrupted)?;
                put(&part, index == 0)?;
                progress.add(match &part {
                    piece::Part::Zeroes(range) => len(range),
                    piece::Part::Data(_, bytes) => bytes.len() as u64,
                });
                Ok(())
            })?;
            if found.sha256 != entry.sha256 {
                let why = "its hash is another one than the manifest has".to_owned();
                return Err(SetError::BadPiece { path, why }.into());
            }
        }
        Ok(())
    }

    fn note(&self, text: &str) -> Result<(), RestoreError> {
        self.progress.clear();
        if self.progress.json {
            return print_line(&json!({"note": text}).to_string()).map_err(RestoreError::Print);
        }
        complain(format_args!("diptych: {text}"));
        Ok(())
    }

    fn tell(&mut self, chain: &[&Entry], target: Option<&Path>) -> Result<(), RestoreError> {
        self.progress.clear();
        let Some(last) = chain.last() else {
            return Ok(());
        };
        let points: Vec<u64> = chain.iter().map(|entry| entry.point).collect();
        let line = if self.progress.json {
            json!({"result": {
                "outcome": if target.is_some() { "restored" } else { "verified" },
                "disk": self.disk.name,
                "point": last.point,
                "points": points,
                // A name that is not in UTF-8 cannot be told as it is.
                "target": target.map(Path::to_string_lossy),
                "size": last.size,
            }})
            .to_string()
        } else {
            let name = printable(&self.disk.name, TEXT_MAX);
            let of = format!(
                "point {} of {} ({} {})",
                last.point,
                utc(last.time),
                points.len(),
                if points.len() == 1 { "file" } else { "files" }
            );
            match target {
                Some(target) => format!("{name}: {of} restored to {}", target.display()),
                None => format!("{name}: {of} verified"),
            }
        };
        print_line(&line).map_err(RestoreError::Print)
    }
}

/// Tells how far it is: a bar where stderr is a terminal, JSON, or nothing.
struct Progress {
    json: bool,
    bar: Option<ProgressBar>,
    phase: &'static str,
    done: u64,
    total: u64,
    told: Instant,
}

impl Progress {
    fn new(json: bool) -> Self {
        let bar = (!json && io::stderr().is_terminal()).then(|| {
            let template =
                "{prefix} {bar:24} {percent:>3} % {bytes:>10} of {total_bytes}, {bytes_per_sec}";
            let style = ProgressStyle::with_template(template);
            ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        });
        Self {
            json,
            bar,
            phase: "",
            done: 0,
            total: 0,
            told: Instant::now(),
        }
    }

    fn begin(&mut self, phase: &'static str, total: u64) {
        (self.phase, self.done, self.total) = (phase, 0, total);
        if let Some(bar) = &self.bar {
            bar.set_prefix(phase);
            bar.set_length(total);
            bar.set_position(0);
        }
    }

    fn add(&mut self, len: u64) {
        self.done = self.done.saturating_add(len);
        if let Some(bar) = &self.bar {
            bar.set_position(self.done);
        }
        if self.json && self.told.elapsed() >= JSON_INTERVAL {
            self.told = Instant::now();
            let progress = json!({"progress": {
                "phase": self.phase, "current": self.done, "total": self.total,
            }});
            // The result tells whether anybody reads.
            let _ = print_line(&progress.to_string());
        }
    }

    fn clear(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
