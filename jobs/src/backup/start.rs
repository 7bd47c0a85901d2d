//! Starting a backup, in two steps: everything is prepared in a drained section (of all
//! the disks that are to be backed up at the same instant), and then the job runs; or
//! nothing has happened at all.

use std::rc::Rc;
use std::sync::{Arc, Weak};
use std::time::Duration;

use block::{
    AttachmentKind, BackendUser, ChildRole, CopyBeforeWriteDriver, Drained, FrozenBitmap, Graph,
    GraphError, NamedBitmap, Node, Perm, Permissions, Snapshot, SnapshotAccount, SnapshotObserver,
};

use crate::context::WeakJobNotifier;
use crate::copying::{FilterHold, Undo};
use crate::drain::DrainUser;
use crate::{JobDriver, JobKey, JobSpec, Jobs, Progress};

use super::account::{Account, Wanted};
use super::driver::{BackupDriver, KIND, Places, Settings};
use super::error::BackupError;
use super::spec::{BackupSpec, BackupSync, BitmapMode};

/// Longest that the guest is held because some of its requests do not end.
const DRAIN: Duration = Duration::from_secs(2);
/// Requests of the body in flight at most, whatever `max-workers` says: more do not copy
/// faster.
const MAX_WORKERS: usize = 64;

/// The job's hold on the source. It is the filter that lets nobody change its size.
const READ_SOURCE: Permissions = Permissions {
    need: Perm::CONSISTENT_READ,
    share: Perm::ALL,
};
/// The job's hold on the target. Others may write what it shows of lower layers: the
/// source may be one of them.
const WRITE_TARGET: Permissions = Permissions {
    need: Perm::WRITE,
    share: Perm::ALL.without(Perm::RESIZE),
};

/// The job's hold on its filter while it discards what it has copied: a new write could
/// be what is discarded.
const NO_WRITERS: Permissions = Permissions {
    need: Perm::NONE,
    share: Perm::ALL.without(Perm::WRITE),
};

/// Starts a backup of the source as it is at this moment. The job has been created and
/// is running when this returns.
///
/// Thread: main. Errors: what [`BackupError`] says; source, target and jobs are as
/// before then. Cancel: the same.
pub async fn start_backup(
    graph: &Rc<Graph>,
    jobs: &Jobs,
    spec: BackupSpec,
) -> Result<JobKey, BackupError> {
    // What is refused anyway does not hold the guest.
    check(graph, &spec)?;
    let drained = graph.drain_within(&spec.source, &[], DRAIN).await?;
    let prepared = prepare_backup(graph, jobs, spec, &drained)?;
    let key = prepared.start();
    let held = drained.elapsed();
    drop(drained);
    tracing::info!(
        held_us = u64::try_from(held.as_micros()).unwrap_or(u64::MAX),
        "backup: filter inserted"
    );
    Ok(key)
}

/// A backup whose filter is in place, and whose job has been created.
///
/// Dropping it cancels the job, which then leaves the graph by itself.
#[must_use = "a backup that is prepared is to be started or taken back"]
pub struct PreparedBackup {
    graph: Rc<Graph>,
    jobs: Jobs,
    driver: Arc<BackupDriver>,
    key: JobKey,
    decided: bool,
}

impl PreparedBackup {
    /// The job.
    pub fn key(&self) -> JobKey {
        self.key
    }

    /// The job runs, and everything counts that the guest does from the end of the
    /// section on.
    pub fn start(mut self) -> JobKey {
        self.decided = true;
        let effects = self.jobs.lock().start(self.key);
        self.jobs.run(effects);
        self.key
    }

    /// Takes everything back. `drained` is the section in which it was prepared, still
    /// held. Clients see the job being cancelled.
    pub fn take_back(mut self, drained: &Drained) {
        self.decided = true;
        self.driver.set_at_end(None);
        self.driver.take_back(&self.graph, drained);
        self.cancel();
    }

    fn cancel(&self) {
        // Nothing has happened: the bitmap is as it was.
        self.driver.set_at_end(None);
        // Nobody can have cancelled or started it before.
        let cancelled = self.jobs.lock().cancel(self.key, true);
        if let Ok(effects) = cancelled {
            self.jobs.run(effects);
        }
    }
}

