//! The manifest: which backups there are of which disks, and what makes each.

use std::collections::HashSet;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// Its name in the directory.
pub const NAME: &str = "diptych-backup.json";
/// A larger one is not ours.
pub const MAX_BYTES: u64 = 64 << 20;
/// What it says that it is.
const FORMAT: &str = "diptych-backup";
const VERSION: u32 = 1;
/// Most disks, and most backups of one.
const MAX_DISKS: usize = 1024;
const MAX_ENTRIES: usize = 100_000;
/// Longest name of a file in most file systems.
const MAX_NAME: usize = 255;
/// Longest name of a disk.
const MAX_DISK_NAME: usize = 1024;
/// Most bytes that one more backup adds: its names are bounded.
const ENTRY_BYTES: usize = 8 << 10;

/// All of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Manifest {
    format: String,
    version: u32,
    /// Random; a part of the names of the bitmaps, so that two directories that hold
    /// backups of the same disk do not take each other's.
    pub set: String,
    /// The disks, in the order in which they came.
    pub disks: Vec<Disk>,
}

/// What all versions have.
#[derive(Debug, Deserialize)]
struct Head {
    format: String,
    version: u32,
}

impl Head {
    fn check(&self) -> Result<(), String> {
        if self.format != FORMAT {
            return Err(format!("its format is not '{FORMAT}'"));
        }
        if self.version != VERSION {
            return Err(format!(
                "its version is {}, this program knows {VERSION}",
                self.version
            ));
        }
        Ok(())
    }
}

/// A disk, by the name that the user gave it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Disk {
    /// Its device or node.
    pub name: String,
    /// The beginning of the names of its files.
    pub stem: String,
    /// Its backups, the oldest first.
    pub entries: Vec<Entry>,
}

/// What a backup holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// All of the disk.
    Full,
    /// What was written since its parent.
    Incremental,
}

impl Kind {
    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Incremental => "incremental",
        }
    }
}

/// A backup of one disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Entry {
    /// The number of the instant, counted through all disks: disks that were backed up
    /// together have the same.
    pub point: u64,
    /// What it holds.
    pub kind: Kind,
    /// The point that it is to be applied to; none for a full one.
    pub parent: Option<u64>,
    /// When it began: seconds since 1970, UTC.
    pub time: u64,
    /// Size of the disk in bytes; that of the file, too.
    pub size: u64,
    /// A sparse file that holds each byte where the disk has it.
    pub file: String,
    /// The hash of its content; see [`super::piece`].
    pub sha256: String,
    /// Bytes of it that are not zeroes, in whole blocks.
    pub data_bytes: u64,
    /// Which parts of the file count, of an incremental one.
    pub ranges: Option<RangesFile>,
    /// The bitmap that has what was written since then.
    pub bitmap: String,
    /// Whether the server said that it keeps the bitmap when it ends.
    pub bitmap_persistent: bool,
    /// What the job said at its end.
    pub job: JobResult,
}

/// A file that lists ranges.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct RangesFile {
    /// Its name.
    pub file: String,
    /// The SHA-256 of its bytes.
    pub sha256: String,
    /// How many there are.
    pub count: u64,
    /// Bytes of the disk in them.
    pub bytes: u64,
}

/// How the job ended that made a backup.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct JobResult {
    /// Its id.
    pub id: String,
    /// `completed`: others are not kept.
    pub result: String,
    /// Bytes of the disk that it went through.
    pub bytes: u64,
    /// How long it took.
    pub milliseconds: u64,
}

impl Manifest {
    /// One without backups. `set` is random.
    pub fn new(set: String) -> Self {
        Self {
            format: FORMAT.to_owned(),
            version: VERSION,
            set,
            disks: Vec::new(),
        }
    }

    /// Reads one that anybody may have written.
    ///
    /// Errors: what is wrong with it, in a sentence without its name.
    pub fn parse(text: &[u8]) -> Result<Self, String> {
        // Another version need not have what this one wants.
        let head: Head = serde_json::from_slice(text).map_err(|error| error.to_string())?;
        head.check()?;
        let read: Self = serde_json::from_slice(text).map_err(|error| error.to_string())?;
        read.check()?;
        Ok(read)
    }

