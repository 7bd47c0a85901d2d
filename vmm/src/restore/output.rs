//! The image that is made: a file that has no name until it is whole, or a block device.

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FallocateFlags, SeekFrom};

use super::RestoreError;
use crate::backup_set::piece::Part;
use crate::backup_set::{Directory, Manifest, manifest};

/// What guests wrote is its owner's alone.
const MODE: u32 = 0o600;
/// Zeroes that are written at once.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// See the module.
pub struct Output {
    file: File,
    /// As it is to be called, or the device.
    path: PathBuf,
    kind: Kind,
}

enum Kind {
    Device,
    /// A file, and whether it may take the place of another one.
    File {
        force: bool,
        temporary: Temporary,
    },
}

/// What a file is called until it is whole.
enum Temporary {
    /// Nothing: it goes when it is closed.
    Unnamed,
    /// This, where the file system has no files without a name.
    Named(TemporaryName),
}

/// Dropped, the name goes.
struct TemporaryName(PathBuf);

impl Drop for TemporaryName {
    fn drop(&mut self) {
        // Moved away already, as a rule.
        let _ = fs::remove_file(&self.0);
    }
}

impl Output {
    /// A place for a disk of `size` bytes.
    ///
    /// Errors: something is there and `force` was not given; it is no place for an image.
    pub fn open(
        path: &Path,
        size: u64,
        force: bool,
        backups: &Directory,
        manifest: &Manifest,
    ) -> Result<Self, RestoreError> {
        let failed = |what| {
            move |source| RestoreError::Target {
                what,
                path: path.to_owned(),
                source,
            }
        };
        let path = match fs::symlink_metadata(path) {
            // What is meant is what the link leads to.
            Ok(_) => path.canonicalize().map_err(failed("find"))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                std::path::absolute(path).map_err(failed("find"))?
            }
            Err(error) => return Err(failed("look at")(error)),
        };
        if is_own(&path, backups, manifest) {
            return Err(RestoreError::Own(path));
        }
        if let Ok(metadata) = fs::metadata(&path) {
            let kind = metadata.file_type();
            if kind.is_block_device() {
                return Self::device(path, size, force);
            }
            if !kind.is_file() {
                return Err(RestoreError::WrongKind(path));
            }
            if !force {
                return Err(RestoreError::Exists(path));
            }
            check_free_file(&path)?;
        }
        let made = new_file(&path).and_then(|(file, temporary)| {
            file.set_len(size)?;
            Ok((file, temporary))
        });
        let (file, temporary) = made.map_err(|source| RestoreError::Target {
            what: "make",
            path: path.clone(),
            source,
        })?;
        let kind = Kind::File { force, temporary };
        Ok(Self { file, path, kind })
    }

    fn device(path: PathBuf, size: u64, force: bool) -> Result<Self, RestoreError> {
        if !force {
            return Err(RestoreError::Device(path));
        }
        let failed = |source| RestoreError::Target {
            what: "open",
            path: path.clone(),
            source,
        };
        // Not one that the kernel uses: mounted, a part of an array.
        let mut options = File::options();
        options.read(true).write(true).custom_flags(libc::O_EXCL);
        let file = options.open(&path).map_err(failed)?;
        let has = rustix::fs::seek(&file, SeekFrom::End(0));
        let has = has.map_err(|error| failed(error.into()))?;
        if has < size {
            let wanted = size;
            return Err(RestoreError::TooSmall { path, has, wanted });
        }
        let kind = Kind::Device;
        let output = Self { file, path, kind };
        output.check_free()?;
        Ok(output)
    }

    /// Whether nobody has the image open whose place is taken. Who opens it later finds out
    /// nothing.
    ///
    /// Errors: somebody has.
    pub fn check_free(&self) -> Result<(), RestoreError> {
        match &self.kind {
            Kind::Device if block::image_is_in_use(&self.file) => {
                Err(RestoreError::InUse(self.path.clone()))
            }
            Kind::File { force: true, .. } => check_free_file(&self.path),
            Kind::Device | Kind::File { .. } => Ok(()),
        }
    }

    pub fn is_device(&self) -> bool {
        matches!(self.kind, Kind::Device)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes a part. `is_first`: of the first backup, so that a new file has zeroes there.
    pub fn put(&self, part: &Part<'_>, is_first: bool) -> io::Result<()> {
        match part {
            Part::Data(offset, bytes) => self.file.write_all_at(bytes, *offset),
            Part::Zeroes(_) if is_first && !self.is_device() => Ok(()),
            Part::Zeroes(range) => self.zero(range),
        }
    }

    fn zero(&self, range: &Range<u64>) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let len = range.end - range.start;
        if rustix::fs::fallocate(&self.file, flags, range.start, len).is_ok() {
            return Ok(());
        }
        let mut at = range.start;
        while at < range.end {
            let len = (range.end - at).min(ZEROES.len() as u64);
            let zeroes = ZEROES.get(..len as usize).unwrap_or_default();
            self.file.write_all_at(zeroes, at)?;
            at += len;
        }
        Ok(())
    }

    /// All of it is there, and verified: makes it durable and gives it its name.
    pub fn finish(self) -> Result<(), RestoreError> {
        self.check_free()?;
        let Self { file, path, kind } = self;
        let failed = |source| RestoreError::Target {
            what: "write",
            path: path.clone(),
            source,
        };
        file.sync_all().map_err(failed)?;
        let Kind::File { force, temporary } = kind else {
            return Ok(());
        };
        let exists = |error: io::Error| match error.kind() {
            io::ErrorKind::AlreadyExists => RestoreError::Exists(path.clone()),
            _ => failed(error),
        };
        let named = match temporary {
            Temporary::Named(name) => name,
            Temporary::Unnamed if !force => {
                link(&file, &path).map_err(exists)?;
                return sync_directory(&path).map_err(failed);
            }
            Temporary::Unnamed => {
                // Only what has a name can take the place of another.
                let name = TemporaryName(temporary_path(&path));
                link(&file, &name.0).map_err(failed)?;
                name
            }
        };
        if force {
            fs::rename(&named.0, &path).map_err(failed)?;
        } else {
            // It never takes the place of another, which may have come meanwhile.
            fs::hard_link(&named.0, &path).map_err(exists)?;
        }
        drop(named);
        sync_directory(&path).map_err(failed)
    }
}

