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

#[cfg(not(shuttle))]
pub(crate) use arc_swap::ArcSwap;

/// The model's [`arc_swap::ArcSwap`]: the same promises, with a switch of threads
/// possible at each call.
#[cfg(shuttle)]
pub(crate) struct ArcSwap<T>(Mutex<std::sync::Arc<T>>);

#[cfg(shuttle)]
impl<T> ArcSwap<T> {
    pub(crate) fn new(value: std::sync::Arc<T>) -> Self {
        Self(Mutex::new(value))
    }

    pub(crate) fn load(&self) -> std::sync::Arc<T> {
        self.load_full()
    }

    pub(crate) fn load_full(&self) -> std::sync::Arc<T> {
        std::sync::Arc::clone(&lock(&self.0))
    }

    pub(crate) fn store(&self, value: std::sync::Arc<T>) {
        let old = std::mem::replace(&mut *lock(&self.0), value);
        drop(old);
    }
}

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
