//! The mark of a thread that holds a leaf lock: one under which no other lock is
//! taken, nothing awaited, nobody woken or called, and no I/O begun.
//!
//! The lock itself lives elsewhere (the job mutex, in `jobs`); the mark lives here
//! because what must not be done under it is mostly done by this crate, which
//! knows nothing of jobs. Everything that this crate locks, submits, drains,
//! wakes or polls asks [`assert_none_held`] first. In release builds that is
//! nothing.

use std::cell::{Cell, Ref, RefCell, RefMut};
#[cfg(not(shuttle))]
use std::thread_local;

#[cfg(shuttle)]
use shuttle::thread_local;

thread_local! {
    /// The leaf lock that this thread holds, by name.
    static HELD: Cell<Option<&'static str>> = const { Cell::new(None) };
}

/// This thread holds a leaf lock until this is dropped.
#[derive(Debug)]
#[must_use = "the mark is taken back when this is dropped"]
pub struct LeafMark {
    /// A mark belongs to its thread.
    _not_send: std::marker::PhantomData<*const ()>,
}

impl LeafMark {
    /// To be made before the lock `name` ("the job mutex") is taken, and dropped
    /// after it was released.
    ///
    /// # Panics
    ///
    /// In debug builds, if this thread holds a leaf lock already.
    #[track_caller]
    pub fn new(name: &'static str) -> Self {
        assert_none_held(format_args!("{name} was taken"));
        HELD.with(|held| held.set(Some(name)));
        Self {
            _not_send: std::marker::PhantomData,
        }
    }
}

impl Drop for LeafMark {
    fn drop(&mut self) {
        HELD.with(|held| held.set(None));
    }
}

/// Whether this thread holds a leaf lock.
pub fn is_held() -> bool {
    HELD.with(Cell::get).is_some()
}

/// To be called before anything that must not happen under a leaf lock. `what`
/// says what it is, as in "a lock was taken".
///
/// # Panics
///
/// In debug builds, if this thread holds one (and does not panic already).
#[track_caller]
pub fn assert_none_held(what: impl std::fmt::Display) {
    if cfg!(debug_assertions)
        && let Some(name) = HELD.with(Cell::get)
        && !std::thread::panicking()
    {
        panic!("{what} while this thread holds {name}");
    }
}

/// A [`RefCell`] that is not borrowed under a leaf lock.
#[derive(Debug, Default)]
pub(crate) struct NoLeafCell<T>(RefCell<T>);

impl<T> NoLeafCell<T> {
    #[track_caller]
    pub(crate) fn borrow(&self) -> Ref<'_, T> {
        assert_none_held("the graph was looked at");
        self.0.borrow()
    }

    #[track_caller]
    pub(crate) fn borrow_mut(&self) -> RefMut<'_, T> {
        assert_none_held("the graph was changed");
        self.0.borrow_mut()
    }

    #[track_caller]
    pub(crate) fn replace(&self, value: T) -> T {
        assert_none_held("the graph was changed");
        self.0.replace(value)
    }
}
