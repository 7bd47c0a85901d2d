//! The end of a job, which is always the end of a transaction: a job on its own
//! has a private one.

use super::job::JobState;
use super::machine::{Announcement, Effect, Hook, Machine};
use super::status::JobStatus;
use crate::error::JobFailure;
use crate::history::JobOutcome;
use crate::id::{JobKey, TxnKey};

/// Jobs that succeed or fail together.
#[derive(Clone, Debug)]
pub(super) struct Txn {
    /// In order of creation; who has finished is taken out.
    pub(super) members: Vec<JobKey>,
    phase: Phase,
    /// One member failed or was cancelled: all end that way.
    aborting: bool,
}

/// How far a transaction has come. At most one hook of it runs at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Bodies run, or everything waits to be finalized.
    Open,
    /// The prepare hook of this member runs.
    Preparing(JobKey),
    /// The commit or abort hook of this member runs, or its clean hook.
    Finishing(JobKey),
}

impl Txn {
    pub(super) fn new() -> Self {
        Self {
            members: Vec::new(),
            phase: Phase::Open,
            aborting: false,
        }
    }

    pub(super) fn takes_members(&self) -> bool {
        self.phase == Phase::Open && !self.aborting
    }
}

impl Machine {
    /// Whether a hook of the job's transaction runs or waits to run on main.
    pub(crate) fn is_finishing(&self, key: JobKey) -> bool {
        self.txn_of(key).is_some_and(|txn| txn.phase != Phase::Open)
    }

    /// Whether results of the job's transaction are being applied, which nobody
    /// can take back.
    pub(super) fn is_committing(&self, key: JobKey) -> bool {
        self.txn_of(key)
            .is_some_and(|txn| matches!(txn.phase, Phase::Finishing(_)) && !txn.aborting)
    }

    fn txn_of(&self, key: JobKey) -> Option<&Txn> {
        self.jobs.get(&key).and_then(|job| self.txns.get(&job.txn))
    }

    pub(super) fn body_returned(&mut self, key: JobKey, result: Result<(), JobFailure>) {
        let Some(job) = self.jobs.get_mut(&key) else {
            return;
        };
        if job.deferred || job.status.is_completed() || job.status == JobStatus::Created {
            return;
        }
        // A body that was dropped while it was parked.
        self.wake_self_before_end(key);
        let Some(job) = self.jobs.get_mut(&key) else {
            return;
        };
        job.deferred = true;
        job.busy = false;
        job.sleeping = false;
        job.kicked = false;
        match result {
            Ok(()) if job.force_cancel => self.fail(key, JobFailure::cancelled()),
            Ok(()) => {
                let txn = job.txn;
                self.set_status(key, JobStatus::Waiting);
                self.all_waiting(txn);
            }
            Err(failure) => self.fail(key, failure),
        }
    }

    fn wake_self_before_end(&mut self, key: JobKey) {
        if self.jobs.get(&key).is_some_and(|job| !job.busy) {
            self.wake_self(key);
        }
    }

    /// The job has failed: it is aborting, and the rest of its transaction with
    /// it.
    pub(super) fn fail(&mut self, key: JobKey, failure: JobFailure) {
        let Some(job) = self.jobs.get_mut(&key) else {
            return;
        };
        job.failure.get_or_insert(failure);
        let txn = job.txn;
        self.set_status(key, JobStatus::Aborting);
        self.abort_others(txn, key);
        self.all_aborted(txn);
    }

    /// Marks the transaction as aborting, once, and force-cancels every other
    /// member.
    fn abort_others(&mut self, txn_key: TxnKey, culprit: JobKey) {
        let Some(txn) = self.txns.get_mut(&txn_key) else {
            return;
        };
        if std::mem::replace(&mut txn.aborting, true) {
            return;
        }
        let others: Vec<JobKey> = txn
            .members
            .iter()
            .copied()
            .filter(|&member| member != culprit)
            .collect();
        for key in others {
            self.request_cancel(key, true);
            let Some(job) = self.jobs.get_mut(&key) else {
                continue;
            };
            if job.deferred || job.status == JobStatus::Created {
                job.failure.get_or_insert_with(JobFailure::cancelled);
                self.set_status(key, JobStatus::Aborting);
            } else {
                self.enter(key);
            }
        }
    }

    /// If every member waits, all are pending; if nobody wants to finalize by
    /// hand, it goes on at once.
    pub(super) fn all_waiting(&mut self, txn_key: TxnKey) {
        let members = self.members(txn_key);
        if !self.all(&members, |job| job.status == JobStatus::Waiting) {
            return;
        }
        for &key in &members {
            self.set_status(key, JobStatus::Pending);
            if self.all(&[key], |job| !job.settings.auto_finalize) {
                self.announce(key, Announcement::Pending);
            }
        }
        if self.all(&members, |job| job.settings.auto_finalize) {
            self.finalize(txn_key);
        }
    }

