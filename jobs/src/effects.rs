//! What is left to do after the job mutex was released.

use std::sync::Arc;

use crate::id::JobKey;
use crate::shared::{Shared, Slot};
use crate::state::JobStatus;
use crate::sync;

/// What a request to the monitor side has caused: bodies to start or wake, and
/// main to be told of events and hooks.
///
/// An effect that nobody runs is a job that never wakes. So not to run them is a
/// warning, and an error in this workspace:
///
/// ```compile_fail
/// #![deny(unused_must_use)]
/// fn pause(jobs: &jobs::Jobs, key: jobs::JobKey) -> Result<(), jobs::JobError> {
///     jobs.lock().pause(key)?;
///     Ok(())
/// }
/// ```
///
/// Dropping them all the same runs them in release builds, with a line in the
/// log, and panics in debug builds.
#[must_use = "an effect nobody runs is a job that never wakes: give it to `Jobs::run`"]
pub struct Effects {
    shared: Arc<Shared>,
    pub(crate) start: Vec<Arc<Slot>>,
    pub(crate) wake: Vec<Arc<Slot>>,
    pub(crate) main: bool,
    /// Illegal changes of status that the machine refused, to be logged.
    pub(crate) refused: Vec<(JobKey, JobStatus, JobStatus)>,
}

impl std::fmt::Debug for Effects {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Effects")
            .field("start", &self.start.len())
            .field("wake", &self.wake.len())
            .field("main", &self.main)
            .finish()
    }
}

impl Effects {
    pub(crate) fn none(shared: &Arc<Shared>) -> Self {
        Self {
            shared: Arc::clone(shared),
            start: Vec::new(),
            wake: Vec::new(),
            main: false,
            refused: Vec::new(),
        }
    }

    /// These effects, and after them those of `other`.
    pub fn and(mut self, mut other: Effects) -> Effects {
        self.start.append(&mut other.start);
        self.wake.append(&mut other.wake);
        self.refused.append(&mut other.refused);
        self.main |= std::mem::take(&mut other.main);
        self
    }

    fn is_empty(&self) -> bool {
        self.start.is_empty() && self.wake.is_empty() && !self.main && self.refused.is_empty()
    }

    /// Runs them.
    ///
    /// # Panics
    ///
    /// In debug builds, if this thread holds the job mutex.
    pub(crate) fn run(mut self) {
        self.run_all();
    }

    fn run_all(&mut self) {
        sync::assert_unlocked("effects were run");
        for (key, from, to) in std::mem::take(&mut self.refused) {
            tracing::error!(?key, %from, %to, "Refused an illegal transition of a job");
        }
        for slot in std::mem::take(&mut self.wake) {
            slot.waker.wake();
        }
        for slot in std::mem::take(&mut self.start) {
            self.shared.start_body(&slot);
        }
        if std::mem::take(&mut self.main) {
            self.shared.wake_main();
        }
    }
}

impl Drop for Effects {
    fn drop(&mut self) {
        if self.is_empty() {
            return;
        }
        if cfg!(debug_assertions) && !std::thread::panicking() {
            panic!("{self:?} were dropped instead of run");
        }
        tracing::error!(effects = ?self, "Effects of a job request were not run by its caller");
        // Unwinding under the mutex: they cannot be run, and the process is done
        // for anyway.
        if !block::leaf::is_held() {
            self.run_all();
        }
    }
}
