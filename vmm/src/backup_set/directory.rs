//! The directory: its lock, and files that come and go as wholes.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;
use rustix::io::Errno;

use super::manifest::{self, Entry, Manifest};
use super::{SetError, piece, ranges};

/// What backups are written into until they are whole: names with this end.
pub const PARTIAL: &str = ".partial";
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
        let Some(text) = self.read_whole(manifest::NAME, manifest::MAX_BYTES)? else {
            return Ok(None);
        };
        let read = Manifest::parse(&text);
        read.map(Some)
            .map_err(|why| SetError::BadManifest { path, why })
    }

    /// Puts a manifest in place of the one that is there, in one step that a crash does
    /// not divide. What it names is there for good before.
    pub fn write_manifest(&self, manifest: &Manifest) -> Result<(), SetError> {
        self.sync()?;
        let partial = self.write_partial(manifest::NAME, manifest.to_text().as_bytes())?;
        let path = self.join(manifest::NAME);
        fs::rename(partial, &path).map_err(SetError::io("write", &path))?;
        self.sync()
    }

    /// Writes a file under a name that is not its last one, and gives that. It is durable.
    pub fn write_partial(&self, name: &str, bytes: &[u8]) -> Result<PathBuf, SetError> {
        let path = self.join(&format!("{name}{PARTIAL}"));
        let failed = || SetError::io("write", &path);
        let _ = fs::remove_file(&path);
        let mut file = create(&path).map_err(failed())?;
        file.write_all(bytes).map_err(failed())?;
        file.sync_all().map_err(failed())?;
        Ok(path)
    }

    /// Makes an empty sparse file of `size` bytes for what is to be `name`, and gives its
    /// path: not the last one.
    pub fn create_partial(&self, name: &str, size: u64) -> Result<PathBuf, SetError> {
        let path = self.join(&format!("{name}{PARTIAL}"));
        let failed = || SetError::io("make", &path);
        let file = create(&path).map_err(failed())?;
        file.set_len(size).map_err(failed())?;
        Ok(path)
    }

    /// Gives a whole file its last name. One that has it is of a backup that was not
    /// finished: the manifest does not know it.
    pub fn finish(&self, name: &str) -> Result<(), SetError> {
        let partial = self.join(&format!("{name}{PARTIAL}"));
        let path = self.join(name);
        fs::rename(partial, &path).map_err(SetError::io("write", &path))
    }

    /// Removes what backups have left that did not end. The lock is held, so nobody is at
    /// work on them.
    pub fn remove_partials(&self) -> Result<(), SetError> {
        let failed = || SetError::io("read", &self.path);
        for found in fs::read_dir(&self.path).map_err(failed())? {
            let path = found.map_err(failed())?.path();
            let name = path.file_name().and_then(|name| name.to_str());
            if name.is_some_and(|name| name.ends_with(PARTIAL)) {
                fs::remove_file(&path).map_err(SetError::io("remove", &path))?;
            }
        }
        Ok(())
    }

    /// Opens the file of a backup for reading.
    ///
    /// Errors: it is not there, no regular file, or not of the size that it should be.
    pub fn open_piece(&self, entry: &Entry) -> Result<File, SetError> {
        let path = self.join(&entry.file);
        let file = open(&path).map_err(SetError::io("open", &path))?;
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
        let text = self.read_whole(&listed.file, ranges::MAX_BYTES)?;
        let text = text.ok_or_else(|| {
            SetError::io("open", &path)(io::Error::from_raw_os_error(libc::ENOENT))
        })?;
        if piece::sha256(&text) != listed.sha256 {
            let why = "its hash is another one than the manifest has".to_owned();
            return Err(SetError::BadPiece { path, why });
        }
        ranges::parse(&text, entry.size).map_err(|why| SetError::BadRanges { path, why })
    }

    fn read_whole(&self, name: &str, most: u64) -> Result<Option<Vec<u8>>, SetError> {
        let path = self.join(name);
        let file = match open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(SetError::io("open", path)(error)),
        };
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

    fn sync(&self) -> Result<(), SetError> {
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
        second
            .write_manifest(&Manifest::new("s".to_owned()))
            .unwrap();
        assert_eq!(second.manifest().unwrap().unwrap().set, "s");
        second.create_partial("x", 512).unwrap();
        second.remove_partials().unwrap();
        let names = fs::read_dir(&path).unwrap().count();
        assert_eq!(names, 2, "the lock and the manifest");
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
