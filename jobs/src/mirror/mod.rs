//! The mirror job: makes a target equal to a source while the guest writes to the
//! source, keeps it so, and puts it in the source's place when asked to.
//!
//! - `spec`, `error`, `start`: what is asked for, and how it begins;
//! - `filter`, `active`: the node above the source that sees what the guest does;
//! - `state`: what filter and copier share, and the rules they follow;
//! - `init`: what is to be copied at first;
//! - `body`, `operations`, `copy`: the copier (what it has in common with other jobs is in
//!   `copying`);
//! - `guard`, `watch`, `retry`: whether it gets on, and what is done if not;
//! - `sweep`, `converge`, `complete`: the moments in which the guest is held, and
//!   the pivot;
//! - `driver`, `user`: the job as the job core and the graph see it.
//!
//! # One life
//!
//! [`start_mirror`] drains the source, puts the filter in and marks everything
//! dirty before the guest goes on, so that there is no moment in which a write is
//! not seen. The body copies dirty ranges: it clears their bits *first*, then looks
//! at the source, and marks them again before it lets go of them if that fails.
//! What reads as zeroes is not read, and not written where the target reads as
//! zeroes already.
//!
//! When nothing is dirty or in flight and the target is flushed, the job is ready.
//! If the guest writes faster than that can come about, its requests write the target
//! as well until the mirror has caught up. To be completed, the guest is held for the
//! moment it takes to copy what little is left, and flush it; the
//! section stays until main has put the target in the source's place.
//!
//! # The guest comes first
//!
//! The filter measures the latency of the guest's requests; the copier has as much
//! in flight as leaves that within bounds of what it is without copying (`copying::Pace`).
//! A write of the guest waits for the copier only in `write-blocking` mode, and only
//! for an operation on the very same chunk. It never fails because of the target.

mod active;
mod body;
mod complete;
mod converge;
mod copy;
mod driver;
mod error;
mod filter;
mod guard;
mod init;
mod operations;
mod private_copy;
mod retry;
#[cfg(all(test, shuttle))]
mod shuttle_tests;
mod spec;
mod start;
mod state;
mod sweep;
#[cfg(all(test, not(shuttle)))]
mod tests;
mod user;
mod watch;

pub use error::MirrorError;
pub use spec::{MirrorSpec, SyncMode};
pub use start::start_mirror;
