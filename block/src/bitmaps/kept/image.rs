//! The image that a side-car file belongs to, and the file itself.

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;

use super::BLOCK;
use super::format::Stamp;
use super::store::Storage;

/// What is added to the name of an image.
const SUFFIX: &str = ".bitmaps";
/// What is added to that while the file is made.
const NEW_SUFFIX: &str = ".new";

/// An image on the host: what a `file` node, or a format on one, is made of.
#[derive(Clone, Debug)]
pub struct ImageFile {
    /// An open file.
    pub(crate) file: std::sync::Arc<File>,
    /// Its name, as the user gave it.
    pub(crate) path: PathBuf,
    /// Where the side-car file is to be, if the user said so.
    pub(crate) bitmap_file: Option<PathBuf>,
}

/// What becomes of a side-car file that is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    /// Nobody may write it meanwhile.
    Read,
    /// Nobody may read or write it meanwhile.
    Write,
    /// For what never changes in it.
    Look,
}

/// An image that is watched.
#[derive(Debug)]
pub(super) struct Image {
    /// Opened for reading by ourselves: the driver's file counts its users.
    file: File,
    /// What tells it from others, over restarts.
    pub(super) identity: String,
}

/// Where the persistent bitmaps of the image file `path` are unless somebody says otherwise:
/// beside it, whatever links lead to it. A file that is not there has none. Blocks.
pub fn bitmap_file_beside(path: &Path) -> Option<PathBuf> {
    let mut beside = path.canonicalize().ok()?.into_os_string();
    beside.push(SUFFIX);
    Some(beside.into())
}

impl ImageFile {
    /// Where its side-car file is; `None` if nobody said and there is no "beside". Blocks.
    pub(super) fn side_car(&self) -> io::Result<Option<PathBuf>> {
        if let Some(path) = &self.bitmap_file {
            return Ok(Some(path.clone()));
        }
        if !self.file.metadata()?.is_file() {
            return Ok(None);
        }
        Ok(bitmap_file_beside(&self.path))
    }

    /// Opens it once more, to be watched. Blocks.
    pub(super) fn watch(&self) -> io::Result<Image> {
        let file = File::options()
            .read(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open(&self.path)?;
        let (ours, theirs) = (file.metadata()?, self.file.metadata()?);
        if (ours.dev(), ours.ino()) != (theirs.dev(), theirs.ino()) {
            return Err(io::Error::other(
                "the file of that name is another one by now",
            ));
        }
        Ok(Image {
            identity: identity(&ours)?,
            file,
        })
    }
}

impl Image {
    /// What it is at this moment. A device has no time of its last change. Blocks.
    pub(super) fn stamp(&self) -> io::Result<Stamp> {
        let metadata = self.file.metadata()?;
        if !metadata.is_file() {
            return Ok(Stamp::default());
        }
        Ok(Stamp {
            len: metadata.len(),
            // Below 10^9.
            mtime: (metadata.mtime(), metadata.mtime_nsec() as u32),
        })
    }

    /// Makes the image durable with its times, so that they are the same after a crash of
    /// the host. Blocks.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.file.sync_all()
    }
}

/// What tells a file or device from others.
fn identity(metadata: &Metadata) -> io::Result<String> {
    if metadata.file_type().is_block_device() {
        return device_identity(metadata.rdev());
    }
    // A number is used again after a deletion, and the device's may be another one after
    // a restart of the host. The time at which the file was made tells both.
    let born = metadata.created().ok();
    Ok(
        match born.and_then(|time| time.duration_since(UNIX_EPOCH).ok()) {
            Some(born) if !born.is_zero() => {
                format!(
                    "file {} of {}.{:09}",
                    metadata.ino(),
                    born.as_secs(),
                    born.subsec_nanos()
                )
            }
            _ => format!("file {} on device {}", metadata.ino(), metadata.dev()),
        },
    )
}

/// A device by what it says of itself, or else by its number, until it is detached or the
/// host restarts.
fn device_identity(device: u64) -> io::Result<String> {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let place = Path::new("/sys/dev/block").join(format!("{major}:{minor}"));
    let line = |path: PathBuf| {
        let text = std::fs::read_to_string(path).ok()?;
        let text = text.trim().to_owned();
        (!text.is_empty() && text.len() < 1024).then_some(text)
    };
    if let Some(uuid) = line(place.join("dm/uuid")) {
        return Ok(format!("device {uuid}"));
    }
    let directory = place.canonicalize().unwrap_or(place);
    let (disk, part) = match line(directory.join("partition")) {
        Some(number) => {
            let start = line(directory.join("start")).unwrap_or_default();
            let disk = directory.parent().map(Path::to_owned).unwrap_or_default();
            (disk, format!(" part {number} at {start}"))
        }
        None => (directory, String::new()),
    };
    let id = line(disk.join("wwid")).or_else(|| line(disk.join("device/wwid")));
    if let Some(id) = id {
        return Ok(format!("device {id}{part}"));
    }
    let sequence = line(disk.join("diskseq")).unwrap_or_default();
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    Ok(format!(
        "device {major}:{minor} sequence {sequence} in {}",
        boot.trim()
    ))
}