    /// Begins to apply the results, unless that has begun.
    pub(super) fn finalize(&mut self, txn_key: TxnKey) {
        let first = match self.txns.get(&txn_key) {
            Some(txn) if txn.phase == Phase::Open && !txn.aborting => txn.members.first().copied(),
            _ => return,
        };
        if let Some(first) = first {
            self.prepare(txn_key, first);
        }
    }

    fn prepare(&mut self, txn_key: TxnKey, key: JobKey) {
        self.set_phase(txn_key, Phase::Preparing(key));
        self.hook(key, Hook::Prepare);
    }

    pub(super) fn prepared(&mut self, key: JobKey, result: Result<(), JobFailure>) {
        let Some(txn_key) = self.jobs.get(&key).map(|job| job.txn) else {
            return;
        };
        if self.txn_of(key).map(|txn| txn.phase) != Some(Phase::Preparing(key)) {
            debug_assert!(false, "prepare of {key:?} ended, but had not begun");
            return;
        }
        if let Err(failure) = result {
            // Open again, so that the abort below begins to finish.
            self.set_phase(txn_key, Phase::Open);
            self.fail(key, failure);
            return;
        }
        let Some(txn) = self.txns.get_mut(&txn_key) else {
            return;
        };
        // Somebody cancelled meanwhile.
        if txn.aborting {
            txn.phase = Phase::Open;
            self.all_aborted(txn_key);
            return;
        }
        let next = txn
            .members
            .iter()
            .copied()
            .skip_while(|&member| member != key)
            .nth(1);
        match next {
            Some(next) => self.prepare(txn_key, next),
            None => self.finish_next(txn_key),
        }
    }

    /// If every member of an aborting transaction is completed and no hook runs,
    /// the members are cleaned up one after the other.
    pub(super) fn all_aborted(&mut self, txn_key: TxnKey) {
        let open = self
            .txns
            .get(&txn_key)
            .is_some_and(|txn| txn.aborting && txn.phase == Phase::Open);
        let members = self.members(txn_key);
        if open && self.all(&members, |job| job.status == JobStatus::Aborting) {
            self.finish_next(txn_key);
        }
    }

    fn finish_next(&mut self, txn_key: TxnKey) {
        let Some(txn) = self.txns.get_mut(&txn_key) else {
            return;
        };
        let commit = !txn.aborting;
        match txn.members.first().copied() {
            Some(key) => {
                txn.phase = Phase::Finishing(key);
                self.hook(key, Hook::Finish { commit });
            }
            None => {
                self.txns.remove(&txn_key);
            }
        }
    }

    pub(super) fn finished(&mut self, key: JobKey) {
        if self.txn_of(key).map(|txn| txn.phase) != Some(Phase::Finishing(key)) {
            debug_assert!(false, "{key:?} was cleaned up, but was not to be");
            return;
        }
        let Some(job) = self.jobs.get(&key) else {
            return;
        };
        let txn_key = job.txn;
        let started = job.started;
        let auto_dismiss = job.settings.auto_dismiss || !started;
        let outcome = match &job.failure {
            _ if job.force_cancel => JobOutcome::Cancelled,
            Some(failure) => JobOutcome::Failed(failure.clone()),
            None => JobOutcome::Completed,
        };
        self.effects.push(Effect::Ended(key, outcome));
        if started {
            let speed = job.limit.speed();
            let end = if job.force_cancel {
                Announcement::Cancelled { speed }
            } else {
                Announcement::Completed {
                    speed,
                    error: job.failure.as_ref().map(|failure| failure.message.clone()),
                }
            };
            self.announce(key, end);
        }
        self.leave_txn(key);
        self.set_status(key, JobStatus::Concluded);
        if auto_dismiss {
            self.dismiss(key);
        }
        self.finish_next(txn_key);
    }

    /// Takes the job out of its transaction, which is gone with its last member.
    pub(super) fn leave_txn(&mut self, key: JobKey) {
        let Some(txn_key) = self.jobs.get(&key).map(|job| job.txn) else {
            return;
        };
        if let Some(txn) = self.txns.get_mut(&txn_key) {
            txn.members.retain(|&member| member != key);
            if txn.members.is_empty() {
                self.txns.remove(&txn_key);
            }
        }
    }

    fn set_phase(&mut self, txn_key: TxnKey, phase: Phase) {
        if let Some(txn) = self.txns.get_mut(&txn_key) {
            txn.phase = phase;
        }
    }

    fn members(&self, txn_key: TxnKey) -> Vec<JobKey> {
        self.txns
            .get(&txn_key)
            .map_or_else(Vec::new, |txn| txn.members.clone())
    }

    fn all(&self, keys: &[JobKey], test: impl Fn(&JobState) -> bool) -> bool {
        keys.iter().filter_map(|key| self.jobs.get(key)).all(test)
    }
}
