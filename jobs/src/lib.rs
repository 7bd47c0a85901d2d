//! The job core: long-running work on disks that can be paused, cancelled,
//! completed and finalized while it runs. And the jobs themselves.
//!
//! What does not live here: how block nodes work (`block`), devices, and QMP's
//! wire form (`vmm`).
//!
//! # One mutex
//!
//! The job mutex protects the list of jobs, the transactions and every field of a
//! job that more than one thread sees; nothing else does, and it protects nothing
//! else. It is a leaf lock: under it no other lock is taken, nothing is awaited, no
//! hook is called and no I/O is done. The API is split by who holds it:
//!
//! - the *monitor* side ([`JobsGuard`]): the caller holds it across "look up" and
//!   "act", so that nothing can change in between;
//! - the *driver* side ([`JobContext`]): the body of a job knows nothing of it; each
//!   method takes it for an instant.
//!
//! What a request causes comes back as [`Effects`] and is run after the mutex was
//! released. What an effect achieved comes back as another event of the state
//! machine, which decides what that means by then.
//!
//! # Threads
//!
//! - *main* runs the hooks of [`JobDriver`] that touch the graph, and delivers
//!   events ([`MainJobs`]);
//! - a job's body runs on its *home*, by default an iothread of its own;
//! - any thread may use [`Jobs`]: drained sections do.

#![forbid(unsafe_code)]

mod backoff;
pub mod backup;
pub mod compare;
mod context;
mod copying;
mod drain;
mod driver;
mod effects;
mod error;
mod event;
mod history;
mod home;
mod id;
mod main_task;
pub mod mirror;
mod monitor;
mod pair;
mod progress;
mod query;
mod shared;
#[cfg(all(test, shuttle))]
mod shuttle_tests;
mod state;
mod sync;
#[cfg(all(test, not(shuttle)))]
mod test_layers;
#[cfg(test)]
mod test_support;
#[cfg(all(test, not(shuttle)))]
mod tests;

pub use backoff::Backoff;
pub use context::{JobContext, JobNotifier, JobWatch};
pub use drain::OwnDrain;
pub use driver::{CopyMode, CopyRates, JobChange, JobDetails, JobDriver, JobKind};
pub use effects::Effects;
pub use error::{ErrorClass, FailedRequest, JobError, JobFailure};
pub use event::{BlockJobProgress, ErrorAction, IoSide, IoStatus, JobEvent, JobEventKind, OnError};
pub use history::{EndedJob, HISTORY_LEN, JobOutcome};
pub use id::{JobId, JobKey, TxnKey};
pub use main_task::MainJobs;
pub use monitor::{ChangeRequest, JobSpec, Jobs, JobsGuard};
pub use pair::CopyPair;
pub use progress::{Progress, ProgressSnapshot};
pub use query::JobInfo;
pub use state::{JobStatus, JobVerb, SLICE, SoftCancel};
