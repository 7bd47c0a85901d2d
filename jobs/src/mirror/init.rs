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
    /// Finds out what is dirty at first. Ends early if the job has to end.
    pub(super) async fn initialize(&mut self) {
        let Initial::Allocated { base, zero_target } = self.driver.settings().initial.clone()
        else {
            return;
        };
        if zero_target && !self.zero_target().await {
            // It cannot be done in a simple way: the copier does it range by range, and
            // acts on what fails.
            self.state.dirty.set_all();
            self.report_progress();
        } else {
            self.look_through(base).await;
        }
        self.to_look_at = None;
    }

    /// Looks for what is allocated above `base`.
    async fn look_through(&mut self, base: Option<Arc<Node>>) {
        self.to_look_at = Some(self.state.size);
        self.watch_anew();
        let mut offset = 0;
        while offset < self.state.size {
            let left = self.state.size - offset;
            let Some(nodes) = self.enter_for_a_step(left).await else {
                return;
            };
            let base = base.clone();
            let step = async move {
                let source = nodes.source()?;
                let node = source.node();
                let extent = match node.chain_status(base.as_ref(), offset, left).await {
                    // The base is not below the source any more: better too much.
                    Err(error) if error.errno == libc::EINVAL && base.is_some() => (true, left),
                    Err(error) => return Some(Err(error)),
                    Ok(extent) => (extent.depth > 0, extent.len),
                };
                Some(Ok(extent))
            };
            let (allocated, len) = match self.wait_for_step(step).await {
                Some(Some(Ok(extent))) => extent,
                // Whatever the policy: what is not known cannot be copied.
                Some(Some(Err(error))) => {
                    self.failure = Some(JobFailure::from(&error));
                    return;
                }
                // Somebody drains the source.
                Some(None) => continue,
                None => return,
            };
            let end = offset + len.clamp(1, left);
            if allocated {
                self.state.set_dirty(offset..end);
                self.report_progress();
            }
            offset = end;
        }
    }

    /// Makes the target read as zeroes. `false`: a request failed.
    async fn zero_target(&mut self) -> bool {
        self.to_look_at = Some(self.state.size);
        self.watch_anew();
        let mut offset = 0;
        while offset < self.state.size {
            let rest = offset..self.state.size;
            let Some(nodes) = self.enter_for_a_step(rest.end - rest.start).await else {
                return true;
            };
            let state = Arc::clone(&self.state);
            let step = async move {
                let target = nodes.target();
                let (zero, len) = state.copy_rules().target_zeroes(target.node(), &rest).await;
                if zero {
                    return Ok(len);
                }
                let len = len.min(ZERO_STEP);
                let flags = ZeroFlags {
                    may_unmap: state.rules.unmap,
                    ..ZeroFlags::default()
                };
                // A guest's write of the target, in write-blocking mode, comes before or
                // after.
                let _range = state.in_flight.lock(rest.start..rest.start + len).await;
                let zeroed = target.write_zeroes(rest.start, len, flags).await;
                state.note_target_written();
                zeroed.map(|()| len)
            };
            match self.wait_for_step(step).await {
                Some(Ok(len)) => offset += len,
                Some(Err(error)) => {
                    tracing::info!(job = self.ctx.id(), %error, "mirror: the target is not zeroed first");
                    return false;
                }
                None => return true,
            }
        }
        true
    }

    /// A pause point, and the right to use both nodes, with so many bytes still to be
    /// looked at. `None`: the job has to end.
    async fn enter_for_a_step(&mut self, to_look_at: u64) -> Option<Entered> {
        self.to_look_at = Some(to_look_at);
        loop {
            self.pause_point().await;
            self.watch_over();
            if self.has_to_end() {
                return None;
            }
            match self.copier.enter() {
                Some(nodes) => return Some(nodes),
                None => runtime::sleep(BUSY).await,
            }
        }
    }

    /// Waits for one request. `None`: the job has to end, and the request has been left to
    /// itself.
    async fn wait_for_step<T: 'static>(
        &mut self,
        step: impl Future<Output = T> + 'static,
    ) -> Option<T> {
        let ctx = self.ctx;
        let ends = || {
            self.watch_over();
            self.has_to_end()
        };
        match ctx.wait_unless(Box::pin(step), ends).await {
            Ok(done) => Some(done),
            Err(rest) => {
                self.left_step = Some(Box::pin(async move {
                    rest.await;
                }));
                None
            }
        }
    }
}