    /// As it is written into the file.
    pub fn to_text(&self) -> String {
        // Numbers and strings only: nothing that JSON cannot say.
        let text = serde_json::to_string_pretty(self).unwrap_or_default();
        text + "\n"
    }

    fn check(&self) -> Result<(), String> {
        if !is_word(&self.set) || self.set.len() > 64 {
            return Err("its set has a bad name".to_owned());
        }
        if self.disks.len() > MAX_DISKS {
            return Err(format!("it has more than {MAX_DISKS} disks"));
        }
        let (mut names, mut files) = (HashSet::new(), HashSet::new());
        for disk in &self.disks {
            if disk.name.is_empty() || disk.name.len() > MAX_DISK_NAME || !names.insert(&disk.name)
            {
                return Err("the name of a disk is empty, too long, or there twice".to_owned());
            }
            if !is_word(&disk.stem) {
                return Err(format!("disk '{}' has a bad stem", disk.name));
            }
            if disk.entries.len() > MAX_ENTRIES {
                return Err(format!("it has more than {MAX_ENTRIES} backups of a disk"));
            }
            let mut last = 0;
            for (index, entry) in disk.entries.iter().enumerate() {
                let refused = |why: &str| {
                    Err(format!(
                        "backup {} of disk '{}' {why}",
                        entry.point, disk.name
                    ))
                };
                if entry.point <= last || i64::try_from(entry.point).is_err() {
                    return refused("is not after the one before it");
                }
                last = entry.point;
                if let Err(why) = entry.check() {
                    return refused(why);
                }
                let before = disk.entries.get(..index).unwrap_or_default();
                if let Some(point) = entry.parent {
                    let parent = at_point(before, point);
                    if parent.is_none_or(|parent| parent.size != entry.size) {
                        return refused("stands on a backup that is not there, or of another size");
                    }
                }
                for file in entry.files() {
                    if !files.insert(file) {
                        return refused("shares a file with another one");
                    }
                }
            }
        }
        Ok(())
    }

    /// Whether one more backup of each of these disks can be noted.
    ///
    /// Errors: which bound there is.
    pub fn check_room<'a>(&self, names: impl Iterator<Item = &'a str>) -> Result<(), String> {
        let (mut disks, mut more) = (self.disks.len(), 0);
        for name in names {
            if name.len() > MAX_DISK_NAME {
                return Err(format!(
                    "the name of a disk is longer than {MAX_DISK_NAME} bytes"
                ));
            }
            more += ENTRY_BYTES;
            match self.disk(name) {
                Some(disk) if disk.entries.len() >= MAX_ENTRIES => {
                    return Err(format!("it has {MAX_ENTRIES} backups of disk '{name}'"));
                }
                Some(_) => {}
                None => disks += 1,
            }
        }
        if disks > MAX_DISKS {
            return Err(format!("it would have more than {MAX_DISKS} disks"));
        }
        if (self.to_text().len() + more) as u64 > MAX_BYTES {
            return Err(format!("it would have more than {MAX_BYTES} bytes"));
        }
        Ok(())
    }

    /// The number of the last instant, 0 if there is none.
    pub fn last_point(&self) -> u64 {
        let entries = self.disks.iter().flat_map(|disk| &disk.entries);
        entries.map(|entry| entry.point).max().unwrap_or(0)
    }

    /// The bitmaps of the last backups of all disks: what incremental ones stand on.
    pub fn last_bitmaps(&self) -> impl Iterator<Item = &str> {
        let last = self.disks.iter().filter_map(|disk| disk.entries.last());
        last.map(|entry| entry.bitmap.as_str())
    }

    /// The disk of that name.
    pub fn disk(&self, name: &str) -> Option<&Disk> {
        self.disks.iter().find(|disk| disk.name == name)
    }

    /// The files of all backups.
    pub fn files(&self) -> impl Iterator<Item = &str> {
        let entries = self.disks.iter().flat_map(|disk| &disk.entries);
        entries.flat_map(Entry::files)
    }

    /// Adds a backup of the disk `name`, which may be a new one.
    pub fn add(&mut self, name: &str, stem: &str, entry: Entry) {
        match self.disks.iter_mut().find(|disk| disk.name == name) {
            Some(disk) => disk.entries.push(entry),
            None => self.disks.push(Disk {
                name: name.to_owned(),
                stem: stem.to_owned(),
                entries: vec![entry],
            }),
        }
    }

    /// The beginning of the names of the files of the disk `name`: as it is known, or one
    /// that no other disk has.
    pub fn stem(&self, name: &str, taken: &[String]) -> String {
        if let Some(disk) = self.disk(name) {
            return disk.stem.clone();
        }
        let fit = |c: char| match c {
            'a'..='z' | 'A'..='Z' | '0'..='9' | '-' | '_' => c,
            _ => '_',
        };
        let short: String = name.chars().take(64).map(fit).collect();
        let is_taken = |stem: &str| {
            self.disks.iter().any(|disk| disk.stem == stem) || taken.iter().any(|it| it == stem)
        };
        let others = (2_u32..).map(|number| format!("{short}-{number}"));
        let mut stems = std::iter::once(short.clone()).chain(others);
        stems.find(|stem| !is_taken(stem)).unwrap_or_default()
    }
}

