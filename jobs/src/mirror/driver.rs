//! The mirror as the job core sees it: body and hooks.

use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::Duration;

use block::{Backend, BitmapRoom, BoxFuture, Drained, Graph, Node};

use crate::{
    CopyMode, CopyRates, ErrorAction, JobChange, JobContext, JobDetails, JobDriver, JobFailure,
    JobKind, JobWatch, OnError, OwnDrain, SoftCancel,
};

use crate::copying::let_target_go;
use crate::pair::CopyPair;

use super::body::{Body, buffer_pool};
use super::complete;
use super::copy::Copier;
use super::init::Initial;
use super::state::MirrorState;

/// Mirrors as the job core knows them.
pub(super) const KIND: JobKind = JobKind {
    name: "mirror",
    block_job: true,
    soft_cancel: SoftCancel::FinishesWhenReady,
    completes: true,
};

/// What is known when the job is created, and never changes.
pub(super) struct Settings {
    pub(super) buf_size: u64,
    pub(super) on_source_error: OnError,
    pub(super) on_target_error: OnError,
    pub(super) auto_finalize: bool,
    pub(super) section_limit: Duration,
    pub(super) initial: Initial,
    pub(super) switches: bool,
    pub(super) deadline: Option<Duration>,
    pub(super) stall_after: Duration,
}

/// The job's places in the graph: known when it starts.
pub(super) struct Places {
    pub(super) source: Arc<Node>,
    pub(super) target: Arc<Node>,
    pub(super) filter: Arc<Node>,
    /// The node that the target is to replace, if that is not the source: shown by it
    /// through filters.
    pub(super) replaces: Option<Arc<Node>>,
    /// Reads the source, below the filter.
    pub(super) source_backend: Arc<Backend>,
    /// Writes the target: the job and the filter do.
    pub(super) target_backend: Arc<Backend>,
    /// Keeps others from using the filter. No requests.
    pub(super) filter_hold: Arc<Backend>,
    /// Keeps `replaces` from being deleted. No requests.
    pub(super) replaces_hold: Option<Arc<Backend>>,
}

impl Places {
    /// The node that all who will see the pivot stand on: to be drained for it.
    pub(super) fn lowest(&self) -> &Arc<Node> {
        self.replaces.as_ref().unwrap_or(&self.source)
    }

    /// Those that go on in the mirror's own drained sections: its copier's. (The target
    /// may stand on the source.) They give way to the sections of others.
    pub(super) fn own_backends(&self) -> [&Arc<Backend>; 2] {
        [&self.source_backend, &self.target_backend]
    }
}

/// Whether `node` is `source`, or is shown by it through filters: then nobody sees a
/// difference when a copy of `source` takes its place.
pub(super) fn shows(source: &Arc<Node>, node: &Arc<Node>) -> bool {
    let mut at = Arc::clone(source);
    while at.id() != node.id() {
        match at.driver().filtered() {
            Some(below) => at = below,
            None => return false,
        }
    }
    true
}

/// What is to become of the mirror when its body has ended well.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Ending {
    /// It was forced, or has failed.
    #[default]
    None,
    /// The guest stays on the source; the target is a copy of a moment.
    Copy,
    /// The guest goes on on the target.
    Pivot,
}

/// A drained section that outlives the body. The section ends first.
pub(super) struct Held {
    pub(super) drained: Drained,
    /// Tells the job core not to wait for this job.
    pub(super) _own: Option<OwnDrain>,
}

/// How the body ended.
#[derive(Default)]
struct Finish {
    ending: Ending,
    held: Option<Held>,
    /// For the persistent bitmaps that the target gets.
    room: Option<BitmapRoom>,
    left: bool,
}

/// The driver of one mirror.
pub(super) struct MirrorDriver {
    settings: Settings,
    state: Arc<MirrorState>,
    places: OnceLock<Places>,
    /// How the mirror gets on. A leaf lock, taken for a copy only: by the body, and for
    /// queries.
    rates: Mutex<CopyRates>,
    /// Set when the body begins.
    watch: OnceLock<JobWatch>,
    /// The user has resumed the job since the body last looked. Atomic; set on main.
    user_resumed: AtomicBool,
    /// How the body ended. A leaf lock, taken for a move only: by the body at
    /// its end, by main's hooks after that.
    finish: Mutex<Finish>,
}

impl MirrorDriver {
    pub(super) fn new(settings: Settings, state: Arc<MirrorState>) -> Self {
        Self {
            settings,
            state,
            places: OnceLock::new(),
            rates: Mutex::default(),
            watch: OnceLock::new(),
            user_resumed: AtomicBool::new(false),
            finish: Mutex::default(),
        }
    }

    pub(super) fn set_places(&self, places: Places) {
        // Set once, before the job is started.
        let _ = self.places.set(places);
    }

    pub(super) fn places(&self) -> Option<&Places> {
        self.places.get()
    }

    pub(super) fn state(&self) -> &Arc<MirrorState> {
        &self.state
    }

    pub(super) fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Whether the job was forced to end, whether or not its hook has run yet.
    pub(super) fn is_cancelled(&self) -> bool {
        !self.state.is_engaged() || self.watch.get().is_some_and(JobWatch::is_force_cancelled)
    }

    /// Whether the user has resumed the job since the last call.
    pub(super) fn take_user_resumed(&self) -> bool {
        self.user_resumed.load(Ordering::Relaxed)
            && self.user_resumed.swap(false, Ordering::Relaxed)
    }

    pub(super) fn rates(&self) -> CopyRates {
        *self
            .rates
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// For the next queries.
    pub(super) fn show_rates(&self, rates: CopyRates) {
        *self
            .rates
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner()) = rates;
    }

