//! Exports: nodes of the graph that other programs can use. The registry of them,
//! and the one NBD server of the process. On main only.
//!
//! What an NBD client is answered is `crate::nbd::server`'s business, and happens
//! on iothreads. What QMP says is `vmm`'s.
//!
//! # Life of an export
//!
//! [`Exports::add`] attaches a backend to the node, with the rights of the export,
//! and lets clients find it. [`Exports::delete`] lets nobody find it any more and
//! cuts its clients off; when the last request has ended the backend is detached,
//! the export is gone, and its id free again.

mod error;
#[cfg(all(test, not(shuttle)))]
mod tests;

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::pin::pin;
use std::rc::Rc;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use futures_util::future::{Either, join, select};

use crate::backend::{Backend, BackendUser};
use crate::bitmaps::{BitmapHold, NamedBitmap};
use crate::graph::{Graph, GraphError};
use crate::nbd::protocol::MAX_STRING;
use crate::nbd::server::{NbdExport, NbdExportOptions, NbdServer};
use crate::node::Node;
use crate::permissions::{Perm, Permissions};
use crate::runtime::{self, IothreadHandle};
use crate::wait::LocalWaiters;

pub use crate::nbd::server::{ListenAddress, ListenError, NbdServerOptions};
pub use error::ExportError;

/// How long a client that may be leaving is waited for, by a deletion that it would
/// stand against.
const LEAVING: Duration = Duration::from_millis(500);
/// Time between two looks whether it has left.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// An export to be made.
pub struct ExportOptions {
    /// Names it; unique among exports of all types.
    pub id: String,
    /// The node that is exported.
    pub node_name: String,
    /// Whether clients may write. `None`: no.
    pub writable: bool,
    /// Every write is on stable storage when it is answered.
    pub writethrough: bool,
    /// Who serves it. `None`: threads of the server.
    pub iothread: Option<ExportIothread>,
    /// Its type, and what only that has.
    pub kind: ExportKind,
}

/// The iothread that serves an export.
pub struct ExportIothread {
    /// The thread.
    pub handle: IothreadHandle,
    /// Dropped, on main, when the export has gone: what keeps the thread from being
    /// stopped.
    pub hold: Box<dyn Any>,
}

/// A dirty bitmap that an export shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapRef {
    /// The node that has it; `None`: the exported one, or one below.
    pub node: Option<String>,
    /// Its name.
    pub name: String,
}

/// The type of an export.
#[derive(Clone, Debug)]
pub enum ExportKind {
    /// A disk of the NBD server.
    Nbd {
        /// The name that clients ask for; at most 4096 bytes. `None`: the node's
        /// name.
        name: Option<String>,
        /// Text for people, shown in lists; at most 4096 bytes.
        description: Option<String>,
        /// Offer the `qemu:allocation-depth` context.
        allocation_depth: bool,
        /// Offer the `qemu:dirty-bitmap:NAME` contexts of these.
        bitmaps: Vec<BitmapRef>,
    },
}

impl ExportKind {
    /// QMP's name of the type.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Nbd { .. } => "nbd",
        }
    }
}

/// How an export is deleted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeleteMode {
    /// Only if no client is connected.
    #[default]
    Safe,
    /// Clients are cut off. Their requests in flight end first.
    Hard,
}

/// What there is to know of an export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportInfo {
    /// Its id.
    pub id: String,
    /// QMP's name of its type.
    pub kind: &'static str,
    /// The node that requests go to at this moment; of an export that was made on a node
    /// under a job's filter, that node as long as the filter is there.
    pub node_name: String,
    /// It is being deleted, and waits for requests to end.
    pub shutting_down: bool,
}

struct Entry {
    id: String,
    kind: &'static str,
    backend: Arc<Backend>,
    /// The name of the node that it was made on, and the filter of a job above that node
    /// that it was attached to instead.
    made_below: Option<(String, Weak<Node>)>,
    nbd: Arc<NbdExport>,
    /// Those that it shows, until it is gone.
    bitmaps: RefCell<Vec<BitmapHold>>,
    /// Of the thread that serves it.
    _hold: Option<Box<dyn Any>>,
    shutting_down: Cell<bool>,
}

impl Entry {
    /// See [`ExportInfo::node_name`].
    fn node_name(&self) -> String {
        let root = self.backend.root();
        match &self.made_below {
            Some((name, filter)) if std::ptr::eq(filter.as_ptr(), Arc::as_ptr(&root)) => {
                name.clone()
            }
            _ => root.name().to_owned(),
        }
    }
}

