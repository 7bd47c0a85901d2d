//! The loop itself: tasks, ring, timers, epoll, in turns.
//!
//! What does not live here: the thread around it (`iothread`), what io_uring
//! requests look like (`crate::uring`).

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use async_task::Runnable;
use event_manager::{
    EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberId, SubscriberOps,
};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::async_fd::Fds;
use super::error::RuntimeError;
use super::iothread::IothreadHandle;
use super::task::Registry;
use super::timers::{Timers, millis_until};
use super::wake_queue::WakeQueue;
use crate::leaf;
use crate::uring::Ring;

/// Tasks that run in one turn at most, so that I/O gets its share.
const TASKS_PER_TURN: usize = 256;
/// Turns with work at hand between two looks at epoll.
const TURNS_PER_EPOLL: u32 = 16;

/// epoll tokens of the loop's own descriptors; those of `AsyncFd`s are smaller.
const TOKEN_WAKE: u32 = u32::MAX;
const TOKEN_RING: u32 = u32::MAX - 1;

thread_local! {
    /// The loop of this thread.
    static CURRENT: RefCell<Option<Rc<LoopCore>>> = const { RefCell::new(None) };
}

/// What other threads send to a loop.
pub(super) enum Message {
    /// A task was woken.
    Run(Runnable),
    /// Something is to be started.
    Spawn(Box<dyn FnOnce() + Send>),
    /// The future of `block_on` was woken.
    WakeRoot,
}

/// The part of a loop that all threads see.
pub(super) struct Shared {
    /// Set once.
    name: Arc<str>,
    /// Kernel thread id of the loop. Set once.
    thread_id: i32,
    /// Synchronises itself.
    queue: WakeQueue<Message>,
    /// Rings a sleeping loop.
    bell: EventFd,
}

impl Shared {
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn name_arc(&self) -> Arc<str> {
        Arc::clone(&self.name)
    }

    pub(super) fn thread_id(&self) -> i32 {
        self.thread_id
    }

    /// Whether the calling thread is the loop's.
    pub(super) fn is_current(&self) -> bool {
        self.with_local(|_| ()).is_some()
    }

    /// Calls `f` with the loop if it is this thread's.
    fn with_local<R>(&self, f: impl FnOnce(&LoopCore) -> R) -> Option<R> {
        CURRENT
            .try_with(|current| {
                let current = current.borrow();
                let core = current.as_ref()?;
                std::ptr::eq(Arc::as_ptr(&core.shared), self).then(|| f(core))
            })
            .ok()
            .flatten()
    }

    /// Makes a task of this loop run; from any thread.
    pub(super) fn schedule(&self, runnable: Runnable) {
        leaf::assert_none_held("a task was woken");
        let mut runnable = Some(runnable);
        self.with_local(|core| core.ready.borrow_mut().extend(runnable.take()));
        let Some(runnable) = runnable else { return };
        if let Err(Message::Run(runnable)) = self.send(Message::Run(runnable)) {
            // The loop ends only when no task is left, so this cannot happen;
            // and a local task must not be dropped on another thread.
            tracing::error!(iothread = &*self.name, "Task woken after its loop ended");
            std::mem::forget(runnable);
        }
    }

    /// Queues `message` and rings if need be. Gives it back if the loop ended.
    pub(super) fn send(&self, message: Message) -> Result<(), Message> {
        if self.queue.push(message)? {
            self.ring_bell();
        }
        Ok(())
    }

    fn ring_bell(&self) {
        // EAGAIN means that the counter is full, so the loop is rung already.
        if let Err(error) = self.bell.write(1)
            && error.kind() != io::ErrorKind::WouldBlock
        {
            tracing::error!(iothread = &*self.name, "Cannot wake the loop: {error}");
        }
    }
}

/// Wakes the future of `block_on`.
struct RootWaker {
    shared: Arc<Shared>,
    /// Whether the future is to be polled.
    woken: AtomicBool,
}

impl Wake for RootWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        leaf::assert_none_held("a task was woken");
        if !self.woken.swap(true, Ordering::AcqRel) && !self.shared.is_current() {
            // A closed queue means that block_on has returned.
            let _ = self.shared.send(Message::WakeRoot);
        }
    }
}