/// See [`Output::check_free`]. A file that is not there, or not to be read, is free.
fn check_free_file(path: &Path) -> Result<(), RestoreError> {
    let mut options = File::options();
    options.read(true).custom_flags(libc::O_NONBLOCK);
    match options.open(path) {
        Ok(file) if block::image_is_in_use(&file) => Err(RestoreError::InUse(path.to_owned())),
        _ => Ok(()),
    }
}

/// Whether the path is that of a file which the backups need.
fn is_own(path: &Path, backups: &Directory, manifest: &Manifest) -> bool {
    let directory = backups.path().canonicalize().ok();
    let parent = path.parent().and_then(|parent| parent.canonicalize().ok());
    if directory.is_none() || directory != parent {
        return false;
    }
    let mut files = manifest.files().chain([manifest::NAME]);
    files.any(|file| path.file_name().is_some_and(|name| name == file))
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

fn temporary_path(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let short: String = name.chars().take(50).collect();
    parent(path).join(format!(".{short}.restore-{}", std::process::id()))
}

fn new_file(path: &Path) -> io::Result<(File, Temporary)> {
    let mut options = File::options();
    options.read(true).write(true).mode(MODE);
    let unnamed = options
        .clone()
        .custom_flags(libc::O_TMPFILE)
        .open(parent(path));
    match unnamed {
        Ok(file) => return Ok((file, Temporary::Unnamed)),
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::EOPNOTSUPP | libc::EINVAL | libc::EISDIR)
            ) => {}
        Err(error) => return Err(error),
    }
    let name = temporary_path(path);
    let file = options.create_new(true).open(&name)?;
    Ok((file, Temporary::Named(TemporaryName(name))))
}

/// Gives a file without a name one, unless that is taken.
fn link(file: &File, path: &Path) -> io::Result<()> {
    let own = format!("/proc/self/fd/{}", file.as_raw_fd());
    Ok(rustix::fs::linkat(
        CWD,
        own,
        CWD,
        path,
        AtFlags::SYMLINK_FOLLOW,
    )?)
}

fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(parent(path))?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(path: &Path, force: bool) -> Result<Output, RestoreError> {
        let backups = Directory::open(Path::new("/nonexistent"));
        Output::open(path, 4096, force, &backups, &Manifest::new("s".to_owned()))
    }

    #[test]
    fn a_file_has_its_name_when_it_is_whole_and_not_before() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        let count = || folder.path().read_dir().unwrap().count();
        drop(open(&path, false).unwrap());
        assert_eq!(count(), 0);
        let output = open(&path, false).unwrap();
        output.put(&Part::Data(512, &[1; 512]), true).unwrap();
        output.put(&Part::Data(1024, &[2; 512]), true).unwrap();
        output.put(&Part::Zeroes(512..1024), false).unwrap();
        assert!(!path.exists());
        output.finish().unwrap();
        let made = fs::read(&path).unwrap();
        assert_eq!(made.len(), 4096);
        assert!(made[..1024].iter().all(|byte| *byte == 0));
        assert!(made[1024..1536].iter().all(|byte| *byte == 2));
        assert_eq!(count(), 1);
    }

    #[test]
    fn nothing_is_overwritten_without_being_asked() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        let late = open(&path, false).unwrap();
        fs::write(&path, "other").unwrap();
        assert!(matches!(late.finish(), Err(RestoreError::Exists(_))));
        assert!(matches!(open(&path, false), Err(RestoreError::Exists(_))));
        assert_eq!(fs::read(&path).unwrap(), b"other");
        open(&path, true).unwrap().finish().unwrap();
        assert_eq!(fs::read(&path).unwrap().len(), 4096);
        assert_eq!(folder.path().read_dir().unwrap().count(), 1);
        let directory = folder.path();
        assert!(matches!(
            open(directory, true),
            Err(RestoreError::WrongKind(_))
        ));
    }
}
