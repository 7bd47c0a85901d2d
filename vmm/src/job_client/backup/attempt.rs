//! What a backup has on the server and in the directory until it is whole.

use std::fs::{self, File};
use std::ops::Range;
use std::path::PathBuf;
use std::time::Instant;

use serde_json::{Value, json};

use super::super::error::JobError;
use super::super::follow::HISTORY;
use super::super::report::{Report, size};
use super::super::server::Server;
use super::super::size::Size;
use super::super::target::free_node_name;
use super::super::verbs;
use super::disks::{self, DiskState};
use super::{BackupArgs, States};
use crate::backup_set::manifest::{JobResult, RangesFile};
use crate::backup_set::names::{self, PARTIAL};
use crate::backup_set::piece::{self, Digest};
use crate::backup_set::{Directory, Entry, Kind, Manifest, SetError, ranges};
use crate::client::{ClientError, Watch as _};

/// More data than that is told before it is read again.
const MUCH: u64 = 1 << 30;

/// See the module.
pub struct Attempt<'a> {
    directory: &'a Directory,
    kind: Kind,
    point: u64,
    disks: Vec<DiskAttempt<'a>>,
    /// The transaction may have been carried out.
    started: bool,
    /// The server keeps the new bitmaps when it ends.
    persistent: bool,
}

struct DiskAttempt<'a> {
    state: &'a DiskState,
    parent: Option<u64>,
    stem: String,
    job_id: String,
    /// Names, without the end of what is not whole.
    file: String,
    ranges_file: String,
    /// The bitmap that begins at the instant.
    bitmap: String,
    /// The bitmap that says what is copied.
    part: Option<String>,
    /// Its files, as far as they are there, and the target's node.
    created: Vec<PathBuf>,
    node: Option<String>,
    /// What was copied.
    ranges: Option<Vec<Range<u64>>>,
    digest: Option<Digest>,
}

impl<'a> Attempt<'a> {
    /// Chooses names; nothing is there yet.
    ///
    /// Errors: the directory cannot be read.
    pub fn new(
        args: &BackupArgs,
        directory: &'a Directory,
        manifest: &Manifest,
        states: &'a States,
    ) -> Result<Self, SetError> {
        let (kind, point) = (args.kind(), directory.next_point(manifest)?);
        let mut stems = Vec::new();
        let disks = states.iter().map(|state| {
            let stem = manifest.stem(&state.name, &stems);
            stems.push(stem.clone());
            let last = manifest
                .disk(&state.name)
                .and_then(|disk| disk.entries.last());
            let parent = last.filter(|_| kind == Kind::Incremental);
            // Disks may swap their names: the bitmap of another disk is not this one's.
            let bitmap = format!("{}{stem}-{point}", disks::prefix(manifest));
            DiskAttempt {
                parent: parent.map(|entry| entry.point),
                job_id: args.job_id(&state.name),
                file: names::data(&stem, point, kind),
                ranges_file: names::ranges(&stem, point, kind),
                part: parent.map(|_| format!("{bitmap}-part")),
                bitmap,
                stem,
                state,
                created: Vec::new(),
                node: None,
                ranges: None,
                digest: None,
            }
        });
        Ok(Self {
            disks: disks.collect(),
            directory,
            kind,
            point,
            started: false,
            persistent: false,
        })
    }

    /// The ids of the jobs.
    pub fn job_ids(&self) -> Vec<String> {
        self.disks.iter().map(|disk| disk.job_id.clone()).collect()
    }

    /// Makes the files and their nodes.
    pub fn prepare(&mut self, server: &mut Server) -> Result<(), JobError> {
        let mut nodes = server.nodes()?;
        for disk in &mut self.disks {
            let path = self.directory.create_partial(&disk.file, disk.state.size)?;
            disk.created.push(path.clone());
            let name = free_node_name(&disk.job_id, &nodes);
            let options = json!({
                "driver": "raw",
                "node-name": name,
                "discard": "unmap",
                "file": {"driver": "file", "filename": path, "discard": "unmap"},
            });
            server.run("blockdev-add", options)?;
            disk.node = Some(name);
            // The next one has another name.
            nodes = server.nodes()?;
        }
        Ok(())
    }

    /// Starts the jobs, with bitmaps that begin at the same instant.
    pub fn start(
        &mut self,
        args: &BackupArgs,
        server: &mut Server,
        report: &mut Report,
    ) -> Result<(), JobError> {
        match self.carry_out(args, true, server) {
            Ok(()) => {
                self.persistent = true;
                Ok(())
            }
            Err(error) if self.started => Err(error),
            // Nothing was done. Perhaps this server keeps no bitmaps of such disks.
            Err(error) => {
                self.carry_out(args, false, server)?;
                report.note(&format!(
                    "The server does not keep the bitmaps when it ends: after that, the next \
                     backup has to be a full one ({error})"
                ))
            }
        }
    }

