//! Drivers that nodes are made of.
//!
//! What does not live here: nodes, edges and permissions between them (`graph`).

pub mod blkdebug;
pub mod copy_before_write;
pub mod copy_on_read;
pub mod file;
pub mod nbd;
pub mod null;
pub mod preallocate;
pub mod qcow2;
pub mod raw;
pub mod snapshot_access;
pub mod throttle;

mod error;

pub use error::{OpenError, ReopenError};
