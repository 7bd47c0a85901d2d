//! Image locking: who uses a file, told to other processes by byte locks.
//!
//! The protocol is QEMU's, so that QEMU, qemu-img and diptych exclude each
//! other: each permission held is a shared lock of the byte at 100 plus its bit
//! number, each permission not shared one at 200 plus its bit number. A
//! permission may be held while nobody has the byte that says it is not shared,
//! and the other way round. Locks belong to the open file description
//! (`F_OFD_SETLK`), so nodes of one process exclude each other, too.
//!
//! Taking first and checking second makes two processes that start at the same
//! moment both fail rather than both go on.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use super::sys;
use crate::permissions::{Perm, PermissionError, Permissions};

/// Bytes of permissions that are held.
const HELD_BASE: i64 = 100;
/// Bytes of permissions that are not shared.
const UNSHARED_BASE: i64 = 200;

/// The locks of one open file.
#[derive(Debug)]
pub(super) struct ImageLock {
    file: Arc<File>,
    filename: String,
    /// Locked bytes, as a set packed by `pack`. Used on main only, and by `close`.
    locked: AtomicU8,
    /// What the last check was about, packed. Used on main only, and by `close`.
    wanted: AtomicU8,
    /// What holds, packed: `locked` goes back to it on abort. Used on main only, and by `close`.
    held: AtomicU8,
}

/// Bytes to lock: low half the permissions held, high half those not shared.
fn pack(permissions: Permissions) -> u8 {
    let bits = |set: Perm| set.iter().fold(0u8, |all, perm| all | 1 << perm.bit());
    bits(permissions.need) | bits(!permissions.share) << 4
}

/// Offset in the file of bit `bit` of a packed set.
fn offset(bit: u32) -> i64 {
    if bit < 4 {
        HELD_BASE + i64::from(bit)
    } else {
        UNSHARED_BASE + i64::from(bit - 4)
    }
}

/// Offset of the byte whose lock is in the way of bit `bit`, the permission it
/// is about, and whether it is about sharing.
fn opposite(bit: u32) -> (i64, Perm, bool) {
    let perm = Perm::EACH[(bit % 4) as usize];
    (offset((bit + 4) % 8), perm, bit >= 4)
}

fn bits(set: u8) -> impl Iterator<Item = u32> {
    (0..8).filter(move |bit| set & 1 << bit != 0)
}

/// Whether a program has the image open, for reading or writing: this one by another open
/// file, diptych or QEMU elsewhere. Where the file system has no locks nobody knows, and it
/// is false.
pub fn image_is_in_use(file: &File) -> bool {
    bits(u8::MAX).any(|bit| sys::byte_is_locked(file, offset(bit)).unwrap_or(false))
}

impl ImageLock {
    /// Whether the file system of `file` has such locks.
    pub(super) fn is_supported(file: &File) -> bool {
        sys::byte_is_locked(file, HELD_BASE).is_ok()
    }

    pub(super) fn new(file: Arc<File>, filename: String) -> Self {
        Self {
            file,
            filename,
            locked: AtomicU8::new(0),
            wanted: AtomicU8::new(0),
            held: AtomicU8::new(0),
        }
    }

    /// Locks what `permissions` need besides what is locked, and looks for
    /// others. All is as before after an error. Asking for nothing new cannot fail.
    pub(super) fn check(&self, permissions: Permissions) -> Result<(), PermissionError> {
        let wanted = pack(permissions);
        if wanted & !self.held.load(Ordering::Relaxed) == 0 {
            // Whoever is there (one that takes first and looks second, or heeds
            // no locks) cannot be against our giving something up.
            self.wanted.store(wanted, Ordering::Relaxed);
            return Ok(());
        }
        let result = self
            .add(wanted)
            .map_err(|source| self.failed(source))
            .and_then(|()| self.look_for_others(wanted));
        match result {
            Ok(()) => self.wanted.store(wanted, Ordering::Relaxed),
            Err(_) => self.abort(),
        }
        result
    }

    /// As [`check`](Self::check), but looks for nobody: another of our locks of the
    /// same file holds the same, and was checked.
    pub(super) fn take(&self, permissions: Permissions) -> Result<(), PermissionError> {
        let wanted = pack(permissions);
        match self.add(wanted) {
            Ok(()) => {
                self.wanted.store(wanted, Ordering::Relaxed);
                Ok(())
            }
            Err(source) => {
                self.abort();
                Err(self.failed(source))
            }
        }
    }

    /// Gives up what the last check does not want.
    pub(super) fn commit(&self) {
        let wanted = self.wanted.load(Ordering::Relaxed);
        self.held.store(wanted, Ordering::Relaxed);
        self.reduce_to(wanted);
    }

    /// Gives up what the last check took.
    pub(super) fn abort(&self) {
        let held = self.held.load(Ordering::Relaxed);
        self.wanted.store(held, Ordering::Relaxed);
        self.reduce_to(held);
    }

    /// Gives up everything.
    pub(super) fn release(&self) {
        self.wanted.store(0, Ordering::Relaxed);
        self.commit();
    }

