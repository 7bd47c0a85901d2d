//! The life of a client: the first connection, its loss, others after it, the end.
//!
//! # Threads
//!
//! Each client has a thread of its own, on which the connection lives; users
//! submit from any thread and are woken on theirs.

use std::future::{pending, poll_fn};
use std::pin::pin;
use std::sync::{Arc, mpsc};
use std::task::Poll;
use std::time::{Duration, Instant};

use futures_util::future::{Either, select};

use super::connect::connect;
use super::error::NbdError;
use super::handshake::{Export, negotiate};
use super::queue::{CloseOnDrop, Command, LinkState, Queue, Status};
use super::socket::Socket;
use super::transmission::{Connection, End};
use crate::driver::CancelReach;
use crate::nbd::protocol::MAX_STRING;
use crate::options::NbdOptions;
use crate::runtime::{Iothread, sleep, sleep_until, spawn_local, unblock};
use crate::sync::{Mutex, lock};

/// First and longest pause between two attempts to reach the server.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LAST_PAUSE: Duration = Duration::from_secs(10);
/// Longest pause while requests wait for the connection.
const LAST_WAITING_PAUSE: Duration = Duration::from_secs(1);
/// A connection that lasts so long was of use. After one that does not, the next one
/// is not made at once.
const STABLE: Duration = Duration::from_secs(1);
/// How long closing waits for the server; more than `transmission` gives it.
const CLOSE_PATIENCE: Duration = Duration::from_secs(5);

/// A connection to an export that is made again when it is lost.
pub(crate) struct Client {
    export: Export,
    queue: Arc<Queue>,
    /// The connection's thread, until it is closed. Taken and put under the lock
    /// only.
    thread: Mutex<Option<Running>>,
}

struct Running {
    thread: Iothread,
    /// Says nothing; its sender goes when the connection's task has ended.
    ended: mpsc::Receiver<()>,
}

impl Client {
    /// Connects node `node` to the export that `options` name.
    ///
    /// Bounded by `open_timeout`, or 30 seconds if there is none: see
    /// [`NbdOptions`]. Thread: one with a loop, which does not block. Cancel: the
    /// connection is given up.
    pub(crate) async fn open(node: &str, options: &NbdOptions) -> Result<Self, NbdError> {
        let opened = Self::try_open(node, options).await;
        if let Err(error) = &opened {
            // Its text is QEMU's, which does not say whose error it is.
            tracing::warn!(
                node,
                server = %options.server,
                export = options.export,
                reason = error.reason(),
                "Cannot open the export: {error}"
            );
        }
        opened
    }

    async fn try_open(node: &str, options: &NbdOptions) -> Result<Self, NbdError> {
        if options.export.len() > MAX_STRING {
            return Err(NbdError::ExportNameTooLong);
        }
        let context = options.dirty_bitmap.as_deref().unwrap_or_default();
        if context.len() > MAX_STRING {
            return Err(NbdError::ContextTooLong);
        }
        let name = format!("nbd-{node}");
        let thread = unblock(move || Iothread::spawn(&name)).await?;
        let queue = Arc::new(Queue::new());
        let (ended_sender, ended) = mpsc::channel();
        let life = Life {
            node: node.to_owned(),
            options: options.clone(),
            queue: Arc::clone(&queue),
        };
        let export = thread
            .handle()
            .call(move || async move {
                let connection = life.first_connection().await?;
                let export = connection.export();
                spawn_local(async move {
                    let _ended = ended_sender;
                    life.run(connection).await;
                })
                .detach();
                Ok::<_, NbdError>(export)
            })
            .await??;
        Ok(Self {
            export,
            queue,
            thread: Mutex::new(Some(Running { thread, ended })),
        })
    }

    /// What was agreed on when it was opened.
    pub(crate) fn export(&self) -> &Export {
        &self.export
    }

    /// Carries out `command`; gives the extent that a block status asks for. Fails
    /// with an errno.
    ///
    /// Any thread with a loop. Cancel: the command goes on.
    pub(crate) async fn request(&self, command: Command) -> Result<Option<Status>, i32> {
        // Dropped by the end of the connection's thread.
        self.queue.submit(command).await.unwrap_or(Err(libc::EIO))
    }

    /// Fails the requests that wait for the server's return, and those to come until
    /// it has returned. What is in flight fails if the connection is lost; with
    /// [`CancelReach::Hanging`], a server that then says nothing for a second is
    /// left. Any thread.
    pub(crate) fn cancel(&self, reach: CancelReach) {
        self.queue.cancel(reach);
    }

    /// Takes leave of the server and ends the thread. Blocks, 5 s at most.
    pub(crate) fn close(&self) {
        let running = lock(&self.thread).take();
        self.queue.close();
        if let Some(Running { thread, ended }) = running {
            // Always an error: it has ended, or takes too long.
            let _ = ended.recv_timeout(CLOSE_PATIENCE);
            thread.stop();
        }
    }
}

impl Drop for Client {
    /// Ends the thread without taking leave.
    fn drop(&mut self) {
        self.queue.close();
    }
}

/// What the connection's thread knows.
struct Life {
    node: String,
    options: NbdOptions,
    queue: Arc<Queue>,
}

