//! Where a device, a job or an export is attached to the graph.
//!
//! Which node that is, and when it changes, is decided by `graph`.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::buffer::IoVec;
use crate::copy_source::CopySource;
use crate::driver::{ChildRole, Extent, WriteFlags, ZeroFlags};
use crate::error::{IoError, IoOp};
use crate::gate::{Gate, ShardIndex};
use crate::latency::GuestLatency;
use crate::node::Node;
use crate::permissions::{Perm, Permissions};
use crate::sync::ArcSwap;

/// How an attachment counts among the parents of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AttachmentKind {
    /// A device, an export or the target of a job: a user of the data.
    Root,
    /// A job's hold on a node that it copies from or puts a filter on.
    Job,
    /// What a node uses as a child in this role without an edge: that node is being
    /// opened, or is a job's filter, for which the job's requests go there.
    Child {
        /// Name of the node that uses it.
        parent: Arc<str>,
        /// As what.
        role: ChildRole,
    },
}

/// Hooks of whoever owns a [`Backend`], called around drained sections.
///
/// Called with no lock held, on main (`drained_end`: on whatever thread ends
/// the section). They must not block. Sections nest: each begin has its end.
pub trait BackendUser: Send + Sync {
    /// A drained section begins: start no new work.
    fn drained_begin(&self) {}

    /// Whether the user is still busy with work of its own, beside the requests
    /// that the backend counts. Asked again at least every 10 ms, and at once
    /// after [`Backend::notify_drain`].
    fn drained_poll(&self) -> bool {
        false
    }

    /// The section has ended.
    fn drained_end(&self) {}

    /// The size of what it is attached to may have changed: [`Backend::size`] tells.
    /// In a drained section, on main.
    fn resized(&self) {}

    /// Whether requests that come while the backend is drained wait in
    /// [`Backend::enter`] (the default). A user that is told of sections by these
    /// hooks, and whose requests serve requests of other backends (the target of
    /// a mirror in write-blocking mode), says `false`: its requests are only
    /// counted, and the section waits until it is idle. Asked once, at attach.
    fn holds_requests(&self) -> bool {
        true
    }

    /// The node whose requests cannot go on without this one's: a job's filter that
    /// saves into what this is attached to before a guest's write passes. A drained
    /// section of that holds those who reach the filter as well. Asked once, at attach.
    fn serves(&self) -> Option<Serves> {
        None
    }

    /// How the attachment counts. Asked once, at attach.
    fn kind(&self) -> AttachmentKind {
        AttachmentKind::Root
    }

    /// Why the node must not be deleted, or used by another job, meanwhile:
    /// `block device is in use by block job: mirror`. `None`: it may.
    fn blocker(&self) -> Option<String> {
        None
    }

    /// Who this is, for refusals: `virtio-blk device 'vda'`, `mirror job 'j0'`.
    fn describe(&self) -> String;
}

/// See [`BackendUser::serves`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Serves {
    /// Id of the node.
    pub node: u64,
    /// Longest that a request there waits for those of this one; `None` if there is no limit.
    /// A section that holds who reaches the node is given up after that, or earlier.
    pub patience: Option<Duration>,
}

/// An attachment point. Lives as long as someone holds it; is part of the graph
/// from `Graph::attach` to `Graph::detach`.
///
/// Any thread may submit requests through it.
pub struct Backend {
    id: u64,
    name: String,
    gate: Gate,
    /// The node that requests go to. Written on main, in a drained section;
    /// [`InFlight`] reads it once per request.
    root: ArcSwap<Node>,
    /// Bits of `need` and `share`, written on main.
    permissions: AtomicU64,
    kind: AttachmentKind,
    /// See [`BackendUser::serves`].
    serves: Option<Serves>,
    /// Who measures its requests. The flag says whether anybody does, and is a hint
    /// (Relaxed); both are written on main.
    meters: ArcSwap<Vec<Arc<GuestLatency>>>,
    is_measured: AtomicBool,
    user: Option<Arc<dyn BackendUser>>,
}