    fn failed(&self, source: io::Error) -> PermissionError {
        PermissionError::Lock {
            filename: self.filename.clone(),
            source,
        }
    }

    fn add(&self, wanted: u8) -> io::Result<()> {
        for bit in bits(wanted & !self.locked.load(Ordering::Relaxed)) {
            sys::set_byte_lock(&self.file, libc::F_RDLCK, offset(bit))?;
            self.locked.fetch_or(1 << bit, Ordering::Relaxed);
        }
        Ok(())
    }

    fn look_for_others(&self, wanted: u8) -> Result<(), PermissionError> {
        for bit in bits(wanted) {
            let (at, perm, shared) = opposite(bit);
            if sys::byte_is_locked(&self.file, at).map_err(|source| self.failed(source))? {
                return Err(PermissionError::Locked {
                    perm,
                    shared,
                    filename: self.filename.clone(),
                });
            }
        }
        Ok(())
    }

    fn reduce_to(&self, set: u8) {
        for bit in bits(self.locked.load(Ordering::Relaxed) & !set) {
            // A byte that stays locked keeps others out longer than needed, and
            // is tried again with the next change.
            match sys::set_byte_lock(&self.file, libc::F_UNLCK, offset(bit)) {
                Ok(()) => {
                    self.locked.fetch_and(!(1 << bit), Ordering::Relaxed);
                }
                Err(error) => tracing::warn!("Cannot unlock image '{}': {error}", self.filename),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WRITER: Permissions = Permissions {
        need: Perm::WRITE,
        share: Perm::CONSISTENT_READ,
    };

    fn two_opens() -> (tempfile::NamedTempFile, ImageLock, ImageLock) {
        let image = tempfile::NamedTempFile::new().unwrap();
        let open = || {
            let file = File::options()
                .read(true)
                .write(true)
                .open(image.path())
                .unwrap();
            ImageLock::new(Arc::new(file), "image".into())
        };
        let (a, b) = (open(), open());
        (image, a, b)
    }

    #[test]
    fn the_bytes_are_those_of_qemu() {
        let set = pack(WRITER);
        let at: Vec<i64> = bits(set).map(offset).collect();
        assert_eq!(at, [101, 201, 202, 203]);
        assert_eq!(opposite(1), (201, Perm::WRITE, false));
        assert_eq!(opposite(5), (101, Perm::WRITE, true));
    }

    #[test]
    fn an_image_is_in_use_while_another_has_it_open() {
        let (image, a, b) = two_opens();
        assert!(!image_is_in_use(image.as_file()));
        a.check(WRITER).unwrap();
        a.commit();
        assert!(image_is_in_use(image.as_file()) && image_is_in_use(&b.file));
        assert!(!image_is_in_use(&a.file), "its own locks do not count");
        drop(a);
        assert!(!image_is_in_use(image.as_file()));
    }

    #[test]
    fn a_second_writer_is_refused_and_leaves_no_locks() {
        let (_image, a, b) = two_opens();
        a.check(WRITER).unwrap();
        a.commit();
        let error = b.check(WRITER).unwrap_err();
        assert_eq!(error.to_string(), "Failed to get \"write\" lock");
        assert_eq!(b.locked.load(Ordering::Relaxed), 0);
        // One who only does not share writing is told so.
        let error = b
            .check(Permissions {
                need: Perm::NONE,
                share: !Perm::WRITE,
            })
            .unwrap_err();
        assert_eq!(error.to_string(), "Failed to get shared \"write\" lock");
        // A reader who shares all is welcome.
        b.check(Permissions {
            need: Perm::CONSISTENT_READ,
            share: Perm::ALL,
        })
        .unwrap();
        b.commit();
        a.release();
        b.check(WRITER).unwrap();
        b.commit();
    }

    #[test]
    fn giving_rights_up_cannot_be_refused() {
        let (_image, a, b) = two_opens();
        let both = Permissions {
            need: Perm::CONSISTENT_READ | Perm::WRITE,
            share: Perm::NONE,
        };
        a.check(both).unwrap();
        a.commit();
        // Another has just taken its bytes, and will go away when it sees ours.
        b.add(pack(both)).unwrap();
        let less = Permissions {
            need: Perm::CONSISTENT_READ,
            share: Perm::NONE,
        };
        a.check(less).unwrap();
        a.commit();
        assert_eq!(a.locked.load(Ordering::Relaxed), pack(less));
        assert!(a.check(both).is_err());
    }

    #[test]
    fn an_aborted_check_keeps_what_was_held_and_no_more() {
        let (_image, a, b) = two_opens();
        let reader = Permissions {
            need: Perm::CONSISTENT_READ,
            share: !Perm::RESIZE,
        };
        a.check(reader).unwrap();
        a.commit();
        a.check(reader.and(WRITER)).unwrap();
        assert!(b.check(WRITER).is_err());
        a.abort();
        assert_eq!(a.locked.load(Ordering::Relaxed), pack(reader));
        b.check(WRITER).unwrap();
        // Taken, not committed: still in the way of others.
        assert!(a.check(reader.and(WRITER)).is_err());
        b.abort();
        a.check(reader.and(WRITER)).unwrap();
    }
}
