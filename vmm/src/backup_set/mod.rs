//! A directory of backups on disk: what `diptych job backup` writes and `diptych restore`
//! reads. The format is in docs/backup.md.
//!
//! - [`manifest`]: which backups there are, and what makes each
//! - [`ranges`]: which parts of the disk an incremental backup holds
//! - [`piece`]: reading the data of one, and its hash
//! - [`directory`]: the lock, and how files come and go safely
//! - [`names`]: what files are called
//!
//! Neither monitors nor jobs are known here. What is read may be hostile: numbers, names and
//! sizes are checked, and no name leads out of the directory.

pub mod directory;
mod error;
pub mod manifest;
pub mod names;
pub mod piece;
pub mod ranges;

pub use directory::Directory;
pub use error::SetError;
pub use manifest::{Disk, Entry, Kind, Manifest};
