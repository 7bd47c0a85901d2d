//! Starting a mirror: filter in, bitmap live, job running; or nothing at all.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use block::{
    AttachmentKind, DetectZeroes, DiscardMode, Drained, Graph, GraphError, Node, Perm, Permissions,
};

use crate::{JobDriver, JobKey, JobSpec, Jobs};

use super::driver::{KIND, MirrorDriver, Places, Settings, shows};
use super::error::MirrorError;
use super::filter::MirrorTop;
use super::init::Initial;
use super::spec::{MirrorSpec, Sizes, SyncMode, sizes};
use super::state::{MirrorState, TargetRules};
use super::user::ReplacesHold;
use crate::copying::{FilterHold, Undo};

/// Default granularity in bytes of a mirror of new writes only.
const NONE_GRANULARITY: u32 = 64 << 10;

/// Longest that the guest is held because some of its requests do not end.
const DRAIN: Duration = Duration::from_secs(2);

/// The job's hold on the source: nobody may change its size.
const READ_SOURCE: Permissions = Permissions {
    need: Perm::CONSISTENT_READ,
    share: Perm::ALL.without(Perm::RESIZE),
};
/// The job's hold on the target: nobody else writes it, or trusts what it reads
/// there.
const WRITE_TARGET: Permissions = Permissions {
    need: Perm::WRITE,
    share: Perm::WRITE_UNCHANGED,
};

/// Starts a mirror. The job has been created and is running when this returns.
///
/// The guest's requests are held for the moment in which the filter goes in;
/// from then on every write is recorded. Sizes that differ make the *job* fail.
///
/// Thread: main. Errors: what [`MirrorError`] says; source, target and jobs are
/// as before then. Cancel: the same.
pub async fn start_mirror(
    graph: &Rc<Graph>,
    jobs: &Jobs,
    spec: MirrorSpec,
) -> Result<JobKey, MirrorError> {
    check(graph, &spec)?;
    let drained = graph.drain_within(&spec.source, &[], DRAIN).await?;
    // Nothing is awaited from here on, so that nobody can come in between; but
    // much may have happened while the requests ended.
    let plan = check(graph, &spec)?;
    let key = set_up(graph, jobs, spec, plan, &drained)?;
    let held = drained.elapsed();
    drop(drained);
    tracing::info!(
        held_us = u64::try_from(held.as_micros()).unwrap_or(u64::MAX),
        "mirror: filter inserted"
    );
    let effects = jobs.lock().start(key);
    jobs.run(effects);
    Ok(key)
}

/// What a start comes down to.
struct Plan {
    sizes: Sizes,
    /// The node to replace, if that is not the source.
    replaces: Option<Arc<Node>>,
    /// All is dirty before the body begins.
    all_dirty: bool,
    initial: Initial,
    rules: TargetRules,
}

fn check(graph: &Graph, spec: &MirrorSpec) -> Result<Plan, MirrorError> {
    graph.check_root_node(&spec.source)?;
    let granularity = match (spec.granularity, spec.sync) {
        // What else is copied beside a write shows on the target: as with QEMU.
        (0, SyncMode::None) if spec.target.limits().cluster_size.is_none() => NONE_GRANULARITY,
        (granularity, _) => granularity,
    };
    let sizes = sizes(
        granularity,
        // A bad one is told of after much else, as by QEMU.
        spec.buf_size.max(0),
        spec.target.limits().cluster_size,
        spec.source.size(),
    )?;
    graph.check_not_blocked(&spec.source)?;
    graph.check_not_blocked(&spec.target)?;
    let mut replaces = None;
    if let Some(name) = &spec.replaces {
        let Ok(node) = graph.find_node(name) else {
            return Err(GraphError::NoSuchNode(name.clone()).into());
        };
        graph.check_not_blocked(&node)?;
        if !shows(&spec.source, &node) {
            return Err(MirrorError::Replaces {
                replaces: name.clone(),
                source_node: spec.source.name().to_owned(),
            });
        }
        if node.size() != spec.source.size() {
            return Err(MirrorError::ReplacesSize);
        }
        replaces = Some(node).filter(|node| node.id() != spec.source.id());
    }
    match spec.sync {
        SyncMode::Full | SyncMode::Top | SyncMode::None => {}
        SyncMode::Incremental => return Err(MirrorError::SyncMode("incremental")),
        SyncMode::Bitmap => return Err(MirrorError::SyncMode("bitmap")),
    }
    if spec.buf_size < 0 {
        return Err(MirrorError::BufSize);
    }
    let data = |node: &Arc<Node>| node.skip_filters().id();
    if data(&spec.source) == data(&spec.target) {
        return Err(MirrorError::SameNode);
    }
    let rules = rules(spec);
    let cluster_size = match (rules.whole_chunks, spec.target.limits().cluster_size) {
        (true, Some(cluster_size)) => u64::from(cluster_size),
        _ => 0,
    };
    let (all_dirty, initial) = initial(spec);
    Ok(Plan {
        sizes: sizes.with_least_granularity(cluster_size),
        replaces,
        all_dirty,
        initial,
        rules,
    })
}

