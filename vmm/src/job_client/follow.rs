//! Jobs on their way to an end: what their events and the queries say, put
//! together.
//!
//! Events tell how a job ends, but a client that comes late has missed some, and
//! a job with `auto-dismiss` is on no list any more when it has ended. Queries
//! tell how far it is. Neither is enough alone.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::error::JobError;
use super::jobs::Job;
use super::rate::Rate;
use super::report::Report;
use super::server::Server;
use super::status;
use crate::client::Event;

/// When a job whose end is near is looked at again.
const SOON: Duration = Duration::from_millis(20);
/// A job that is off the list so often without a word about its end has gone.
const ABSENCES: u32 = 3;
/// The command that tells of jobs that have ended; not QEMU's.
pub const HISTORY: &str = "query-job-history";
/// The error of a job that was cancelled, where nothing else tells.
const CANCELLED_TEXT: &str = "Operation canceled";

/// How far jobs are followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Goal {
    /// They are ready, or beyond.
    Ready,
    /// They wait to be finalized by hand, or beyond.
    Pending,
    /// They have ended.
    End,
}

/// How a job ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// Well.
    Completed,
    /// With an error.
    Failed(String),
    /// Somebody did not want it any more.
    Cancelled,
    /// It is not there any more, and nobody said why.
    Gone,
}

impl Ending {
    /// What the process ends with.
    pub fn status(&self) -> u8 {
        match self {
            Self::Completed => status::DONE,
            Self::Failed(_) => status::FAILED,
            Self::Cancelled => status::CANCELLED,
            Self::Gone => status::LOST,
        }
    }
}

/// A job that is followed.
#[derive(Clone, Debug)]
pub struct Followed {
    /// The last that was heard of it.
    pub job: Job,
    /// How fast it is.
    pub rate: Rate,
    /// When it was first seen.
    pub begun: Instant,
    /// It was asked to complete.
    pub completing: bool,
    was_ready: bool,
    /// It waits for somebody to finalize it. The status alone does not tell:
    /// every job passes `pending`.
    to_finalize: bool,
    ending: Option<Ending>,
    ended: bool,
    /// How often in a row it was on no list.
    absent: u32,
    /// The user was told of its end.
    told: bool,
}

impl Followed {
    fn new(id: &str) -> Self {
        Self {
            job: Job {
                id: id.to_owned(),
                ..Job::default()
            },
            rate: Rate::default(),
            begun: Instant::now(),
            completing: false,
            was_ready: false,
            to_finalize: false,
            ending: None,
            ended: false,
            absent: 0,
            told: false,
        }
    }

    /// How it ended, if it has.
    pub fn ending(&self) -> Option<&Ending> {
        self.ending.as_ref().filter(|_| self.ended)
    }

    /// What it is doing, in a word or a few.
    pub fn phase(&self) -> &str {
        match (self.job.status.as_str(), self.job.stopped_by()) {
            ("paused" | "standby", Some("nospace")) => "stopped: no space left",
            ("paused" | "standby", Some(_)) => "stopped by an I/O error",
            ("paused" | "standby", None) => "paused",
            ("" | "created", _) => "starting",
            ("running", _) if matches!(self.job.kind.as_str(), "mirror" | "backup") => "copying",
            ("running", _) if self.job.kind == "compare" => "comparing",
            ("ready" | "waiting", _) if self.completing => "pivoting",
            (status, _) => status,
        }
    }

    fn has_reached(&self, goal: Goal) -> bool {
        self.ended
            || match goal {
                Goal::Ready => self.was_ready || self.to_finalize,
                Goal::Pending => self.to_finalize,
                Goal::End => false,
            }
    }

