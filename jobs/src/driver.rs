//! What a kind of job has to provide: its body and its hooks.
//!
//! The core calls these and knows nothing else of mirror, backup and so on.

use std::rc::Rc;
use std::sync::Arc;

use block::{BoxFuture, Graph};

use crate::backup::FleecingInfo;
use crate::compare::Comparison;
use crate::context::JobContext;
use crate::error::JobFailure;
use crate::pair::CopyPair;
use crate::state::SoftCancel;

/// What is true of every job of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JobKind {
    /// The type's name on the wire (`mirror`).
    pub name: &'static str,
    /// Whether `block-job-*` commands and `BLOCK_JOB_*` events know it.
    pub block_job: bool,
    /// What a soft cancel means to it.
    pub soft_cancel: SoftCancel,
    /// Whether it becomes ready and is completed by hand.
    pub completes: bool,
}

/// The body and the hooks of one job.
///
/// No hook is ever called with the job mutex held, so each may use anything. `run`,
/// `pause` and `resume` never overlap one another.
///
/// The hooks of *main* that cannot wait run in the order in which their causes
/// happened. Those that can (`prepare`, `commit`, `abort`, `clean`) run one at a time
/// and in order within a transaction; between them, and wherever one of them awaits,
/// hooks of other jobs and clients' commands may change the graph. So what a hook has
/// found out about the graph holds until its next await: it looks again afterwards, or
/// is protected by a drained section and by the rights of its attachments.
///
/// A driver sees its job only through the [`JobContext`] that `run` is given. It
/// cannot reach the monitor side with it:
///
/// ```compile_fail,E0599
/// fn body(context: jobs::JobContext) {
///     context.lock();
/// }
/// ```
///
/// ```compile_fail,E0599
/// async fn body(context: jobs::JobContext) {
///     context.cancel(true);
/// }
/// ```
pub trait JobDriver: Send + Sync + 'static {
    /// The body: the job's work, on its home iothread, after an implicit pause
    /// point.
    ///
    /// It has to reach a pause point ([`JobContext::pause_point`], `sleep` and
    /// `throttle`) between requests and at least every 100 ms, and to return soon
    /// after a forced cancel. It changes nothing in the graph: that is what
    /// `prepare`, `commit`, `abort` and `clean` are for.
    ///
    /// If the home ends first, the future is dropped and the job fails.
    fn run(self: Arc<Self>, context: JobContext) -> BoxFuture<'static, Result<(), JobFailure>>;

    /// Home: about to park in a pause point. Ends when the job has no request in
    /// flight.
    fn pause(&self) -> BoxFuture<'_, ()> {
        Box::pin(std::future::ready(()))
    }

    /// Home: back from a pause point.
    fn resume(&self) -> BoxFuture<'_, ()> {
        Box::pin(std::future::ready(()))
    }

    /// Main: the user resumed the job, or cancelled it while he had it paused.
    fn user_resume(&self) {}

    /// Main: a cancel was requested, and the core has decided whether it is a
    /// forced one. The place to give up requests that may hang. May be called
    /// several times, and after the body's end.
    fn cancel(&self, force: bool) {
        let _ = force;
    }

    /// Main: the `complete` verb was accepted; the body sees
    /// [`JobContext::is_complete_requested`] as well.
    fn complete(&self) {}

    /// Main: the rate limit is now `speed` bytes/s (0 for none). The core applies
    /// it; this is for drivers that size their requests by it.
    fn set_speed(&self, speed: u64) {
        let _ = speed;
    }

    /// Monitor's thread: change a parameter of the running job.
    ///
    /// # Errors
    ///
    /// The text is the client's answer.
    fn change(&self, change: &JobChange) -> Result<(), String> {
        let _ = change;
        Err("Job type does not support change".to_owned())
    }

    /// Monitor's thread: what `query-block-jobs` shows beyond the common fields.
    fn query(&self) -> JobDetails {
        JobDetails::default()
    }

    /// Any thread: the two nodes that the job keeps equal, while it does.
    fn pair(&self) -> Option<CopyPair> {
        None
    }

    /// Main: all members of the transaction are done; last chance to fail.
    fn prepare<'a>(&'a self, graph: &'a Rc<Graph>) -> BoxFuture<'a, Result<(), JobFailure>> {
        let _ = graph;
        Box::pin(std::future::ready(Ok(())))
    }

    /// Main: apply the result. Exactly one of `commit` and `abort` is called,
    /// once.
    fn commit<'a>(&'a self, graph: &'a Rc<Graph>) -> BoxFuture<'a, ()> {
        let _ = graph;
        Box::pin(std::future::ready(()))
    }

    /// Main: leave everything as it was before the job. Also after a `prepare`
    /// that succeeded, and for a job that was never started.
    fn abort<'a>(&'a self, graph: &'a Rc<Graph>) -> BoxFuture<'a, ()> {
        let _ = graph;
        Box::pin(std::future::ready(()))
    }

    /// Main: after `commit` or `abort`, and before the end is told. What the creator of
    /// the job wants to do at its end belongs here.
    fn clean<'a>(&'a self, graph: &'a Rc<Graph>) -> BoxFuture<'a, ()> {
        let _ = graph;
        Box::pin(std::future::ready(()))
    }

    /// Main: the job is gone. The last call.
    fn free(&self) {}

    /// Any thread: whether a drained section has to wait for the running body.
    /// Asked only while the body neither has yielded nor drains by itself. Must
    /// not wait.
    fn drained_poll(&self) -> bool {
        true
    }
}

/// A parameter of a running job to be changed (`block-job-change`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JobChange {
    /// A mirror's copy mode.
    CopyMode(CopyMode),
}

/// Who copies a guest's new data to a mirror's target.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CopyMode {
    /// The job, later.
    #[default]
    Background,
    /// The guest's write itself.
    WriteBlocking,
}

impl CopyMode {
    /// The name on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Self::Background => "background",
            Self::WriteBlocking => "write-blocking",
        }
    }
}

/// Details that only some kinds of jobs have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct JobDetails {
    /// Mirror: source and target are the same at each completed write.
    pub actively_synced: Option<bool>,
    /// Mirror that may change it by itself: the copy mode of this moment.
    pub copy_mode: Option<CopyMode>,
    /// Mirror: how it gets on.
    pub rates: Option<CopyRates>,
    /// Comparison: what it has found so far.
    pub comparison: Option<Comparison>,
    /// Backup that fleeces: how that gets on.
    pub fleecing: Option<FleecingInfo>,
}

/// How a copying gets on against a guest that writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CopyRates {
    /// Bytes per second that the guest dirties.
    pub dirty: u64,
    /// Bytes per second that are copied.
    pub copy: u64,
    /// Seconds until nothing is left, if both stay so; `None`: never.
    pub eta: Option<u64>,
    /// What is left has got no less for a long time.
    pub is_stalled: bool,
}
