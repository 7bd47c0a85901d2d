//! The backup as the job core sees it: hooks, and its end.

use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use block::{Backend, BoxFuture, Drained, Graph, GraphError, Node, Snapshot, Stalls, runtime};

use crate::copying::{
    detach_when_idle, let_target_go, take_out, take_out_some_time, wait_until_idle,
};
use crate::{JobContext, JobDetails, JobDriver, JobFailure, JobKind, OnError, SoftCancel};

use super::account::Account;
use super::body::Body;
use super::start::AtEnd;

/// How often is looked whether discards of the source have ended.
const DISCARD_LOOK: Duration = Duration::from_millis(100);

/// Backups as the job core knows them.
pub(super) const KIND: JobKind = JobKind {
    name: "backup",
    block_job: true,
    soft_cancel: SoftCancel::Forces,
    completes: false,
};

/// What is known when the job is created, and never changes.
pub(super) struct Settings {
    pub(super) on_source_error: OnError,
    pub(super) on_target_error: OnError,
    /// Requests in flight, and bytes of each, at most.
    pub(super) max_workers: usize,
    pub(super) max_chunk: u64,
    /// Nothing is copied but what the guest is about to change.
    pub(super) only_guest: bool,
    /// What lower layers have is not part of the backup.
    pub(super) only_top: bool,
    pub(super) discard_source: bool,
    /// Guests' requests need not wait until the target has what they change.
    pub(super) saves_behind: bool,
    /// See [`Rules`](crate::copying::Rules).
    pub(super) explicit_zeroes: bool,
}

/// The job's places in the graph: known when it starts.
pub(super) struct Places {
    pub(super) filter: Arc<Node>,
    pub(super) snapshot: Arc<Snapshot>,
    /// What is left for the body.
    pub(super) account: Account,
    /// Reads the source, below the filter.
    pub(super) source_backend: Arc<Backend>,
    /// Reads what is copied: the source's backend, or one of the snapshot.
    pub(super) reader: Arc<Backend>,
    /// Where the filter saves, if that is not the target.
    pub(super) scratch: Option<Arc<Backend>>,
    /// Writes the target: the job does, and the filter unless it has a scratch file.
    pub(super) target_backend: Arc<Backend>,
    /// Keeps others from using the filter. No requests.
    pub(super) filter_hold: Arc<Backend>,
}

impl Places {
    /// The backends that stand below the filter or beside it.
    fn others(&self) -> impl Iterator<Item = &Arc<Backend>> {
        let always = [&self.target_backend, &self.source_backend];
        always.into_iter().chain(&self.scratch)
    }
}

/// How the fleecing of a backup gets on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FleecingInfo {
    /// Bytes of the disk that are in the scratch file.
    pub scratch_bytes: u64,
    /// Most of them that there were.
    pub most_scratch_bytes: u64,
    /// How guests' requests had to wait.
    pub stalls: Stalls,
}

/// The driver of one backup.
pub(super) struct BackupDriver {
    settings: Settings,
    places: OnceLock<Places>,
    /// The user has resumed the job since the body last looked. Atomic; set on main.
    user_resumed: AtomicBool,
    /// What is to be done with the user's bitmap in the end. A leaf lock, taken for a
    /// move only, on main.
    at_end: Mutex<Option<AtEnd>>,
    /// The job has left the graph. Atomic; set on main.
    left: AtomicBool,
}

impl BackupDriver {
    pub(super) fn new(settings: Settings) -> Self {
        Self {
            settings,
            places: OnceLock::new(),
            user_resumed: AtomicBool::new(false),
            at_end: Mutex::default(),
            left: AtomicBool::new(false),
        }
    }

    pub(super) fn settings(&self) -> &Settings {
        &self.settings
    }

    pub(super) fn set_places(&self, places: Places) {
        // Set once, before the job is started.
        let _ = self.places.set(places);
    }

    pub(super) fn places(&self) -> Option<&Places> {
        self.places.get()
    }

    pub(super) fn set_at_end(&self, at_end: Option<AtEnd>) {
        let before = std::mem::replace(&mut *self.at_end(), at_end);
        drop(before);
    }

    fn at_end(&self) -> std::sync::MutexGuard<'_, Option<AtEnd>> {
        self.at_end
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Says what becomes of the user's bitmap, once.
    fn end_bitmap(&self, success: bool) {
        let at_end = self.at_end().take();
        if let (Some(at_end), Some(places)) = (at_end, self.places()) {
            at_end.apply(success, &places.account);
        }
    }

    /// Whether the user has resumed the job since the last call.
    pub(super) fn take_user_resumed(&self) -> bool {
        self.user_resumed.load(Ordering::Relaxed)
            && self.user_resumed.swap(false, Ordering::Relaxed)
    }

    /// Takes a backup that has not been started off the graph, in the section in which
    /// it was prepared.
    pub(super) fn take_back(&self, graph: &Graph, drained: &Drained) {
        let Some(places) = self.places() else {
            return;
        };
        places.snapshot.end();
        if self.left.swap(true, Ordering::Relaxed) {
            return;
        }
        graph.detach(&places.filter_hold);
        graph.detach(&places.reader);
        let removed = graph.remove_filter(&places.filter, drained);
        if let Err(error) = removed {
            tracing::error!(%error, "backup: the filter could not be taken out again");
        }
        for backend in places.others() {
            graph.detach(backend);
        }
    }