/// Collects what epoll reports. Acting on it comes after, when the event manager
/// is not borrowed any more.
struct Collector {
    seen: Rc<RefCell<Vec<(u32, EventSet)>>>,
}

impl MutEventSubscriber for Collector {
    fn process(&mut self, events: Events, _ops: &mut EventOps<'_>) {
        self.seen
            .borrow_mut()
            .push((events.data(), events.event_set()));
    }

    fn init(&mut self, _ops: &mut EventOps<'_>) {}
}

/// A loop, as its own thread sees it.
pub(crate) struct LoopCore {
    shared: Arc<Shared>,
    /// Tasks to run, in order.
    ready: RefCell<VecDeque<Runnable>>,
    pub(super) registry: Rc<Registry>,
    pub(super) timers: RefCell<Timers>,
    pub(super) fds: RefCell<Fds>,
    ring: Rc<Ring>,
    /// Borrowed while epoll waits, when no task runs, and briefly to add or
    /// remove a descriptor.
    manager: RefCell<EventManager<Collector>>,
    collector: SubscriberId,
    seen: Rc<RefCell<Vec<(u32, EventSet)>>>,
    /// Turns since the last look at epoll.
    turns: Cell<u32>,
    /// Looks at epoll; tests use it to see that an idle loop sleeps.
    polls: Cell<u64>,
    /// Whether a `block_on` is running.
    busy: Cell<bool>,
}

impl LoopCore {
    /// This thread's loop.
    ///
    /// # Panics
    ///
    /// If it has none.
    pub(super) fn current() -> Rc<Self> {
        Self::try_current().expect("this thread has no event loop (block::runtime)")
    }

    pub(super) fn try_current() -> Option<Rc<Self>> {
        CURRENT.with(|current| current.borrow().clone())
    }

    pub(super) fn shared(&self) -> Arc<Shared> {
        Arc::clone(&self.shared)
    }

    fn new(name: &str) -> Result<Rc<Self>, RuntimeError> {
        let setup = |source: io::Error| RuntimeError::Setup {
            name: name.to_owned(),
            source,
        };
        let ring = Ring::new().map_err(|source| RuntimeError::IoUring {
            name: name.to_owned(),
            source,
        })?;
        let bell = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(setup)?;
        let mut manager = EventManager::new().map_err(|e| setup(io_error(e)))?;
        let seen = Rc::new(RefCell::new(Vec::new()));
        let collector = manager.add_subscriber(Collector {
            seen: Rc::clone(&seen),
        });
        for (fd, token) in [
            (bell.as_raw_fd(), TOKEN_WAKE),
            (ring.as_raw_fd(), TOKEN_RING),
        ] {
            manager
                .event_ops(collector)
                .and_then(|mut ops| ops.add(Events::with_data_raw(fd, token, EventSet::IN)))
                .map_err(|e| setup(io_error(e)))?;
        }
        // SAFETY: gettid has no arguments and cannot fail.
        let thread_id = unsafe { libc::gettid() };
        Ok(Rc::new(Self {
            shared: Arc::new(Shared {
                name: name.into(),
                thread_id,
                queue: WakeQueue::new(),
                bell,
            }),
            ready: RefCell::default(),
            registry: Rc::default(),
            timers: RefCell::default(),
            fds: RefCell::default(),
            ring: Rc::new(ring),
            manager: RefCell::new(manager),
            collector,
            seen,
            turns: Cell::new(0),
            polls: Cell::new(0),
            busy: Cell::new(false),
        }))
    }

    /// Registers `fd` (edge-triggered) with epoll.
    pub(super) fn add_fd(&self, fd: RawFd, token: u32, events: EventSet) -> io::Result<()> {
        let mut manager = self.manager.borrow_mut();
        let mut ops = manager.event_ops(self.collector).map_err(io_error)?;
        ops.add(Events::with_data_raw(fd, token, events))
            .map_err(io_error)
    }

