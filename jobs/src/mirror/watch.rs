//! How the mirror gets on, as the body sees it: what is left, what clients are told, and
//! what is done if it does not.
//!
//! The judgement is `guard`'s.

use std::time::Instant;

use block::CancelReach;

use crate::JobFailure;

use super::body::{Body, PATIENCE};
use super::guard::Sight;

impl Body<'_> {
    /// Tells what is left: dirty, being copied, or being mirrored by the guest's
    /// own requests.
    pub(super) fn report_progress(&self) {
        self.ctx.progress().set_remaining(self.left());
    }

    /// What is dirty, being copied, or being mirrored by the guest's own requests.
    pub(super) fn left(&self) -> u64 {
        self.state.dirty_bytes() + self.in_flight + self.state.active_bytes()
    }

    /// The time until now says nothing about how the mirror gets on.
    pub(super) fn skip_time(&mut self) {
        let done = self.ctx.progress().snapshot().current;
        self.guard.skip(self.left(), done, Instant::now());
    }

    /// Looks how the mirror gets on: clients are told if it does not, and it fails if
    /// its time is over.
    pub(super) fn watch_over(&mut self) {
        let now = Instant::now();
        if self.guard.is_due(now) {
            let sight = Sight {
                left: self.left(),
                done: self.ctx.progress().snapshot().current,
                waits: !self.ready || self.should_end(),
                is_limited: self.ctx.speed() > 0,
            };
            let stalled = self.guard.look(sight, now);
            self.driver.show_rates(self.guard.rates());
            if stalled {
                self.tell_of_stall();
                if self.driver.settings().switches && !self.hung {
                    self.switch();
                }
            }
        }
        if self.ready || self.failure.is_some() {
            return;
        }
        if let Some(deadline) = self.guard.missed(now) {
            self.tell_of_stall();
            // What it waits for there does not matter any more.
            self.places.target.cancel_in_flight(CancelReach::Hanging);
            let rates = self.guard.rates();
            self.failure = Some(JobFailure::new(
                libc::ETIMEDOUT,
                format!(
                    "The mirror was not ready within {} s: {} bytes are left, {} bytes/s are \
                     dirtied and {} bytes/s copied; use copy-mode 'auto' or 'write-blocking', \
                     a higher speed or a longer deadline",
                    deadline.as_secs(),
                    self.left(),
                    rates.dirty,
                    rates.copy
                ),
            ));
        }
    }

    fn tell_of_stall(&self) {
        let rates = self.guard.rates();
        tracing::warn!(
            job = self.ctx.id(),
            left = self.left(),
            dirty_rate = rates.dirty,
            copy_rate = rates.copy,
            "mirror: what is left gets no less"
        );
        self.ctx.stalled(rates.dirty, rates.copy);
    }

    /// A target that hangs, for the copier or for one of the guest's own requests, does
    /// not hold the guest of a mirror that only catches up.
    pub(super) fn look_for_hang(&mut self) {
        if self.operations.is_empty() {
            self.last_ended = Instant::now();
        }
        if self.state.renew_generation() {
            self.renewed = Instant::now();
        }
        if self.last_ended.elapsed() >= PATIENCE || self.renewed.elapsed() >= PATIENCE {
            self.hung = true;
            self.state.set_catching_up(false);
        }
    }
}