    /// Takes an event of this job in. Says whether it should be looked at soon.
    fn hear(&mut self, event: &Event) -> bool {
        match event.name.as_str() {
            "JOB_STATUS_CHANGE" => {
                let status = event.data["status"].as_str().unwrap_or_default();
                match status {
                    "null" => {
                        self.ended = true;
                        self.ending.get_or_insert(Ending::Gone);
                        return false;
                    }
                    "created" if self.ended => return false,
                    _ => {}
                }
                status.clone_into(&mut self.job.status);
                self.was_ready |= status == "ready";
                self.to_finalize = false;
                return status == "concluded";
            }
            "BLOCK_JOB_READY" => self.was_ready = true,
            "BLOCK_JOB_PENDING" => self.to_finalize = true,
            "BLOCK_JOB_COMPLETED" => {
                self.ending = Some(match event.data["error"].as_str() {
                    Some(error) => Ending::Failed(error.to_owned()),
                    None => Ending::Completed,
                });
                self.take_numbers(event);
                return true;
            }
            "BLOCK_JOB_CANCELLED" => {
                self.ending = Some(Ending::Cancelled);
                self.take_numbers(event);
                return true;
            }
            _ => {}
        }
        false
    }

    fn take_numbers(&mut self, event: &Event) {
        if let (Some(current), Some(total)) =
            (event.data["offset"].as_u64(), event.data["len"].as_u64())
        {
            self.job.current = current;
            self.job.total = total;
        }
        if let Some(kind) = event.data["type"].as_str() {
            kind.clone_into(&mut self.job.kind);
        }
    }

    /// Takes what a query said. Says whether it should be looked at soon.
    fn see(&mut self, job: Option<&Job>, now: Instant) -> bool {
        let Some(job) = job else {
            self.absent += 1;
            if self.absent >= ABSENCES {
                self.ended = true;
                self.ending.get_or_insert(Ending::Gone);
            }
            return !self.ended;
        };
        self.absent = 0;
        self.job = job.clone();
        self.rate.note(now, job.current);
        self.was_ready |= job.status == "ready";
        self.to_finalize = job.status == "pending" && job.auto_finalize == Some(false);
        if job.status != "concluded" {
            return false;
        }
        // Listed until somebody dismisses it; else it is about to vanish.
        self.ended = job.auto_dismiss != Some(true);
        if self.ending.is_none() {
            self.ending = Some(match job.error.as_deref() {
                None => Ending::Completed,
                Some(CANCELLED_TEXT) => Ending::Cancelled,
                Some(error) => Ending::Failed(error.to_owned()),
            });
        }
        !self.ended
    }
}

/// Follows jobs of one server.
pub struct Follower<'a> {
    /// Where they are.
    pub server: &'a mut Server,
    /// Who is told.
    pub report: &'a mut Report,
    jobs: Vec<Followed>,
}

