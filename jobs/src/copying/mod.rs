//! What jobs that copy have in common.
//!
//! - `carry`, `plan`, `pool`: carrying a range over;
//! - `hold`: who keeps others off the filter;
//! - `pace`: why the guest does not suffer from it;
//! - `leave`: taking a job's filter and its attachments off the graph;
//! - `undo`: the same for a start that fails.

mod carry;
mod hold;
mod leave;
mod pace;
mod plan;
mod pool;
mod undo;

pub(crate) use carry::{Carrier, Copied, CopyError, Entered, Look, Rules, Runs, Side, enter};
pub(crate) use hold::FilterHold;
pub(crate) use leave::{
    PATIENCE, detach_when_idle, let_target_go, take_out, take_out_some_time, wait_until_idle,
};
pub(crate) use pace::{BACKUP_TOLERANCE, INTERVAL, LITTLE, Pace, window_of_speed};
pub(crate) use pool::{BufferPool, PooledBuffer};
pub(crate) use undo::Undo;
