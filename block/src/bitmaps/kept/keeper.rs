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
use super::room::{Room, Rooms};
use super::store::{Storage, Version};

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
        /// Of each bitmap.
        chunks: Vec<u64>,
        reply: oneshot::Sender<Result<Room, KeepError>>,
    },
    Tidy,
    Resize {
        to: Option<u64>,
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
    /// Nothing is served any more, and the file is closed.
    ended: bool,
    /// What the file has by then.
    version: Option<Version>,
}

#[derive(Default)]
struct Shared {
    /// A leaf lock: held to put something in, or to take everything out.
    queue: Mutex<Queue>,
    changed: Condvar,
    /// For those who wait until it has ended.
    gone: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        self.lock().woken = true;
        self.changed.notify_one();
    }

    fn wait_for_end(&self) -> Option<Version> {
        let queue = self.lock();
        let ended = self.gone.wait_while(queue, |queue| !queue.ended);
        ended.unwrap_or_else(PoisonError::into_inner).version
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
    rooms: Arc<Rooms>,
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
        let rooms = Arc::clone(core.rooms());
        let asked = Arc::clone(&shared);
        rooms.keeper_is_there(Arc::new(move || asked.ask(Request::Tidy)));
        let (theirs, intent) = (Arc::clone(&shared), Arc::clone(intent));
        let name = format!("bitmaps {node}");
        let thread = std::thread::Builder::new()
            .name(name)
            .spawn(move || serve(core, &theirs, &intent))?;
        Ok(Self {
            shared,
            rooms,
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

    /// Makes room for bitmaps of so many `chunks` each; see [`Core::reserve`]. Until it is
    /// dropped they may be added, unless [`end`](Self::end) is called.
    ///
    /// Cancel: there is no room.
    pub(super) async fn reserve(&self, chunks: Vec<u64>) -> Result<Room, KeepError> {
        self.ask(|reply| Request::Reserve { chunks, reply }).await
    }

    /// Room for a moment, if somebody has some: nothing ends meanwhile.
    pub(crate) fn share_room(&self) -> Option<Room> {
        self.rooms.share()
    }

    /// Has it end if there is nothing to be kept.
    pub(super) fn tidy(&self) {
        self.shared.ask(Request::Tidy);
    }

    /// See [`Core::resize`].
    pub(super) async fn resize(&self, to: Option<u64>) -> Result<(), KeepError> {
        self.ask(|reply| Request::Resize { to, reply }).await
    }

    /// See [`Core::close`]. It goes on.
    pub(super) async fn close(&self) -> Result<(), KeepError> {
        self.ask(|reply| Request::Close { reply }).await
    }

    /// Closes the file and ends the thread. Gives what the file has then. Blocks, for each
    /// who calls it, until that is so.
    pub(super) fn end(&self) -> Option<Version> {
        self.rooms.close();
        self.shared.ask(Request::End);
        let version = self.shared.wait_for_end();
        let thread = self
            .thread
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(thread) = thread {
            // It catches its panics.
            let _ = thread.join();
        }
        version
    }

    /// Whether it serves nobody any more: nothing was left to be kept.
    pub(super) fn has_ended(&self) -> bool {
        self.shared.lock().ended
    }

    async fn ask<T>(
        &self,
        request: impl FnOnce(oneshot::Sender<Result<T, KeepError>>) -> Request,
    ) -> Result<T, KeepError> {
        let (reply, answer) = oneshot::channel();
        self.shared.ask(request(reply));
        // A request that is dropped was not served.
        answer.await.unwrap_or(Err(KeepError::Gone))
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.rooms.close();
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
    core.rooms().close();
    intent.keeper_is_gone();
    let version = core.version();
    drop(core);
    let mut queue = shared.lock();
    queue.ended = true;
    queue.version = Some(version);
    let unserved = std::mem::take(&mut queue.requests);
    drop(queue);
    shared.gone.notify_all();
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
        let mut requests = requests.into_iter();
        while let Some(request) = requests.next() {
            match request {
                Request::Commit(reply) => answer(reply, core.commit()),
                Request::Reserve { chunks, reply } => {
                    let reserved = core.reserve(&chunks);
                    let room = core.rooms().give(chunks).ok_or(KeepError::Gone);
                    // Nobody may be waiting: then it goes again.
                    let _ = reply.send(reserved.and(room));
                }
                Request::Tidy => answer(None, core.tidy()),
                Request::Resize { to, reply } => answer(Some(reply), core.resize(to)),
                Request::Close { reply } => answer(Some(reply), core.close()),
                Request::End => {
                    answer(None, core.close());
                    return;
                }
            }
            core.serve_writers();
            if core.has_ended() {
                // Who has asked since is told so when the file is closed.
                let mut queue = shared.lock();
                let later = std::mem::take(&mut queue.requests);
                queue.requests = requests.chain(later).collect();
                return;
            }
        }
        // After what was asked for before they asked.
        core.serve_writers();
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

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::super::store::{Disk, Store};
    use super::super::tests::{OfTestNode, Recorder};
    use super::super::{Use, tests::sized_node};
    use super::*;

    #[test]
    fn who_asks_when_nothing_is_kept_any_more_is_told_so_when_the_file_is_closed() {
        let disk = Disk {
            identity: "image".to_owned(),
            layer: "test".to_owned(),
            size: 1 << 20,
            resizing: false,
            usage: Use::Open,
        };
        let store = Store::create(Recorder::default(), &disk).unwrap();
        let intent = Arc::new(Intent::new(1 << 20));
        let core = Core::new(
            store,
            OfTestNode(sized_node(1 << 20)),
            Arc::clone(&intent),
            disk.identity.clone(),
            disk.layer.clone(),
        );
        let shared = Shared::default();
        let (commit, mut committed) = oneshot::channel();
        let (reserve, mut reserved) = oneshot::channel();
        shared.ask(Request::Commit(Some(commit)));
        shared.ask(Request::Reserve {
            chunks: vec![1],
            reply: reserve,
        });
        // There are no bitmaps: the commit takes the file away.
        serve(core, &shared, &intent);
        assert!(matches!(committed.try_recv(), Ok(Some(Ok(())))));
        // As one who asks a moment later, who then makes a new file.
        assert!(reserved.try_recv().is_err());
        assert!(shared.wait_for_end().is_some());
    }
}