    /// Changes what is waited for.
    pub(super) fn modify_fd(&self, fd: RawFd, token: u32, events: EventSet) -> io::Result<()> {
        let mut manager = self.manager.borrow_mut();
        let ops = manager.event_ops(self.collector).map_err(io_error)?;
        ops.modify(Events::with_data_raw(fd, token, events))
            .map_err(io_error)
    }

    /// Takes `fd` out of epoll; it must still be open.
    pub(super) fn remove_fd(&self, fd: RawFd) {
        let mut manager = self.manager.borrow_mut();
        if let Ok(mut ops) = manager.event_ops(self.collector)
            && let Err(error) = ops.remove(Events::empty_raw(fd))
        {
            tracing::error!("Cannot take fd {fd} out of epoll: {}", io_error(error));
        }
    }

    /// Moves what other threads sent to where it belongs.
    fn take_messages(&self) {
        let mut messages = Vec::new();
        self.shared.queue.take(&mut messages);
        for message in messages {
            match message {
                Message::Run(runnable) => self.ready.borrow_mut().push_back(runnable),
                Message::Spawn(start) => start(),
                Message::WakeRoot => {}
            }
        }
    }

    /// Runs the tasks that are ready now; those they wake come in the next turn.
    fn run_tasks(&self) {
        let count = self.ready.borrow().len().min(TASKS_PER_TURN);
        for _ in 0..count {
            let runnable = self.ready.borrow_mut().pop_front();
            let Some(runnable) = runnable else { break };
            leaf::assert_none_held("a task was run");
            runnable.run();
            leaf::assert_none_held("a task awaited");
        }
    }

    fn fire_timers(&self) {
        if self.timers.borrow().next().is_none() {
            return;
        }
        let now = Instant::now();
        loop {
            let due = self.timers.borrow_mut().pop_due(now);
            match due {
                Some(waker) => waker.wake(),
                None => break,
            }
        }
    }

    /// Waits for epoll, at most `timeout` milliseconds (-1: for ever), and wakes
    /// who waited for what it reports.
    fn poll_events(&self, timeout: i32) {
        self.turns.set(0);
        self.polls.set(self.polls.get() + 1);
        let polled = self.manager.borrow_mut().run_with_timeout(timeout);
        if let Err(error) = polled {
            // Only a broken epoll descriptor ends here. Not spinning on it is
            // all that can be done.
            tracing::error!(
                iothread = self.shared.name(),
                "epoll failed: {}",
                io_error(error)
            );
            std::thread::sleep(Duration::from_millis(10));
        }
        let mut seen = self.seen.take();
        for (token, events) in seen.drain(..) {
            match token {
                TOKEN_WAKE => {
                    // The count does not matter, and EAGAIN cannot.
                    let _ = self.shared.bell.read();
                }
                TOKEN_RING => {}
                token => {
                    let wakers = self.fds.borrow_mut().ready(token, events);
                    wakers.into_iter().for_each(Waker::wake);
                }
            }
        }
        // Keeps the allocation.
        self.seen.replace(seen);
    }

    /// One turn after the tasks: submits, harvests, fires timers, and waits if
    /// there is nothing to do.
    fn turn(&self, root: Option<&RootWaker>) {
        self.take_messages();
        self.run_tasks();
        self.ring.submit();
        self.ring.harvest();
        self.fire_timers();
        let idle = || {
            self.ready.borrow().is_empty()
                && root.is_none_or(|root| !root.woken.load(Ordering::Acquire))
        };
        if !idle() {
            self.turns.set(self.turns.get() + 1);
            if self.turns.get() >= TURNS_PER_EPOLL {
                self.poll_events(0);
            }
        } else if self.shared.queue.prepare_sleep() {
            // A root woken from elsewhere sent a message, so it is awake or the
            // bell rings.
            let now = Instant::now();
            let timer = self.timers.borrow().next();
            let stalled = self.ring.retry_at();
            let timeout = match timer.into_iter().chain(stalled).min() {
                Some(at) => millis_until(at, now),
                None => -1,
            };
            self.poll_events(timeout);
            self.shared.queue.awake();
        }
        self.ring.harvest();
    }

