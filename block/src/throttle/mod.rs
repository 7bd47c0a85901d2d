//! Throttle groups: limits on the rate of requests, shared by several nodes.
//!
//! - `limits`: what is allowed, and whether it makes sense;
//! - `limiter`: the leaky buckets;
//! - `schedule`: who is next;
//! - here: the lock around these, time, and the requests that wait.
//!
//! What does not live here: the filter that asks (`drivers::throttle`), and the
//! user's objects (`object-add`, the monitor's).
//!
//! # Threads
//!
//! Any thread may ask. A group's state is behind a leaf lock that is held for a
//! few steps of arithmetic, by requests and by main alike, and never across an
//! await or a wake-up; a group without limits takes it not at all. A request
//! waits with a timer of its own thread only while it is the next of its group,
//! so no thread waits for another's loop; whoever goes wakes who is next.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use crate::driver::BoxFuture;
use crate::runtime;
use crate::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use crate::sync::{Mutex, MutexGuard, lock};

mod limiter;
mod limits;
mod schedule;
#[cfg(all(test, not(shuttle)))]
mod tests;

pub(crate) use limiter::Direction;
pub use limits::{LimitsError, RateLimit, ThrottleLimits};

use schedule::{Schedule, Turn, Wakes};

/// Limits that its members share.
#[derive(Debug)]
pub struct ThrottleGroup {
    /// Begin of the group's time.
    began: Instant,
    /// Whether there are limits; else nobody takes the lock. May be behind the
    /// schedule for as long as a request takes.
    limited: AtomicBool,
    /// Nodes that are in the group.
    members: AtomicUsize,
    /// A leaf lock.
    schedule: Mutex<Schedule>,
}

impl ThrottleGroup {
    fn new(limits: ThrottleLimits) -> Self {
        Self {
            began: Instant::now(),
            limited: AtomicBool::new(limits.any()),
            members: AtomicUsize::new(0),
            schedule: Mutex::new(Schedule::new(limits, Duration::ZERO)),
        }
    }

    /// The limits at this moment.
    pub fn limits(&self) -> ThrottleLimits {
        self.lock().limits()
    }

    /// Changes the limits. Requests that wait go by the new ones at once; what went
    /// through before does not count any more.
    pub fn set_limits(&self, limits: ThrottleLimits) -> Result<(), LimitsError> {
        limits.check()?;
        let now = self.now();
        let wakes = self.lock().set_limits(limits, now);
        // After the schedule: who still sees the old word finds the new limits.
        self.limited.store(limits.any(), Ordering::Release);
        wakes.wake();
        Ok(())
    }

    /// Requests that wait for their turn.
    pub fn queued(&self) -> usize {
        self.lock().queued()
    }

    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    fn lock(&self) -> MutexGuard<'_, Schedule> {
        lock(&self.schedule)
    }
}

/// A node's place in a group.
#[derive(Debug)]
pub(crate) struct ThrottleMember {
    group: Arc<ThrottleGroup>,
    /// Its number in the schedule.
    key: usize,
    /// Whether it still counts as a member for [`ThrottleGroups::remove`].
    counted: AtomicBool,
}

impl ThrottleMember {
    pub(crate) fn new(group: Arc<ThrottleGroup>) -> Self {
        group.members.fetch_add(1, Ordering::Relaxed);
        let key = group.lock().add_member();
        Self {
            group,
            key,
            counted: AtomicBool::new(true),
        }
    }

    /// Whether it is a member of this group.
    pub(crate) fn is_of(&self, group: &Arc<ThrottleGroup>) -> bool {
        Arc::ptr_eq(&self.group, group)
    }

    /// Waits until a request of `len` bytes may go.
    ///
    /// Thread: one with a loop. Cancel: it counts as gone if it had been let
    /// through, else not at all; the next one's turn is not lost.
    pub(crate) fn pass(&self, direction: Direction, len: u64) -> Pass<'_> {
        Pass {
            member: self,
            direction,
            len,
            ticket: None,
            timer: None,
        }
    }

    /// A drained section begins: nobody waits until it has ended. Those who did are
    /// to be woken, with no lock held.
    pub(crate) fn drained_begin(&self) -> Wakes {
        self.group.lock().release(self.key)
    }

    /// The section has ended.
    pub(crate) fn drained_end(&self) {
        self.group.lock().hold(self.key);
    }

    /// Lets all go that wait at this moment.
    pub(crate) fn let_go(&self) {
        let wakes = self.group.lock().let_go(self.key);
        wakes.wake();
    }

    /// The group does not count this member any more and may be removed. Requests
    /// that still come are limited all the same.
    pub(crate) fn leave(&self) {
        if self.counted.swap(false, Ordering::AcqRel) {
            self.group.members.fetch_sub(1, Ordering::Release);
        }
    }
}

