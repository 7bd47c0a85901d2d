//! The state machine: what a job is, what may happen to it, and what follows.
//!
//! Pure: no lock, no I/O, no callback, no clock, no type of the block layer.
//! [`Machine::step`] takes the job, an [`Event`], and gives [`Effect`]s, which
//! are data too. Who holds the job mutex around it, and who runs the effects
//! after it, is in `shell`.
//!
//! ```text
//!                                    ┌──► paused            (pause point)
//!  undefined ──► created ──► running ┴──────────────────┐
//!                   │ │         │    ┌──► standby       │ body returned
//!                   │ │         └► ready ───────────────┤
//!     set-up failed │ │ cancelled                       ▼
//!                   │ └────────► aborting ◄── waiting ──► pending
//!                   ▼               │   ▲                 │    │
//!                  null ◄── concluded ◄─┼─────────────────┘    │
//!                                       └──────────────────────┘
//! ```

mod job;
mod limit;
mod machine;
mod status;
mod txn;

#[cfg(test)]
mod random_tests;
#[cfg(test)]
mod rig;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod txn_tests;

pub use job::SoftCancel;
pub(crate) use job::{JobSettings, JobState};
pub use limit::SLICE;
pub(crate) use machine::{Announcement, Effect, Event, Hook, Machine};
pub use status::{JobStatus, JobVerb};
