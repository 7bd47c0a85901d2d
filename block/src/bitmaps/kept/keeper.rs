//! The thread that keeps the bitmaps of a node, and how it is asked.
//!
//! What it does is `core`'s.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use futures_channel::oneshot;

use super::core::{Core, KeepError, Source};
use super::intent::Intent;
use super::store::Storage;

/// How often it is looked which regions are not written any more. One that was not between
/// two looks is cooled.
const TICK: Duration = Duration::from_secs(15);
/// How often writers that are still under way are looked for: at first, and at last.
const POLL: (Duration, Duration) = (Duration::from_millis(2), Duration::from_secs(1));

type Reply = oneshot::Sender<Result<(), KeepError>>;

/// What the thread is asked for.
enum Request {
    Commit(Option<Reply>),
    Reserve {
        chunks: u64,
        reply: Reply,
    },
    Resize {
        begins: bool,
        reply: Reply,
    },
    Close {
        reply: Reply,
    },
    /// As `Close`, and it ends.
    End,
}

#[derive(Default)]
struct Queue {
    requests: Vec<Request>,
    /// A writer has asked.
    woken: bool,
    /// Nothing is served any more.
    ended: bool,
    /// What the file has by then.
    generation: u64,
}

#[derive(Default)]
struct Shared {
    /// A leaf lock: held to put something in, or to take everything out.
    queue: Mutex<Queue>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        self.lock().woken = true;
        self.changed.notify_one();
    }

    fn ask(&self, request: Request) {
        let mut queue = self.lock();
        if !queue.ended {
            queue.requests.push(request);
        }
        drop(queue);
        self.changed.notify_one();
    }
}

/// Keeps the bitmaps of a node in a side-car file, by a thread of its own. Dropped, the
/// thread closes the file and ends by itself.
pub(crate) struct Keeper {
    shared: Arc<Shared>,
    /// Taken by who waits for its end.
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl std::fmt::Debug for Keeper {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Keeper").finish_non_exhaustive()
    }
}

impl Keeper {
    /// Starts the thread.
    pub(super) fn start<S: Storage, B: Source>(
        node: &str,
        core: Core<S, B>,
        intent: &Arc<Intent>,
    ) -> std::io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let waker = Arc::clone(&shared);
        intent.keeper_is_there(Arc::new(move || waker.wake()));
        let (theirs, intent) = (Arc::clone(&shared), Arc::clone(intent));
        let name = format!("bitmaps {node}");
        let thread = std::thread::Builder::new()
            .name(name)
            .spawn(move || serve(core, &theirs, &intent))?;
        Ok(Self {
            shared,
            thread: Mutex::new(Some(thread)),
        })
    }

    /// Makes durable what the bitmaps are by now; see [`Core::commit`].
    ///
    /// Cancel: it is done all the same.
    pub(super) async fn commit(&self) -> Result<(), KeepError> {
        self.ask(|reply| Request::Commit(Some(reply))).await
    }

    /// As [`commit`](Self::commit), without waiting.
    pub(super) fn commit_soon(&self) {
        self.shared.ask(Request::Commit(None));
    }

    /// See [`Core::reserve`].
    pub(super) async fn reserve(&self, chunks: u64) -> Result<(), KeepError> {
        self.ask(|reply| Request::Reserve { chunks, reply }).await
    }

    /// See [`Core::resize`].
    pub(super) async fn resize(&self, begins: bool) -> Result<(), KeepError> {
        self.ask(|reply| Request::Resize { begins, reply }).await
    }

    /// See [`Core::close`]. It goes on.
    pub(super) async fn close(&self) -> Result<(), KeepError> {
        self.ask(|reply| Request::Close { reply }).await
    }

    /// Closes the file and ends the thread. Gives the generation of the file. Blocks.
    pub(super) fn end(&self) -> u64 {
        self.shared.ask(Request::End);
        let thread = self
            .thread
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(thread) = thread {
            // It catches its panics.
            let _ = thread.join();
        }
        self.shared.lock().generation
    }

    /// Whether it serves nobody any more: nothing was left to be kept.
    pub(super) fn has_ended(&self) -> bool {
        self.shared.lock().ended
    }

    async fn ask(&self, request: impl FnOnce(Reply) -> Request) -> Result<(), KeepError> {
        let (reply, answer) = oneshot::channel();
        self.shared.ask(request(reply));
        // A request that is dropped was not served.
        answer.await.unwrap_or(Err(KeepError::Gone))
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.shared.ask(Request::End);
    }
}

fn serve<S: Storage, B: Source>(mut core: Core<S, B>, shared: &Shared, intent: &Intent) {
    let served = catch_unwind(AssertUnwindSafe(|| run(&mut core, shared, intent)));
    if served.is_err() {
        tracing::error!("the thread that keeps bitmaps has panicked");
        // Else writes to regions that are not marked fail from now on.
        let _ = catch_unwind(AssertUnwindSafe(|| core.abandon()));
    }
    intent.keeper_is_gone();
    let mut queue = shared.lock();
    queue.ended = true;
    queue.generation = core.generation();
    let unserved = std::mem::take(&mut queue.requests);
    drop(queue);
    drop(unserved);
}

fn run<S: Storage, B: Source>(core: &mut Core<S, B>, shared: &Shared, intent: &Intent) {
    let mut next_tick = Instant::now() + TICK;
    let mut pause = POLL.0;
    let mut cooling = false;
    loop {
        let requests = {
            let mut queue = shared.lock();
            while queue.requests.is_empty() && !queue.woken {
                let now = Instant::now();
                let until = match (cooling, intent.any_warm()) {
                    (true, _) => now + pause,
                    (false, true) => next_tick,
                    (false, false) => {
                        queue = shared
                            .changed
                            .wait(queue)
                            .unwrap_or_else(PoisonError::into_inner);
                        continue;
                    }
                };
                if until <= now {
                    break;
                }
                (queue, _) = shared
                    .changed
                    .wait_timeout(queue, until - now)
                    .unwrap_or_else(PoisonError::into_inner);
                if cooling {
                    break;
                }
            }
            queue.woken = false;
            std::mem::take(&mut queue.requests)
        };
        for request in requests {
            match request {
                Request::Commit(reply) => answer(reply, core.commit()),
                Request::Reserve { chunks, reply } => answer(Some(reply), core.reserve(chunks)),
                Request::Resize { begins, reply } => answer(Some(reply), core.resize(begins)),
                Request::Close { reply } => answer(Some(reply), core.close()),
                Request::End => {
                    answer(None, core.close());
                    return;
                }
            }
            core.serve_writers();
        }
        // After what was asked for before they asked.
        core.serve_writers();
        if core.has_ended() {
            return;
        }
        if Instant::now() >= next_tick {
            cooling = core.tick();
            pause = POLL.0;
            next_tick = Instant::now() + TICK;
        }
        if cooling {
            cooling = core.cool();
            pause = (pause * 2).min(POLL.1);
        }
    }
}

fn answer(reply: Option<Reply>, result: Result<(), KeepError>) {
    match reply {
        Some(reply) => {
            // Nobody may be waiting.
            let _ = reply.send(result);
        }
        None => {
            if let Err(error) = result {
                tracing::error!(
                    error = &error as &dyn std::error::Error,
                    "bitmaps could not be made durable"
                );
            }
        }
    }
}
