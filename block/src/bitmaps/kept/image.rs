//! The image that a side-car file belongs to, and the file itself.

use std::fs::{File, Metadata};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

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
    pub(super) identity: Identity,
}

/// What tells a file or device from others, over restarts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    text: String,
    /// Whether nothing that takes its place can have the same. If not, only an image's
    /// [stamp](Image::stamp) proves that it is the same one: not after a crash.
    is_unique: bool,
}

impl Identity {
    fn new(text: String, is_unique: bool) -> Self {
        Self { text, is_unique }
    }

    /// In words, and as it is stored.
    pub(super) fn as_str(&self) -> &str {
        &self.text
    }

    /// See there.
    pub(super) fn is_unique(&self) -> bool {
        self.is_unique
    }
}

/// How coarse the times of files may be: those of a file system that has no parts of seconds
/// (FAT counts by two), and else the kernel's.
const GRAINS: (Duration, Duration) = (Duration::from_secs(2), Duration::from_millis(20));

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
        let identity = match ours.file_type().is_block_device() {
            true => device_identity(ours.rdev())?,
            false => file_identity(&file, &ours, ours.created().ok()),
        };
        Ok(Image { file, identity })
    }
}

impl Image {
    /// The identity of the image and of the file that has its bitmaps: a copy of that, put in
    /// its place later, would miss what was written since. Blocks.
    pub(super) fn with(&self, side_car: &SideCar) -> io::Result<Identity> {
        let metadata = side_car.file.metadata()?;
        let own = file_identity(&side_car.file, &metadata, metadata.created().ok());
        Ok(Identity::new(
            format!("{}, kept in {}", self.identity.text, own.text),
            self.identity.is_unique && own.is_unique,
        ))
    }

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
    /// the host; and so old that whatever is written from now on has another time. Blocks,
    /// some time.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.file.sync_all()?;
        if let Some(time) = self.stamp()?.time() {
            let coarse = time.duration_since(UNIX_EPOCH).unwrap_or_default();
            let grain = match coarse.subsec_nanos() {
                0 => GRAINS.0,
                _ => GRAINS.1,
            };
            // One that lies in the future is somebody else's, or of another clock.
            let age = SystemTime::now().duration_since(time).unwrap_or_default();
            std::thread::sleep(grain.saturating_sub(age));
        }
        Ok(())
    }
}

impl Stamp {
    /// The time of the last change; `None` if there is none.
    fn time(&self) -> Option<SystemTime> {
        let seconds = u64::try_from(self.mtime.0).ok().filter(|time| *time > 0)?;
        UNIX_EPOCH.checked_add(Duration::new(seconds, self.mtime.1))
    }
}

/// What tells a file from others, and whether it tells from all.
fn file_identity(file: &File, metadata: &Metadata, born: Option<SystemTime>) -> Identity {
    // A number is used again after a deletion, and the device's may be another one after
    // a restart of the host. The time at which the file was made tells both.
    let inode = metadata.ino();
    let born = born.and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    if let Some(born) = born.filter(|born| !born.is_zero()) {
        let (seconds, nanoseconds) = (born.as_secs(), born.subsec_nanos());
        return Identity::new(format!("file {inode} of {seconds}.{nanoseconds:09}"), true);
    }
    match file_handle(file) {
        Some(handle) => Identity::new(format!("file {inode} with handle {handle}"), true),
        None => Identity::new(format!("file {inode} on device {}", metadata.dev()), false),
    }
}

