//! The beginning of the body: which ranges are to be copied at all.
//!
//! The guest's requests are recorded from the moment in which the filter went in, long
//! before this begins, and what is found here is only ever *added* to what is dirty. So
//! a write into a range that was looked at already, or that is looked at later, is not
//! lost. Nor is one that went to the target by itself and was zeroed over there: the
//! source has it by then, so its range is found to be allocated.

use std::sync::Arc;
use std::time::Duration;

use block::{Node, ZeroFlags, runtime};

use crate::JobFailure;
use crate::copying::Entered;

use super::body::Body;

/// Bytes zeroed by one request, so that a cancel is not kept waiting.
const ZERO_STEP: u64 = 64 << 20;
/// Wait while somebody drains a node.
const BUSY: Duration = Duration::from_millis(1);

/// What is dirty at first.
#[derive(Clone)]
pub(super) enum Initial {
    /// What was marked before the body began (everything, or nothing), and no more.
    Marked,
    /// What the source has allocated above a base: all layers if there is none.
    Allocated {
        base: Option<Arc<Node>>,
        /// The target has to be made zero first.
        zero_target: bool,
    },
}

impl Body<'_> {
    /// Finds out what is dirty at first. Ends early if the job is forced to end.
    ///
    /// Errors: the source could not be asked.
    pub(super) async fn initialize(&mut self) -> Result<(), JobFailure> {
        let Initial::Allocated { base, zero_target } = self.driver.settings().initial.clone()
        else {
            return Ok(());
        };
        if zero_target && !self.zero_target().await {
            // It cannot be done in a simple way: the copier does it range by range, and
            // acts on what fails.
            self.state.dirty.set_all();
            self.report_progress();
            return Ok(());
        }
        let mut offset = 0;
        while offset < self.state.size {
            let Some(nodes) = self.enter_for_a_step().await else {
                return Ok(());
            };
            let left = self.state.size - offset;
            let status = nodes
                .source
                .node()
                .chain_status(base.as_ref(), offset, left);
            let (allocated, len) = match status.await {
                Ok(extent) => (extent.depth > 0, extent.len),
                // The base is not below the source any more: better too much.
                Err(error) if error.errno == libc::EINVAL && base.is_some() => (true, left),
                // Whatever the policy: what is not known cannot be copied.
                Err(error) => return Err(JobFailure::from(&error)),
            };
            let end = offset + len.clamp(1, left);
            if allocated {
                self.state.set_dirty(offset..end);
                self.report_progress();
            }
            offset = end;
        }
        Ok(())
    }

    /// Makes the target read as zeroes. `false`: a request failed.
    async fn zero_target(&mut self) -> bool {
        let mut offset = 0;
        while offset < self.state.size {
            let Some(nodes) = self.enter_for_a_step().await else {
                return true;
            };
            let target = nodes.target.node();
            let rest = offset..self.state.size;
            let (zero, len) = self.state.copy_rules().target_zeroes(target, &rest).await;
            let len = if zero { len } else { len.min(ZERO_STEP) };
            if !zero {
                let flags = ZeroFlags {
                    may_unmap: self.state.rules.unmap,
                    ..ZeroFlags::default()
                };
                // A guest's write of the target, in write-blocking mode, comes before or
                // after.
                let _range = self.state.in_flight.lock(offset..offset + len).await;
                let zeroed = nodes.target.write_zeroes(offset, len, flags).await;
                self.state.note_target_written();
                if let Err(error) = zeroed {
                    tracing::info!(job = self.ctx.id(), %error, "mirror: the target is not zeroed first");
                    return false;
                }
            }
            offset += len;
        }
        true
    }

    /// A pause point, and the right to use both nodes. `None`: the job is forced to end.
    async fn enter_for_a_step(&mut self) -> Option<Entered> {
        loop {
            self.ctx.pause_point().await;
            if self.ctx.is_force_cancelled() {
                return None;
            }
            match self.copier.enter() {
                Some(nodes) => return Some(nodes),
                None => runtime::sleep(BUSY).await,
            }
        }
    }
}
