//! What the server has of the disks that are to be backed up, and whether an incremental
//! backup can follow the last one.

use std::collections::HashSet;
use std::ops::Range;

use serde_json::{Value, json};

use super::super::error::JobError;
use super::super::interrupt::Interrupts;
use super::super::server::Server;
use super::super::target;
use crate::backup_set::names;
use crate::backup_set::{Directory, Entry, Manifest, SetError, piece};
use crate::client::Watch as _;

/// The command that tells what a bitmap has set.
pub const RANGES: &str = "query-block-dirty-bitmap-ranges";
/// The command that tells of nodes.
const NODES: &str = "query-named-block-nodes";
/// Most ranges that a server may tell of.
const MAX_RANGES: usize = 1 << 26;

/// A disk.
#[derive(Clone, Debug)]
pub struct DiskState {
    /// As the user named it.
    pub name: String,
    /// The node that is copied.
    pub node: String,
    /// Its size in bytes.
    pub size: u64,
    /// Its bitmaps.
    pub bitmaps: Vec<Bitmap>,
    /// The bitmap of its last backup, by the manifest.
    pub last_bitmap: Option<String>,
}

/// A bitmap of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bitmap {
    pub name: String,
    pub granularity: u64,
    pub recording: bool,
    pub busy: bool,
    pub inconsistent: bool,
}

/// The beginning of the names of the bitmaps of a set.
pub fn prefix(manifest: &Manifest) -> String {
    format!("backup-{}-", manifest.set)
}

fn nodes(server: &mut Server) -> Result<Vec<Value>, JobError> {
    match server.run(NODES, json!({"flat": true}))? {
        Value::Array(rows) => Ok(rows),
        _ => Err(JobError::Answer { command: NODES }),
    }
}

/// Finds the disks.
///
/// Errors: one is not there.
pub fn look(
    names: &[String],
    directory: &Directory,
    manifest: &Manifest,
    server: &mut Server,
) -> Result<Vec<DiskState>, JobError> {
    let rows = nodes(server)?;
    let mut states: Vec<DiskState> = Vec::new();
    for name in names {
        let is_node = rows.iter().any(|row| row["node-name"] == name.as_str());
        let node = match is_node {
            true => name.clone(),
            false => match server.disk(name)? {
                Some(node) => node.name,
                None => return Err(JobError::NoSource(name.clone())),
            },
        };
        if states.iter().any(|state| state.node == node) {
            return Err(JobError::Usage(format!("Disk '{name}' is named twice")));
        }
        let row = rows.iter().find(|row| row["node-name"] == node.as_str());
        let row = row.ok_or(JobError::Answer { command: NODES })?;
        let size = row["image"]["virtual-size"].as_u64();
        let bitmaps = row["dirty-bitmaps"].as_array().map(Vec::as_slice);
        let last = manifest.disk(name).and_then(|disk| disk.entries.last());
        states.push(DiskState {
            name: name.clone(),
            node,
            size: size.ok_or(JobError::Answer { command: NODES })?,
            bitmaps: bitmaps
                .unwrap_or_default()
                .iter()
                .filter_map(bitmap)
                .collect(),
            last_bitmap: last.map(|entry| entry.bitmap.clone()),
        });
    }
    // What a backup reads must not be what it writes.
    for state in &states {
        let row = rows
            .iter()
            .find(|row| row["node-name"] == state.node.as_str());
        let file = row.and_then(|row| row["file"].as_str());
        if file.is_some_and(|file| is_partial_of(directory, file)) {
            return Err(JobError::NoSource(state.name.clone()));
        }
    }
    Ok(states)
}

/// Whether a file, as a server names it, is one of a backup into the directory that has not
/// ended.
fn is_partial_of(directory: &Directory, file: &str) -> bool {
    let own = directory.path().to_str().unwrap_or_default();
    file.strip_prefix(own)
        .and_then(|rest| rest.strip_prefix('/'))
        .is_some_and(names::is_partial)
}

fn bitmap(row: &Value) -> Option<Bitmap> {
    let flag = |name: &str| row[name].as_bool().unwrap_or(false);
    Some(Bitmap {
        name: row["name"].as_str()?.to_owned(),
        granularity: row["granularity"].as_u64()?,
        recording: flag("recording"),
        busy: flag("busy"),
        inconsistent: flag("inconsistent"),
    })
}

/// Takes away what backups into this directory have left on the server, and in it, that did
/// not end.
///
/// Errors: a job of one still runs.
pub fn tidy(
    states: &[DiskState],
    directory: &Directory,
    manifest: &Manifest,
    server: &mut Server,
) -> Result<(), JobError> {
    for row in nodes(server)? {
        let (Some(name), Some(file)) = (row["node-name"].as_str(), row["file"].as_str()) else {
            continue;
        };
        // Children go with the node that was added.
        if is_partial_of(directory, file) && !name.starts_with('#') {
            let deleted = server.run("blockdev-del", json!({"node-name": name}));
            deleted.map_err(|error| match error {
                JobError::Client(crate::client::ClientError::Refused { .. }) => {
                    JobError::StillRunning {
                        node: name.to_owned(),
                        address: server.address().to_owned(),
                    }
                }
                error => error,
            })?;
        }
    }
    // A disk may have been backed up by another name, too, and have a bitmap of that.
    let prefix = prefix(manifest);
    let needed: HashSet<&str> = manifest.last_bitmaps().collect();
    for state in states {
        let ours = state.bitmaps.iter().filter(|bitmap| {
            bitmap.name.starts_with(&prefix) && !needed.contains(bitmap.name.as_str())
        });
        for bitmap in ours.filter(|bitmap| !bitmap.busy) {
            remove_bitmap(&state.node, &bitmap.name, server)?;
        }
    }
    directory.remove_partials()?;
    Ok(())
}

