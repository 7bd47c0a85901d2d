//! The embedded guest's logic, without its machine.
//!
//! Here is all that can be wrong without touching hardware: what a sector
//! looks like, what the guest believes to be on its disks, how it counts time,
//! and what it says to the host. The host links the same code to check images.
//! Virtqueues, traps and memory live in `kernel/`, which is compiled for the
//! bare machine by the build script of `vmm`.
//!
//! Nothing here allocates, blocks, or knows a thread.

#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

pub mod cmdline;
pub mod histogram;
pub mod mailbox;
pub mod phase;
pub mod random;
pub mod record;
pub mod report;
pub mod sector;