impl Life {
    /// The first connection: one attempt, or as many as `open_timeout` allows.
    async fn first_connection(&self) -> Result<Connection, NbdError> {
        let timeout = self.options.open_timeout;
        if timeout.is_zero() {
            return self.attempt(NbdOptions::ATTEMPT).await;
        }
        let start = Instant::now();
        let mut pause = FIRST_PAUSE;
        loop {
            let left = timeout.saturating_sub(start.elapsed());
            let error = match self.attempt(left.min(NbdOptions::ATTEMPT)).await {
                Ok(connection) => return Ok(connection),
                Err(error) => error,
            };
            let left = timeout.saturating_sub(start.elapsed());
            if left.is_zero() {
                return Err(error);
            }
            sleep(pause.min(left)).await;
            pause = (pause * 2).min(LAST_WAITING_PAUSE);
        }
    }

    /// Connects and agrees with the server, in `limit` at most.
    async fn attempt(&self, limit: Duration) -> Result<Connection, NbdError> {
        let options = &self.options;
        let work = async {
            let socket = Socket::new(connect(&options.server).await?);
            let context = options.dirty_bitmap.as_deref();
            let export = negotiate(&socket, &options.export, context).await?;
            Ok(Connection::new(socket, export))
        };
        match select(pin!(work), pin!(sleep(limit))).await {
            Either::Left((result, _)) => result,
            Either::Right(_) => Err(NbdError::Timeout {
                address: options.server.to_string(),
                export: options.export.clone(),
                waited: limit,
            }),
        }
    }

    async fn run(self, first: Connection) {
        let _close = CloseOnDrop(Arc::clone(&self.queue));
        let export = first.export();
        let mut connection = first;
        let mut pause = Duration::ZERO;
        loop {
            let began = Instant::now();
            let (error, unanswered) = match connection.run(&self.queue).await {
                End::Closed => return,
                End::Broken(error, unanswered) => (error, unanswered),
            };
            // A server that is there and hangs up each time is not run against.
            pause = match began.elapsed() < STABLE {
                true => (pause * 2).clamp(FIRST_PAUSE, LAST_WAITING_PAUSE),
                false => Duration::ZERO,
            };
            let delay = self.options.reconnect_delay;
            tracing::warn!(
                node = self.node,
                server = %self.options.server,
                export = self.options.export,
                unanswered = unanswered.len(),
                reconnect_delay = delay.as_secs(),
                "Lost the connection to the NBD server: {error}"
            );
            self.queue.lost(unanswered, delay);
            let patience = Instant::now().checked_add(delay);
            connection = match self.reconnect(&export, pause, patience).await {
                Some(connection) => connection,
                None => return,
            };
            tracing::info!(
                node = self.node,
                server = %self.options.server,
                "Connected to the NBD server again"
            );
            self.queue.connected();
        }
    }

    /// Tries to reach the server until it is there, after `pause` and with growing
    /// pauses; `None`: the node is closed. Requests wait until `patience`.
    async fn reconnect(
        &self,
        export: &Export,
        pause: Duration,
        patience: Option<Instant>,
    ) -> Option<Connection> {
        let attempts = pin!(async {
            sleep(pause).await;
            self.attempts(export).await
        });
        let give_up = pin!(async {
            match patience {
                Some(at) => sleep_until(at).await,
                None => pending().await,
            }
            self.queue.give_up();
            pending::<()>().await;
        });
        let closed = poll_fn(|cx| {
            self.queue.register(cx.waker());
            match self.queue.state() {
                LinkState::Closed => Poll::Ready(()),
                _ => Poll::Pending,
            }
        });
        let ended = select(give_up, closed);
        match select(attempts, ended).await {
            Either::Left((connection, _)) => Some(connection),
            Either::Right(_) => None,
        }
    }

    async fn attempts(&self, export: &Export) -> Connection {
        let mut pause = FIRST_PAUSE;
        let mut told = String::new();
        loop {
            let error = match self.attempt(NbdOptions::ATTEMPT).await {
                Ok(connection) => match export.check_still_there(&connection.export()) {
                    Ok(()) => return connection,
                    Err(error) => error,
                },
                Err(error) => error,
            };
            // Each reason once.
            let text = error.to_string();
            if text != told {
                tracing::warn!(
                    node = self.node,
                    server = %self.options.server,
                    export = self.options.export,
                    "Cannot reach the NBD server again yet: {text}"
                );
                told = text;
            }
            if self.pause(pause).await {
                // Somebody wants the server: no reason to be slow about it.
                pause = FIRST_PAUSE;
            } else {
                pause = (pause * 2).min(LAST_PAUSE);
            }
        }
    }

    /// Waits for `pause`; shorter if requests wait or come meanwhile, which is then
    /// said.
    async fn pause(&self, pause: Duration) -> bool {
        sleep(FIRST_PAUSE.min(pause)).await;
        if self.queue.state() == LinkState::Waiting {
            sleep(pause.min(LAST_WAITING_PAUSE).saturating_sub(FIRST_PAUSE)).await;
            return false;
        }
        let wanted = poll_fn(|cx| {
            self.queue.register(cx.waker());
            match self.queue.take_wanted() {
                true => Poll::Ready(()),
                false => Poll::Pending,
            }
        });
        let rest = sleep(pause.saturating_sub(FIRST_PAUSE));
        matches!(select(wanted, pin!(rest)).await, Either::Left(_))
    }
}