impl<'a> Follower<'a> {
    /// Follows jobs by their ids. Nothing is asked yet, and none has to be there
    /// any more: events that came before are looked at too, but for those of an earlier
    /// job of the same id.
    pub fn new<'i>(
        server: &'a mut Server,
        report: &'a mut Report,
        ids: impl IntoIterator<Item = &'i str>,
    ) -> Self {
        let jobs: Vec<_> = ids.into_iter().map(Followed::new).collect();
        for followed in &jobs {
            server.forget_earlier(&followed.job.id);
        }
        Self {
            server,
            report,
            jobs,
        }
    }

    /// The jobs.
    pub fn jobs(&self) -> &[Followed] {
        &self.jobs
    }

    /// The jobs were asked to complete: what they do now is a pivot.
    pub fn set_completing(&mut self) {
        for job in &mut self.jobs {
            job.completing = true;
        }
    }

    /// The jobs have been followed since then already.
    pub fn set_begun(&mut self, begun: Instant) {
        for job in &mut self.jobs {
            job.begun = begun;
        }
    }

    /// Waits until all have reached `goal`, and tells the user of their progress
    /// and their ends.
    ///
    /// Errors: of the connection; [`JobError::Interrupted`]. It can be called
    /// again after the latter.
    pub fn run(&mut self, goal: Goal) -> Result<(), JobError> {
        self.run_until(|jobs| jobs.iter().all(|job| job.has_reached(goal)))
    }

    /// As [`run`](Self::run), until `is_enough` says so of the jobs.
    pub fn run_until(&mut self, is_enough: impl Fn(&[Followed]) -> bool) -> Result<(), JobError> {
        let mut next_look = Instant::now();
        loop {
            self.tell_ends()?;
            if is_enough(&self.jobs) {
                return Ok(());
            }
            let wait = next_look.saturating_duration_since(Instant::now());
            let event = self.server.next_event(wait)?;
            if let Some(event) = &event
                && self.hear(event)?
            {
                next_look = Instant::now();
            }
            // Events without end must not keep the queries away.
            if event.is_none() || Instant::now() >= next_look + SOON {
                let pause = if self.look()? {
                    SOON
                } else {
                    self.report.interval()
                };
                next_look = Instant::now() + pause;
            }
        }
    }

    fn hear(&mut self, event: &Event) -> Result<bool, JobError> {
        let data = &event.data;
        let id = data["id"].as_str().or(data["device"].as_str());
        let job = id.and_then(|id| self.jobs.iter_mut().find(|job| job.job.id == id));
        let Some(job) = job else { return Ok(false) };
        self.report.event(event)?;
        if event.name == "BLOCK_JOB_ERROR" && data["action"] == "stop" {
            let operation = data["operation"].as_str().unwrap_or("read or write");
            self.report.note(&format!(
                "Job '{}' was stopped by a {operation} error; mend it, then: diptych job resume --qmp {} {}",
                job.job.id,
                self.server.address(),
                job.job.id
            ))?;
        }
        Ok(job.hear(event))
    }

    /// Asks how far they are. Says whether to ask again soon.
    fn look(&mut self) -> Result<bool, JobError> {
        let now = self.server.jobs()?;
        let mut soon = false;
        for job in self.jobs.iter_mut().filter(|job| !job.ended) {
            let seen = now.iter().find(|seen| seen.id == job.job.id);
            soon |= job.see(seen, Instant::now());
            if seen.is_some() && !job.ended {
                self.report.progress(job)?;
            }
        }
        Ok(soon)
    }

    fn tell_ends(&mut self) -> Result<(), JobError> {
        for job in self.jobs.iter_mut().filter(|job| job.ended && !job.told) {
            job.told = true;
            add_history(&mut job.job, self.server);
            self.report.ended(job)?;
        }
        Ok(())
    }

    /// What the process ends with when all is over: the worst of all endings.
    pub fn status(&self) -> u8 {
        let endings = self.jobs.iter().filter_map(Followed::ending);
        let statuses: Vec<u8> = endings.map(Ending::status).collect();
        [status::FAILED, status::LOST, status::CANCELLED]
            .into_iter()
            .find(|status| statuses.contains(status))
            .unwrap_or(status::DONE)
    }
}

