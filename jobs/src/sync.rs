//! Synchronisation primitives: the standard library's, or the model checker's
//! in builds with `--cfg shuttle`.

use block::leaf;

#[cfg(not(shuttle))]
pub(crate) use std::sync::{Mutex, MutexGuard, atomic};

#[cfg(shuttle)]
pub(crate) use shuttle::sync::{Mutex, MutexGuard, atomic};

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

/// The job mutex is a leaf: nothing is called, locked or awaited under it. The
/// block layer keeps the mark, and looks at it wherever it locks, wakes, drains or
/// submits.
///
/// # Panics
///
/// In debug builds, if this thread holds it.
#[track_caller]
pub(crate) fn assert_unlocked(what: &str) {
    leaf::assert_none_held(what);
}
