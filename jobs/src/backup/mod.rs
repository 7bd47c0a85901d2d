//! The backup job: makes a target what a source is at one instant, while the guest goes
//! on writing the source.
//!
//! - `spec`, `error`, `start`: what is asked for, and how it begins;
//! - `account`: what is left to be copied;
//! - `body`: the copying beside the guest;
//! - `driver`: the job as the job core sees it, and its end.
//!
//! The instant is the one in which the `copy-before-write` filter goes in, in a drained
//! section. From then on the filter copies what a guest's request is about to change
//! before it does, and the body copies the rest: of each cluster whoever *claims* it
//! first. A snapshot that the filter could not save makes the job fail, whatever else
//! has been copied.
//!
//! *Fleecing*: the filter saves into a scratch file instead, so that guests never wait for
//! the target. The body reads the snapshot, from the source or the scratch file, and what
//! it has copied is freed there.

mod account;
mod body;
mod driver;
mod error;
mod operation;
mod scan;
mod spec;
mod start;
#[cfg(all(test, not(shuttle)))]
mod tests;

pub use driver::FleecingInfo;
pub use error::BackupError;
pub use spec::{BackupPerf, BackupSpec, BackupSync, BitmapMode};
pub use start::{PreparedBackup, prepare_backup, start_backup};
