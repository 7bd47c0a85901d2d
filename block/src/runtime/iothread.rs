//! Threads that run a loop, and the way to them from others.

use std::future::Future;
use std::io;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;

use futures_channel::oneshot;
use futures_util::FutureExt;

use super::error::RuntimeError;
use super::event_loop::{EventLoop, Message, Shared};
use super::task::{panic_message, spawn_local};

/// An iothread. Dropping it is [`Iothread::stop`].
pub struct Iothread {
    handle: IothreadHandle,
    /// Asks the loop to end. `None` once used.
    stop: Option<oneshot::Sender<()>>,
    /// `None` once joined.
    thread: Option<JoinHandle<()>>,
}

/// How much a background thread stands back (`nice(2)`): it gets a quarter of a processor
/// that others want wholly, and all of one that nobody wants.
const BACKGROUND: i32 = 5;

/// Lets the calling thread stand back behind the others, for good. Not further than that
/// if it was started by one that does, and so does already.
pub(crate) fn stand_back() {
    // Linux knows a priority for each thread; this sets that of the calling one.
    if let Err(error) = rustix::process::setpriority_process(None, BACKGROUND) {
        tracing::debug!("Cannot lower a thread's priority: {error}");
    }
}

impl Iothread {
    /// Starts a thread with a loop. Linux shows the first 15 bytes of `name`.
    pub fn spawn(name: &str) -> Result<Self, RuntimeError> {
        Self::spawn_with(name, || {})
    }

    /// As [`spawn`](Self::spawn), for work that is not to take processors from those
    /// whom a guest waits for.
    pub fn spawn_background(name: &str) -> Result<Self, RuntimeError> {
        Self::spawn_with(name, stand_back)
    }

    fn spawn_with(name: &str, prepare: fn()) -> Result<Self, RuntimeError> {
        let (ready_sender, ready) = mpsc::channel();
        let (stop, stopped) = oneshot::channel();
        let owned_name = name.to_owned();
        let thread = std::thread::Builder::new()
            // The standard library panics at NUL.
            .name(name.replace('\0', " "))
            .spawn(move || {
                prepare();
                match EventLoop::new(&owned_name) {
                    Ok(event_loop) => {
                        let _ = ready_sender.send(Ok(event_loop.handle()));
                        // Ends when asked to, or when the Iothread is leaked away.
                        let _ = event_loop.block_on(stopped);
                    }
                    Err(error) => {
                        let _ = ready_sender.send(Err(error));
                    }
                }
            })
            .map_err(|source| RuntimeError::Thread {
                name: name.to_owned(),
                source,
            })?;
        let handle = ready.recv().map_err(|_| RuntimeError::Thread {
            name: name.to_owned(),
            source: io::Error::other("the thread ended before its loop ran"),
        })??;
        Ok(Self {
            handle,
            stop: Some(stop),
            thread: Some(thread),
        })
    }

    /// The way to this iothread from any thread.
    pub fn handle(&self) -> &IothreadHandle {
        &self.handle
    }

    /// Stops the loop: drops its tasks, waits until the kernel has finished every
    /// request they had made, and until the thread is gone. May take as long as
    /// a slow disk does. Later calls by handles fail with
    /// [`RuntimeError::Stopped`].
    ///
    /// On the iothread itself it cannot wait: then the loop ends after the task
    /// that called.
    pub fn stop(self) {
        drop(self);
    }
}

impl Drop for Iothread {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            // An error means that the loop has ended already.
            let _ = stop.send(());
        }
        let Some(thread) = self.thread.take() else {
            return;
        };
        if self.handle.is_current() {
            return;
        }
        if thread.join().is_err() {
            tracing::error!(iothread = self.handle.name(), "Iothread ended by a panic");
        }
    }
}

/// The way to a loop from any thread. Cheap to clone; does not keep the loop
/// running.
#[derive(Clone)]
pub struct IothreadHandle {
    shared: Arc<Shared>,
}

impl IothreadHandle {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// Name of the loop.
    pub fn name(&self) -> &str {
        self.shared.name()
    }

    /// Kernel thread id (as `query-iothreads` shows it).
    pub fn thread_id(&self) -> i32 {
        self.shared.thread_id()
    }

    /// Whether the calling thread is this one.
    pub fn is_current(&self) -> bool {
        self.shared.is_current()
    }

    /// Runs `f` over there, as a task; the future it makes may be `!Send`.
    ///
    /// Calls from one thread begin in their order. If the loop has ended, `f` is
    /// dropped. A panic is logged.
    pub fn spawn<F, Fut>(&self, f: F)
    where
        F: FnOnce() -> Fut + Send + 'static,
        Fut: Future<Output = ()> + 'static,
    {
        // The loop has ended if it comes back; see above.
        let _ = self.shared.send(Message::Spawn(Box::new(move || {
            spawn_local(async move { f().await }).detach();
        })));
    }

    /// Runs `f` over there, as a task, and waits for its result.
    ///
    /// May be called on any thread, also this one. Errors: `Stopped` if the loop
    /// ended before the task did, `Panicked`. Cancel: the task goes on.
    pub async fn call<F, Fut, R>(&self, f: F) -> Result<R, RuntimeError>
    where
        F: FnOnce() -> Fut + Send + 'static,
        Fut: Future<Output = R> + 'static,
        R: Send + 'static,
    {
        let (sender, receiver) = oneshot::channel();
        self.spawn(move || async move {
            // Nobody waits any more if the send fails.
            let _ = sender.send(
                AssertUnwindSafe(async move { f().await })
                    .catch_unwind()
                    .await,
            );
        });
        match receiver.await {
            Ok(Ok(result)) => Ok(result),
            Ok(Err(panic)) => Err(RuntimeError::Panicked {
                name: self.name().to_owned(),
                message: panic_message(panic.as_ref()).to_owned(),
            }),
            Err(oneshot::Canceled) => Err(RuntimeError::Stopped {
                name: self.name().to_owned(),
            }),
        }
    }
}

impl std::fmt::Debug for IothreadHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("IothreadHandle").field(&self.name()).finish()
    }
}