impl Drop for PreparedBackup {
    fn drop(&mut self) {
        if !self.decided {
            self.cancel();
        }
    }
}

/// The job's hold on the snapshot that it fleeces. What it discards is only the saved copy.
const READ_SNAPSHOT: Permissions = Permissions {
    need: Perm::CONSISTENT_READ,
    share: Perm::ALL.without(Perm::RESIZE),
};

/// What a start comes down to.
struct Plan {
    /// Bytes per cluster of the account.
    cluster: u64,
    /// The same, as users know it.
    shown_cluster: u64,
    /// The user's bitmap, and what is to become of it.
    bitmap: Option<(Arc<NamedBitmap>, BitmapMode)>,
}

fn check(graph: &Graph, spec: &BackupSpec) -> Result<Plan, BackupError> {
    let mode = spec.check_bitmap_mode()?;
    let mut bitmap = None;
    if let Some(name) = &spec.bitmap {
        let found = find_bitmap(spec, name)?;
        let mode = mode.ok_or(BackupError::ModeRequired)?;
        found.check_usable()?;
        spec.check_bitmap_use(mode)?;
        bitmap = Some((found, mode));
    } else if mode.is_some() {
        return Err(BackupError::ModeWithoutBitmap);
    }
    if spec.source.id() == spec.target.id() {
        return Err(BackupError::SameNode);
    }
    if spec.compress {
        let devices = graph.backends().into_iter();
        let device = devices
            .filter(|it| it.node == spec.target.name())
            .map(|it| it.name)
            .find(|name| !name.is_empty());
        return Err(BackupError::Compression(device.unwrap_or_default()));
    }
    spec.check_scratch()?;
    graph.check_no_job(&spec.source)?;
    graph.check_no_job(&spec.target)?;
    spec.check_perf()?;
    if spec.source.size() != spec.target.size() {
        return Err(BackupError::Sizes);
    }
    let (cluster, shown_cluster) = spec.clusters()?;
    if spec.discard_source {
        let name = spec.source.name();
        let used = graph.backends().iter().any(|it| it.node == name)
            || graph.check_root_node(&spec.source).is_err();
        if used {
            return Err(BackupError::DiscardUsed(name.to_owned()));
        }
    }
    Ok(Plan {
        cluster,
        shown_cluster,
        bitmap,
    })
}

fn find_bitmap(spec: &BackupSpec, name: &str) -> Result<Arc<NamedBitmap>, BackupError> {
    let bitmap = spec.source.named_bitmap(name);
    bitmap.ok_or_else(|| BackupError::NoSuchBitmap(name.to_owned()))
}

/// What becomes of the user's bitmap.
pub(super) struct AtEnd {
    bitmap: FrozenBitmap,
    mode: BitmapMode,
}

impl AtEnd {
    /// Sets the bitmap to what its mode says, after a success or a failure.
    pub(super) fn apply(self, success: bool, account: &Account) {
        let Self { bitmap, mode } = self;
        match (mode, success) {
            (BitmapMode::OnSuccess | BitmapMode::Always, true) => bitmap.abdicate(),
            (BitmapMode::OnSuccess, false) | (BitmapMode::Never, _) => bitmap.reclaim(),
            (BitmapMode::Always, false) => match account.not_copied() {
                Ok(not_copied) => bitmap.abdicate_with(&not_copied),
                Err(error) => {
                    tracing::warn!(%error, "backup: the bitmap keeps what it had");
                    bitmap.reclaim();
                }
            },
        }
    }
}

