//! The directory: its lock, and files that come and go as wholes.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;
use rustix::io::Errno;

use super::manifest::{self, Entry, Manifest};
use super::names::{self, PARTIAL};
use super::{SetError, piece, ranges};

/// The file that is locked.
const LOCK: &str = ".diptych-backup.lock";
/// What was written by a guest is its owner's alone.
const MODE: u32 = 0o600;

/// An open directory of backups.
#[derive(Debug)]
pub struct Directory {
    path: PathBuf,
    /// Locked as long as it is open, for who writes.
    _lock: Option<File>,
}

impl Directory {
    /// For reading.
    pub fn open(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            _lock: None,
        }
    }

    /// For a new backup: it is made if it is not there, and locked until this is dropped.
    /// Its path is absolute and without symbolic links from then on.
    ///
    /// Errors: it cannot be made; somebody else has it locked.
    pub fn lock(path: &Path) -> Result<Self, SetError> {
        let mut maker = fs::DirBuilder::new();
        maker.recursive(true).mode(0o700);
        maker
            .create(path)
            .map_err(SetError::io("make the directory", path))?;
        let path = path.canonicalize().map_err(SetError::io("find", path))?;
        let file = path.join(LOCK);
        let lock = File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(MODE)
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
            .open(&file)
            .map_err(SetError::io("open", &file))?;
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => return Err(SetError::Locked(path)),
            Err(error) => return Err(SetError::io("lock", file)(error.into())),
        }
        Ok(Self {
            path,
            _lock: Some(lock),
        })
    }

    /// The path of a file in it.
    pub fn join(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Its own path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The manifest; `None` if there is none.
    pub fn manifest(&self) -> Result<Option<Manifest>, SetError> {
        let path = self.join(manifest::NAME);
        let Some(text) = Self::read_whole(open(&path), &path, manifest::MAX_BYTES)? else {
            return Ok(None);
        };
        let read = Manifest::parse(&text);
        read.map(Some)
            .map_err(|why| SetError::BadManifest { path, why })
    }

    /// The manifest that the next backup is noted in: a new one if there is none, which is
    /// not there before [`begin`](Self::begin).
    ///
    /// Errors: none is there, and files that one should know are.
    pub fn manifest_or_new(&self, set: impl FnOnce() -> String) -> Result<Manifest, SetError> {
        if let Some(manifest) = self.manifest()? {
            return Ok(manifest);
        }
        let names = self.file_names()?;
        if let Some(file) = names.into_iter().find(|name| names::point(name).is_some()) {
            let directory = self.path.clone();
            return Err(SetError::LostManifest { directory, file });
        }
        Ok(Manifest::new(set()))
    }

    /// Sees to it that there is a manifest for good, before anything is named after its set:
    /// what a backup leaves that does not end is known by that name.
    pub fn begin(&self, manifest: &Manifest) -> Result<(), SetError> {
        if self.join(manifest::NAME).symlink_metadata().is_ok() {
            return Ok(());
        }
        self.put_manifest(&self.write_manifest(manifest)?)?;
        self.sync()
    }

    /// Writes a manifest under a name that is not its last one, and gives that. All that it
    /// names is there for good then, and so is it.
    pub fn write_manifest(&self, manifest: &Manifest) -> Result<PathBuf, SetError> {
        let text = manifest.to_text();
        // What cannot be read back would be the end of all backups in the directory.
        Manifest::parse(text.as_bytes()).map_err(|why| SetError::Full {
            path: self.join(manifest::NAME),
            why,
        })?;
        self.sync()?;
        self.write_partial(manifest::NAME, text.as_bytes())
    }

    /// Puts a written manifest in place of the one that is there, in one step that a crash
    /// does not divide. [`sync`](Self::sync) makes that last.
    ///
    /// Errors: the old one is still there.
    pub fn put_manifest(&self, written: &Path) -> Result<(), SetError> {
        let path = self.join(manifest::NAME);
        fs::rename(written, &path).map_err(SetError::io("write", &path))
    }

    /// Writes a file under a name that is not its last one, and gives that. It is durable.
    pub fn write_partial(&self, name: &str, bytes: &[u8]) -> Result<PathBuf, SetError> {
        let path = self.join(&format!("{name}{PARTIAL}"));
        let _ = fs::remove_file(&path);
        let written = create(&path).and_then(|mut file| {
            file.write_all(bytes)?;
            file.sync_all()
        });
        written.map_err(|error| {
            let _ = fs::remove_file(&path);
            SetError::io("write", &path)(error)
        })?;
        Ok(path)
    }

    /// Makes an empty sparse file of `size` bytes for what is to be `name`, and gives its
    /// path: not the last one.
    pub fn create_partial(&self, name: &str, size: u64) -> Result<PathBuf, SetError> {
        let path = self.join(&format!("{name}{PARTIAL}"));
        let failed = || SetError::io("make", &path);
        let file = create(&path).map_err(failed())?;
        file.set_len(size).map_err(|error| {
            let _ = fs::remove_file(&path);
            failed()(error)
        })?;
        Ok(path)
    }

    /// Whether a file can be given this name.
    ///
    /// Errors: something has it. What is there stays there.
    pub fn check_free(&self, name: &str) -> Result<(), SetError> {
        let path = self.join(name);
        if path.symlink_metadata().is_ok() {
            let error = io::Error::from_raw_os_error(libc::EEXIST);
            return Err(SetError::io("write", &path)(error));
        }
        Ok(())
    }

    /// Gives the files of the manifest their last names, those of its last backup and of
    /// one whose client ended before it came to that. They count by the manifest already.
    pub fn complete(&self, manifest: &Manifest) -> Result<(), SetError> {
        let there: HashSet<String> = self.file_names()?.into_iter().collect();
        let mut moved = false;
        for name in manifest.files() {
            let partial = format!("{name}{PARTIAL}");
            // Nobody else comes meanwhile: the directory is locked.
            if !there.contains(name) && there.contains(&partial) {
                let path = self.join(name);
                fs::rename(self.join(&partial), &path).map_err(SetError::io("write", &path))?;
                moved = true;
            }
        }
        if moved { self.sync() } else { Ok(()) }
    }

    /// The number of the next instant: no file has it, of a manifest or not.
    pub fn next_point(&self, manifest: &Manifest) -> Result<u64, SetError> {
        let names = self.file_names()?;
        let points = names.iter().filter_map(|name| names::point(name));
        let last = points.chain([manifest.last_point()]).max().unwrap_or(0);
        let next = last
            .checked_add(1)
            .filter(|next| i64::try_from(*next).is_ok());
        next.ok_or_else(|| SetError::Full {
            path: self.join(manifest::NAME),
            why: format!("point {last} is the last one"),
        })
    }

    /// Files that look as those of backups, and are in no manifest: the machine went down
    /// when one was about to be noted, or somebody put them there.
    pub fn strangers(&self, manifest: &Manifest) -> Result<Vec<String>, SetError> {
        let known: HashSet<&str> = manifest.files().collect();
        let names = self.file_names()?.into_iter();
        let strange =
            |name: &String| names::point(name).is_some() && !known.contains(name.as_str());
        Ok(names.filter(strange).collect())
    }

    fn file_names(&self) -> Result<Vec<String>, SetError> {
        let failed = || SetError::io("read", &self.path);
        let mut names = Vec::new();
        for found in fs::read_dir(&self.path).map_err(failed())? {
            // What is not in UTF-8 is not ours.
            names.extend(found.map_err(failed())?.file_name().into_string().ok());
        }
        names.sort();
        Ok(names)
    }

    /// Removes what backups have left that did not end. The lock is held, so nobody is at
    /// work on them.
    pub fn remove_partials(&self) -> Result<(), SetError> {
        for name in self.file_names()? {
            if names::is_partial(&name) {
                let path = self.join(&name);
                fs::remove_file(&path).map_err(SetError::io("remove", &path))?;
            }
        }
        Ok(())
    }

    /// Opens a file of a backup that counts, which may not have its last name yet.
    fn open_file(&self, name: &str) -> io::Result<File> {
        let partial = format!("{name}{PARTIAL}");
        // It may get it meanwhile.
        let mut opened = open(&self.join(name));
        for name in [partial.as_str(), name] {
            match opened {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    opened = open(&self.join(name));
                }
                opened => return opened,
            }
        }
        opened
    }

    /// Opens the file of a backup for reading.
    ///
    /// Errors: it is not there, no regular file, or not of the size that it should be.
    pub fn open_piece(&self, entry: &Entry) -> Result<File, SetError> {
        let path = self.join(&entry.file);
        let file = self
            .open_file(&entry.file)
            .map_err(SetError::io("open", &path))?;
        let metadata = file.metadata().map_err(SetError::io("read", &path))?;
        let why = if !metadata.is_file() {
            "it is no regular file".to_owned()
        } else if metadata.len() != entry.size {
            format!("it has {} bytes, not {}", metadata.len(), entry.size)
        } else {
            return Ok(file);
        };
        Err(SetError::BadPiece { path, why })
    }

    /// The parts of the disk that a backup holds.
    ///
    /// Errors: those of its list, which is looked at for its hash.
    pub fn ranges(&self, entry: &Entry) -> Result<Vec<Range<u64>>, SetError> {
        let Some(listed) = &entry.ranges else {
            let all = (entry.size > 0).then_some(0..entry.size);
            return Ok(all.into_iter().collect());
        };
        let path = self.join(&listed.file);
        let text = Self::read_whole(self.open_file(&listed.file), &path, ranges::MAX_BYTES)?;
        let text = text.ok_or_else(|| {
            SetError::io("open", &path)(io::Error::from_raw_os_error(libc::ENOENT))
        })?;
        if piece::sha256(&text) != listed.sha256 {
            let why = "its hash is another one than the manifest has".to_owned();
            return Err(SetError::BadPiece { path, why });
        }
        ranges::parse(&text, entry.size).map_err(|why| SetError::BadRanges { path, why })
    }

    /// Reads a file that was opened by `path`; `None` if there is none.
    fn read_whole(
        opened: io::Result<File>,
        path: &Path,
        most: u64,
    ) -> Result<Option<Vec<u8>>, SetError> {
        let file = match opened {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(SetError::io("open", path)(error)),
        };
        let path = path.to_owned();
        let failed = || SetError::io("read", &path);
        if !file.metadata().map_err(failed())?.is_file() {
            let why = "it is no regular file".to_owned();
            return Err(SetError::BadPiece { path, why });
        }
        let mut text = Vec::new();
        file.take(most + 1)
            .read_to_end(&mut text)
            .map_err(failed())?;
        if text.len() as u64 > most {
            let why = format!("it has more than {most} bytes");
            return Err(SetError::BadPiece { path, why });
        }
        Ok(Some(text))
    }

    /// Makes the names of the files last.
    pub fn sync(&self) -> Result<(), SetError> {
        let synced = File::open(&self.path).and_then(|directory| directory.sync_all());
        synced.map_err(SetError::io("write", &self.path))
    }
}