/// What can be told of an NBD export before it is made. Gives the server.
fn check_nbd(
    server: Option<Rc<NbdServer>>,
    name: &str,
    description: Option<&str>,
) -> Result<Rc<NbdServer>, ExportError> {
    let server = server.ok_or(ExportError::ServerNotRunning)?;
    if name.len() > MAX_STRING {
        return Err(ExportError::NameTooLong {
            name: name.to_owned(),
        });
    }
    if let Some(description) = description.filter(|text| text.len() > MAX_STRING) {
        return Err(ExportError::DescriptionTooLong {
            description: description.to_owned(),
        });
    }
    if server.has_export(name) {
        return Err(ExportError::NameInUse {
            name: name.to_owned(),
        });
    }
    Ok(server)
}

/// All exports of the process, and its NBD server.
pub struct Exports {
    graph: Rc<Graph>,
    /// In the order they were made.
    entries: RefCell<Vec<Rc<Entry>>>,
    server: RefCell<Option<Rc<NbdServer>>>,
    /// A server is being started.
    starting: Cell<bool>,
    /// Clients wait for [`Exports::admit_clients`].
    holding_clients: Cell<bool>,
    on_deleted: Box<dyn Fn(&str)>,
    /// Those who wait for `entries` to become less.
    deleted: LocalWaiters,
}

impl Exports {
    /// No exports, and no server. `on_deleted` is called on main with the id of
    /// each export that has gone.
    pub fn new(graph: &Rc<Graph>, on_deleted: impl Fn(&str) + 'static) -> Rc<Self> {
        Rc::new(Self {
            graph: Rc::clone(graph),
            entries: RefCell::default(),
            server: RefCell::default(),
            starting: Cell::new(false),
            holding_clients: Cell::new(false),
            on_deleted: Box::new(on_deleted),
            deleted: LocalWaiters::default(),
        })
    }

    /// Lets clients that come to a server that is started from now on wait, until
    /// [`admit_clients`](Self::admit_clients).
    pub fn hold_clients(&self) {
        self.holding_clients.set(true);
    }

    /// Everything that clients may ask for is there.
    pub fn admit_clients(&self) {
        self.holding_clients.set(false);
        if let Some(server) = &*self.server.borrow() {
            server.admit_clients();
        }
    }