/// Whether a node has a bitmap of that name.
pub fn has_bitmap(node: &str, name: &str, server: &mut Server) -> Result<bool, JobError> {
    let rows = nodes(server)?;
    let row = rows.iter().find(|row| row["node-name"] == node);
    let bitmaps = row.and_then(|row| row["dirty-bitmaps"].as_array());
    Ok(bitmaps.is_some_and(|bitmaps| bitmaps.iter().any(|bitmap| bitmap["name"] == name)))
}

/// Takes a bitmap away.
pub fn remove_bitmap(node: &str, name: &str, server: &mut Server) -> Result<(), JobError> {
    let arguments = json!({"node": node, "name": name});
    server.run("block-dirty-bitmap-remove", arguments).map(drop)
}

/// Takes a node away that was a job's target.
pub fn remove_node(name: &str, server: &mut Server) -> Result<(), JobError> {
    target::delete(name, server)
}

/// Whether an incremental backup of the disk can follow the last one: everything that it
/// would stand on is there.
///
/// Errors: it cannot, and why.
pub fn check_chain(
    state: &DiskState,
    directory: &Directory,
    manifest: &Manifest,
    verify: bool,
    server: &mut Server,
) -> Result<(), JobError> {
    let broken = |why: String| JobError::BrokenChain {
        disk: state.name.clone(),
        why,
    };
    let chain = manifest.disk(&state.name).and_then(|disk| disk.chain(None));
    let chain = chain.unwrap_or_default();
    let Some(last) = chain.last() else {
        return Err(broken(
            "there is no backup of it in the directory".to_owned(),
        ));
    };
    check_bitmap(state, last).map_err(broken)?;
    for entry in &chain {
        let checked = check_piece(entry, directory, verify, server.interrupts());
        checked.map_err(|error| match error {
            SetError::Interrupted => JobError::BackupSet(error),
            error => broken(super::super::report::with_causes(&error)),
        })?;
    }
    Ok(())
}

fn check_bitmap(state: &DiskState, last: &Entry) -> Result<(), String> {
    let (name, point) = (&last.bitmap, last.point);
    let bitmap = state.bitmaps.iter().find(|bitmap| bitmap.name == *name);
    let Some(bitmap) = bitmap else {
        return Err(format!(
            "the server does not have bitmap '{name}', so nobody knows what was written since \
             point {point}"
        ));
    };
    if bitmap.inconsistent || !bitmap.recording {
        let what = if bitmap.inconsistent {
            "inconsistent"
        } else {
            "not recording"
        };
        return Err(format!(
            "bitmap '{name}' is {what}, so nobody knows what was written since point {point}"
        ));
    }
    if bitmap.busy {
        return Err(format!("bitmap '{name}' is in use by somebody else"));
    }
    if state.size != last.size {
        return Err(format!(
            "its size has changed from {} to {} bytes since point {point}",
            last.size, state.size
        ));
    }
    Ok(())
}

fn check_piece(
    entry: &Entry,
    directory: &Directory,
    verify: bool,
    interrupts: &mut Interrupts,
) -> Result<(), SetError> {
    let file = directory.open_piece(entry)?;
    let ranges = directory.ranges(entry)?;
    if !verify {
        return Ok(());
    }
    let path = directory.join(&entry.file);
    let found = piece::read(&file, &path, &ranges, |_| {
        interrupts.check().map_err(|_| SetError::Interrupted)
    })?;
    if found.sha256 != entry.sha256 {
        let why = "its hash is another one than the manifest has".to_owned();
        return Err(SetError::BadPiece { path, why });
    }
    Ok(())
}

/// What a bitmap that does not change any more has set, on a disk of `size` bytes.
pub fn ranges(
    node: &str,
    name: &str,
    size: u64,
    server: &mut Server,
) -> Result<Vec<Range<u64>>, JobError> {
    let nonsense = || JobError::Answer { command: RANGES };
    let mut ranges: Vec<Range<u64>> = Vec::new();
    let mut from = 0;
    loop {
        let arguments = json!({"node": node, "name": name, "offset": from});
        let answer = server.run(RANGES, arguments)?;
        for row in answer["ranges"].as_array().ok_or_else(nonsense)? {
            let (offset, len) = (row["offset"].as_u64(), row["length"].as_u64());
            let range = offset
                .zip(len)
                .and_then(|(offset, len)| Some(offset..offset.checked_add(len)?));
            let range = range.ok_or_else(nonsense)?;
            let after = ranges.last().map_or(0, |last| last.end);
            if range.is_empty() || range.start < after || range.end > size {
                return Err(nonsense());
            }
            match ranges.last_mut() {
                Some(last) if last.end == range.start => last.end = range.end,
                _ => ranges.push(range),
            }
        }
        match answer["next-offset"].as_u64() {
            None => return Ok(ranges),
            Some(next) if next > from && next < size && ranges.len() < MAX_RANGES => from = next,
            Some(_) => return Err(nonsense()),
        }
    }
}
