//! A stand for tests of the machine: keeps what the effects say.

use std::collections::VecDeque;

use super::job::{JobSettings, JobState, SoftCancel};
use super::machine::{Announcement, Effect, Event, Hook, Machine};
use super::status::JobStatus;
use crate::error::{JobError, JobFailure};
use crate::history::JobOutcome;
use crate::id::{JobId, JobKey, TxnKey};

#[derive(Default)]
pub(super) struct Rig {
    pub(super) machine: Machine,
    pub(super) news: Vec<(JobKey, Announcement)>,
    pub(super) hooks: VecDeque<(JobKey, Hook)>,
    pub(super) started: Vec<JobKey>,
    pub(super) woken: Vec<JobKey>,
    pub(super) ended: Vec<(JobKey, JobOutcome)>,
    pub(super) freed: Vec<JobKey>,
}

/// A block job like a backup: cancel is always a forced one, ends by itself.
pub(super) fn settings(id: &str) -> JobSettings {
    JobSettings {
        id: Some(JobId::new(id).unwrap()),
        block_job: true,
        auto_finalize: true,
        auto_dismiss: true,
        soft_cancel: SoftCancel::Forces,
        completes: false,
    }
}

/// A block job like a mirror.
pub(super) fn mirror(id: &str) -> JobSettings {
    JobSettings {
        soft_cancel: SoftCancel::FinishesWhenReady,
        completes: true,
        ..settings(id)
    }
}

pub(super) fn eio() -> JobFailure {
    JobFailure::from_errno(libc::EIO)
}

impl Rig {
    pub(super) fn absorb(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Announce(key, what) => self.news.push((key, what)),
                Effect::StartBody(key) => self.started.push(key),
                Effect::WakeBody(key) => self.woken.push(key),
                Effect::Hook(key, hook) => self.hooks.push_back((key, hook)),
                Effect::Ended(key, outcome) => self.ended.push((key, outcome)),
                Effect::Free(key) => self.freed.push(key),
                Effect::Refused { key, from, to } => panic!("{from} -> {to} of {key:?}"),
            }
        }
    }

    pub(super) fn create(&mut self, settings: JobSettings, txn: Option<TxnKey>) -> JobKey {
        let (key, effects) = self.machine.create(settings, 0, txn).unwrap();
        self.absorb(effects);
        key
    }

    pub(super) fn try_step(&mut self, key: JobKey, event: Event) -> Result<(), JobError> {
        let effects = self.machine.step(key, event)?;
        self.absorb(effects);
        Ok(())
    }

    #[track_caller]
    pub(super) fn step(&mut self, key: JobKey, event: Event) {
        self.try_step(key, event).unwrap();
    }

    pub(super) fn refusal(&mut self, key: JobKey, event: Event) -> String {
        let error = self.try_step(key, event).unwrap_err();
        error.to_string()
    }

    pub(super) fn start(&mut self, settings: JobSettings) -> JobKey {
        let key = self.create(settings, None);
        self.step(key, Event::Start);
        key
    }

    #[track_caller]
    pub(super) fn job(&self, key: JobKey) -> &JobState {
        self.machine.job(key).unwrap()
    }

    pub(super) fn status(&self, key: JobKey) -> JobStatus {
        self.machine
            .job(key)
            .map_or(JobStatus::Null, |job| job.status)
    }

    pub(super) fn body_ok(&mut self, key: JobKey) {
        self.step(key, Event::BodyReturned(Ok(())));
    }

    pub(super) fn body_fails(&mut self, key: JobKey) {
        self.step(key, Event::BodyReturned(Err(eio())));
    }

    /// Main calls its hooks, with success, until none is left. Gives those of
    /// transactions in the order in which they were called.
    pub(super) fn main(&mut self) -> Vec<(JobKey, Hook)> {
        let mut called = Vec::new();
        while let Some((key, hook)) = self.hooks.pop_front() {
            match hook {
                Hook::Prepare => self.step(key, Event::Prepared(Ok(()))),
                Hook::Finish { .. } => self.step(key, Event::Finished),
                Hook::UserResume | Hook::Cancel { .. } | Hook::Complete | Hook::SetSpeed(_) => {
                    continue;
                }
            }
            called.push((key, hook));
        }
        called
    }

    /// The news of one job as clients would read them.
    pub(super) fn told(&self, key: JobKey) -> String {
        let words: Vec<String> = self
            .news
            .iter()
            .filter(|(of, _)| *of == key)
            .map(|(_, what)| match what {
                Announcement::Status(status) => status.name().to_owned(),
                Announcement::Ready { .. } => "READY".to_owned(),
                Announcement::Stalled { .. } => "STALLED".to_owned(),
                Announcement::Pending => "PENDING".to_owned(),
                Announcement::Error { side, action } => {
                    format!("ERROR({},{})", side.name(), action.name())
                }
                Announcement::Completed { error: None, .. } => "COMPLETED".to_owned(),
                Announcement::Completed {
                    error: Some(error), ..
                } => format!("COMPLETED({error})"),
                Announcement::Cancelled { .. } => "CANCELLED".to_owned(),
            })
            .collect();
        words.join(" ")
    }
}
