//! Synchronisation primitives: the standard library's, or the model checker's
//! in builds with `--cfg shuttle`; and the mark of a thread that holds the job
//! mutex.

#[cfg(not(shuttle))]
pub(crate) use std::sync::{Mutex, MutexGuard, atomic};
#[cfg(not(shuttle))]
use std::thread_local;

#[cfg(shuttle)]
pub(crate) use shuttle::sync::{Mutex, MutexGuard, atomic};
#[cfg(shuttle)]
use shuttle::thread_local;

use std::cell::Cell;

#[cfg(not(shuttle))]
pub(crate) use futures_util::task::AtomicWaker as WakerSlot;

/// The model's [`futures_util::task::AtomicWaker`]: the same promises, with a
/// switch of threads possible at each call.
#[cfg(shuttle)]
#[derive(Default)]
pub(crate) struct WakerSlot(Mutex<Option<std::task::Waker>>);

#[cfg(shuttle)]
impl WakerSlot {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    pub(crate) fn register(&self, waker: &std::task::Waker) {
        let old = self.0.lock().unwrap().replace(waker.clone());
        drop(old);
    }

    pub(crate) fn wake(&self) {
        let waker = self.0.lock().unwrap().take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

thread_local! {
    /// Whether this thread holds a job mutex.
    static HELD: Cell<bool> = const { Cell::new(false) };
}

/// Notes that this thread holds the job mutex until the mark is dropped.
#[derive(Debug)]
pub(crate) struct HeldMark(());

impl HeldMark {
    /// To be called before the mutex is taken.
    ///
    /// # Panics
    ///
    /// In debug builds, if this thread holds it already (it would wait for
    /// itself).
    pub(crate) fn new() -> Self {
        assert_unlocked("the job mutex was taken");
        HELD.with(|held| held.set(true));
        Self(())
    }
}

impl Drop for HeldMark {
    fn drop(&mut self) {
        HELD.with(|held| held.set(false));
    }
}

/// Whether this thread holds the job mutex.
pub(crate) fn is_held() -> bool {
    HELD.with(Cell::get)
}

/// The job mutex is a leaf: nothing is called, locked or awaited under it.
///
/// # Panics
///
/// In debug builds, if this thread holds it.
#[track_caller]
pub(crate) fn assert_unlocked(what: &str) {
    debug_assert!(!is_held(), "{what} while this thread holds the job mutex");
}
