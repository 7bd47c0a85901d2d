//! Who of a group's members is next, without clock, lock or thread.
//!
//! Requests that have to wait are queued by member and direction, and members
//! take turns, one request each. Nobody overtakes within a direction; the two
//! directions take turns where they share a limit.

use std::collections::VecDeque;
use std::task::Waker;
use std::time::Duration;

use slab::Slab;

use super::limiter::{Direction, Limiter};
use super::limits::ThrottleLimits;

/// The mutable part of a group.
#[derive(Debug)]
pub(super) struct Schedule {
    limiter: Limiter,
    members: Slab<Member>,
    tickets: Slab<Ticket>,
    /// Members that have queued requests, the next one first. By direction.
    turns: [VecDeque<usize>; 2],
    /// The direction that is asked first.
    first: Direction,
}

#[derive(Debug, Default)]
struct Member {
    /// Drained sections in which its requests do not wait.
    released: usize,
    /// Its queued tickets, the oldest first. By direction.
    queued: [VecDeque<usize>; 2],
}

/// A request that waits, or may go and has not noticed yet.
#[derive(Debug)]
struct Ticket {
    member: usize,
    direction: Direction,
    len: u64,
    granted: bool,
    waker: Waker,
}

/// What a queued request is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// It may go; its ticket is gone.
    Go,
    /// It is next, at this time at the earliest: it has to ask again then.
    Next(Duration),
    /// Others are before it: it will be woken.
    Queued,
}

/// Who has to look again. Wake them without the lock.
#[must_use]
#[derive(Debug, Default)]
pub(crate) struct Wakes(Vec<Waker>);

impl Wakes {
    pub(crate) fn wake(self) {
        for waker in self.0 {
            waker.wake();
        }
    }
}

impl Schedule {
    pub(super) fn new(limits: ThrottleLimits, now: Duration) -> Self {
        Self {
            limiter: Limiter::new(limits, now),
            members: Slab::new(),
            tickets: Slab::new(),
            turns: Default::default(),
            first: Direction::Read,
        }
    }

    pub(super) fn limits(&self) -> ThrottleLimits {
        self.limiter.limits()
    }

    pub(super) fn add_member(&mut self) -> usize {
        self.members.insert(Member::default())
    }

    /// A member without requests goes.
    pub(super) fn remove_member(&mut self, member: usize) {
        let member = self.members.remove(member);
        debug_assert!(
            member.queued.iter().all(VecDeque::is_empty),
            "requests hold their member"
        );
    }

    /// Lets a request through at once (`None`), or queues it. What comes before
    /// it in the queue is looked at as well.
    pub(super) fn arrive(
        &mut self,
        member: usize,
        direction: Direction,
        len: u64,
        waker: &Waker,
        now: Duration,
    ) -> (Option<usize>, Wakes) {
        let free = self.members[member].released > 0
            || self.turns.iter().all(VecDeque::is_empty)
                && self.limiter.wait(direction, now).is_zero();
        if free {
            self.limiter.charge(direction, len);
            return (None, Wakes::default());
        }
        let ticket = self.tickets.insert(Ticket {
            member,
            direction,
            len,
            granted: false,
            waker: waker.clone(),
        });
        let queue = &mut self.members[member].queued[direction.index()];
        queue.push_back(ticket);
        if queue.len() == 1 {
            self.turns[direction.index()].push_back(member);
        }
        (Some(ticket), self.dispatch(now))
    }

    /// What a queued request may do now. Its waker is that of its last question.
    pub(super) fn ask(&mut self, ticket: usize, waker: &Waker, now: Duration) -> (Turn, Wakes) {
        self.tickets[ticket].waker.clone_from(waker);
        let mut wakes = Wakes::default();
        if !self.tickets[ticket].granted && self.is_next(ticket) {
            wakes = self.dispatch(now);
        }
        let Ticket {
            granted, direction, ..
        } = self.tickets[ticket];
        let turn = if granted {
            self.tickets.remove(ticket);
            Turn::Go
        } else if self.is_next(ticket) {
            Turn::Next(now.saturating_add(self.limiter.wait(direction, now)))
        } else {
            Turn::Queued
        };
        (turn, wakes)
    }

