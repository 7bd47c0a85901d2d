//! The QMP monitor: sockets, sessions, commands, events.
//!
//! Every monitor socket serves one client at a time, as QEMU's do; the next is
//! accepted when that one has left. Several sockets may be open; events go to
//! every client that has negotiated. What a command *does* is elsewhere (`block`,
//! `jobs`, the machine): here is its wire form, its checks and its place in the
//! conversation.
//!
//! # Threads and locks
//!
//! Everything runs on the main thread, as tasks of its event loop; there is no
//! lock. A command is a task of its own and waits without blocking, so that no
//! client waits for another's.
//!
//! # Hostile clients
//!
//! What a client can make the monitor hold is bounded: the message being read
//! ([`json::Limits`]), the messages that wait, and the bytes that it does not
//! read ([`output`]).

mod args;
mod commands;
mod connection;
mod error;
mod events;
mod json;
mod objects;
mod output;
mod request;
mod schema;
mod session;
mod socket;

#[cfg(test)]
mod tests;

use std::cell::{Cell, OnceCell, RefCell};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::rc::{Rc, Weak};
use std::time::Duration;

use block::runtime::{AsyncFd, Interest, sleep, spawn_local};
use block::{Exports, Graph};
use futures_util::FutureExt;
use jobs::{Jobs, MainJobs};
use slab::Slab;

use crate::vm_control::{VmControl, VmEvent};
use connection::Connection;
use output::Changed;
use session::Session;

pub(crate) use commands::{
    ExportArgs, NbdServerArgs, parse_blockdev, parse_export, parse_nbd_server,
};
use error::ErrorClass;
pub(crate) use error::QmpError;
pub(crate) use events::Event;
pub(crate) use objects::{ObjectOptions, Objects, object_help, parse_object};
pub(crate) use schema::{HelpTopic, help_list, option_help, parts_with_help};
pub(crate) use socket::{QmpAddress, QmpSocket, SocketError, TcpAddress};

/// What all monitor sockets of the process share. Main thread only.
pub(crate) struct Monitor {
    graph: Rc<Graph>,
    jobs: MainJobs,
    /// Held by commands that open and close nodes, so that they take effect one after
    /// another whichever client sent them. All others do not wait: they change the graph
    /// in one step. Nor does one that waits for a server.
    graph_commands: futures_util::lock::Mutex<()>,
    objects: Objects,
    exports: Rc<Exports>,
    machine: OnceCell<Rc<dyn VmControl>>,
    sessions: RefCell<Slab<Rc<Session>>>,
    quitting: Cell<bool>,
    /// A client said `quit` and has its reply.
    quit_answered: Cell<bool>,
    closing: Cell<bool>,
    /// Sockets that are listened on.
    sockets: Cell<usize>,
    /// `quit_answered`, `closing`, `sessions` or `sockets` changed.
    changed: Changed,
}

impl Monitor {
    /// A monitor without a socket. Becomes main's part of `jobs`: it delivers
    /// their events and runs their hooks.
    ///
    /// Panics: no event loop on this thread.
    pub(crate) fn new(graph: &Rc<Graph>, jobs: &Jobs) -> Rc<Self> {
        Rc::new_cyclic(|weak: &Weak<Self>| Self {
            graph: Rc::clone(graph),
            jobs: jobs.attach_main(Rc::clone(graph), {
                let monitor = weak.clone();
                move |event| {
                    if let Some(monitor) = monitor.upgrade() {
                        monitor.emit(&Event::of_job(&event));
                    }
                }
            }),
            graph_commands: futures_util::lock::Mutex::new(()),
            objects: Objects::new(graph),
            exports: Exports::new(graph, {
                let monitor = weak.clone();
                move |id| {
                    if let Some(monitor) = monitor.upgrade() {
                        monitor.emit(&Event::of_deleted_export(id));
                    }
                }
            }),
            machine: OnceCell::new(),
            sessions: RefCell::default(),
            quitting: Cell::new(false),
            quit_answered: Cell::new(false),
            closing: Cell::new(false),
            sockets: Cell::new(0),
            changed: Changed::default(),
        })
    }

    /// Gives the monitor a guest: the commands that need one are there from now
    /// on. A second machine is ignored.
    pub(crate) fn set_machine(&self, machine: Rc<dyn VmControl>) {
        if self.machine.set(machine).is_err() {
            tracing::error!("The monitor has a machine already");
        }
    }

    /// Main's part of the jobs.
    pub(crate) fn jobs(&self) -> &MainJobs {
        &self.jobs
    }

    /// The objects that users made.
    pub(crate) fn objects(&self) -> &Objects {
        &self.objects
    }

    /// The exports, and the NBD server.
    pub(crate) fn exports(&self) -> &Rc<Exports> {
        &self.exports
    }

    fn machine(&self) -> Option<Rc<dyn VmControl>> {
        self.machine.get().cloned()
    }

    /// Serves clients of `socket` until [`close`](Self::close), in a task.
    ///
    /// Errors: the loop cannot watch the socket. Panics: no event loop on this
    /// thread.
    pub(crate) fn listen(self: &Rc<Self>, socket: QmpSocket) -> io::Result<()> {
        let listener = AsyncFd::new(socket.listener()?)?;
        let monitor = Rc::clone(self);
        monitor.sockets.set(monitor.sockets.get() + 1);
        spawn_local(async move {
            monitor.accept_until_closing(&socket, &listener).await;
            // The socket's file goes here, when no client can be served.
            drop((listener, socket));
            monitor.sockets.set(monitor.sockets.get() - 1);
            monitor.changed.notify();
        })
        .detach();
        Ok(())
    }

