//! What the tests of the shell share: a driver that does what a test says, and a
//! main thread with jobs on it.

use std::rc::Rc;
use std::sync::{Arc, Mutex};

use block::{BoxFuture, Graph};

use crate::state::SoftCancel;
use crate::{JobChange, JobContext, JobDetails, JobDriver, JobEvent, JobEventKind, JobFailure};
use crate::{JobKey, JobKind, JobSpec, Jobs};

pub(crate) const MIRROR: JobKind = JobKind {
    name: "mirror",
    block_job: true,
    soft_cancel: SoftCancel::FinishesWhenReady,
    completes: true,
};

type Body =
    dyn Fn(JobContext) -> BoxFuture<'static, Result<(), JobFailure>> + Send + Sync + 'static;
type Main = dyn Fn() -> BoxFuture<'static, Result<(), JobFailure>> + Send + Sync + 'static;

/// A driver that notes which hooks were called.
pub(crate) struct Scripted {
    body: Box<Body>,
    prepare: Option<Box<Main>>,
    called: Mutex<Vec<String>>,
    /// What several drivers and the sink of events write to, with this job's name.
    journal: Option<(&'static str, Journal)>,
}

/// What happened, in order, to several jobs.
pub(crate) type Journal = Arc<Mutex<Vec<String>>>;

impl Scripted {
    pub(crate) fn new<F, Fut>(body: F) -> Self
    where
        F: Fn(JobContext) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<(), JobFailure>> + 'static,
    {
        Self {
            body: Box::new(move |context| Box::pin(body(context))),
            prepare: None,
            called: Mutex::default(),
            journal: None,
        }
    }

    /// Writes `name.hook` to `journal` for each hook.
    #[cfg(not(shuttle))]
    pub(crate) fn with_journal(mut self, name: &'static str, journal: &Journal) -> Self {
        self.journal = Some((name, Arc::clone(journal)));
        self
    }

    #[cfg(not(shuttle))]
    pub(crate) fn with_prepare<F, Fut>(mut self, prepare: F) -> Self
    where
        F: Fn() -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<(), JobFailure>> + 'static,
    {
        self.prepare = Some(Box::new(move || Box::pin(prepare())));
        self
    }

    fn note(&self, what: impl Into<String>) {
        // Also checks the rule of the leaf lock at each hook.
        crate::sync::assert_unlocked("a hook was called");
        let what = what.into();
        if let Some((name, journal)) = &self.journal {
            journal.lock().unwrap().push(format!("{name}.{what}"));
        }
        self.called.lock().unwrap().push(what);
    }

    /// The hooks called so far.
    pub(crate) fn called(&self) -> Vec<String> {
        self.called.lock().unwrap().clone()
    }
}

impl JobDriver for Scripted {
    fn run(self: Arc<Self>, context: JobContext) -> BoxFuture<'static, Result<(), JobFailure>> {
        self.note("run");
        (self.body)(context)
    }

    fn pause(&self) -> BoxFuture<'_, ()> {
        self.note("pause");
        Box::pin(std::future::ready(()))
    }

    fn resume(&self) -> BoxFuture<'_, ()> {
        self.note("resume");
        Box::pin(std::future::ready(()))
    }

    fn user_resume(&self) {
        self.note("user_resume");
    }

    fn cancel(&self, force: bool) {
        self.note(format!("cancel({force})"));
    }

    fn complete(&self) {
        self.note("complete");
    }

    fn set_speed(&self, speed: u64) {
        self.note(format!("set_speed({speed})"));
    }

    fn change(&self, change: &JobChange) -> Result<(), String> {
        self.note(format!("{change:?}"));
        Err("Not now".to_owned())
    }

    fn query(&self) -> JobDetails {
        crate::sync::assert_unlocked("a hook was called");
        JobDetails {
            actively_synced: Some(true),
            ..JobDetails::default()
        }
    }

    fn prepare<'a>(&'a self, _: &'a Rc<Graph>) -> BoxFuture<'a, Result<(), JobFailure>> {
        self.note("prepare");
        match &self.prepare {
            Some(prepare) => prepare(),
            None => Box::pin(std::future::ready(Ok(()))),
        }
    }

    fn commit<'a>(&'a self, _: &'a Rc<Graph>) -> BoxFuture<'a, ()> {
        self.note("commit");
        Box::pin(std::future::ready(()))
    }

    fn abort<'a>(&'a self, _: &'a Rc<Graph>) -> BoxFuture<'a, ()> {
        self.note("abort");
        Box::pin(std::future::ready(()))
    }

    fn clean<'a>(&'a self, _: &'a Rc<Graph>) -> BoxFuture<'a, ()> {
        self.note("clean");
        Box::pin(std::future::ready(()))
    }

    fn free(&self) {
        self.note("free");
    }
}

/// Creates a job and starts it.
pub(crate) fn start(jobs: &Jobs, spec: JobSpec, driver: &Arc<Scripted>) -> JobKey {
    let driver: Arc<dyn JobDriver> = Arc::clone(driver) as Arc<dyn JobDriver>;
    let mut guard = jobs.lock();
    let (key, created) = guard.create(spec, &driver).unwrap();
    let started = guard.start(key);
    drop(guard);
    jobs.run(created.and(started));
    key
}

/// A mirror with this id.
pub(crate) fn spec(id: &str) -> JobSpec {
    JobSpec {
        id: Some(id.to_owned()),
        ..JobSpec::new(MIRROR)
    }
}

/// An event in short: `running`, `READY`, `COMPLETED`.
pub(crate) fn word(event: &JobEvent) -> String {
    match &event.kind {
        JobEventKind::StatusChange(status) => status.name().to_owned(),
        JobEventKind::Ready(_) => "READY".to_owned(),
        JobEventKind::Stalled { .. } => "STALLED".to_owned(),
        JobEventKind::Pending => "PENDING".to_owned(),
        JobEventKind::Error { action, .. } => format!("ERROR({})", action.name()),
        JobEventKind::Completed { error: None, .. } => "COMPLETED".to_owned(),
        JobEventKind::Completed {
            error: Some(error), ..
        } => format!("COMPLETED({error})"),
        JobEventKind::Cancelled(_) => "CANCELLED".to_owned(),
    }
}