/// An open side-car file, locked against others.
#[derive(Debug)]
pub(crate) struct SideCar {
    file: File,
    path: PathBuf,
}

impl SideCar {
    /// Opens the file at `path`; `None` if there is none. Fails with
    /// [`WouldBlock`](io::ErrorKind::WouldBlock) if somebody else has it in use.
    pub(super) fn open(path: &Path, access: Access) -> io::Result<Option<Self>> {
        let flags = libc::O_NONBLOCK | libc::O_NOFOLLOW | libc::O_NOCTTY;
        let opened = File::options()
            .read(true)
            .write(access == Access::Write)
            .custom_flags(flags)
            .open(path);
        let file = match opened {
            Err(error) if cannot_be(&error) => return Ok(None),
            file => file?,
        };
        if !file.metadata()?.is_file() {
            return Err(io::Error::other("it is no regular file"));
        }
        match access {
            Access::Write => file.try_lock()?,
            Access::Read => file.try_lock_shared()?,
            Access::Look => {}
        }
        let this = Self {
            file,
            path: path.to_owned(),
        };
        // It may have been taken away, or replaced, before it was locked.
        match this.is_in_place()? {
            true => Ok(Some(this)),
            false => Err(io::ErrorKind::WouldBlock.into()),
        }
    }

    /// A new file that is to be at `path`, where nothing is yet: see
    /// [`put_in_place`](Self::put_in_place).
    pub(super) fn create(path: &Path) -> io::Result<Self> {
        Self::open_new(path)?.claimed()
    }

    /// The file before it is ours.
    pub(super) fn open_new(path: &Path) -> io::Result<Self> {
        let mut new = path.to_owned().into_os_string();
        new.push(NEW_SUFFIX);
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOFOLLOW | libc::O_NOCTTY)
            .open(&new)?;
        if !file.metadata()?.is_file() {
            return Err(io::Error::other("there is something else of that name"));
        }
        Ok(Self {
            file,
            path: new.into(),
        })
    }

    /// Takes the file for ours, and empties it.
    pub(super) fn claimed(self) -> io::Result<Self> {
        self.file.try_lock()?;
        // Who made it may have given it its name, and let it go, before it was locked here.
        if !self.is_in_place()? {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.file.set_len(0)?;
        Ok(self)
    }

    /// Gives it its name, durably: it is found there whole or not at all.
    pub(super) fn put_in_place(&mut self, path: &Path) -> io::Result<()> {
        let renamed = rustix::fs::renameat_with(
            rustix::fs::CWD,
            &self.path,
            rustix::fs::CWD,
            path,
            rustix::fs::RenameFlags::NOREPLACE,
        );
        match renamed {
            // A file system that cannot tell (NFS). Whoever makes such a file has to hold the
            // lock of the unfinished one, which is ours.
            Err(Errno::INVAL | Errno::NOSYS) => {
                if std::fs::symlink_metadata(path).is_ok() {
                    return Err(io::ErrorKind::AlreadyExists.into());
                }
                std::fs::rename(&self.path, path)?;
            }
            renamed => renamed?,
        }
        self.path = path.to_owned();
        sync_directory(path)
    }

    /// Takes the unfinished file away again.
    pub(super) fn discard(self) {
        let _ = std::fs::remove_file(&self.path);
    }

    /// Whether this is the file that is found under its name.
    fn is_in_place(&self) -> io::Result<bool> {
        let (ours, found) = (self.file.metadata()?, std::fs::symlink_metadata(&self.path));
        Ok(found.is_ok_and(|found| (found.dev(), found.ino()) == (ours.dev(), ours.ino())))
    }
}

/// Whether there is nothing of a name, since it leads nowhere or is longer than any.
fn cannot_be(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::ENOENT | libc::ENOTDIR | libc::ENAMETOOLONG)
    )
}

/// Makes the names in the directory of `path` durable.
fn sync_directory(path: &Path) -> io::Result<()> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    File::open(directory)?.sync_all()
}

fn place(block: u32) -> u64 {
    u64::from(block) * BLOCK as u64
}

impl Storage for SideCar {
    fn read(&self, block: u32, into: &mut [u8]) -> io::Result<()> {
        let mut done = 0;
        while done < into.len() {
            match self
                .file
                .read_at(&mut into[done..], place(block) + done as u64)
            {
                Ok(0) => {
                    into[done..].fill(0);
                    break;
                }
                Ok(count) => done += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn write(&self, block: u32, from: &[u8]) -> io::Result<()> {
        self.file.write_all_at(from, place(block))
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn reserve(&self, blocks: u32) -> io::Result<()> {
        // Whatever its length is: what was copied here by others may have holes.
        match fallocate(&self.file, FallocateFlags::empty(), 0, place(blocks)) {
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => Ok(()),
            result => Ok(result?),
        }
    }

    fn remove(&self) -> io::Result<()> {
        if self.is_in_place()? {
            std::fs::remove_file(&self.path)?;
        }
        sync_directory(&self.path)
    }
}