    /// Operations that copy from the source, with up to `buffers` buffers kept.
    pub(super) fn copier(&self, places: &Places, buffers: usize) -> Rc<Copier> {
        Copier::new(
            Arc::clone(&self.state),
            Arc::clone(&places.source_backend),
            buffer_pool(self.settings.buf_size, buffers),
        )
    }

    fn finish(&self) -> MutexGuard<'_, Finish> {
        self.finish
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Leaves word for main's hooks how the body ended.
    pub(super) fn set_ending(&self, ending: Ending) {
        self.finish().ending = ending;
    }

    /// How the body ended.
    pub(super) fn ending(&self) -> Ending {
        self.finish().ending
    }

    /// Leaves a drained section for the next hook.
    pub(super) fn keep_section(&self, held: Held) {
        let before = self.finish().held.replace(held);
        drop(before);
    }

    /// The drained section that was left, if one was.
    pub(super) fn take_section(&self) -> Option<Held> {
        self.finish().held.take()
    }

    /// Leaves room for bitmaps for the pivot.
    pub(super) fn keep_room(&self, room: Option<BitmapRoom>) {
        let before = std::mem::replace(&mut self.finish().room, room);
        // What both are for stays: the newer one is there by now.
        drop(before);
    }

    /// The room that was left, if there is any.
    pub(super) fn take_room(&self) -> Option<BitmapRoom> {
        self.finish().room.take()
    }

    /// Whether this is the first call: the mirror leaves the graph once.
    pub(super) fn leaves_now(&self) -> bool {
        !std::mem::replace(&mut self.finish().left, true)
    }

    /// Ends a drained section, and logs how long it held the guest.
    pub(super) fn end_section(&self, held: Held, job: &str) {
        let took = held.drained.elapsed();
        drop(held);
        let us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        tracing::info!(job, held_us = us, "mirror: drained section ended");
    }
}

impl JobDriver for MirrorDriver {
    fn run(self: Arc<Self>, context: JobContext) -> BoxFuture<'static, Result<(), JobFailure>> {
        Box::pin(async move {
            let _ = self.watch.set(context.watch());
            let Some(places) = self.places() else {
                return Err(JobFailure::new(libc::EINVAL, "The mirror was not set up"));
            };
            if places.source.size() != places.target.size() {
                return Err(JobFailure::new(
                    libc::EINVAL,
                    "Source and target image have different sizes",
                ));
            }
            Body::new(&context, &self, places).run().await
        })
    }

    fn pause(&self) -> BoxFuture<'_, ()> {
        // Nobody looks whether the target hangs while the body is parked.
        self.state.set_catching_up(false);
        Box::pin(std::future::ready(()))
    }

    fn resume(&self) -> BoxFuture<'_, ()> {
        // What failed while the body was parked is dirty, and tried again at once: it
        // is no reason to park again, whatever it was that somebody has mended.
        self.state.forget_active_error(|error| {
            self.settings.on_target_error.action(error.errno) == ErrorAction::Stop
        });
        Box::pin(std::future::ready(()))
    }

    fn user_resume(&self) {
        self.user_resumed.store(true, Ordering::Relaxed);
    }

    fn cancel(&self, force: bool) {
        if force {
            // Nothing will be copied any more, so nothing has to be recorded, and
            // no guest request has to wait for the target.
            self.state.set_engaged(false);
            // Nor for a server that is away, or a limit of its rate: what becomes of
            // the target does not matter any more.
            if let Some(places) = self.places() {
                let_target_go(&places.target_backend);
            }
        }
    }

    fn change(&self, change: &JobChange) -> Result<(), String> {
        let JobChange::CopyMode(mode) = change;
        match mode {
            CopyMode::WriteBlocking => self.state.mirror_actively_for_good(),
            // Nothing is stored: the body may be switching just now.
            CopyMode::Background if self.state.copy_mode() == CopyMode::Background => {}
            CopyMode::Background => {
                return Err(
                    "Change to copy mode 'background' is not implemented: cancel the job and \
                     start it anew"
                        .to_owned(),
                );
            }
        }
        Ok(())
    }

    fn query(&self) -> JobDetails {
        JobDetails {
            actively_synced: Some(self.state.is_actively_synced()),
            copy_mode: self.settings.switches.then(|| self.state.copy_mode()),
            rates: Some(self.rates()),
            ..JobDetails::default()
        }
    }

    /// What is in flight is counted at both nodes; this is about what may follow.
    fn drained_poll(&self) -> bool {
        !self.is_cancelled()
    }

    fn pair(&self) -> Option<CopyPair> {
        let places = self.places().filter(|_| self.state.is_engaged())?;
        let data = |node: &Arc<Node>| node.skip_filters().id();
        Some(CopyPair {
            nodes: [data(&places.source), data(&places.target)],
            filter: places.filter.id(),
            backends: vec![
                Arc::clone(&places.source_backend),
                Arc::clone(&places.target_backend),
            ],
            lag: Arc::clone(&self.state) as _,
        })
    }

    fn prepare<'a>(&'a self, graph: &'a Rc<Graph>) -> BoxFuture<'a, Result<(), JobFailure>> {
        Box::pin(complete::prepare(self, graph))
    }

    fn commit<'a>(&'a self, graph: &'a Rc<Graph>) -> BoxFuture<'a, ()> {
        Box::pin(complete::leave(self, graph))
    }

    fn abort<'a>(&'a self, graph: &'a Rc<Graph>) -> BoxFuture<'a, ()> {
        Box::pin(complete::leave(self, graph))
    }

    fn clean<'a>(&'a self, graph: &'a Rc<Graph>) -> BoxFuture<'a, ()> {
        Box::pin(complete::leave(self, graph))
    }
}