    /// A queued request is given up. If it was let through, that stays counted.
    pub(super) fn give_up(&mut self, ticket: usize) -> Wakes {
        let was_next = self.is_next(ticket);
        let Ticket {
            member,
            direction,
            granted,
            ..
        } = self.tickets.remove(ticket);
        if !granted {
            let queue = &mut self.members[member].queued[direction.index()];
            queue.retain(|queued| *queued != ticket);
            if queue.is_empty() {
                self.turns[direction.index()].retain(|turn| *turn != member);
            }
        }
        let mut wakes = Wakes::default();
        if was_next {
            self.wake_next(&mut wakes);
        }
        wakes
    }

    /// A member's requests do not wait until [`hold`](Self::hold): those that are
    /// queued may go.
    pub(super) fn release(&mut self, member: usize) -> Wakes {
        self.members[member].released += 1;
        self.let_go(member)
    }

    /// Takes one [`release`](Self::release) back.
    pub(super) fn hold(&mut self, member: usize) {
        let released = &mut self.members[member].released;
        debug_assert!(*released > 0, "each section ends once");
        *released = released.saturating_sub(1);
    }

    /// Lets a member's queued requests go at once.
    pub(super) fn let_go(&mut self, member: usize) -> Wakes {
        let mut wakes = Wakes::default();
        for direction in Direction::BOTH {
            self.turns[direction.index()].retain(|turn| *turn != member);
            for ticket in std::mem::take(&mut self.members[member].queued[direction.index()]) {
                self.grant(ticket, &mut wakes);
            }
        }
        self.wake_next(&mut wakes);
        wakes
    }

    /// New limits; what has gone through so far does not count any more.
    pub(super) fn set_limits(&mut self, limits: ThrottleLimits, now: Duration) -> Wakes {
        self.limiter = Limiter::new(limits, now);
        let mut wakes = self.dispatch(now);
        // Their time has changed.
        self.wake_next(&mut wakes);
        wakes
    }

    /// Lets everybody go whose turn and time has come.
    fn dispatch(&mut self, now: Duration) -> Wakes {
        let mut wakes = Wakes::default();
        let mut refused = 0;
        while refused < 2 {
            let direction = self.first;
            self.first = match direction {
                Direction::Read => Direction::Write,
                Direction::Write => Direction::Read,
            };
            let ready = !self.turns[direction.index()].is_empty()
                && self.limiter.wait(direction, now).is_zero();
            if ready && let Some(ticket) = self.take_next(direction) {
                self.grant(ticket, &mut wakes);
                refused = 0;
            } else {
                refused += 1;
            }
        }
        if !wakes.0.is_empty() {
            self.wake_next(&mut wakes);
        }
        wakes
    }

    /// Takes the next ticket of a direction off its queue; its member goes to the
    /// end of the line.
    fn take_next(&mut self, direction: Direction) -> Option<usize> {
        let turns = &mut self.turns[direction.index()];
        let member = turns.pop_front()?;
        let queue = &mut self.members[member].queued[direction.index()];
        let ticket = queue.pop_front();
        if !queue.is_empty() {
            turns.push_back(member);
        }
        ticket
    }

    fn grant(&mut self, ticket: usize, wakes: &mut Wakes) {
        let ticket = &mut self.tickets[ticket];
        ticket.granted = true;
        wakes.0.push(ticket.waker.clone());
        let (direction, len) = (ticket.direction, ticket.len);
        self.limiter.charge(direction, len);
    }

    fn next(&self, direction: Direction) -> Option<usize> {
        let member = *self.turns[direction.index()].front()?;
        self.members[member].queued[direction.index()]
            .front()
            .copied()
    }

    fn is_next(&self, ticket: usize) -> bool {
        self.next(self.tickets[ticket].direction) == Some(ticket)
    }

    /// Lets those who are next find out how long they have to wait.
    fn wake_next(&self, wakes: &mut Wakes) {
        let next = Direction::BOTH
            .into_iter()
            .filter_map(|direction| self.next(direction));
        wakes
            .0
            .extend(next.map(|ticket| self.tickets[ticket].waker.clone()));
    }

    /// Requests that wait.
    pub(super) fn queued(&self) -> usize {
        self.members
            .iter()
            .flat_map(|(_, member)| &member.queued)
            .map(VecDeque::len)
            .sum()
    }
}
