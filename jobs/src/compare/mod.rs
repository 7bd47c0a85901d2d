//! The compare job: reads two nodes and tells where they differ, also while both are
//! in use.
//!
//! - `spec`, `error`, `start`: what is asked for, and how it begins;
//! - `look`: reading a range of both;
//! - `body`: which range is next, how many at a time;
//! - `skip`: what a bitmap leaves out;
//! - `settle`: whether what was read is a difference, or was written meanwhile;
//! - `result`: what is told;
//! - `driver`: the job as the job core sees it.
//!
//! # What counts as a difference
//!
//! Both nodes are read beside everything else that goes on. What reads the same is the
//! same, and is not looked at again. What reads differently is a *candidate*: one of the
//! nodes may have been written between the two reads, or a mirror from one to the other
//! may have yet to copy it.
//!
//! Bitmaps record what is written to either node from the start on. So to settle
//! candidates nothing has to be read: all requests to both nodes are held for the
//! moment it takes those in flight to end. Then each write that could have come between
//! the reads is in a bitmap, or is still to be copied by the mirror, which is asked. A
//! candidate that is in neither was different all the time. The others are read again,
//! later; what is written all the time is at last read while the requests are held, a
//! little at a time.
//!
//! A bitmap that has recorded what was written to one node since the other was made of it (a
//! backup) leaves that out. It is looked at before something is read, to read less, after
//! that, and again in the moment in which requests are held: by then it has every write that
//! a candidate could come from, so what is clean in it differs for another reason.

mod body;
mod driver;
mod error;
mod look;
mod result;
mod settle;
mod skip;
mod spec;
mod start;
#[cfg(all(test, not(shuttle)))]
mod tests;

pub use error::CompareError;
pub use result::Comparison;
pub use spec::{CompareSpec, MAX_DIFFERENCES};
pub use start::start_compare;