/// What a file server would know the file by: with a number that another one of the same inode
/// does not have. `None` where there is none, or only until the file system is mounted anew.
fn file_handle(file: &File) -> Option<String> {
    const FUSE: i64 = 0x6573_5546;
    /// `MAX_HANDLE_SZ` of `linux/exportfs.h`.
    const MOST: usize = 128;
    #[repr(C)]
    struct Handle {
        head: libc::file_handle,
        bytes: [u8; MOST],
    }
    if rustix::fs::fstatfs(file).ok()?.f_type == FUSE {
        return None;
    }
    let mut handle = Handle {
        head: libc::file_handle {
            handle_bytes: MOST as u32,
            handle_type: 0,
            f_handle: [],
        },
        bytes: [0; MOST],
    };
    let mut mount = 0;
    // SAFETY: the descriptor is open, the path is an empty string, which AT_EMPTY_PATH allows,
    // and the kernel writes at most `handle_bytes` bytes behind the head, which are there.
    let result = unsafe {
        libc::name_to_handle_at(
            file.as_raw_fd(),
            c"".as_ptr(),
            &raw mut handle.head,
            &raw mut mount,
            libc::AT_EMPTY_PATH,
        )
    };
    let bytes = handle.bytes.get(..handle.head.handle_bytes as usize)?;
    if result != 0 || bytes.is_empty() {
        return None;
    }
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    Some(format!("{:x}:{hex}", handle.head.handle_type))
}

/// A device by what it says of itself, or else by its number, until it is detached or the
/// host restarts; and whether that tells it from all others.
fn device_identity(device: u64) -> io::Result<Identity> {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let place = Path::new("/sys/dev/block").join(format!("{major}:{minor}"));
    let line = |path: PathBuf| {
        let text = std::fs::read_to_string(path).ok()?;
        let text = text.trim().to_owned();
        (!text.is_empty() && text.len() < 1024).then_some(text)
    };
    if let Some(uuid) = line(place.join("dm/uuid")) {
        return Ok(Identity::new(format!("device {uuid}"), true));
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
        return Ok(Identity::new(format!("device {id}{part}"), true));
    }
    // Another disk of the same number has another one.
    let sequence = line(disk.join("diskseq"));
    let is_unique = sequence.is_some();
    let sequence = sequence.unwrap_or_default();
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let boot = boot.trim();
    let identity = format!("device {major}:{minor} sequence {sequence} in {boot}");
    Ok(Identity::new(identity, is_unique))
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
        sync_directory(&self.path)?;
        if self.file.metadata()?.nlink() > 0 {
            // It was moved away, or has another name: from there it may come back.
            self.file.set_len(0)?;
            self.file.sync_all()?;
        }
        Ok(())
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_takes_the_place_of_another_one_is_another_one_without_a_time_of_birth() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        let identity = |born| {
            let file = File::options()
                .create(true)
                .append(true)
                .open(&path)
                .unwrap();
            let metadata = file.metadata().unwrap();
            (file_identity(&file, &metadata, born), metadata.ino())
        };
        let (first, _) = identity(None);
        std::fs::write(&path, "more").unwrap();
        assert_eq!(identity(None).0, first);
        // What there is to tell them by.
        assert_eq!(first.is_unique, first.text.contains("with handle"));
        for _ in 0..20 {
            std::fs::remove_file(&path).unwrap();
            let (other, _) = identity(None);
            assert!(other != first || !first.is_unique, "{first:?}");
        }
        // A time of zero is none.
        assert_eq!(identity(Some(UNIX_EPOCH)), identity(None));
        let born = UNIX_EPOCH + Duration::new(5, 7);
        let (told, inode) = identity(Some(born));
        let expected = Identity::new(format!("file {inode} of 5.000000007"), true);
        assert_eq!(told, expected);
    }

    #[test]
    fn what_is_written_after_an_image_was_synced_has_another_time() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        for round in 0u8..20 {
            std::fs::write(&path, [round]).unwrap();
            let file = std::sync::Arc::new(File::open(&path).unwrap());
            let image = ImageFile {
                file,
                path: path.clone(),
                bitmap_file: None,
            };
            let image = image.watch().unwrap();
            image.sync().unwrap();
            let stamp = image.stamp().unwrap();
            std::fs::write(&path, [round + 1]).unwrap();
            assert_ne!(image.stamp().unwrap(), stamp);
        }
    }
}
