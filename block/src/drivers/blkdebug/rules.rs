//! The rules of a `blkdebug` node: which requests fail, and when.
//!
//! A rule waits for its event in its state. The event makes it active, together
//! with the others of that event and instead of those that were; requests meet
//! the active rules only.

use std::time::Duration;

use crate::debug_event::DebugEvent;
use crate::error::IoOp;
use crate::node::SECTOR_SIZE;

/// The state in which a node begins.
const FIRST_STATE: i32 = 1;

/// An `inject-error` rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InjectError {
    /// What makes it active. [`DebugEvent::NONE`]: that the node is opened.
    pub event: DebugEvent,
    /// The state in which the event does; 0: any.
    pub state: i32,
    /// Requests that it is about; `None`: all but [`IoOp::BlockStatus`].
    pub op: Option<IoOp>,
    /// What they fail with; not above 0: not at all.
    pub errno: i32,
    /// Only requests that touch this sector.
    pub sector: Option<u64>,
    /// It is gone after the first.
    pub once: bool,
    /// They fail before anything else runs.
    pub immediately: bool,
    /// How long they take before they fail, or go on.
    pub delay: Duration,
}

impl InjectError {
    /// A sector as options have it: -1 is none, and other negative ones are never
    /// touched.
    pub fn sector_from(sector: i64) -> Option<u64> {
        match sector {
            -1 => None,
            sector => Some(u64::try_from(sector).unwrap_or(u64::MAX)),
        }
    }
}

/// A `set-state` rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SetState {
    /// What it waits for.
    pub event: DebugEvent,
    /// The state in which it does; 0: any.
    pub state: i32,
    /// The state afterwards.
    pub new_state: i32,
}

/// What a rule does to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Hit {
    /// What it fails with, if it does.
    pub(super) errno: Option<i32>,
    pub(super) immediately: bool,
    pub(super) delay: Duration,
}

/// All rules of a node, and its state.
#[derive(Debug)]
pub(super) struct Rules {
    state: i32,
    /// `None`: it was one that acts once, and has.
    errors: Vec<Option<InjectError>>,
    states: Vec<SetState>,
    /// Places in `errors`, in order: the first one given is looked at first.
    active: Vec<usize>,
}

impl Rules {
    /// The rules of a node that has just been opened.
    pub(super) fn new(errors: Vec<InjectError>, states: Vec<SetState>) -> Self {
        let mut rules = Self {
            state: FIRST_STATE,
            errors: errors.into_iter().map(Some).collect(),
            states,
            active: Vec::new(),
        };
        rules.happened(DebugEvent::NONE);
        rules
    }

    /// An event has come.
    pub(super) fn happened(&mut self, event: DebugEvent) {
        let current = self.state;
        let here = |state: i32| state == 0 || state == current;
        let active: Vec<usize> = self
            .errors
            .iter()
            .enumerate()
            .filter_map(|(place, rule)| Some((place, rule.as_ref()?)))
            .filter(|(_, rule)| rule.event == event && here(rule.state))
            .map(|(place, _)| place)
            .collect();
        if !active.is_empty() {
            self.active = active;
        }
        let next = self
            .states
            .iter()
            .find(|rule| rule.event == event && here(rule.state));
        if let Some(rule) = next {
            self.state = rule.new_state;
        }
    }

    /// What happens to a request; `None`: nothing.
    pub(super) fn hit(&mut self, op: IoOp, offset: u64, len: u64) -> Option<Hit> {
        let matches = |rule: &InjectError| {
            let kind = match rule.op {
                Some(wanted) => wanted == op,
                None => op != IoOp::BlockStatus,
            };
            let place = rule.sector.is_none_or(|sector| {
                sector.checked_mul(SECTOR_SIZE).is_some_and(|at| {
                    offset <= at && offset.checked_add(len).is_some_and(|end| at < end)
                })
            });
            kind && place
        };
        let index = self.active.iter().position(|place| {
            let rule = self.errors.get(*place).and_then(Option::as_ref);
            rule.is_some_and(matches)
        })?;
        let slot = self.errors.get_mut(*self.active.get(index)?)?;
        let rule = slot.as_ref()?;
        let hit = Hit {
            errno: (rule.errno > 0).then_some(rule.errno),
            immediately: rule.immediately,
            delay: rule.delay,
        };
        if rule.once && (hit.errno.is_some() || !hit.delay.is_zero()) {
            *slot = None;
            self.active.remove(index);
        }
        Some(hit)
    }
}
