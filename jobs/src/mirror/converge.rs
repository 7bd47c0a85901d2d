//! Drained sections of the body: the moments in which the guest is held so that
//! source and target can be the same.
//!
//! A section is entered only when little is left to copy, and given up when it
//! lasts too long; then the copier goes on beside the guest, and the next section
//! may be longer. So that little is left at some time, a mirror that does not get
//! there *catches up*: the guest's writes go to the target as well, as in
//! `write-blocking` mode, until the mirror is ready or has ended. The last section
//! stays held after the body's end, until main has put the target in place
//! (`complete`).

use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use block::{Drained, Graph, GraphError, runtime};
use futures_util::future::{Either, select};

use crate::{CopyMode, JobContext, JobFailure};

use super::body::{Body, with_patience};
use super::driver::{Ending, Held};
use super::operations::account;
use crate::copying::{Copied, LITTLE, Side};

/// Most bytes that a section leaves to be copied inside it: what a slow disk copies
/// within the limit.
pub(super) const SECTION_BYTES: u64 = LITTLE;
/// Time that the first section may take for copying and flushing. Doubles with each
/// section that did not suffice.
pub(super) const SECTION_LIMIT: Duration = Duration::from_millis(10);
/// How often it doubles at most: before the mirror is ready, which it becomes without
/// a section too; and to end, where a target that flushes slowly has to have its time.
const DOUBLINGS: u32 = 4;
pub(super) const ENDING_DOUBLINGS: u32 = 8;
/// Longest that the guest is held because some of its requests do not end.
pub(super) const HOLD_LIMIT: Duration = Duration::from_secs(2);
/// First and longest wait before it is held again after that; doubles.
pub(super) const HOLD_RETRY: (Duration, Duration) =
    (Duration::from_secs(1), Duration::from_secs(30));
/// Time in which what is left has got no less after which it does so in any case.
const STUCK_BEFORE_CATCHING_UP: Duration = Duration::from_secs(3);
/// Passes beside the guest after which a mirror that is not ready yet catches up.
const PASSES_BEFORE_CATCHING_UP: u32 = 2;