    /// Takes the backup off the graph, whichever way it ended. Idempotent.
    async fn leave(&self, graph: &Rc<Graph>) {
        let Some(places) = self.places() else {
            return;
        };
        places.snapshot.end();
        if self.left.swap(true, Ordering::Relaxed) {
            return;
        }
        if self.settings().discard_source {
            wait_until_idle(&[&places.source_backend]).await;
            if places.source_backend.in_flight() > 0 {
                leave_after_discards(graph, places);
                return;
            }
        }
        graph.detach(&places.filter_hold);
        if places.scratch.is_some() {
            // It stands on the filter.
            detach_when_idle(graph, &places.reader);
        }
        let removed = take_out(graph, &places.filter).await;
        // Copies that guests' requests began end soon, unless the target hangs.
        wait_until_idle(&places.others().collect::<Vec<_>>()).await;
        for backend in places.others() {
            detach_when_idle(graph, backend);
        }
        match removed {
            Ok(()) | Err(GraphError::NotFound { .. }) => {}
            Err(error) => {
                let filter = places.filter.name();
                tracing::warn!(%error, filter, "backup: the filter stays for now");
                take_out_some_time(graph, &places.filter);
            }
        }
    }

    /// The failure of a job whose snapshot is broken.
    pub(super) fn broken(places: &Places) -> Option<JobFailure> {
        let errno = places.snapshot.broken()?;
        let why = JobFailure::from_errno(errno).message;
        let message = format!(
            "The snapshot is broken, the target holds no state of the disk: what the guest wrote \
             over could not be saved ({why})"
        );
        Some(JobFailure::new(errno, message))
    }
}

/// Takes a backup off the graph some time: nobody may write the source before the last
/// discard has ended, however long that takes, since it would take the new data away.
fn leave_after_discards(graph: &Rc<Graph>, places: &Places) {
    let filter = Arc::clone(&places.filter);
    let [source, hold] = [&places.source_backend, &places.filter_hold].map(Arc::clone);
    tracing::warn!(
        filter = filter.name(),
        "backup: the filter stays until requests to the source end that hang"
    );
    detach_when_idle(graph, &places.target_backend);
    let graph = Rc::clone(graph);
    runtime::spawn_local(async move {
        while source.in_flight() > 0 {
            runtime::sleep(DISCARD_LOOK).await;
        }
        graph.detach(&hold);
        graph.detach(&source);
        take_out_some_time(&graph, &filter);
    })
    .detach();
}

impl JobDriver for BackupDriver {
    fn run(self: Arc<Self>, context: JobContext) -> BoxFuture<'static, Result<(), JobFailure>> {
        Box::pin(async move {
            let Some(places) = self.places() else {
                return Err(JobFailure::new(libc::EINVAL, "The backup was not set up"));
            };
            let ended = Body::new(&context, &self, places).run().await;
            if let Some(info) = self.query().fleecing {
                context.set_fleecing(info);
            }
            ended
        })
    }

    fn query(&self) -> JobDetails {
        let places = self.places().filter(|places| places.scratch.is_some());
        let fleecing = places.map(|places| FleecingInfo {
            // Nothing is left of it once the job has let it go.
            scratch_bytes: match self.left.load(Ordering::Relaxed) {
                true => 0,
                false => places.snapshot.saved_bytes(),
            },
            most_scratch_bytes: places.snapshot.most_saved_bytes(),
            stalls: places.snapshot.stalls(),
        });
        JobDetails {
            fleecing,
            ..JobDetails::default()
        }
    }

    fn pause(&self) -> BoxFuture<'_, ()> {
        // Guests wait for nobody who is parked; what is in memory stays there.
        if let Some(places) = self.places() {
            places.snapshot.save_behind(false);
        }
        Box::pin(std::future::ready(()))
    }

    fn user_resume(&self) {
        self.user_resumed.store(true, Ordering::Relaxed);
    }

    fn cancel(&self, force: bool) {
        if let (true, Some(places)) = (force, self.places()) {
            // Nothing will be copied any more, so no guest request has to wait for it.
            places.snapshot.end();
            let_target_go(&places.target_backend);
        }
    }

    fn prepare<'a>(&'a self, _: &'a Rc<Graph>) -> BoxFuture<'a, Result<(), JobFailure>> {
        let broken = self.places().and_then(Self::broken);
        Box::pin(async move { broken.map_or(Ok(()), Err) })
    }

    fn commit<'a>(&'a self, graph: &'a Rc<Graph>) -> BoxFuture<'a, ()> {
        self.end_bitmap(true);
        Box::pin(self.leave(graph))
    }

    fn abort<'a>(&'a self, graph: &'a Rc<Graph>) -> BoxFuture<'a, ()> {
        self.end_bitmap(false);
        Box::pin(self.leave(graph))
    }

    fn clean<'a>(&'a self, graph: &'a Rc<Graph>) -> BoxFuture<'a, ()> {
        Box::pin(self.leave(graph))
    }
}
