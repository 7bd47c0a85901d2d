//! The file driver on real files: in memory (tmpfs) and on the disk that holds
//! the build directory.

mod content;
mod copying;
mod locking;
mod opening;
mod storage;

use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use super::*;

/// A directory on tmpfs, and one on the disk.
fn places() -> [PathBuf; 2] {
    [PathBuf::from("/dev/shm"), disk()]
}

/// A directory on the disk, where tests may write.
fn disk() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("..")
        .join("target")
}

fn image_in(place: &Path, size: u64) -> NamedTempFile {
    let image = NamedTempFile::new_in(place).unwrap();
    image.as_file().set_len(size).unwrap();
    image
}

fn file_options(path: &Path) -> FileOptions {
    FileOptions {
        filename: path.to_owned(),
        locking: None,
        host_device: false,
        bitmap_file: None,
    }
}

fn flags(direct: bool) -> OpenFlags {
    OpenFlags {
        cache: CacheOptions {
            direct,
            no_flush: false,
        },
        ..OpenFlags::default()
    }
}

/// As clients open an image, also for other drivers' tests.
pub(in crate::drivers) fn open_image(path: &Path, direct: bool) -> FileDriver {
    open("node", &file_options(path), flags(direct)).unwrap()
}

/// As on storage with larger blocks than the one at hand.
fn with_blocks(mut driver: FileDriver, memory: u32, request: u32) -> FileDriver {
    assert!(driver.direct.is_some(), "O_DIRECT");
    // Where the kernel has nothing to say (tmpfs), it takes anything.
    let told = sys::direct_alignment(&driver.file).filter(|told| told.request > 0);
    assert!(told.is_none_or(|told| told.memory <= memory && told.request <= request));
    driver.direct = Some(DirectAlignment { memory, request });
    driver
}