fn create(path: &Path) -> io::Result<File> {
    File::options()
        .write(true)
        .create_new(true)
        .mode(MODE)
        .open(path)
}

/// Neither a link nor a FIFO leads elsewhere or waits.
fn open(path: &Path) -> io::Result<File> {
    File::options()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_backup_at_a_time_goes_into_a_directory() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a/b");
        let first = Directory::lock(&path).unwrap();
        assert!(matches!(Directory::lock(&path), Err(SetError::Locked(_))));
        drop(first);
        let second = Directory::lock(&path).unwrap();
        assert_eq!(second.manifest().unwrap(), None);
        let new = second.manifest_or_new(|| "s".to_owned()).unwrap();
        assert_eq!(second.manifest().unwrap(), None);
        second.begin(&new).unwrap();
        assert_eq!(second.manifest().unwrap(), Some(new));
        second.create_partial("x.1.full.raw", 512).unwrap();
        second.remove_partials().unwrap();
        let names = fs::read_dir(&path).unwrap().count();
        assert_eq!(names, 2, "the lock and the manifest");
    }

    #[test]
    fn files_of_others_and_of_backups_stay_what_they_are() {
        let folder = tempfile::tempdir().unwrap();
        let set = Directory::lock(folder.path()).unwrap();
        let others = ["film.mkv.partial", "a.7.full.raw", "notes.raw"];
        for name in others {
            fs::write(folder.path().join(name), name).unwrap();
        }
        assert!(matches!(
            set.manifest_or_new(|| "s".to_owned()),
            Err(SetError::LostManifest { .. })
        ));
        let manifest = Manifest::new("s".to_owned());
        set.begin(&manifest).unwrap();
        set.create_partial("a.7.full.raw", 512).unwrap();
        assert!(set.check_free("a.7.full.raw").is_err());
        assert_eq!(set.next_point(&manifest).unwrap(), 8);
        assert_eq!(set.strangers(&manifest).unwrap(), ["a.7.full.raw"]);
        set.remove_partials().unwrap();
        assert!(!folder.path().join("a.7.full.raw.partial").exists());
        for name in others {
            assert_eq!(fs::read_to_string(folder.path().join(name)).unwrap(), name);
        }
    }

    #[test]
    fn a_backup_counts_by_the_manifest_before_its_files_have_their_names() {
        let folder = tempfile::tempdir().unwrap();
        let set = Directory::lock(folder.path()).unwrap();
        let text = serde_json::json!({
            "format": "diptych-backup", "version": 1, "set": "s",
            "disks": [{"name": "a", "stem": "a", "entries": [{
                "point": 1, "kind": "full", "parent": null, "time": 0, "size": 512,
                "file": "a.1.full.raw", "sha256": "0".repeat(64), "data-bytes": 0,
                "ranges": null, "bitmap": "b", "bitmap-persistent": false,
                "job": {"id": "j", "result": "completed", "bytes": 0, "milliseconds": 0},
            }]}],
        });
        let manifest = Manifest::parse(text.to_string().as_bytes()).unwrap();
        let entry = &manifest.disks[0].entries[0];
        assert!(set.open_piece(entry).is_err());
        set.create_partial("a.1.full.raw", 512).unwrap();
        set.create_partial("a.2.full.raw", 512).unwrap();
        set.open_piece(entry).unwrap();
        set.complete(&manifest).unwrap();
        set.remove_partials().unwrap();
        set.open_piece(entry).unwrap();
        assert_eq!(set.file_names().unwrap(), [LOCK, "a.1.full.raw"]);
        set.complete(&manifest).unwrap();
    }

    #[test]
    fn a_file_that_cannot_be_as_large_as_the_disk_is_not_left() {
        let folder = tempfile::tempdir().unwrap();
        let set = Directory::lock(folder.path()).unwrap();
        assert!(set.create_partial("a.1.full.raw", u64::MAX).is_err());
        assert_eq!(folder.path().read_dir().unwrap().count(), 1, "the lock");
    }

    #[test]
    fn what_is_no_file_of_the_directory_is_not_read() {
        let folder = tempfile::tempdir().unwrap();
        let set = Directory::open(folder.path());
        let name = folder.path().join(manifest::NAME);
        std::os::unix::fs::symlink("/etc/passwd", &name).unwrap();
        assert!(set.manifest().is_err());
        fs::remove_file(&name).unwrap();
        fs::create_dir(&name).unwrap();
        assert!(set.manifest().is_err());
        fs::remove_dir(&name).unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &name,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RUSR,
            0,
        )
        .unwrap();
        assert!(set.manifest().is_err());
    }
}