/// How the target is to be written.
fn rules(spec: &MirrorSpec) -> TargetRules {
    let target = &spec.target;
    // Whether ranges that are not allocated will show something one day that they do not
    // show now: it stands on an image that is not open.
    let lacks_layers = target.limits().cluster_size.is_some() && target.backing().is_none();
    let mut lowest = Arc::clone(target);
    while let Some(below) = lowest.backing() {
        lowest = below;
    }
    let may_lack_layers = lowest.limits().cluster_size.is_some();
    // Of a part only what was written is copied, over whatever the target shows, here or
    // where it is exported from. A whole copy leaves nothing of that, unless the user says
    // that there is nothing.
    let is_part = match spec.sync {
        SyncMode::Top => spec.source.backing().is_some(),
        sync => sync != SyncMode::Full,
    };
    TargetRules {
        unmap: spec.unmap,
        whole_chunks: spec.sync != SyncMode::Full && lacks_layers,
        explicit_zeroes: is_part || (may_lack_layers && !spec.target_is_zero),
    }
}

/// Whether all is dirty at once, and what is found out by the body.
fn initial(spec: &MirrorSpec) -> (bool, Initial) {
    let base = spec.source.backing();
    let target = &spec.target;
    let (discard, detect) = (target.options().discard, target.options().detect_zeroes);
    match (spec.sync, &base) {
        (SyncMode::None, _) => (false, Initial::Marked),
        (SyncMode::Top, Some(_)) => {
            let zero_target = false;
            (false, Initial::Allocated { base, zero_target })
        }
        // Whoever has zeroes detected wants them to be written.
        _ if detect == DetectZeroes::Unmap => (true, Initial::Marked),
        _ => {
            let zeroes_fast =
                spec.unmap && target.limits().can_zero_fast && discard == DiscardMode::Unmap;
            if !spec.target_is_zero && !zeroes_fast {
                return (true, Initial::Marked);
            }
            let initial = Initial::Allocated {
                base: None,
                zero_target: !spec.target_is_zero,
            };
            (false, initial)
        }
    }
}

fn set_up(
    graph: &Rc<Graph>,
    jobs: &Jobs,
    spec: MirrorSpec,
    plan: Plan,
    drained: &Drained,
) -> Result<JobKey, MirrorError> {
    let state = Arc::new(MirrorState::new(
        spec.source.size(),
        plan.sizes.granularity,
        spec.copy_mode,
        plan.rules,
    )?);
    let filter = graph.insert_filter(
        spec.filter_node_name.as_deref(),
        &spec.source,
        &[],
        drained,
        |source| Box::new(MirrorTop::new(source, Arc::clone(&state))),
    )?;
    let mut undo = Undo::new(graph, jobs, drained, &filter);
    let driver = Arc::new(MirrorDriver::new(
        Settings {
            buf_size: plan.sizes.buf_size,
            on_source_error: spec.on_source_error,
            on_target_error: spec.on_target_error,
            auto_finalize: spec.auto_finalize,
            section_limit: spec.section_limit,
            initial: plan.initial,
            switches: spec.switches,
            deadline: spec.deadline,
            stall_after: spec.stall_after,
        },
        Arc::clone(&state),
    ));
    let job = JobSpec {
        id: Some(spec.job_id.clone()),
        auto_finalize: spec.auto_finalize,
        auto_dismiss: spec.auto_dismiss,
        home: spec.home.clone(),
        ..JobSpec::new(KIND)
    };
    let as_driver: Arc<dyn JobDriver> = Arc::clone(&driver) as _;
    let (key, effects) = jobs.lock().create(job, &as_driver)?;
    jobs.run(effects);
    undo.created(key);
    if spec.speed != 0 {
        // A bad one is found out this late by QEMU too, and seen: created, null.
        let effects = jobs.lock().set_speed(key, spec.speed)?;
        jobs.run(effects);
    }

    let as_source = jobs.backend_user(key, AttachmentKind::Job);
    let source_backend = undo.attach(&spec.source, READ_SOURCE, as_source)?;
    let as_target = jobs.backend_user(key, AttachmentKind::Root);
    let target_backend = undo.attach(&spec.target, WRITE_TARGET, as_target)?;
    let hold = Arc::new(FilterHold {
        job_id: spec.job_id.clone(),
        job_type: KIND.name,
    });
    let filter_hold = undo.attach(&filter, Permissions::IDLE, hold)?;

    let replaces_hold = match &plan.replaces {
        Some(node) => {
            let hold = Arc::new(ReplacesHold {
                job_id: spec.job_id.clone(),
            });
            Some(undo.attach(node, Permissions::IDLE, hold)?)
        }
        None => None,
    };

    if plan.all_dirty {
        state.dirty.set_all();
    }
    let progress = jobs.lock().progress(key);
    // The body refuses sizes that differ, having begun nothing.
    if let Ok(progress) = progress {
        if spec.source.size() == spec.target.size() {
            progress.set_remaining(state.dirty_bytes());
        }
        state.active.set_progress(progress);
    }
    state.set_target(Arc::clone(&target_backend));
    // From here on every guest request counts; all of them are still held.
    state.set_engaged(true);
    driver.set_places(Places {
        source: spec.source,
        target: spec.target,
        filter,
        replaces: plan.replaces,
        source_backend,
        target_backend,
        filter_hold,
        replaces_hold,
    });
    undo.disarm();
    Ok(key)
}