    fn carry_out(
        &mut self,
        args: &BackupArgs,
        persistent: bool,
        server: &mut Server,
    ) -> Result<(), JobError> {
        let actions = self.actions(args, persistent)?;
        let answer = server.run("transaction", json!({"actions": actions}));
        // Only a refusal says that nothing was done, and that a job of the same id is
        // somebody else's; unless what could not be done is to make it last.
        self.started = match &answer {
            Err(JobError::Client(ClientError::Refused { .. })) => {
                let there = self
                    .disks
                    .iter()
                    .map(|disk| disks::has_bitmap(&disk.state.node, &disk.bitmap, server));
                // Nobody knows: then it is looked for.
                there
                    .collect::<Result<Vec<_>, _>>()
                    .map_or(true, |there| there.contains(&true))
            }
            _ => true,
        };
        answer.map(drop)
    }

    fn actions(&self, args: &BackupArgs, persistent: bool) -> Result<Vec<Value>, JobError> {
        let mut bitmaps = Vec::new();
        let mut backups = Vec::new();
        for disk in &self.disks {
            let node = &disk.state.node;
            let mut new = json!({"node": node, "name": disk.bitmap, "persistent": persistent});
            if let Some(Size(granularity)) = args.granularity {
                new["granularity"] = granularity.into();
            }
            bitmaps.push(json!({"type": "block-dirty-bitmap-add", "data": new}));
            let mut backup = args.job_arguments()?;
            backup["job-id"] = disk.job_id.as_str().into();
            backup["device"] = node.as_str().into();
            backup["target"] = disk.node.as_deref().unwrap_or_default().into();
            backup["sync"] = "full".into();
            if let (Some(part), Some(last)) = (&disk.part, &disk.state.last_bitmap) {
                let known = disk.state.bitmaps.iter().find(|it| it.name == *last);
                let part_bitmap = json!({
                    "node": node, "name": part, "disabled": true,
                    "granularity": known.map(|bitmap| bitmap.granularity),
                });
                bitmaps.push(json!({"type": "block-dirty-bitmap-add", "data": part_bitmap}));
                let merge = json!({"node": node, "target": part, "bitmaps": [last]});
                bitmaps.push(json!({"type": "block-dirty-bitmap-merge", "data": merge}));
                backup["sync"] = "bitmap".into();
                backup["bitmap"] = part.as_str().into();
                backup["bitmap-mode"] = "never".into();
            }
            backups.push(json!({"type": "blockdev-backup", "data": backup}));
        }
        bitmaps.extend(backups);
        Ok(bitmaps)
    }

    /// Says which requests of the jobs failed, if the server knows: the error of a job names
    /// neither file nor place.
    pub fn explain(&self, server: &mut Server, report: &mut Report) -> Result<(), JobError> {
        if !server.has(HISTORY) {
            return Ok(());
        }
        let history = server.run(HISTORY, json!({}))?;
        let ended = history.as_array().map(Vec::as_slice).unwrap_or_default();
        for disk in &self.disks {
            let last = ended.iter().rev().find(|job| job["id"] == *disk.job_id);
            let Some(last) = last.filter(|job| job["result"] == "failed") else {
                continue;
            };
            let (Some(operation), Some(offset), Some(error)) = (
                last["operation"].as_str(),
                last["offset"].as_u64(),
                last["error"].as_str(),
            ) else {
                continue;
            };
            let what = match operation {
                "write" => format!("'{}'", self.directory.join(&disk.file).display()),
                _ => format!("disk '{}'", disk.state.name),
            };
            report.note(&format!(
                "Job '{}' could not {operation} {what} at {offset}: {error}",
                disk.job_id
            ))?;
        }
        Ok(())
    }

    /// Takes what the jobs have made from the server, and reads it.
    pub fn collect(&mut self, server: &mut Server, report: &mut Report) -> Result<(), JobError> {
        for disk in &mut self.disks {
            let size_of_disk = disk.state.size;
            if let Some(part) = &disk.part {
                let ranges = disks::ranges(&disk.state.node, part, size_of_disk, server)?;
                disk.ranges = Some(ranges);
            }
            if let Some(node) = &disk.node {
                disks::remove_node(node, server)?;
                disk.node = None;
            }
            let path = self.directory.join(&format!("{}{PARTIAL}", disk.file));
            let failed = || SetError::io("read", &path);
            let file = File::open(&path).map_err(failed())?;
            let metadata = file.metadata().map_err(failed())?;
            if metadata.len() != size_of_disk {
                let why = format!("it has {} bytes, not {size_of_disk}", metadata.len());
                return Err(SetError::BadPiece { path, why }.into());
            }
            let allocated = std::os::unix::fs::MetadataExt::blocks(&metadata).saturating_mul(512);
            if allocated > MUCH {
                report.note(&format!(
                    "Reading {} of '{}' for its hash",
                    size(allocated),
                    disk.file
                ))?;
            }
            let all = (size_of_disk > 0).then_some(0..size_of_disk);
            let all: Vec<Range<u64>> = all.into_iter().collect();
            let ranges = disk.ranges.as_deref().unwrap_or(&all);
            let interrupts = server.interrupts();
            let digest = piece::read(&file, &path, ranges, |_| {
                interrupts.check().map_err(|_| SetError::Interrupted)
            })?;
            file.sync_all().map_err(SetError::io("write", &path))?;
            disk.digest = Some(digest);
        }
        Ok(())
    }