impl Body<'_> {
    /// Whether it is time to hold the guest: the mirror is to end, or does not
    /// become ready because the guest goes on writing, and little is left.
    pub(super) fn wants_section(&self) -> bool {
        let ends = self.should_end();
        if self.wait_left().is_some() || (self.ready && !ends) {
            return false;
        }
        let left = self.state.dirty_bytes();
        if ends && left == 0 {
            return true;
        }
        // After a section that did not suffice it is the copier's turn.
        let turn = u32::from(self.sections > 0);
        let little = left <= SECTION_BYTES && self.passes >= self.section_pass + turn;
        let overdue = self.state.is_catching_up() || self.passes > PASSES_BEFORE_CATCHING_UP;
        little && (ends || (left > 0 && overdue))
    }

    /// Makes sure that what is left becomes less. A mirror that the guest keeps from
    /// becoming ready, or from ending, has the guest's requests go to the target as
    /// well until it has. That always converges, and the guest waits less for small
    /// writes of its own than for large copies in a section.
    pub(super) fn ensure_progress(&self) {
        let state = &self.state;
        let switches = self.driver.settings().switches;
        if !self.ready && self.ctx.speed() > 0 && !switches {
            // It is the user who wants this to take long, not the guest.
            if state.is_catching_up() {
                state.set_catching_up(false);
            }
            return;
        }
        if self.hung || state.mirrors_actively() || (self.ready && !self.should_end()) {
            return;
        }
        let helps = if self.ready {
            self.sections > 0 || self.passes > 0
        } else {
            self.passes >= PASSES_BEFORE_CATCHING_UP
                || self.guard.stuck_for(Instant::now()) >= STUCK_BEFORE_CATCHING_UP
        };
        if helps && state.dirty_bytes() > 0 {
            if switches {
                self.switch();
                return;
            }
            tracing::info!(
                job = self.ctx.id(),
                dirty = state.dirty_bytes(),
                "mirror: the guest keeps pace with the copier; its writes go to the target as \
                 well until the mirror has caught up"
            );
            state.set_catching_up(true);
        }
    }

    /// From now on the guest's requests write the target as well, for good.
    pub(super) fn switch(&self) {
        if self.state.copy_mode() == CopyMode::Background {
            tracing::info!(
                job = self.ctx.id(),
                dirty = self.state.dirty_bytes(),
                "mirror: the guest keeps pace with the copier; copy mode is write-blocking now"
            );
            self.state.mirror_actively_for_good();
        }
    }

    /// Holds the guest and copies the rest. Nothing may be in flight.
    ///
    /// Returns whether the body is done; the section is with the driver then. If
    /// not, the guest goes on, and the job is ready if it could be.
    pub(super) async fn converge(&mut self) -> bool {
        let own = self.ctx.own_drain();
        let drained = match with_patience(&self.state, self.drain_source()).await.0 {
            Some(Ok(drained)) => drained,
            Some(Err(error @ GraphError::DrainTimeout { .. })) => {
                self.hold_later(&error);
                return false;
            }
            Some(Err(error)) => {
                self.failure = Some(drain_failure(&error));
                return false;
            }
            None => return false,
        };
        self.hold_pause = HOLD_RETRY.0;
        let held = Held {
            drained,
            _own: Some(own),
        };
        let doublings = if self.should_end() {
            ENDING_DOUBLINGS
        } else {
            DOUBLINGS
        };
        let limit = self.driver.settings().section_limit * (1 << self.sections.min(doublings));
        self.sections = self.sections.saturating_add(1);
        self.section_pass = self.passes;
        let clean = self.copy_rest(Instant::now() + limit).await;
        self.report_progress();
        // A cancel that came while the rest was copied counts.
        if clean && self.should_end() && !self.ctx.is_force_cancelled() {
            let ending = if self.ctx.is_soft_cancelled() {
                Ending::Copy
            } else {
                Ending::Pivot
            };
            self.finish(ending, held);
            return true;
        }
        // The guest goes on first: who waits for a slow target is the job.
        self.driver.end_section(held, self.ctx.id());
        self.quiesce().await;
        if clean && !self.ready && !self.ctx.is_force_cancelled() {
            self.become_ready();
        }
        false
    }

    /// Requests of the guest hang: those that do not are to go on, and the next
    /// section comes later.
    fn hold_later(&mut self, error: &GraphError) {
        let pause = self.hold_pause;
        self.hold_pause = (pause * 2).min(HOLD_RETRY.1);
        tracing::warn!(
            job = self.ctx.id(),
            %error,
            again_in_ms = pause.as_millis() as u64,
            "mirror: the guest could not be held"
        );
        self.not_before = self.not_before.max(Some(Instant::now() + pause));
    }

    /// Leaves the rest to main's hooks.
    fn finish(&mut self, ending: Ending, held: Held) {
        if ending == Ending::Copy {
            // The target is a copy of this moment, whatever the guest does next.
            self.state.set_engaged(false);
        }
        self.driver.set_ending(ending);
        if self.driver.settings().auto_finalize {
            self.driver.keep_section(held);
        } else {
            // A job that waits to be finalized by hand must not hold the guest
            // meanwhile, nor a target that nobody looks after: a pivot then catches up
            // and makes a section of its own.
            self.state.set_catching_up(false);
            self.driver.end_section(held, self.ctx.id());
        }
    }

    /// What the target needs for the persistent bitmaps of the disk is made before the guest
    /// is held for the pivot.
    pub(super) async fn make_room_for_bitmaps(&mut self) {
        let pivots = self.should_end() && !self.ctx.is_soft_cancelled();
        if !pivots || std::mem::replace(&mut self.has_room, true) {
            return;
        }
        let (from, to) = (
            Arc::clone(self.places.lowest()),
            Arc::clone(&self.places.target),
        );
        let room = self.ctx.graph().run(move |graph: Rc<Graph>| {
            Box::pin(async move { graph.make_room_for_bitmaps(&from, &to).await })
        });
        if let Some(Ok(room)) = self.unless_cancelled(room).await {
            self.driver.keep_room(room);
        }
    }

    /// `None` if the job was cancelled meanwhile.
    async fn drain_source(&self) -> Option<Result<Drained, GraphError>> {
        let source = Arc::clone(self.places.lowest());
        let own = self.places.own_backends().map(Arc::clone);
        let drained = self.ctx.graph().run(move |graph: Rc<Graph>| {
            Box::pin(async move {
                let own = own.each_ref();
                graph.drain_within(&source, &own, HOLD_LIMIT).await
            })
        });
        let drained = self.unless_cancelled(drained).await;
        drained.map(|drained| drained.and_then(|drained| drained))
    }

    /// `None` if the job was cancelled meanwhile.
    async fn unless_cancelled<T>(&self, part: impl Future<Output = T>) -> Option<T> {
        let mut part = pin!(part);
        loop {
            match select(&mut part, pin!(self.ctx.kicked())).await {
                Either::Left((result, _)) => return Some(result),
                Either::Right(_) if self.ctx.is_force_cancelled() => return None,
                Either::Right(_) => {}
            }
        }
    }

    /// Copies what is dirty and flushes the target. `true` if both are as they
    /// should be. If not, something may still be in flight.
    async fn copy_rest(&mut self, deadline: Instant) -> bool {
        let (ctx, notifier) = (self.ctx, self.notifier.clone());
        let mut over = pin!(over_at(ctx, deadline));
        let done = |copied: &Copied| account(ctx, &notifier, copied);
        let swept = self.rest.copy(0, done, over.as_mut()).await;
        if !self.is_done(swept) || !self.state.dirty.is_clean() {
            return false;
        }
        let swept = self.rest.flush(over).await;
        self.is_done(swept)
    }
}

/// Ends at `deadline`, or when the job is to stop at once.
pub(super) async fn over_at(ctx: &JobContext, deadline: Instant) {
    let mut timer = pin!(runtime::sleep_until(deadline));
    while !ctx.is_force_cancelled() {
        if let Either::Left(_) = select(timer.as_mut(), pin!(ctx.kicked())).await {
            return;
        }
    }
}

/// What the job says when the guest could not be held.
pub(super) fn drain_failure(error: &GraphError) -> JobFailure {
    JobFailure::new(
        libc::ETIMEDOUT,
        format!("Cannot hold the requests to the source for the switch to the target: {error}"),
    )
}

/// The side that a failed section is put down to.
pub(super) fn describe(side: Side) -> &'static str {
    match side {
        Side::Source => "source",
        Side::Target => "target",
    }
}
