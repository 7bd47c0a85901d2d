//! A file without a name: it takes space while it is open, and is gone when it is
//! closed, however the process ends.

use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use super::open::{Kind, Opened};
use super::{FileDriver, FileNode, OpenFlags};
use crate::drivers::OpenError;
use crate::node::SECTOR_SIZE;
use crate::options::{CacheOptions, FileOptions};

/// Only its owner can read what guests wrote.
const MODE: u32 = 0o600;
/// Names that are tried where a file needs one for a moment.
const NAMES: u32 = 100;

/// Makes a sparse file of `size` bytes (rounded up to whole sectors) in `directory`, for a
/// node of the name `node`.
///
/// Where the file system knows no files without names, it has one for an instant. Blocks:
/// to be called through [`unblock`](crate::runtime::unblock).
pub(crate) fn open_scratch(node: &str, directory: &Path, size: u64) -> Result<FileNode, OpenError> {
    let failed = |error| OpenError::Open {
        path: directory.to_owned(),
        error,
    };
    let size = size.next_multiple_of(SECTOR_SIZE);
    let file = unnamed(directory).map_err(failed)?;
    file.set_len(size).map_err(failed)?;
    let options = FileOptions {
        // What users are shown; nothing is opened by it.
        filename: directory.join("(unnamed)"),
        // Nobody else can open it.
        locking: Some(false),
        host_device: false,
        bitmap_file: None,
    };
    let flags = OpenFlags {
        cache: CacheOptions {
            // What it holds is of no use after a crash.
            no_flush: true,
            ..CacheOptions::default()
        },
        ..OpenFlags::default()
    };
    let opened = Opened {
        file,
        kind: Kind::Regular,
        read_only: false,
        size,
        direct: None,
    };
    let driver = FileDriver::new(node, &options, flags, opened)?;
    Ok(FileNode::new(driver, options))
}

fn unnamed(directory: &Path) -> io::Result<File> {
    let mut options = File::options();
    options.read(true).write(true).mode(MODE);
    let opened = options
        .clone()
        .custom_flags(libc::O_TMPFILE | libc::O_CLOEXEC)
        .open(directory);
    match opened.as_ref().map_err(io::Error::raw_os_error) {
        // File systems without such files; a kernel that does not know them says the last.
        Err(Some(libc::EOPNOTSUPP | libc::EINVAL | libc::EISDIR)) => {}
        _ => return opened,
    }
    options.create_new(true).custom_flags(libc::O_CLOEXEC);
    let mut last = io::Error::from_raw_os_error(libc::EEXIST);
    for _ in 0..NAMES {
        let path = directory.join(next_name());
        match options.open(&path) {
            Ok(file) => {
                std::fs::remove_file(&path)?;
                return Ok(file);
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => last = error,
            Err(error) => return Err(error),
        }
    }
    Err(last)
}

fn next_name() -> PathBuf {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    format!(".diptych-scratch-{}-{number}", std::process::id()).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::BlockDriver;

    #[test]
    fn a_scratch_file_is_in_no_directory() {
        let folder = tempfile::tempdir().unwrap();
        let scratch = open_scratch("scratch", folder.path(), 1000).unwrap();
        assert_eq!(scratch.size(), 1024);
        assert_eq!(folder.path().read_dir().unwrap().count(), 0);
        let missing = folder.path().join("none");
        let error = open_scratch("scratch", &missing, 512).err().unwrap();
        assert!(error.to_string().contains("none"), "{error}");
    }
}
