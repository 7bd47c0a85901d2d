//! Synchronisation primitives: the standard library's, or the model checker's
//! in builds with `--cfg shuttle`.
//!
//! Modules that shuttle checks take them from here. The rest of the crate uses
//! `std::sync`.

use crate::leaf;

#[cfg(not(shuttle))]
pub(crate) use std::sync::{Mutex, MutexGuard, atomic};

#[cfg(shuttle)]
pub(crate) use shuttle::sync::{Mutex, MutexGuard, atomic};

/// Locks `mutex`. A panic of an earlier holder does not matter: everything that
/// this crate guards is consistent at each point where its holder may panic.
///
/// # Panics
///
/// In debug builds, under a leaf lock of another crate.
#[track_caller]
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    leaf::assert_none_held("a lock of the block layer was taken");
    mutex
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
}
