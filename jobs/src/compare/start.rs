//! Starting a comparison: attached to both nodes, their writes recorded, job running;
//! or nothing at all.

use std::iter::successors;
use std::rc::Rc;
use std::sync::Arc;

use block::{AttachmentKind, Backend, BitmapHold, DirtyBitmap, Graph, Node, Permissions};

use crate::{JobDriver, JobKey, JobSpec, Jobs};

use super::driver::{CompareDriver, Guests, KIND, Place, Settings};
use super::error::CompareError;
use super::spec::{CompareSpec, MAX_DIFFERENCES};

/// Smallest chunk in which writes are recorded, in bytes.
const MIN_GRANULARITY: u64 = 4096;
/// Most chunks: 8 MiB of bits for each node.
const MAX_CHUNKS: u64 = 64 << 20;

/// The job reads whatever is there, and is in nobody's way: also not in that of a
/// mirror, which lets nobody rely on what its target holds. What was written while it
/// was read does not count.
const READ_ANYTHING: Permissions = Permissions::IDLE;

/// Starts a comparison. The job has been created and is running when this returns.
/// Requests to the nodes are not held.
///
/// Thread: main. Errors: what [`CompareError`] says; nodes and jobs are as before then.
pub fn start_compare(
    graph: &Rc<Graph>,
    jobs: &Jobs,
    spec: CompareSpec,
) -> Result<JobKey, CompareError> {
    if spec.max_differences > MAX_DIFFERENCES {
        return Err(CompareError::MaxDifferences);
    }
    let data = [spec.source.skip_filters(), spec.target.skip_filters()];
    let ids = [data[0].id(), data[1].id()];
    if ids[0] == ids[1] {
        return Err(CompareError::SameNode(data[0].name().to_owned()));
    }
    let mut pairs = jobs.pairs().into_iter();
    let pair = pairs.find(|active| active.pair.joins(ids));
    let hold = match &spec.bitmap {
        Some(name) => Some(hold_bitmap(&spec.source, name)?),
        None => None,
    };
    let mut nodes = [spec.source, spec.target];
    if let Some(active) = &pair {
        if !active.ready {
            let [source, target] = &nodes;
            return Err(CompareError::NotReady(
                source.name().to_owned(),
                target.name().to_owned(),
            ));
        }
        for node in &mut nodes {
            // The filter takes what goes through it for the guest's requests.
            if node.id() == active.pair.filter
                && let Some(below) = node.driver().filtered()
            {
                *node = below;
            }
        }
    }
    let driver = Arc::new(CompareDriver::new(Settings {
        on_error: [spec.on_source_error, spec.on_target_error],
        max_differences: spec.max_differences,
        is_mirrored: pair.is_some(),
    }));
    let size = nodes[0].size().max(nodes[1].size());
    let granularity = size
        .div_ceil(MAX_CHUNKS)
        .next_power_of_two()
        .clamp(MIN_GRANULARITY, DirtyBitmap::MAX_GRANULARITY);
    let mut bitmaps = Vec::new();
    for node in &data {
        bitmaps.push(Arc::new(DirtyBitmap::new(node.size(), granularity)?));
    }

    let job = JobSpec {
        id: Some(spec.job_id),
        auto_finalize: spec.auto_finalize,
        auto_dismiss: spec.auto_dismiss,
        home: spec.home,
        ..JobSpec::new(KIND)
    };
    let as_driver: Arc<dyn JobDriver> = Arc::clone(&driver) as _;
    let (key, effects) = jobs.lock().create(job, &as_driver)?;
    jobs.run(effects);
    let mut undo = Undo {
        graph,
        jobs,
        job: Some(key),
        backends: Vec::new(),
    };
    if spec.speed != 0 {
        let effects = jobs.lock().set_speed(key, spec.speed)?;
        jobs.run(effects);
    }
    for node in &nodes {
        let user = jobs.backend_user(key, AttachmentKind::Job);
        let backend = graph.attach("", node, READ_ANYTHING, Some(user))?;
        undo.backends.push(backend);
    }
    let backends = undo.disarm();
    driver.set_guests(Guests::measured(graph, &data));
    if let Some(hold) = hold {
        driver.set_skip(hold);
    }
    let places = nodes.into_iter().zip(data).zip(backends).zip(bitmaps);
    let places: Vec<Place> = places
        .map(|(((node, data), backend), written)| place(node, data, backend, written))
        .collect();
    let progress = jobs.lock().progress(key);
    if let Ok(progress) = progress {
        progress.set_remaining(size);
    }
    if let Ok(places) = <[Place; 2]>::try_from(places) {
        driver.set_places(places);
    }
    let effects = jobs.lock().start(key);
    jobs.run(effects);
    Ok(key)
}

/// Has a bitmap of the node, or of one that it filters, left as it is.
fn hold_bitmap(node: &Arc<Node>, name: &str) -> Result<BitmapHold, CompareError> {
    let below = |node: &Arc<Node>| node.driver().filtered();
    let bitmap = successors(Some(Arc::clone(node)), below).find_map(|node| node.named_bitmap(name));
    let bitmap = bitmap.ok_or_else(|| CompareError::NoSuchBitmap(name.to_owned()))?;
    let hold = bitmap.hold()?;
    match bitmap.is_recording() {
        true => Ok(hold),
        false => Err(CompareError::NotRecording(name.to_owned())),
    }
}

fn place(
    node: Arc<Node>,
    data: Arc<Node>,
    backend: Arc<Backend>,
    written: Arc<DirtyBitmap>,
) -> Place {
    data.attach_bitmap(&written);
    Place {
        node,
        data,
        backend,
        written,
    }
}

/// Takes back what was done, when dropped before [`Undo::disarm`].
struct Undo<'a> {
    graph: &'a Rc<Graph>,
    jobs: &'a Jobs,
    job: Option<JobKey>,
    backends: Vec<Arc<Backend>>,
}

impl Undo<'_> {
    fn disarm(mut self) -> Vec<Arc<Backend>> {
        self.job = None;
        std::mem::take(&mut self.backends)
    }
}

impl Drop for Undo<'_> {
    fn drop(&mut self) {
        for backend in self.backends.drain(..) {
            self.graph.detach(&backend);
        }
        if let Some(key) = self.job.take() {
            let effects = self.jobs.lock().set_up_failed(key);
            self.jobs.run(effects);
        }
    }
}
