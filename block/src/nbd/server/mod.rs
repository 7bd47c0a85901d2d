//! The NBD server: sockets that listen, connections, and what their clients are
//! answered.
//!
//! What does not live here: which exports there are and when they go
//! (`crate::export`), what is on the wire (`super::protocol`).
//!
//! - `listen`: addresses and listening sockets;
//! - `handshake`: until a client has chosen an export;
//! - `connection`: requests in, replies out, with bounds;
//! - `request`: what is done for a request; `reply`: how it is answered;
//! - `socket`, `buffers`, `sectors`, `export`: what these stand on.
//!
//! # Threads and locks
//!
//! Main starts and stops the server, and adds and removes exports. Connections are
//! spread over the server's iothreads; one that has chosen an export with an
//! iothread of its own moves there. Main and the iothreads meet in [`Shared`]: one
//! leaf lock, held for a few instructions.
//!
//! # Hostile clients
//!
//! A client has [`HANDSHAKE_LIMIT`] to choose an export. What it can make the server
//! hold is bounded, by `connection` and `handshake`; who sends what makes no sense
//! is cut off. Connections beyond the limit wait in the kernel.

mod buffers;
mod connection;
mod export;
mod handshake;
mod listen;
mod reply;
mod request;
mod sectors;
mod socket;

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::future::{Either, select, select_all};
use rustix::net::{SocketFlags, accept_with};

use crate::runtime::{
    AsyncFd, Interest, Iothread, IothreadHandle, RuntimeError, sleep, unblock, unblock_detached,
};
use crate::sync::{Mutex, lock};
use crate::wait::Waiters;
use connection::Connection;
use export::ExportUse;
use handshake::{Agreed, HandshakeEnd, negotiate};
use listen::{Listeners, SocketFile};
use socket::{Input, Socket, Stream};

pub(crate) use export::{NbdExport, NbdExportOptions};
pub use listen::{ListenAddress, ListenError};

/// Time that a client has to choose an export.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// Threads of the server at most; a host with fewer CPUs has fewer.
const MAX_THREADS: usize = 4;
/// Pause after a failure to accept that may last, such as too many open files.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// How the server is started.
#[derive(Debug)]
pub struct NbdServerOptions {
    /// Where it listens.
    pub address: ListenAddress,
    /// Clients at a time, those in the handshake included; 0 for no limit. With 1,
    /// exports do not offer several connections.
    pub max_connections: u32,
}

impl NbdServerOptions {
    /// Clients at a time unless something else is said.
    pub const DEFAULT_MAX_CONNECTIONS: u32 = 100;
}

/// A running server. Main only.
pub(crate) struct NbdServer {
    shared: Arc<Shared>,
    multi_conn: bool,
}

/// What main and the iothreads share. Goes when the server was stopped and the last
/// request of the last client has ended.
struct Shared {
    /// A leaf lock; nobody is woken under it.
    state: Mutex<State>,
    /// 0: no limit.
    max_clients: usize,
    /// Those who wait for a change of `state`.
    changed: Waiters,
    threads: Threads,
    /// Which thread gets the next client.
    next_thread: AtomicUsize,
}

#[derive(Default)]
struct State {
    /// What clients can find, in the order it was added.
    exports: Vec<Arc<NbdExport>>,
    /// Everyone who is connected.
    clients: HashMap<u64, Entry>,
    next_client: u64,
    /// Clients may come; never taken back.
    admitting: bool,
    /// The server was stopped; never taken back.
    stopping: bool,
    /// Nobody listens any more.
    closed: bool,
    /// The file of a unix socket.
    file: Option<SocketFile>,
}

struct Entry {
    line: Arc<Line>,
    /// The export that the client has chosen.
    chosen: Option<Arc<NbdExport>>,
}

/// A client's connection, as far as others may end it. Any thread.
struct Line {
    socket: Arc<Socket>,
    /// Never taken back.
    cut: AtomicBool,
    /// Those who wait for `cut`.
    changed: Waiters,
}

impl Line {
    /// Ends the connection, whatever its task waits for. Requests in flight go on
    /// to their end.
    fn cut(&self) {
        self.cut.store(true, Ordering::Release);
        self.socket.shut_down();
        self.changed.wake();
    }

    fn is_cut(&self) -> bool {
        self.cut.load(Ordering::Acquire)
    }

    /// Waits until the connection was cut. Cancel: nothing happens.
    async fn until_cut(&self) {
        self.changed.until(|| self.is_cut().then_some(())).await;
    }
}

/// One client, until the last of its requests has ended. Its place is free when
/// this is dropped.
struct Client {
    shared: Arc<Shared>,
    number: u64,
    line: Arc<Line>,
}