impl Backend {
    pub(crate) fn new(
        name: &str,
        node: Arc<Node>,
        permissions: Permissions,
        user: Option<Arc<dyn BackendUser>>,
    ) -> Arc<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let backend = Self {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            name: name.to_owned(),
            gate: Gate::new(user.as_ref().is_none_or(|u| u.holds_requests())),
            root: ArcSwap::new(node),
            permissions: AtomicU64::new(0),
            kind: user
                .as_ref()
                .map_or(AttachmentKind::Root, |user| user.kind()),
            serves: user.as_ref().and_then(|user| user.serves()),
            meters: ArcSwap::new(Arc::default()),
            is_measured: AtomicBool::new(false),
            user,
        };
        backend.store_permissions(permissions);
        Arc::new(backend)
    }

    /// The name that QMP knows it by: a device's id. Empty for exports and jobs.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A number that no other backend of this process has.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// The node that new requests go to at this moment.
    pub fn root(&self) -> Arc<Node> {
        self.root.load_full()
    }

    /// Size in bytes at this moment.
    pub fn size(&self) -> u64 {
        self.root.load().size()
    }

    /// What this backend may do, and lets others do.
    pub fn permissions(&self) -> Permissions {
        let bits = self.permissions.load(Ordering::Acquire);
        let perms = |shift: u32| {
            Perm::EACH
                .into_iter()
                .filter(|p| bits >> shift & 1 << p.bit() != 0)
                .fold(Perm::NONE, |all, p| all | p)
        };
        Permissions {
            need: perms(0),
            share: perms(32),
        }
    }

    pub(crate) fn store_permissions(&self, permissions: Permissions) {
        let bits = |set: Perm| set.iter().fold(0u64, |bits, p| bits | 1 << p.bit());
        self.permissions.store(
            bits(permissions.need) | bits(permissions.share) << 32,
            Ordering::Release,
        );
    }

    pub(crate) fn store_root(&self, node: Arc<Node>) {
        self.root.store(node);
    }

    pub(crate) fn gate(&self) -> &Gate {
        &self.gate
    }

    pub(crate) fn user(&self) -> Option<&Arc<dyn BackendUser>> {
        self.user.as_ref()
    }

    /// Id of the node whose requests its own serve.
    pub(crate) fn serves(&self) -> Option<Serves> {
        self.serves
    }

    /// How it counts among the parents of a node.
    pub fn kind(&self) -> &AttachmentKind {
        &self.kind
    }

    /// Who this is, for people: as QEMU says it in its permission errors.
    pub fn describe(&self) -> String {
        match (&self.kind, &self.user) {
            _ if !self.name.is_empty() => format!("block device '{}'", self.name),
            (AttachmentKind::Child { parent, .. }, _) => format!("node '{parent}'"),
            (AttachmentKind::Job, Some(user)) => user.describe(),
            _ => "an unnamed block device".to_owned(),
        }
    }

    /// Counts a request in. While the backend is drained, this waits; it never
    /// fails. The request goes to the root node of this moment.
    ///
    /// Take one per request, and none while holding another of the same backend:
    /// a section that begins in between would wait for the first, which waits
    /// for the second.
    ///
    /// Cancel: nothing is counted.
    pub async fn enter(self: &Arc<Self>) -> InFlight {
        let shard = self.gate.enter().await;
        self.in_flight_from(shard)
    }

    /// As [`enter`](Self::enter), but gives `None` instead of waiting.
    pub fn try_enter(self: &Arc<Self>) -> Option<InFlight> {
        self.gate
            .try_enter()
            .map(|shard| self.in_flight_from(shard))
    }

    fn in_flight_from(self: &Arc<Self>, shard: ShardIndex) -> InFlight {
        let is_measured = self.is_measured.load(Ordering::Relaxed);
        InFlight {
            node: self.root.load_full(),
            backend: Arc::clone(self),
            shard,
            began: is_measured.then(Instant::now),
        }
    }

    /// From now on `latency` is told how long each request takes that begins here, from
    /// when it is counted in: for jobs that are no filter on its way. Main only.
    pub fn measure(&self, latency: &Arc<GuestLatency>) {
        self.set_meters(|meters| meters.push(Arc::clone(latency)));
    }

    /// `latency` is told no more. Main only.
    pub fn measure_no_more(&self, latency: &Arc<GuestLatency>) {
        self.set_meters(|meters| meters.retain(|meter| !Arc::ptr_eq(meter, latency)));
    }

    fn set_meters(&self, change: impl FnOnce(&mut Vec<Arc<GuestLatency>>)) {
        let mut meters = self.meters.load_full().to_vec();
        change(&mut meters);
        self.is_measured
            .store(!meters.is_empty(), Ordering::Relaxed);
        self.meters.store(Arc::new(meters));
    }

    /// Whether anybody measures its requests.
    pub fn is_measured(&self) -> bool {
        self.is_measured.load(Ordering::Relaxed)
    }

    /// Requests in flight at this moment; those held by a section do not count.
    pub fn in_flight(&self) -> usize {
        self.gate.in_flight()
    }

    /// Whether a drained section holds requests back at this moment.
    pub fn is_drained(&self) -> bool {
        self.gate.is_closed()
    }

    /// Tells those who wait for this backend's user to become idle to ask it
    /// again. Any thread.
    pub fn notify_drain(&self) {
        self.gate.wake_drainers();
    }

    /// Enters, reads, leaves. See [`Node::read`].
    pub async fn read(self: &Arc<Self>, offset: u64, iov: IoVec) -> Result<(), IoError> {
        self.enter().await.read(offset, iov).await
    }

    /// Enters, writes, leaves. See [`InFlight::write`].
    pub async fn write(
        self: &Arc<Self>,
        offset: u64,
        iov: IoVec,
        flags: WriteFlags,
    ) -> Result<(), IoError> {
        self.enter().await.write(offset, iov, flags).await
    }

    /// Enters, writes zeroes, leaves. See [`InFlight::write_zeroes`].
    pub async fn write_zeroes(
        self: &Arc<Self>,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> Result<(), IoError> {
        self.enter().await.write_zeroes(offset, len, flags).await
    }

    /// Enters, discards, leaves. See [`InFlight::discard`].
    pub async fn discard(self: &Arc<Self>, offset: u64, len: u64) -> Result<(), IoError> {
        self.enter().await.discard(offset, len).await
    }

    /// Enters, flushes, leaves. See [`Node::flush`].
    pub async fn flush(self: &Arc<Self>) -> Result<(), IoError> {
        self.enter().await.flush().await
    }

    /// Enters, asks, leaves. See [`Node::block_status`].
    pub async fn block_status(self: &Arc<Self>, offset: u64, len: u64) -> Result<Extent, IoError> {
        self.enter().await.block_status(offset, len).await
    }
}