    /// Serves one client that is there already, in a task, until it leaves or
    /// [`close`](Self::close). `name` is for the log.
    ///
    /// Errors: the loop cannot watch the connection. Panics: no event loop on this
    /// thread.
    pub(crate) fn serve_client(self: &Rc<Self>, name: &str, stream: UnixStream) -> io::Result<()> {
        let stream = AsyncFd::new(Connection::of(stream)?)?;
        spawn_local(Rc::clone(self).serve(Path::new(name).into(), stream)).detach();
        Ok(())
    }

    async fn accept_until_closing(
        self: &Rc<Self>,
        socket: &QmpSocket,
        listener: &AsyncFd<OwnedFd>,
    ) {
        let accept = self.accept_all(socket, listener);
        let closing = self.closing();
        futures_util::pin_mut!(accept, closing);
        futures_util::future::select(accept, closing).await;
    }

    /// One client after another.
    async fn accept_all(self: &Rc<Self>, socket: &QmpSocket, listener: &AsyncFd<OwnedFd>) {
        let path: Rc<Path> = socket.path().into();
        /// Pause after a failure that may last, such as too many open files.
        const RETRY: Duration = Duration::from_millis(100);
        loop {
            let accepted = listener.io(Interest::Readable, Connection::accept).await;
            let stream = accepted.and_then(AsyncFd::new);
            match stream {
                // A task of its own: it flushes its output when the monitor
                // closes and nobody waits here any more.
                Ok(stream) => {
                    spawn_local(Rc::clone(self).serve(Rc::clone(&path), stream)).await;
                }
                Err(error) => {
                    tracing::warn!(path = %path.display(), %error, "Cannot accept a QMP client");
                    sleep(RETRY).await;
                }
            }
        }
    }

    /// One client. Its panic harms no other.
    async fn serve(self: Rc<Self>, path: Rc<Path>, stream: AsyncFd<Connection>) {
        let path = path.display();
        let session = Rc::new(Session::default());
        let registered = Registered::new(&self, &session);
        tracing::debug!(%path, "QMP client connected");
        let served = AssertUnwindSafe(session.serve(&self, &stream)).catch_unwind();
        match served.await {
            Ok(Ok(())) => tracing::debug!(%path, "QMP client left"),
            // It left without reading everything: its own business.
            Ok(Err(error))
                if matches!(
                    error.kind(),
                    io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe
                ) =>
            {
                tracing::debug!(%path, "QMP client left");
            }
            Ok(Err(error)) => tracing::warn!(%path, %error, "QMP client cut off"),
            Err(_) => tracing::error!(%path, "QMP session panicked; client cut off"),
        }
        drop(registered);
    }

    /// Sends an event to every negotiated client.
    pub(crate) fn emit(&self, event: &Event) {
        let line = event.line();
        for (_, session) in self.sessions.borrow().iter() {
            session.send_event(&line);
        }
    }

    /// Sends an event of the machine.
    pub(crate) fn emit_machine(&self, event: VmEvent) {
        self.emit(&Event::now(event.name(), event.data()));
    }

    /// Delivers what jobs have announced, so that it precedes a reply.
    fn flush_job_events(&self) {
        self.jobs.flush_events();
    }

    /// The program is about to end: commands that come from now on are not carried
    /// out, on any socket. What `quit` does.
    pub(crate) fn request_quit(&self) {
        self.quitting.set(true);
    }

    fn is_quitting(&self) -> bool {
        self.quitting.get()
    }

    /// A reply was queued: if it was that of `quit`, the program may end.
    fn command_answered(&self) {
        if self.quitting.get() {
            self.quit_answered.set(true);
            self.changed.notify();
        }
    }

    /// Waits until a client has said `quit` and its reply is on the way. Cancel:
    /// nothing happens.
    pub(crate) async fn quit_requested(&self) {
        self.changed
            .until(|| self.quit_answered.get().then_some(()))
            .await;
    }

    async fn closing(&self) {
        self.changed
            .until(|| self.closing.get().then_some(()))
            .await;
    }

    /// Ends all sessions, each after it has been given everything announced so
    /// far, and removes the sockets. Bounded: a client that does not read is cut
    /// off.
    pub(crate) async fn close(&self) {
        self.closing.set(true);
        self.changed.notify();
        self.changed
            .until(|| {
                let ended = self.sessions.borrow().is_empty() && self.sockets.get() == 0;
                ended.then_some(())
            })
            .await;
    }
}

/// Keeps a session among those that get events.
struct Registered {
    monitor: Rc<Monitor>,
    key: usize,
}

impl Registered {
    fn new(monitor: &Rc<Monitor>, session: &Rc<Session>) -> Self {
        Self {
            key: monitor.sessions.borrow_mut().insert(Rc::clone(session)),
            monitor: Rc::clone(monitor),
        }
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.monitor.sessions.borrow_mut().remove(self.key);
        self.monitor.changed.notify();
    }
}
