//! The backup as the job core sees it: hooks, and its end.

use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use block::{Backend, BoxFuture, Drained, Graph, GraphError, Node, Snapshot, runtime};

use crate::copying::{LEAVE_DRAIN, detach_when_idle, let_target_go, take_out, take_out_some_time};
use crate::{JobContext, JobDriver, JobFailure, JobKind, OnError, SoftCancel};

use super::body::Body;
use super::start::AtEnd;

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
    /// See [`Rules`](crate::copying::Rules).
    pub(super) explicit_zeroes: bool,
}

/// The job's places in the graph: known when it starts.
pub(super) struct Places {
    pub(super) filter: Arc<Node>,
    pub(super) snapshot: Arc<Snapshot>,
    /// Reads the source, below the filter.
    pub(super) source_backend: Arc<Backend>,
    /// Writes the target: the job and the filter do.
    pub(super) target_backend: Arc<Backend>,
    /// Keeps others from using the filter. No requests.
    pub(super) filter_hold: Arc<Backend>,
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
    /// The job has left the graph. Atomic; on main.
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
            at_end.apply(success, &places.snapshot);
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
        let removed = graph.remove_filter(&places.filter, drained);
        if let Err(error) = removed {
            tracing::error!(%error, "backup: the filter could not be taken out again");
        }
        graph.detach(&places.target_backend);
        graph.detach(&places.source_backend);
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
        graph.detach(&places.filter_hold);
        let removed = take_out(graph, &places.filter).await;
        // Copies that guests' requests began end soon, unless the target hangs.
        let patience = Instant::now() + LEAVE_DRAIN;
        let backends = [&places.target_backend, &places.source_backend];
        while backends.iter().any(|it| it.in_flight() > 0) && Instant::now() < patience {
            runtime::sleep(Duration::from_millis(1)).await;
        }
        for backend in backends {
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

impl JobDriver for BackupDriver {
    fn run(self: Arc<Self>, context: JobContext) -> BoxFuture<'static, Result<(), JobFailure>> {
        Box::pin(async move {
            let Some(places) = self.places() else {
                return Err(JobFailure::new(libc::EINVAL, "The backup was not set up"));
            };
            Body::new(&context, &self, places).run().await
        })
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