impl Drop for Client {
    fn drop(&mut self) {
        let entry = lock(&self.shared.state).clients.remove(&self.number);
        drop(entry);
        self.shared.changed.wake();
    }
}

/// The server's iothreads.
struct Threads(Vec<Iothread>);

impl Drop for Threads {
    fn drop(&mut self) {
        // Their end is waited for, and this may be one of them.
        let threads = std::mem::take(&mut self.0);
        unblock_detached(move || drop(threads));
    }
}

impl Threads {
    fn start() -> Result<Self, RuntimeError> {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = (0..cpus.min(MAX_THREADS))
            .map(|number| Iothread::spawn(&format!("nbd{number}")))
            .collect::<Result<_, _>>()?;
        Ok(Self(threads))
    }

    fn get(&self, number: usize) -> Option<&IothreadHandle> {
        let number = number.checked_rem(self.0.len())?;
        self.0.get(number).map(Iothread::handle)
    }
}

impl NbdServer {
    /// Listens, and serves whoever comes: at once, or, if it is not `admitting`, from
    /// [`admit_clients`](Self::admit_clients) on. Cancel: nothing is left.
    pub(crate) async fn start(
        options: NbdServerOptions,
        admitting: bool,
    ) -> Result<Self, ListenError> {
        let NbdServerOptions {
            address,
            max_connections,
        } = options;
        let (listeners, threads) = unblock(move || {
            let listeners = listen::listen(address)?;
            let threads = Threads::start()?;
            Ok::<_, ListenError>((listeners, threads))
        })
        .await?;
        let Listeners { sockets, file } = listeners;
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                file,
                admitting,
                ..State::default()
            }),
            max_clients: max_connections as usize,
            changed: Waiters::default(),
            threads,
            next_thread: AtomicUsize::new(0),
        });
        if let Some(thread) = shared.threads.get(0) {
            let shared = Arc::clone(&shared);
            thread.spawn(move || accept_until_stopped(shared, sockets));
        }
        Ok(Self {
            shared,
            multi_conn: max_connections != 1,
        })
    }

    /// Serves those who have come, and who come from now on.
    pub(crate) fn admit_clients(&self) {
        lock(&self.shared.state).admitting = true;
        self.shared.changed.wake();
    }

    /// Accepts nobody any more, lets nobody find an export, and cuts all clients
    /// off. Requests in flight go on to their end.
    pub(crate) fn stop(&self) {
        let (file, exports, lines) = {
            let mut state = lock(&self.shared.state);
            state.stopping = true;
            let lines: Vec<Arc<Line>> = state
                .clients
                .values()
                .map(|entry| Arc::clone(&entry.line))
                .collect();
            (state.file.take(), std::mem::take(&mut state.exports), lines)
        };
        drop((file, exports));
        for line in lines {
            line.cut();
        }
        self.shared.changed.wake();
    }

    /// Waits, after [`stop`](Self::stop), until the address is free for others.
    /// Cancel: nothing happens.
    pub(crate) async fn closed(&self) {
        let closed = || lock(&self.shared.state).closed.then_some(());
        self.shared.changed.until(closed).await;
    }

    /// Whether clients can find an export of that name.
    pub(crate) fn has_export(&self, name: &str) -> bool {
        self.shared.find_export(name).is_some()
    }

    /// Lets clients find an export. The caller has looked for the name.
    pub(crate) fn add_export(&self, options: NbdExportOptions) -> Arc<NbdExport> {
        let export = Arc::new(NbdExport::new(options, self.multi_conn));
        let mut state = lock(&self.shared.state);
        state.exports.push(Arc::clone(&export));
        drop(state);
        export
    }

    /// Lets nobody find the export any more, and cuts off who has chosen it. With
    /// `unless_used`, does nothing but say `false` if somebody has.
    pub(crate) fn remove_export(&self, export: &Arc<NbdExport>, unless_used: bool) -> bool {
        let lines: Vec<Arc<Line>> = {
            let mut state = lock(&self.shared.state);
            if unless_used && export.connections() > 0 {
                return false;
            }
            state.exports.retain(|other| !Arc::ptr_eq(other, export));
            state
                .clients
                .values()
                .filter(|entry| {
                    let chosen = entry.chosen.as_ref();
                    chosen.is_some_and(|chosen| Arc::ptr_eq(chosen, export))
                })
                .map(|entry| Arc::clone(&entry.line))
                .collect()
        };
        for line in lines {
            line.cut();
        }
        true
    }
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Shared {
    fn find_export(&self, name: &str) -> Option<Arc<NbdExport>> {
        let state = lock(&self.state);
        let export = state.exports.iter().find(|export| export.name == name);
        export.cloned()
    }

    fn exports(&self) -> Vec<Arc<NbdExport>> {
        lock(&self.state).exports.clone()
    }

    /// The export of that name, for good: it counts the client from now on, and the
    /// client is cut off when it is removed.
    fn choose_export(&self, client: &Client, name: &str) -> Option<ExportUse> {
        let mut state = lock(&self.state);
        let export = state.exports.iter().find(|export| export.name == name)?;
        let export = Arc::clone(export);
        let entry = state.clients.get_mut(&client.number)?;
        let before = entry.chosen.replace(Arc::clone(&export));
        let export_use = ExportUse::new(&export);
        drop(state);
        drop(before);
        Some(export_use)
    }

    /// Takes a client in, unless the server was stopped.
    fn admit(self: &Arc<Self>, socket: OwnedFd) -> Option<Client> {
        let line = Arc::new(Line {
            socket: Arc::new(Socket::new(socket)),
            cut: AtomicBool::new(false),
            changed: Waiters::default(),
        });
        let mut state = lock(&self.state);
        if state.stopping {
            return None;
        }
        let number = state.next_client;
        state.next_client += 1;
        state.clients.insert(
            number,
            Entry {
                line: Arc::clone(&line),
                chosen: None,
            },
        );
        drop(state);
        Some(Client {
            shared: Arc::clone(self),
            number,
            line,
        })
    }

    /// Waits until one more client may come. Cancel: nothing happens.
    async fn room(&self) {
        let room = || {
            let clients = lock(&self.state).clients.len();
            (self.max_clients == 0 || clients < self.max_clients).then_some(())
        };
        self.changed.until(room).await;
    }

    async fn stopping(&self) {
        let stopping = || lock(&self.state).stopping.then_some(());
        self.changed.until(stopping).await;
    }
}