impl Disk {
    /// The backups that make what the disk held at `point` (or at the last point before it
    /// that it has; `None`: its last one), the full one first.
    pub fn chain(&self, point: Option<u64>) -> Option<Vec<&Entry>> {
        let reached = |entry: &&Entry| point.is_none_or(|point| entry.point <= point);
        let mut chain = vec![self.entries.iter().rev().find(reached)?];
        // Parents are older, so it ends.
        while let Some(parent) = chain.last().and_then(|entry| entry.parent) {
            chain.push(at_point(&self.entries, parent)?);
        }
        chain.reverse();
        Some(chain)
    }
}

impl Entry {
    /// Its files.
    fn files(&self) -> impl Iterator<Item = &str> {
        let ranges = self.ranges.as_ref().map(|ranges| ranges.file.as_str());
        std::iter::once(self.file.as_str()).chain(ranges)
    }

    fn check(&self) -> Result<(), &'static str> {
        if i64::try_from(self.size).is_err() {
            return Err("is larger than a file can be");
        }
        if !self.files().all(is_file_name) {
            return Err("has a file whose name is none");
        }
        let hashes = [
            Some(&self.sha256),
            self.ranges.as_ref().map(|it| &it.sha256),
        ];
        if !hashes.into_iter().flatten().all(|hash| is_sha256(hash)) {
            return Err("has a hash that is none");
        }
        let is_incremental = self.kind == Kind::Incremental;
        if self.ranges.is_some() != is_incremental || self.parent.is_some() != is_incremental {
            return Err("is neither a full nor an incremental one");
        }
        Ok(())
    }
}

/// The backup of that point, among some in order.
fn at_point(entries: &[Entry], point: u64) -> Option<&Entry> {
    let place = entries.binary_search_by_key(&point, |entry| entry.point);
    entries.get(place.ok()?)
}

/// Letters, digits, `-` and `_`, at least one.
pub(super) fn is_word(text: &str) -> bool {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
    !text.is_empty() && text.bytes().all(fits)
}

/// The name of a file in the directory itself: words and dots, not hidden.
fn is_file_name(name: &str) -> bool {
    !name.starts_with('.')
        && name.len() <= MAX_NAME
        && name != NAME
        && is_word(&name.replace('.', "-"))
        && Path::new(name).file_name().is_some_and(|it| it == name)
}

fn is_sha256(text: &str) -> bool {
    text.len() == 64
        && text
            .bytes()
            .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// Seconds since 1970 as `2026-11-23T13:20:00Z`.
pub fn utc(seconds: u64) -> String {
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // Eras of 400 years from 0000-03-01 on, as the Gregorian calendar repeats.
    let day = days.saturating_add(719_468);
    let (era, of_era) = (day / 146_097, day % 146_097);
    let year = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let shifted = (5 * of_year + 2) / 153;
    let date = of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 {
        shifted + 3
    } else {
        shifted - 9
    };
    let year = year + era * 400 + u64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{date:02}T{:02}:{:02}:{:02}Z",
        rest / 3600,
        rest / 60 % 60,
        rest % 60
    )
}

#[cfg(test)]
mod tests;
