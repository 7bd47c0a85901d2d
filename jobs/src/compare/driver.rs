//! The comparison as the job core sees it.

use std::rc::Rc;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, Weak};

use block::{Backend, BitmapHold, BoxFuture, DirtyBitmap, Felt, Graph, GuestLatency, Node};

use crate::copying::{detach_when_idle, wait_until_idle};
use crate::{JobContext, JobDetails, JobDriver, JobFailure, JobKind, OnError, SoftCancel};

use super::body::Body;
use super::result::Comparison;
use super::skip::Skip;

/// Comparisons as the job core knows them.
pub(super) const KIND: JobKind = JobKind {
    name: "compare",
    block_job: true,
    soft_cancel: SoftCancel::Forces,
    completes: false,
};

/// What is known when the job is created, and never changes.
pub(super) struct Settings {
    /// What a failed read does, by side.
    pub(super) on_error: [OnError; 2],
    pub(super) max_differences: u32,
    /// A mirror keeps the two nodes equal, and has to go on.
    pub(super) is_mirrored: bool,
}

/// Devices and exports that used one of the nodes when the job began, and what they feel.
pub(super) struct Guests {
    /// Weakly: main must not be the last to hold a node.
    backends: Vec<Weak<Backend>>,
    latency: Arc<GuestLatency>,
}

impl Guests {
    /// Measures them from now on. Main only.
    pub(super) fn measured(graph: &Graph, nodes: &[Arc<Node>]) -> Self {
        let latency = Arc::default();
        let guests = graph.guests_of(nodes);
        for backend in &guests {
            backend.measure(&latency);
        }
        Self {
            backends: guests.iter().map(Arc::downgrade).collect(),
            latency,
        }
    }

    /// Measures them no more. Main only.
    fn forget(&self) {
        for backend in self.backends.iter().filter_map(Weak::upgrade) {
            backend.measure_no_more(&self.latency);
        }
    }
}

/// One of the two nodes, in the graph.
pub(super) struct Place {
    pub(super) node: Arc<Node>,
    /// The node below its filters, where writes are recorded.
    pub(super) data: Arc<Node>,
    pub(super) backend: Arc<Backend>,
    /// What was written to it since the job began, or it was last read again.
    pub(super) written: Arc<DirtyBitmap>,
}

/// The driver of one comparison.
pub(super) struct CompareDriver {
    settings: Settings,
    /// Known when it starts.
    places: OnceLock<[Place; 2]>,
    /// Known when it starts. The latency is atomic.
    guests: OnceLock<Guests>,
    /// What is not to be compared. Known when it starts.
    skip: OnceLock<Skip>,
    /// Keeps the bitmap of `skip` as it is. A leaf lock: moved in and out on main.
    hold: Mutex<Option<BitmapHold>>,
    /// What was found. A leaf lock, taken for a copy only: by the body, and for
    /// queries.
    found: Mutex<Comparison>,
}

impl CompareDriver {
    pub(super) fn new(settings: Settings) -> Self {
        Self {
            settings,
            places: OnceLock::new(),
            guests: OnceLock::new(),
            skip: OnceLock::new(),
            hold: Mutex::default(),
            found: Mutex::default(),
        }
    }

    pub(super) fn settings(&self) -> &Settings {
        &self.settings
    }

    pub(super) fn set_places(&self, places: [Place; 2]) {
        // Set once, before the job is started.
        let _ = self.places.set(places);
    }

    pub(super) fn set_guests(&self, guests: Guests) {
        // Set once, before the job is started.
        let _ = self.guests.set(guests);
    }

    /// What is dirty in this bitmap is not compared. Main only.
    pub(super) fn set_skip(&self, hold: BitmapHold) {
        // Set once, before the job is started.
        let _ = self.skip.set(Skip::new(hold.bitmap()));
        *self.lock_hold() = Some(hold);
    }

    pub(super) fn skip(&self) -> Option<Skip> {
        self.skip.get().cloned()
    }

    fn lock_hold(&self) -> MutexGuard<'_, Option<BitmapHold>> {
        self.hold
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// What the guest has felt since the last call.
    pub(super) fn felt(&self) -> Option<Felt> {
        self.guests.get()?.latency.take()
    }

    fn found(&self) -> Comparison {
        let found = self.found.lock();
        found
            .unwrap_or_else(|poisoned| poisoned.into_inner())
            .clone()
    }

    /// For the next queries.
    pub(super) fn show(&self, found: Comparison) {
        *self
            .found
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner()) = found;
    }
}

impl JobDriver for CompareDriver {
    fn run(self: Arc<Self>, context: JobContext) -> BoxFuture<'static, Result<(), JobFailure>> {
        Box::pin(async move {
            let Some(places) = self.places.get() else {
                return Err(JobFailure::new(
                    libc::EINVAL,
                    "The comparison was not set up",
                ));
            };
            let ended = Body::new(&context, &self, places).run().await;
            context.set_comparison(self.found());
            ended
        })
    }

    fn query(&self) -> JobDetails {
        JobDetails {
            comparison: Some(self.found()),
            ..JobDetails::default()
        }
    }

    fn clean<'a>(&'a self, graph: &'a Rc<Graph>) -> BoxFuture<'a, ()> {
        Box::pin(async move {
            if let Some(guests) = self.guests.get() {
                guests.forget();
            }
            let places = || self.places.get().into_iter().flatten();
            // Who hears that it has ended may use the nodes, unless one hangs.
            wait_until_idle(&places().map(|place| &place.backend).collect::<Vec<_>>()).await;
            for place in places() {
                place.data.detach_bitmap(&place.written);
                detach_when_idle(graph, &place.backend);
            }
            let hold = self.lock_hold().take();
            // Not under the lock: it takes the bitmap's.
            drop(hold);
        })
    }

    /// Each request counts by itself, and none is begun in a section.
    fn drained_poll(&self) -> bool {
        false
    }
}
