//! How the mirror gets on, as the body sees it: what is left, what clients are told, and
//! what is done if it does not.
//!
//! The judgement is `guard`'s.

use std::time::{Duration, Instant};

use block::CancelReach;

use crate::JobFailure;
use crate::copying::PATIENCE;

use super::body::Body;
use super::guard::Sight;

impl Body<'_> {
    /// Tells what is left: dirty, being copied, or being mirrored by the guest's
    /// own requests.
    pub(super) fn report_progress(&self) {
        self.ctx.progress().set_remaining(self.left());
    }

    /// What is dirty, being copied, or being mirrored by the guest's own requests.
    pub(super) fn left(&self) -> u64 {
        self.state.dirty_bytes() + self.in_flight + self.state.active.in_flight()
    }

    /// What has to become less: while the beginning is found out, what was not looked at.
    fn ahead(&self) -> u64 {
        self.to_look_at.unwrap_or_else(|| self.left())
    }

    /// Bytes that the copier has done, without what the guest's own requests have.
    fn copied(&self) -> u64 {
        let done = self.ctx.progress().snapshot().current;
        done.saturating_sub(self.state.active.done())
    }

    /// What was until now says nothing about how the mirror gets on.
    pub(super) fn watch_anew(&mut self) {
        self.guard
            .begin(self.ahead(), self.copied(), Instant::now());
    }

    /// A pause point, or at least a look at what was asked of the job. Time in which the
    /// body was parked says nothing about how the mirror gets on.
    pub(super) async fn pause_point(&mut self) {
        if !self.ctx.is_pause_requested() {
            return;
        }
        let parked = Instant::now();
        self.ctx.pause_point().await;
        self.guard
            .rested(parked, self.ahead(), self.copied(), Instant::now());
    }

    /// Looks how the mirror gets on: clients are told if it does not, and it fails if
    /// its time is over.
    pub(super) fn watch_over(&mut self) {
        let now = Instant::now();
        if self.guard.is_due(now) {
            let sight = Sight {
                left: self.ahead(),
                done: self.copied(),
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
            let text = self.missed_text(deadline);
            self.failure = Some(JobFailure::new(libc::ETIMEDOUT, text));
        }
    }

    fn missed_text(&self, deadline: Duration) -> String {
        let seconds = deadline.as_secs();
        if let Some(ahead) = self.to_look_at {
            return format!(
                "The mirror was not ready within {seconds} s: it is still being found out what \
                 there is to copy, with {ahead} of {} bytes not looked at; use a longer deadline",
                self.state.size
            );
        }
        let rates = self.guard.rates();
        format!(
            "The mirror was not ready within {seconds} s: {} bytes are left, {} bytes/s are \
             dirtied and {} bytes/s copied; use copy-mode 'auto' or 'write-blocking', a higher \
             speed or a longer deadline",
            self.left(),
            rates.dirty,
            rates.copy
        )
    }

    fn tell_of_stall(&self) {
        let rates = self.guard.rates();
        tracing::warn!(
            job = self.ctx.id(),
            left = self.ahead(),
            dirty_rate = rates.dirty,
            copy_rate = rates.copy,
            "mirror: what is left gets no less"
        );
        self.ctx.stalled(rates.dirty, rates.copy);
    }

    /// A target that hangs, for the copier or for one of the guest's own requests, does
    /// not hold the guest of a mirror that only catches up.
    pub(super) fn look_for_hang(&mut self) {
        if self.operations.is_empty() && self.rest.is_idle() {
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