/// Accepts clients, on the server's first thread.
async fn accept_until_stopped(shared: Arc<Shared>, sockets: Vec<OwnedFd>) {
    let listeners: io::Result<Vec<_>> = sockets.into_iter().map(AsyncFd::new).collect();
    match listeners {
        Ok(listeners) => {
            let accept = pin!(accept_all(&shared, &listeners));
            let stopping = pin!(shared.stopping());
            select(accept, stopping).await;
        }
        Err(error) => tracing::error!(%error, "Cannot watch the NBD server's socket"),
    }
    lock(&shared.state).closed = true;
    shared.changed.wake();
}

async fn accept_all(shared: &Arc<Shared>, listeners: &[AsyncFd<OwnedFd>]) {
    let admitting = || lock(&shared.state).admitting.then_some(());
    shared.changed.until(admitting).await;
    loop {
        shared.room().await;
        let accepts = listeners.iter().map(|listener| {
            Box::pin(listener.io(Interest::Readable, |socket| {
                let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
                Ok(accept_with(socket, flags)?)
            }))
        });
        match select_all(accepts).await.0 {
            Ok(socket) => serve_somewhere(shared, socket),
            // It has gone before its turn came.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(error) => {
                tracing::warn!(%error, "Cannot accept an NBD client");
                sleep(ACCEPT_RETRY).await;
            }
        }
    }
}

/// Gives a new client to the next thread.
fn serve_somewhere(shared: &Arc<Shared>, socket: OwnedFd) {
    let Some(client) = shared.admit(socket) else {
        return;
    };
    let number = shared.next_thread.fetch_add(1, Ordering::Relaxed);
    if let Some(thread) = shared.threads.get(number) {
        thread.spawn(move || serve(client));
    }
}

/// One client, from its greeting on.
async fn serve(client: Client) {
    let mut input = Input::new();
    let agreed = match shake_hands(&client, &mut input).await {
        Ok(agreed) => agreed,
        Err(HandshakeEnd::Left) => return,
        Err(end) => {
            tracing::info!(reason = %end, "NBD client cut off in the handshake");
            client.line.socket.shut_down();
            return;
        }
    };
    match agreed.export.iothread.clone() {
        Some(home) if !home.is_current() => {
            home.spawn(move || Connection::serve(client, agreed, input));
        }
        _ => Connection::serve(client, agreed, input).await,
    }
}

async fn shake_hands(client: &Client, input: &mut Input) -> Result<Agreed, HandshakeEnd> {
    // The loop's hold on the socket ends here: the next thread's may follow.
    let stream = Stream::new(Arc::clone(&client.line.socket))?;
    let negotiation = pin!(negotiate(client, &stream, input));
    let limit = pin!(sleep(HANDSHAKE_LIMIT));
    match select(negotiation, limit).await {
        Either::Left((end, _)) => end,
        Either::Right(_) => Err(HandshakeEnd::Unanswerable("it took too long")),
    }
}