/// Prepares a backup in a drained section of its source (at least): the source is copied
/// as it is in that section.
///
/// Thread: main; nothing is awaited. Errors: what [`BackupError`] says; everything is as
/// before then.
pub fn prepare_backup(
    graph: &Rc<Graph>,
    jobs: &Jobs,
    spec: BackupSpec,
    drained: &Drained,
) -> Result<PreparedBackup, BackupError> {
    let plan = check(graph, &spec)?;
    let at_end = match &plan.bitmap {
        Some((bitmap, mode)) => Some(AtEnd {
            bitmap: bitmap.freeze()?,
            mode: *mode,
        }),
        None => None,
    };
    let part = at_end.as_ref().filter(|_| spec.takes_from_bitmap());
    let part = part.map(|at_end| at_end.bitmap.bits().as_ref());
    let size = spec.source.size();
    let (account, wanted) = match spec.scratch {
        None => {
            let (shown, cluster) = (plan.shown_cluster, plan.cluster);
            (SnapshotAccount::fine(size, shown, cluster, part)?, None)
        }
        Some(_) => {
            let wanted = Wanted::new(size, plan.shown_cluster, part)?;
            (wanted.snapshot(plan.cluster)?, Some(wanted))
        }
    };
    let mut snapshot = None;
    let filter = graph
        .insert_filter_with_target(
            spec.filter_node_name.as_deref(),
            &spec.source,
            &spec.target,
            drained,
            |source| {
                let mut filter = CopyBeforeWriteDriver::for_job(source, account, spec.policy);
                if spec.discard_source {
                    filter = filter.that_discards();
                }
                snapshot = Some(Arc::clone(filter.kept()));
                Box::new(filter)
            },
        )
        .map_err(|error| match error {
            GraphError::FrozenAbove { .. } => BackupError::Replace(error),
            error => BackupError::Filter(error),
        })?;
    let mut undo = Undo::new(graph, jobs, drained, &filter);
    let Some(snapshot) = snapshot else {
        // The filter is made by whoever inserts it.
        return Err(GraphError::NotFilter(filter.name().to_owned()).into());
    };
    // Before there is a job: clients would see it come and go.
    let user: Arc<dyn BackendUser> = Arc::new(TargetUser {
        filter: filter.name().into(),
        job_id: spec.job_id.clone(),
    });
    if let Err(error) = may_write(graph, &spec.target, &user) {
        drop(undo);
        // With QEMU there is no conflict of the source's users before they are the filter's.
        return Err(match may_write(graph, &spec.target, &user) {
            Ok(()) => BackupError::Replace(error),
            Err(_) => BackupError::Filter(error),
        });
    }
    // As late as with QEMU, for which the filter decides on the clusters.
    spec.check_chunk(plan.shown_cluster)?;
    let only_top = spec.sync == BackupSync::Top && spec.source.backing().is_some();
    if only_top {
        snapshot.only_allocated();
    }
    let driver = Arc::new(BackupDriver::new(settings(&spec, &plan, only_top)));
    let job = JobSpec {
        id: Some(spec.job_id.clone()),
        auto_finalize: spec.auto_finalize,
        auto_dismiss: spec.auto_dismiss,
        txn: spec.txn,
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

    // The filter stands for the job there.
    let as_source = jobs.backend_user_of_filter(key, &filter, ChildRole::File);
    let as_source = Arc::new(as_source.beside_others());
    let source_backend = undo.attach(&spec.source, READ_SOURCE, as_source)?;
    let as_target = jobs.backend_user_of_filter(key, &filter, ChildRole::Target);
    let as_target = match spec.scratch {
        // Guests' requests never get there.
        Some(_) => as_target,
        None => as_target.serving(&filter, spec.policy.timeout),
    };
    let target_backend = undo.attach(&spec.target, WRITE_TARGET, Arc::new(as_target))?;
    let hold = Arc::new(FilterHold {
        job_id: spec.job_id.clone(),
        job_type: KIND.name,
    });
    let hold_permissions = match spec.discard_source {
        true => NO_WRITERS,
        false => Permissions::IDLE,
    };
    let filter_hold = undo.attach(&filter, hold_permissions, hold)?;

    let (mut scratch, mut reader) = (None, Arc::clone(&source_backend));
    if let Some(node) = &spec.scratch {
        let user = DrainUser::new(jobs.clone(), key, AttachmentKind::Job);
        let user = user.serving(&filter, spec.policy.timeout);
        scratch = Some(undo.attach(node, WRITE_TARGET, Arc::new(user))?);
        let user = jobs.backend_user(key, AttachmentKind::Job);
        reader = graph.attach_snapshot(&filter, READ_SNAPSHOT, user)?;
        undo.attached_on_top(&reader);
    }

    snapshot.set_target(Arc::clone(scratch.as_ref().unwrap_or(&target_backend)));
    let account = match wanted {
        Some(wanted) => wanted.of(&snapshot),
        None => Account::Shared(Arc::clone(&snapshot)),
    };
    let guard = jobs.lock();
    let (progress, notifier) = (guard.progress(key), guard.notifier(key));
    drop(guard);
    if let (Ok(progress), Ok(notifier)) = (progress, notifier) {
        progress.set_remaining(account.pending_bytes());
        // Guests' requests copy from the first instant, whenever the body begins.
        let notifier = notifier.downgrade();
        let observer: Arc<dyn SnapshotObserver> = match account {
            Account::Shared(_) => Arc::new(Observer { progress, notifier }),
            Account::Fleecing(_) => Arc::new(BreakObserver {
                snapshot: Arc::downgrade(&snapshot),
                notifier,
            }),
        };
        snapshot.observe(observer);
    }
    driver.set_places(Places {
        filter,
        snapshot,
        account,
        reader,
        scratch,
        source_backend,
        target_backend,
        filter_hold,
    });
    driver.set_at_end(at_end);
    undo.disarm();
    Ok(PreparedBackup {
        graph: Rc::clone(graph),
        jobs: jobs.clone(),
        driver,
        key,
        decided: false,
    })
}

/// Fails if the job could not write the target as things are.
fn may_write(
    graph: &Graph,
    target: &Arc<Node>,
    user: &Arc<dyn BackendUser>,
) -> Result<(), GraphError> {
    let backend = graph.attach("", target, WRITE_TARGET, Some(Arc::clone(user)))?;
    graph.detach(&backend);
    Ok(())
}

/// Whether zeroes have to be there on the target: a copy of a part may go over others, and
/// an image with clusters may stand on one that is not open.
fn explicit_zeroes(spec: &BackupSpec) -> bool {
    let mut lowest = Arc::clone(&spec.target);
    while let Some(below) = lowest.backing() {
        lowest = below;
    }
    spec.sync != BackupSync::Full || lowest.limits().cluster_size.is_some()
}

fn settings(spec: &BackupSpec, plan: &Plan, only_top: bool) -> Settings {
    Settings {
        on_source_error: spec.on_source_error,
        on_target_error: spec.on_target_error,
        max_workers: usize::try_from(spec.perf.max_workers)
            .unwrap_or(MAX_WORKERS)
            .clamp(1, MAX_WORKERS),
        max_chunk: match u64::try_from(spec.perf.max_chunk) {
            Ok(0) | Err(_) => u64::MAX,
            Ok(most) => (most / plan.shown_cluster)
                .max(1)
                .saturating_mul(plan.shown_cluster),
        },
        only_guest: spec.sync == BackupSync::None,
        only_top,
        discard_source: spec.discard_source,
        // What a target without an end of its own (`none`) has, and what one shows of the source
        // below it, has to be right at any moment; and a scratch file is no target of the body.
        saves_behind: spec.sync != BackupSync::None
            && spec.scratch.is_none()
            && spec.target.backing().is_none(),
        explicit_zeroes: explicit_zeroes(spec),
    }
}

/// The filter, while it is seen whether the target can be written.
struct TargetUser {
    filter: Arc<str>,
    job_id: String,
}

impl BackendUser for TargetUser {
    fn kind(&self) -> AttachmentKind {
        AttachmentKind::Child {
            parent: Arc::clone(&self.filter),
            role: ChildRole::Target,
        }
    }

    fn describe(&self) -> String {
        format!("{} job '{}'", KIND.name, self.job_id)
    }
}

/// Tells the job what guests' requests have copied.
struct Observer {
    progress: Arc<Progress>,
    /// The driver keeps the snapshot, which keeps this.
    notifier: WeakJobNotifier,
}

impl SnapshotObserver for Observer {
    fn copied_by_guest(&self, len: u64, moved: u64) {
        self.progress.add_done(len);
        self.notifier.charge(moved);
    }

    fn changed(&self) {
        self.notifier.notify();
    }
}

/// Wakes the job when the snapshot is broken: what guests' requests save for a job that
/// fleeces is no work of its own.
struct BreakObserver {
    /// Weakly, since the snapshot has this.
    snapshot: Weak<Snapshot>,
    notifier: WeakJobNotifier,
}

impl SnapshotObserver for BreakObserver {
    fn copied_by_guest(&self, _: u64, _: u64) {}

    fn changed(&self) {
        let snapshot = self.snapshot.upgrade();
        if snapshot.is_some_and(|snapshot| snapshot.broken().is_some()) {
            self.notifier.notify();
        }
    }
}