impl fmt::Debug for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Backend")
            .field("id", &self.id)
            .field("name", &self.name)
            .field("root", &self.root.load().name())
            .field("in_flight", &self.in_flight())
            .finish()
    }
}

/// One request in flight: counted until it is dropped. Derefs to the node that
/// the request goes to, which stays the same whatever happens to the graph.
///
/// Drop it on any thread, but not before the request has ended: a future that
/// is dropped midway leaves the kernel writing, and a section that does not
/// know of it would swap the graph under it. Whoever stops waiting for a request
/// leaves it to a task of its own.
#[derive(Debug)]
pub struct InFlight {
    backend: Arc<Backend>,
    node: Arc<Node>,
    shard: ShardIndex,
    /// When it was counted in, if somebody wants to know how long it takes.
    began: Option<Instant>,
}

impl InFlight {
    /// The node the request goes to.
    pub fn node(&self) -> &Arc<Node> {
        &self.node
    }

    /// The backend it came through.
    pub fn backend(&self) -> &Arc<Backend> {
        &self.backend
    }

    /// As [`Node::write`], if the backend has the right to.
    pub async fn write(&self, offset: u64, iov: IoVec, flags: WriteFlags) -> Result<(), IoError> {
        let len = iov.len() as u64;
        self.check_right(IoOp::Write, offset, len, flags.unchanged)?;
        self.node.write(offset, iov, flags).await
    }

    /// As [`Node::copy_from`], if the backend has the right to.
    pub async fn copy_from(&self, offset: u64, from: impl Into<CopySource>) -> bool {
        let from = from.into();
        let may = self.check_right(IoOp::Write, offset, from.len(), false);
        may.is_ok() && self.node.copy_from(offset, from).await
    }

    /// As [`Node::write_zeroes`], if the backend has the right to.
    pub async fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> Result<(), IoError> {
        self.check_right(IoOp::WriteZeroes, offset, len, false)?;
        self.node.write_zeroes(offset, len, flags).await
    }

    /// As [`Node::discard`], if the backend has the right to write.
    pub async fn discard(&self, offset: u64, len: u64) -> Result<(), IoError> {
        self.check_right(IoOp::Discard, offset, len, false)?;
        self.node.discard(offset, len).await
    }

    fn check_right(&self, op: IoOp, offset: u64, len: u64, unchanged: bool) -> Result<(), IoError> {
        let need = self.backend.permissions().need;
        if need.contains(Perm::WRITE) || (unchanged && need.contains(Perm::WRITE_UNCHANGED)) {
            return Ok(());
        }
        Err(self.node.error(op, offset, len, libc::EPERM))
    }
}

impl Deref for InFlight {
    type Target = Node;

    fn deref(&self) -> &Node {
        &self.node
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        if let Some(began) = self.began {
            for meter in self.backend.meters.load_full().iter() {
                meter.record(began.elapsed());
            }
        }
        self.backend.gate.leave(self.shard);
    }
}