/// Adds what a server keeps of a backup that it does not list any more: a short one is over
/// before anybody asks how its fleecing gets on.
fn add_history(job: &mut Job, server: &mut Server) {
    const FLEECING: &str = "fleecing";
    if job.kind != "backup" || !server.has(HISTORY) {
        return;
    }
    // What is missing is not worth an error; that of a lost connection comes again.
    let Ok(Value::Array(ended)) = server.run(HISTORY, json!({})) else {
        return;
    };
    let last = ended.iter().rev().find(|row| row["id"] == *job.id);
    if let Some(found) = last.and_then(|row| row.get(FLEECING)) {
        if !job.raw.is_object() {
            job.raw = json!({});
        }
        job.raw[FLEECING] = found.clone();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(name: &str, data: Value) -> Event {
        Event {
            name: name.to_owned(),
            data,
            timestamp: Value::Null,
        }
    }

    fn status_of(followed: &mut Followed, status: &str) {
        followed.hear(&event(
            "JOB_STATUS_CHANGE",
            json!({"id": "j", "status": status}),
        ));
    }

    fn job(status: &str) -> Job {
        Job {
            id: "j".to_owned(),
            status: status.to_owned(),
            ..Job::default()
        }
    }

    #[test]
    fn events_tell_how_a_job_ended_that_is_on_no_list() {
        for (end, ending) in [
            (
                event("BLOCK_JOB_COMPLETED", json!({"device": "j"})),
                Ending::Completed,
            ),
            (
                event("BLOCK_JOB_COMPLETED", json!({"device": "j", "error": "No"})),
                Ending::Failed("No".to_owned()),
            ),
            (
                event("BLOCK_JOB_CANCELLED", json!({"device": "j"})),
                Ending::Cancelled,
            ),
        ] {
            let mut followed = Followed::new("j");
            status_of(&mut followed, "running");
            followed.hear(&end);
            assert_eq!(followed.ending(), None);
            status_of(&mut followed, "concluded");
            status_of(&mut followed, "null");
            assert_eq!(followed.ending(), Some(&ending));
        }
    }

    #[test]
    fn a_concluded_job_that_stays_listed_has_ended_as_it_says() {
        for (error, ending) in [
            (None, Ending::Completed),
            (Some("Operation canceled"), Ending::Cancelled),
            (Some("No"), Ending::Failed("No".to_owned())),
        ] {
            let mut followed = Followed::new("j");
            let listed = Job {
                error: error.map(str::to_owned),
                auto_dismiss: Some(false),
                ..job("concluded")
            };
            followed.see(Some(&listed), Instant::now());
            assert_eq!(followed.ending(), Some(&ending));
        }
    }

    #[test]
    fn a_concluded_job_that_is_about_to_vanish_is_waited_for() {
        let mut followed = Followed::new("j");
        let listed = Job {
            auto_dismiss: Some(true),
            ..job("concluded")
        };
        assert!(followed.see(Some(&listed), Instant::now()));
        assert_eq!(followed.ending(), None);
        status_of(&mut followed, "null");
        assert_eq!(followed.ending(), Some(&Ending::Completed));
    }

    #[test]
    fn a_job_that_vanishes_without_a_word_has_gone() {
        let mut followed = Followed::new("j");
        followed.see(Some(&job("running")), Instant::now());
        for _ in 1..ABSENCES {
            assert!(followed.see(None, Instant::now()));
        }
        assert!(!followed.see(None, Instant::now()));
        assert_eq!(followed.ending(), Some(&Ending::Gone));
        assert_eq!(Ending::Gone.status(), status::LOST);
    }

    #[test]
    fn goals_are_reached_in_order() {
        let mut followed = Followed::new("j");
        status_of(&mut followed, "running");
        assert!(!followed.has_reached(Goal::Ready));
        status_of(&mut followed, "ready");
        assert!(followed.has_reached(Goal::Ready) && !followed.has_reached(Goal::Pending));
        status_of(&mut followed, "standby");
        assert!(followed.has_reached(Goal::Ready));
        status_of(&mut followed, "pending");
        assert!(!followed.has_reached(Goal::Pending));
        followed.hear(&event("BLOCK_JOB_PENDING", json!({"id": "j"})));
        assert!(followed.has_reached(Goal::Pending) && !followed.has_reached(Goal::End));
        status_of(&mut followed, "aborting");
        assert!(!followed.has_reached(Goal::Pending));
        let listed = Job {
            auto_finalize: Some(false),
            ..job("pending")
        };
        followed.see(Some(&listed), Instant::now());
        assert!(followed.has_reached(Goal::Pending));
    }

    #[test]
    fn phases_say_what_a_person_wants_to_know() {
        let mut followed = Followed::new("j");
        let mut phase = |status: &str, io_status: &str, completing| {
            followed.completing = completing;
            followed.job = Job {
                kind: "mirror".to_owned(),
                io_status: Some(io_status.to_owned()),
                ..job(status)
            };
            followed.phase().to_owned()
        };
        assert_eq!(phase("running", "ok", false), "copying");
        assert_eq!(phase("ready", "ok", false), "ready");
        assert_eq!(phase("ready", "ok", true), "pivoting");
        assert_eq!(phase("paused", "ok", false), "paused");
        assert_eq!(phase("paused", "nospace", false), "stopped: no space left");
        assert_eq!(phase("standby", "failed", true), "stopped by an I/O error");
    }
}