    /// Drops all tasks and waits until the kernel has done with our memory.
    fn shut_down(&self) {
        // A task that another thread is just waking is in nobody's queue yet:
        // its message comes soon, so wait for it.
        loop {
            self.registry.wake_all();
            let mut messages = Vec::new();
            self.shared.queue.take(&mut messages);
            // Spawn messages are dropped unrun: callers see the loop as stopped.
            for message in messages {
                drop(message);
            }
            loop {
                let runnable = self.ready.borrow_mut().pop_front();
                let Some(runnable) = runnable else { break };
                // Drops the future.
                drop(runnable);
            }
            if self.registry.is_empty() {
                break;
            }
            if self.shared.queue.prepare_sleep() {
                self.poll_events(100);
                self.shared.queue.awake();
            }
        }
        self.ring.drain(self.shared.name());
        for message in self.shared.queue.close() {
            drop(message);
        }
    }
}

fn io_error(error: event_manager::Error) -> io::Error {
    match error {
        event_manager::Error::Epoll(errno) => io::Error::from_raw_os_error(errno.errno()),
        other => io::Error::other(format!("{other:?}")),
    }
}

/// An event loop on the calling thread.
///
/// Dropping it drops all its tasks, and waits until the kernel has finished
/// every request they had made.
pub struct EventLoop {
    core: Rc<LoopCore>,
}

impl EventLoop {
    /// Makes this thread's loop. `name` is for messages.
    pub fn new(name: &str) -> Result<Self, RuntimeError> {
        if LoopCore::try_current().is_some() {
            return Err(RuntimeError::AlreadyRunning {
                name: name.to_owned(),
            });
        }
        let core = LoopCore::new(name)?;
        CURRENT.with(|current| current.replace(Some(Rc::clone(&core))));
        Ok(Self { core })
    }

    /// The way to this loop from other threads.
    pub fn handle(&self) -> IothreadHandle {
        IothreadHandle::new(self.core.shared())
    }

    /// Runs the loop until `future` ends, and gives its result. Tasks that are
    /// left wait for the next `block_on`.
    ///
    /// # Panics
    ///
    /// If called from inside a task of this loop, or if `future` panics.
    pub fn block_on<F: Future>(&self, future: F) -> F::Output {
        struct Busy<'a>(&'a Cell<bool>);
        impl Drop for Busy<'_> {
            fn drop(&mut self) {
                self.0.set(false);
            }
        }
        assert!(
            !self.core.busy.replace(true),
            "EventLoop::block_on inside a task of the same loop"
        );
        let _busy = Busy(&self.core.busy);
        let root = Arc::new(RootWaker {
            shared: self.core.shared(),
            woken: AtomicBool::new(true),
        });
        let waker = Waker::from(Arc::clone(&root));
        let mut cx = Context::from_waker(&waker);
        let mut future = pin!(future);
        loop {
            leaf::assert_none_held("a task was run");
            if root.woken.swap(false, Ordering::AcqRel)
                && let Poll::Ready(output) = future.as_mut().poll(&mut cx)
            {
                return output;
            }
            leaf::assert_none_held("a task awaited");
            self.core.turn(Some(&root));
        }
    }

    /// How often the loop has looked at epoll.
    #[cfg(all(test, not(shuttle)))]
    pub(super) fn polls(&self) -> u64 {
        self.core.polls.get()
    }
}

impl Drop for EventLoop {
    fn drop(&mut self) {
        self.core.shut_down();
        CURRENT.with(|current| current.take());
    }
}

/// This thread's loop, if it has one.
pub fn current() -> Option<IothreadHandle> {
    LoopCore::try_current().map(|core| IothreadHandle::new(core.shared()))
}

/// This thread's ring.
///
/// # Panics
///
/// If the thread has no loop: drivers are called on loops only.
pub(crate) fn current_ring() -> Rc<Ring> {
    leaf::assert_none_held("I/O was begun");
    CURRENT.with(|current| {
        let current = current.borrow();
        let core = current
            .as_ref()
            .expect("block I/O on a thread without event loop (block::runtime)");
        Rc::clone(&core.ring)
    })
}