    /// Writes the manifest that knows the files by their last names, which they do not have
    /// yet, under a name that is not its last one, which it gives. `manifest` is that one
    /// then.
    ///
    /// Errors: the backup does not count; [`take_down`](Self::take_down) removes it.
    pub fn note(
        &mut self,
        manifest: &mut Manifest,
        (begun, time): (Instant, u64),
    ) -> Result<PathBuf, JobError> {
        let milliseconds = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        for disk in &mut self.disks {
            let Some(digest) = disk.digest.take() else {
                continue;
            };
            let mut listed = None;
            if let Some(held) = disk.ranges.take() {
                let text = ranges::to_text(&held);
                if text.len() as u64 > ranges::MAX_BYTES {
                    let path = self.directory.join(&disk.ranges_file);
                    let why = "it would be too long: take a full backup".to_owned();
                    return Err(SetError::BadRanges { path, why }.into());
                }
                let written = self
                    .directory
                    .write_partial(&disk.ranges_file, text.as_bytes())?;
                disk.created.push(written);
                self.directory.check_free(&disk.ranges_file)?;
                listed = Some(RangesFile {
                    sha256: piece::sha256(text.as_bytes()),
                    count: held.len() as u64,
                    bytes: held.iter().map(|range| range.end - range.start).sum(),
                    file: disk.ranges_file.clone(),
                });
            }
            self.directory.check_free(&disk.file)?;
            let entry = Entry {
                point: self.point,
                kind: self.kind,
                parent: disk.parent,
                time,
                size: disk.state.size,
                file: disk.file.clone(),
                sha256: digest.sha256,
                data_bytes: digest.data_bytes,
                bitmap: disk.bitmap.clone(),
                bitmap_persistent: self.persistent,
                job: JobResult {
                    id: disk.job_id.clone(),
                    result: "completed".to_owned(),
                    bytes: listed
                        .as_ref()
                        .map_or(disk.state.size, |ranges| ranges.bytes),
                    milliseconds,
                },
                ranges: listed,
            };
            manifest.add(&disk.state.name, &disk.stem, entry);
        }
        Ok(self.directory.write_manifest(manifest)?)
    }

    /// The bitmaps (of a node) that nobody needs any more when the backup counts.
    pub fn old_bitmaps(self) -> Vec<(String, String)> {
        let mut old = Vec::new();
        for disk in self.disks {
            let node = &disk.state.node;
            old.extend(disk.part.map(|part| (node.clone(), part)));
            let last = disk.state.last_bitmap.clone();
            let is_there = |name: &String| disk.state.bitmaps.iter().any(|it| it.name == *name);
            old.extend(last.filter(is_there).map(|last| (node.clone(), last)));
        }
        old
    }

    /// Takes everything away that is there.
    ///
    /// Errors: the first of those of the steps, all of which are tried.
    pub fn take_down(&mut self, server: &mut Server) -> Result<(), JobError> {
        let mut first = Ok(());
        let mut note = |result: Result<(), JobError>| {
            if first.is_ok() {
                first = result;
            }
        };
        if self.started {
            let jobs = server.jobs();
            let running = |id: &str| {
                let jobs = jobs.as_ref().map(Vec::as_slice).unwrap_or_default();
                jobs.iter().any(|job| job.id == id && job.kind == "backup")
            };
            for disk in self.disks.iter().filter(|disk| running(&disk.job_id)) {
                // It ends by itself, too; then its node can be taken away.
                let _ = verbs::ask_to_cancel(server, &disk.job_id, true);
            }
            note(jobs.map(drop));
        }
        for disk in &mut self.disks {
            if let Some(node) = &disk.node {
                let removed = disks::remove_node(node, server);
                if removed.is_ok() {
                    disk.node = None;
                }
                note(removed);
            }
            if self.started {
                for name in [Some(&disk.bitmap), disk.part.as_ref()]
                    .into_iter()
                    .flatten()
                {
                    match disks::remove_bitmap(&disk.state.node, name, server) {
                        // There is none if the transaction was refused.
                        Err(JobError::Client(ClientError::Refused { class, desc, .. }))
                            if class == "GenericError" && desc.contains("not found") => {}
                        removed => note(removed),
                    }
                }
            }
            // What somebody may be writing is left until nobody does.
            if disk.node.is_none() {
                for path in disk.created.drain(..) {
                    note(
                        fs::remove_file(&path)
                            .map_err(|source| SetError::io("remove", &path)(source).into()),
                    );
                }
            }
        }
        first
    }
}