    /// Starts the NBD server. Cancel: it is not started.
    pub async fn start_nbd_server(&self, options: NbdServerOptions) -> Result<(), ExportError> {
        struct Starting<'a>(&'a Cell<bool>);
        impl Drop for Starting<'_> {
            fn drop(&mut self) {
                self.0.set(false);
            }
        }
        if self.server.borrow().is_some() || self.starting.replace(true) {
            return Err(ExportError::ServerRunning);
        }
        let _starting = Starting(&self.starting);
        let server = NbdServer::start(options, !self.holding_clients.get()).await?;
        self.server.replace(Some(Rc::new(server)));
        Ok(())
    }

    /// Whether the NBD server runs.
    pub fn nbd_server_running(&self) -> bool {
        self.server.borrow().is_some()
    }

    /// Stops the NBD server: nobody is accepted any more, all clients are cut off,
    /// also those that have not finished the handshake, and all NBD exports are
    /// deleted. Waits for these, but no longer than `limit`: gives the ids of those
    /// whose requests have not ended by then. They go when these do.
    ///
    /// Fails with [`ExportError::ServerNotRunning`]. Cancel: all is done but the
    /// waiting.
    pub async fn stop_nbd_server(
        self: &Rc<Self>,
        limit: Duration,
    ) -> Result<Vec<String>, ExportError> {
        let server = self.server.take().ok_or(ExportError::ServerNotRunning)?;
        server.stop();
        let going: Vec<Rc<Entry>> = self.entries.borrow().clone();
        for entry in going.iter().filter(|entry| !entry.shutting_down.get()) {
            self.finish_delete(entry, entry.nbd.connections() > 0);
        }
        // A thread that accepts and does not get to it is no reason to wait for ever.
        let closed = pin!(server.closed());
        let late = pin!(runtime::sleep(limit));
        let closed = select(closed, late);
        let gone = pin!(self.wait_deleted(&going, limit));
        Ok(join(gone, closed).await.0)
    }

    /// Whether there may be an export of that id and of that node, as far as it can be
    /// told from these: what [`add`](Self::add) looks at first. Gives the node.
    pub fn check(
        &self,
        id: &str,
        node_name: &str,
        writable: bool,
    ) -> Result<Arc<Node>, ExportError> {
        if !crate::graph::names::is_identifier(id) {
            return Err(ExportError::InvalidId);
        }
        if self.entries.borrow().iter().any(|entry| entry.id == id) {
            return Err(ExportError::IdInUse { id: id.to_owned() });
        }
        let node = self.graph.find_node(node_name)?;
        if writable && node.read_only() {
            return Err(ExportError::ReadOnlyNode);
        }
        Ok(node)
    }

    /// Makes an export. Fails without any change.
    pub fn add(&self, options: ExportOptions) -> Result<(), ExportError> {
        let ExportOptions {
            id,
            node_name,
            writable,
            writethrough,
            iothread,
            kind,
        } = options;
        let node = self.check(&id, &node_name, writable)?;
        let server = self.server.borrow().clone();
        let kind_name = kind.name();
        let ExportKind::Nbd {
            name,
            description,
            allocation_depth,
            bitmaps,
        } = kind;
        let name = name.unwrap_or(node_name);
        // As QEMU does it: who is in the way of the export's rights is told before what is
        // wrong with the export.
        let backend = self.attach(&id, &node, permissions(writable))?;
        let checked = check_nbd(server, &name, description.as_deref());
        let prepared = checked.and_then(|server| {
            let holds = self.hold_bitmaps(&node, bitmaps, writable)?;
            Ok((server, holds))
        });
        let (server, holds) = match prepared {
            Ok(prepared) => prepared,
            Err(error) => {
                self.graph.detach(&backend);
                return Err(error);
            }
        };
        let root = backend.root();
        let made_below =
            (!Arc::ptr_eq(&root, &node)).then(|| (node.name().to_owned(), Arc::downgrade(&root)));
        let bitmaps = holds.iter().map(|hold| Arc::clone(hold.bitmap()));
        let nbd = server.add_export(NbdExportOptions {
            name,
            description,
            allocation_depth,
            bitmaps: bitmaps.collect(),
            writable,
            writethrough,
            iothread: iothread.as_ref().map(|thread| thread.handle.clone()),
            backend: Arc::clone(&backend),
        });
        self.entries.borrow_mut().push(Rc::new(Entry {
            id,
            kind: kind_name,
            backend,
            made_below,
            nbd,
            bitmaps: RefCell::new(holds),
            _hold: iothread.map(|thread| thread.hold),
            shutting_down: Cell::new(false),
        }));
        Ok(())
    }

    /// Of two conflicts, that of what the export needs is told, as by QEMU: what it does
    /// not share is looked at second.
    fn attach(
        &self,
        id: &str,
        node: &Arc<Node>,
        permissions: Permissions,
    ) -> Result<Arc<Backend>, ExportError> {
        let user = || Arc::new(ExportUser { id: id.to_owned() });
        let attached = self.graph.attach("", node, permissions, Some(user()));
        if let Err(GraphError::Conflict { .. }) = attached {
            let sharing = Permissions {
                share: Perm::ALL,
                ..permissions
            };
            let first = self.graph.attach("", node, sharing, Some(user()))?;
            self.graph.detach(&first);
        }
        Ok(attached?)
    }

    /// Deletes an export. It is gone at once if no client is connected, else when
    /// the last request has ended.
    ///
    /// A safe deletion is refused only if clients stay: one that has just closed its
    /// connection counts until the connection's thread has seen that. Cancel: it may
    /// or may not have been deleted.
    pub async fn delete(self: &Rc<Self>, id: &str, mode: DeleteMode) -> Result<(), ExportError> {
        let deadline = Instant::now() + LEAVING;
        loop {
            match self.try_delete(id, mode) {
                Err(ExportError::InUse { .. }) if Instant::now() < deadline => {
                    runtime::sleep(LOOK_AGAIN).await;
                }
                result => return result,
            }
        }
    }

    fn try_delete(self: &Rc<Self>, id: &str, mode: DeleteMode) -> Result<(), ExportError> {
        let entry = self.find(id)?;
        if entry.shutting_down.get() {
            return Err(ExportError::ShuttingDown { id: id.to_owned() });
        }
        // It is this server's, since it is not shutting down.
        let server = self.server.borrow().clone();
        let server = server.ok_or(ExportError::ServerNotRunning)?;
        let is_used = entry.nbd.connections() > 0;
        if !server.remove_export(&entry.nbd, mode == DeleteMode::Safe) {
            return Err(ExportError::InUse { id: id.to_owned() });
        }
        self.finish_delete(&entry, is_used);
        Ok(())
    }

    /// All exports, the latest first (as QEMU lists them).
    pub fn list(&self) -> Vec<ExportInfo> {
        let entries = self.entries.borrow();
        entries
            .iter()
            .rev()
            .map(|entry| ExportInfo {
                id: entry.id.clone(),
                kind: entry.kind,
                node_name: entry.node_name(),
                shutting_down: entry.shutting_down.get(),
            })
            .collect()
    }

    /// Ends everything, for the end of the process: as
    /// [`stop_nbd_server`](Self::stop_nbd_server), if there is one. Waits no longer
    /// than `limit` for requests; gives the ids of exports that still have some.
    pub async fn close_all(self: &Rc<Self>, limit: Duration) -> Vec<String> {
        match self.stop_nbd_server(limit).await {
            Ok(left) => left,
            Err(_) => {
                let going: Vec<Rc<Entry>> = self.entries.borrow().clone();
                self.wait_deleted(&going, limit).await
            }
        }
    }

    /// Makes the bitmaps busy that are to be shown, each once.
    fn hold_bitmaps(
        &self,
        node: &Arc<Node>,
        wanted: Vec<BitmapRef>,
        writable: bool,
    ) -> Result<Vec<BitmapHold>, ExportError> {
        let mut found: Vec<Arc<NamedBitmap>> = Vec::new();
        for BitmapRef { node: at, name } in wanted {
            let bitmap = match at {
                Some(at) => self.graph.find_bitmap(&at, &name)?,
                None => {
                    let (owner, bitmap) = find_below(node, &name)
                        .ok_or_else(|| ExportError::BitmapNotFound { name: name.clone() })?;
                    if !writable && !owner.read_only() && bitmap.is_recording() {
                        return Err(ExportError::BitmapRecords { name });
                    }
                    bitmap
                }
            };
            bitmap.check_usable()?;
            if !found.iter().any(|known| Arc::ptr_eq(known, &bitmap)) {
                found.push(bitmap);
            }
        }
        let holds = found.iter().map(|bitmap| Ok(bitmap.hold()?));
        holds.collect()
    }

    fn find(&self, id: &str) -> Result<Rc<Entry>, ExportError> {
        let entries = self.entries.borrow();
        let entry = entries.iter().find(|entry| entry.id == id);
        entry
            .cloned()
            .ok_or_else(|| ExportError::NotFound { id: id.to_owned() })
    }

    /// The export was removed from its server, and its clients were cut off. The rest
    /// follows when they have gone: at once if there were none; if there were, after
    /// whoever deletes it has been told that it goes, however fast they are.
    fn finish_delete(self: &Rc<Self>, entry: &Rc<Entry>, is_used: bool) {
        entry.shutting_down.set(true);
        if !is_used && entry.nbd.connections() == 0 {
            self.end_delete(entry);
            return;
        }
        let (this, entry) = (Rc::clone(self), Rc::clone(entry));
        runtime::spawn_local(async move {
            entry.nbd.unused().await;
            this.end_delete(&entry);
        })
        .detach();
    }

    fn end_delete(&self, entry: &Rc<Entry>) {
        self.graph.detach(&entry.backend);
        entry.bitmaps.borrow_mut().clear();
        self.entries
            .borrow_mut()
            .retain(|other| !Rc::ptr_eq(other, entry));
        (self.on_deleted)(&entry.id);
        self.deleted.wake();
    }

    /// Waits until all of `going` are gone; gives the ids of those that are not.
    async fn wait_deleted(&self, going: &[Rc<Entry>], limit: Duration) -> Vec<String> {
        let left = || {
            let entries = self.entries.borrow();
            let left = |entry: &&Rc<Entry>| entries.iter().any(|other| Rc::ptr_eq(other, entry));
            let left: Vec<String> = going
                .iter()
                .filter(left)
                .map(|entry| entry.id.clone())
                .collect();
            left
        };
        let gone = pin!(self.deleted.until(|| left().is_empty().then_some(())));
        let limit = pin!(runtime::sleep(limit));
        match select(gone, limit).await {
            Either::Left(_) => Vec::new(),
            Either::Right(_) => left(),
        }
    }
}

/// The bitmap of that name that is next on the way down: of the node, or of what it shows.
fn find_below(node: &Arc<Node>, name: &str) -> Option<(Arc<Node>, Arc<NamedBitmap>)> {
    let mut next = Some(Arc::clone(node));
    while let Some(node) = next {
        if let Some(bitmap) = node.named_bitmap(name) {
            return Some((node, bitmap));
        }
        next = match node.driver().filtered() {
            Some(below) => Some(below),
            None => node.backing(),
        };
    }
    None
}

/// What an export does with its node, and lets others do: all but resizing, which
/// clients would not be told of.
fn permissions(writable: bool) -> Permissions {
    Permissions {
        need: if writable {
            Perm::CONSISTENT_READ | Perm::WRITE
        } else {
            Perm::CONSISTENT_READ
        },
        share: Perm::CONSISTENT_READ | Perm::WRITE | Perm::WRITE_UNCHANGED,
    }
}

/// The export as the graph knows it. It needs no hooks: connections count each
/// request in at the backend before they do anything with it, and read no further
/// while a drained section holds that one.
struct ExportUser {
    id: String,
}

impl BackendUser for ExportUser {
    fn describe(&self) -> String {
        format!("export '{}'", self.id)
    }
}