impl Drop for ThrottleMember {
    fn drop(&mut self) {
        self.leave();
        self.group.lock().remove_member(self.key);
    }
}

/// See [`ThrottleMember::pass`].
pub(crate) struct Pass<'a> {
    member: &'a ThrottleMember,
    direction: Direction,
    len: u64,
    /// Its number in the queue.
    ticket: Option<usize>,
    /// Set while it is the next one, with the time that it is set to.
    timer: Option<(Duration, BoxFuture<'static, ()>)>,
}

impl Pass<'_> {
    /// Polls the timer that wakes us at `at`, in the group's time.
    fn poll_timer(&mut self, at: Duration, cx: &mut Context<'_>) -> Poll<()> {
        if self.timer.as_ref().is_none_or(|(set, _)| *set != at) {
            let timer: BoxFuture<'static, ()> = match self.member.group.began.checked_add(at) {
                Some(at) => Box::pin(runtime::sleep_until(at)),
                // Past what the clock can tell.
                None => Box::pin(std::future::pending()),
            };
            self.timer = Some((at, timer));
        }
        match &mut self.timer {
            Some((_, timer)) => timer.as_mut().poll(cx),
            None => Poll::Ready(()),
        }
    }
}

impl Future for Pass<'_> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let member = self.member;
        let group = &member.group;
        if self.ticket.is_none() {
            if !group.limited.load(Ordering::Acquire) {
                return Poll::Ready(());
            }
            let (direction, len, now) = (self.direction, self.len, group.now());
            let arrived = group
                .lock()
                .arrive(member.key, direction, len, cx.waker(), now);
            arrived.1.wake();
            self.ticket = arrived.0;
        }
        while let Some(ticket) = self.ticket {
            let now = group.now();
            let (turn, wakes) = group.lock().ask(ticket, cx.waker(), now);
            wakes.wake();
            match turn {
                Turn::Go => self.ticket = None,
                Turn::Next(at) => {
                    if self.poll_timer(at, cx).is_pending() {
                        return Poll::Pending;
                    }
                }
                Turn::Queued => {
                    self.timer = None;
                    return Poll::Pending;
                }
            }
        }
        self.timer = None;
        Poll::Ready(())
    }
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket.take() {
            let wakes = self.member.group.lock().give_up(ticket);
            wakes.wake();
        }
    }
}

/// A group cannot be removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GroupError {
    /// No group of that name.
    #[error("There is no throttle group of that name")]
    NotFound,
    /// There is a group of that name.
    #[error("There is a throttle group of that name already")]
    Exists,
    /// Nodes are in it.
    #[error("Nodes still use the throttle group")]
    InUse,
    /// Its limits make no sense.
    #[error(transparent)]
    Limits(#[from] LimitsError),
}

/// The groups of a graph by name. Main only.
#[derive(Debug, Default)]
pub struct ThrottleGroups {
    groups: RefCell<BTreeMap<String, Arc<ThrottleGroup>>>,
}

impl ThrottleGroups {
    /// Makes a group.
    ///
    /// Errors: the limits make no sense, or the name is taken.
    pub fn create(
        &self,
        name: &str,
        limits: ThrottleLimits,
    ) -> Result<Arc<ThrottleGroup>, GroupError> {
        limits.check()?;
        let mut groups = self.groups.borrow_mut();
        if groups.contains_key(name) {
            return Err(GroupError::Exists);
        }
        let group = Arc::new(ThrottleGroup::new(limits));
        groups.insert(name.to_owned(), Arc::clone(&group));
        Ok(group)
    }

    /// The group of that name.
    pub fn find(&self, name: &str) -> Option<Arc<ThrottleGroup>> {
        self.groups.borrow().get(name).cloned()
    }

    /// Removes a group.
    ///
    /// Errors: no such group, or a node is in it that is open.
    pub fn remove(&self, name: &str) -> Result<(), GroupError> {
        let mut groups = self.groups.borrow_mut();
        let group = groups.get(name).ok_or(GroupError::NotFound)?;
        if group.members.load(Ordering::Acquire) > 0 {
            return Err(GroupError::InUse);
        }
        groups.remove(name);
        Ok(())
    }
}
