//! One virtqueue on its iothread: from kicks to requests, from ended requests to
//! the used ring and the interrupt.
//!
//! A queue is served by one task for as long as it is active, and by a task for
//! each request that has entered the backend. All are on one thread, so nothing
//! here is locked; other threads talk to the queue by [`Control`] messages.
//!
//! # Waiting requests
//!
//! While the backend is drained, requests wait in `held`, before anything of
//! them is in flight: a reset drops them, a pause keeps them. Those that have
//! entered are always awaited, because the kernel may be writing guest memory
//! for them.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::io;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::task::{Context, Poll, Waker};
use std::time::Instant;

use block::InFlight;
use block::runtime::{AsyncFd, Interest, spawn_local, yield_now};
use futures_channel::mpsc::{TryRecvError, UnboundedReceiver};
use futures_util::StreamExt;
use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::Shared;
use super::execute::status_of;
use super::request::{ChainError, Command, Parser, Reply, Request, Status};
use super::stats::Kind;
use crate::ticket::TicketPart;
use crate::virtio::Interrupt;

/// What other threads want of a queue. Parts of tickets are dropped when it is
/// done.
pub(super) enum Control {
    /// Start no request; done when none is in flight.
    Pause(TicketPart),
    /// Go on, and look at the ring.
    Resume,
    /// Leave the rings alone for ever; done when no request is in flight.
    Stop(TicketPart),
}

/// What a queue is served with.
pub(super) struct QueueSetup {
    pub(super) index: u16,
    pub(super) queue: Queue,
    pub(super) shared: Arc<Shared>,
    pub(super) parser: Parser,
    pub(super) features: u64,
    pub(super) interrupt: Arc<Interrupt>,
    pub(super) kick: Arc<EventFd>,
    pub(super) control: UnboundedReceiver<Control>,
    pub(super) paused: bool,
}

#[derive(Debug, thiserror::Error)]
enum QueueError {
    #[error(transparent)]
    Chain(#[from] ChainError),
    #[error("The rings cannot be used")]
    Ring(#[from] virtio_queue::Error),
    #[error("More requests are available than the queue has entries")]
    TooManyRequests,
    #[error("Notifications cannot be received")]
    Kick(#[source] io::Error),
}

/// What the queue's task and its requests share. All on one thread.
struct Active {
    index: u16,
    shared: Arc<Shared>,
    parser: Parser,
    features: u64,
    interrupt: Arc<Interrupt>,
    queue: RefCell<Queue>,
    /// Requests that have entered the backend.
    in_flight: Cell<usize>,
    /// The rings must not be touched any more.
    stopped: Cell<bool>,
    /// The driver broke the rules: no new requests are taken.
    broken: Cell<bool>,
    /// Something is in the used ring that the driver may have to be told of.
    completed: Cell<bool>,
    /// The queue's task, while it waits.
    waker: Cell<Option<Waker>>,
}

/// The part of a request that outlives it: counted in flight until dropped.
struct Outstanding {
    active: Rc<Active>,
    reply: Reply,
    /// As [`Command::accounting`].
    accounting: Option<(Kind, u64)>,
    start: Instant,
    answered: bool,
}

/// Requests that have been taken from the ring, and are not in flight.
#[derive(Default)]
struct Held {
    requests: VecDeque<(Request, Instant)>,
    /// Waits for the backend on behalf of the first one.
    gate: Option<Pin<Box<dyn Future<Output = InFlight>>>>,
}

enum Event {
    Control(Option<Control>),
    Entered(InFlight),
    Completed,
    Kick,
}

/// Serves a queue until it is stopped, and then until its last request has
/// ended. Dropping the future (the end of the iothread) leaves the rings as they
/// are.
pub(super) async fn serve(setup: QueueSetup) {
    let QueueSetup { kick, control, .. } = setup;
    let active = Rc::new(Active {
        index: setup.index,
        shared: setup.shared,
        parser: setup.parser,
        features: setup.features,
        interrupt: setup.interrupt,
        queue: RefCell::new(setup.queue),
        in_flight: Cell::new(0),
        stopped: Cell::new(false),
        broken: Cell::new(false),
        completed: Cell::new(false),
        waker: Cell::new(None),
    });
    let task = QueueTask {
        active: Rc::clone(&active),
        control,
        paused: setup.paused,
        held: Held::default(),
        idle: Vec::new(),
        notify_from: None,
        batch: Vec::new(),
    };
    match AsyncFd::new(kick) {
        Ok(kick) => task.run(kick).await,
        Err(error) => {
            active.fail(&QueueError::Kick(error));
            task.stop().await;
        }
    }
}

struct QueueTask {
    active: Rc<Active>,
    control: UnboundedReceiver<Control>,
    paused: bool,
    held: Held,
    /// Who waits for no request being in flight.
    idle: Vec<TicketPart>,
    /// The driver has been asked to notify of what it makes available from this
    /// index on; `None`: not to notify.
    notify_from: Option<u16>,
    /// Requests of one look at the ring; empty in between.
    batch: Vec<Request>,
}

impl QueueTask {
    async fn run(mut self, kick: AsyncFd<Arc<EventFd>>) {
        loop {
            loop {
                let message = match self.control.try_recv() {
                    Ok(message) => Some(message),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Closed) => None,
                };
                if self.obey(message) {
                    drop(kick);
                    return self.stop().await;
                }
            }
            self.active.interrupt_if_wanted();
            self.release_idle();
            if self.take_requests() {
                // Submits what was taken before more is looked for; meanwhile
                // the driver need not notify.
                yield_now().await;
                continue;
            }
            match self.next_event(&kick).await {
                Event::Control(message) => {
                    if self.obey(message) {
                        drop(kick);
                        return self.stop().await;
                    }
                }
                Event::Entered(pass) => self.start_held(pass),
                Event::Completed | Event::Kick => {}
            }
        }
    }

    /// Acts on a message; returns whether the queue is to stop. `None`: the
    /// device has gone.
    fn obey(&mut self, message: Option<Control>) -> bool {
        match message {
            Some(Control::Pause(part)) => {
                self.paused = true;
                self.held.gate = None;
                self.idle.push(part);
                false
            }
            Some(Control::Resume) => {
                self.paused = false;
                // Whoever waited for the pause has been overtaken.
                self.idle.clear();
                self.held.wait(&self.active);
                false
            }
            Some(Control::Stop(part)) => {
                self.idle.push(part);
                true
            }
            None => true,
        }
    }

    fn release_idle(&mut self) {
        if self.active.in_flight.get() == 0 {
            self.idle.clear();
        }
    }

    /// Takes what is available and starts it. Returns whether to look again soon;
    /// if not, the driver has been asked to notify.
    fn take_requests(&mut self) -> bool {
        if self.paused || self.active.broken.get() {
            return false;
        }
        match self.try_take_requests() {
            Ok(again) => again,
            Err(error) => {
                self.active.fail(&error);
                false
            }
        }
    }

    fn try_take_requests(&mut self) -> Result<bool, QueueError> {
        let active = Rc::clone(&self.active);
        let mut batch = std::mem::take(&mut self.batch);
        let taken = active.pop(self.held.requests.len(), &mut batch);
        let found = !batch.is_empty();
        if found {
            let now = Instant::now();
            for request in batch.drain(..) {
                self.start(request, now);
            }
        }
        self.batch = batch;
        taken?;
        if active.broken.get() {
            return Ok(false);
        }
        let mut queue = active.queue.borrow_mut();
        let mem = active.parser.mem();
        if found {
            if self.notify_from.take().is_some() {
                queue.disable_notification(mem)?;
            }
            return Ok(true);
        }
        let next = Some(queue.next_avail());
        if self.notify_from == next {
            return Ok(false);
        }
        self.notify_from = next;
        // What came between the last look and this is not announced.
        Ok(queue.enable_notification(mem)?)
    }

    /// Starts a request, or lets it wait for the backend.
    fn start(&mut self, request: Request, now: Instant) {
        let active = &self.active;
        match &request.command {
            Command::Refuse(status) => active.answer(&request.reply, *status),
            Command::GetId { data } => {
                let mut id = [0; 20];
                let serial = active.shared.config.serial.as_bytes();
                let len = serial.len().min(id.len());
                id[..len].copy_from_slice(&serial[..len]);
                data.copy_from(0, &id[..data.len()]);
                active.answer(&request.reply, Status::Ok);
            }
            _ => {
                // First come, first served.
                let pass = if self.held.requests.is_empty() {
                    active.shared.config.backend.try_enter()
                } else {
                    None
                };
                match pass {
                    Some(pass) => active.submit(request, pass, now),
                    None => {
                        self.held.requests.push_back((request, now));
                        self.held.wait(active);
                    }
                }
            }
        }
    }

    /// Starts the requests that waited, the first of them with `pass`.
    fn start_held(&mut self, pass: InFlight) {
        self.held.gate = None;
        let mut pass = Some(pass);
        while let Some((request, start)) = self.held.requests.pop_front() {
            match pass
                .take()
                .or_else(|| self.active.shared.config.backend.try_enter())
            {
                Some(pass) => self.active.submit(request, pass, start),
                None => {
                    self.held.requests.push_front((request, start));
                    break;
                }
            }
        }
        self.held.wait(&self.active);
    }

    async fn next_event(&mut self, kick: &AsyncFd<Arc<EventFd>>) -> Event {
        let mut kicked = pin!(kick.io(Interest::Readable, |event| event.read()));
        poll_fn(|cx| {
            if let Poll::Ready(event) = self.poll_inner(cx) {
                return Poll::Ready(event);
            }
            // A broken queue's driver has nothing to say but a reset.
            if self.active.broken.get() {
                return Poll::Pending;
            }
            kicked.as_mut().poll(cx).map(|result| {
                if let Err(error) = result {
                    self.active.fail(&QueueError::Kick(error));
                }
                Event::Kick
            })
        })
        .await
    }

    /// Everything but the driver's notifications.
    fn poll_inner(&mut self, cx: &mut Context<'_>) -> Poll<Event> {
        if let Poll::Ready(message) = self.control.poll_next_unpin(cx) {
            return Poll::Ready(Event::Control(message));
        }
        if let Some(gate) = &mut self.held.gate
            && let Poll::Ready(pass) = gate.as_mut().poll(cx)
        {
            return Poll::Ready(Event::Entered(pass));
        }
        let idle = !self.idle.is_empty() && self.active.in_flight.get() == 0;
        if idle || self.active.completed.get() {
            return Poll::Ready(Event::Completed);
        }
        self.active.waker.set(Some(cx.waker().clone()));
        Poll::Pending
    }

    /// Drops what waits, and waits for what is in flight.
    async fn stop(mut self) {
        self.active.stopped.set(true);
        self.held = Held::default();
        let mut closed = false;
        poll_fn(|cx| {
            // A reset may be asked for while one queue is being stopped.
            while !closed {
                match self.control.poll_next_unpin(cx) {
                    Poll::Ready(Some(Control::Pause(part) | Control::Stop(part))) => {
                        self.idle.push(part);
                    }
                    Poll::Ready(Some(Control::Resume)) => {}
                    Poll::Ready(None) => closed = true,
                    Poll::Pending => break,
                }
            }
            if self.active.in_flight.get() == 0 {
                return Poll::Ready(());
            }
            self.active.waker.set(Some(cx.waker().clone()));
            Poll::Pending
        })
        .await;
    }
}

impl Held {
    /// Waits for the backend, if anybody has to.
    fn wait(&mut self, active: &Active) {
        if self.gate.is_none() && !self.requests.is_empty() {
            let backend = Arc::clone(&active.shared.config.backend);
            self.gate = Some(Box::pin(async move { backend.enter().await }));
        }
    }
}

impl Active {
    /// Takes all available chains. `held` is how many requests wait already.
    ///
    /// On an error, `batch` has the requests before the bad one.
    fn pop(&self, held: usize, batch: &mut Vec<Request>) -> Result<(), QueueError> {
        let mut queue = self.queue.borrow_mut();
        let outstanding = held + self.in_flight.get();
        let room = usize::from(queue.size()).saturating_sub(outstanding);
        let capacity = self.shared.space.capacity();
        for chain in queue.iter(self.parser.mem())? {
            // Each request has a descriptor at least until it is answered.
            if batch.len() == room {
                return Err(QueueError::TooManyRequests);
            }
            batch.push(self.parser.parse(chain, capacity)?);
        }
        Ok(())
    }

    fn submit(self: &Rc<Self>, request: Request, pass: InFlight, start: Instant) {
        let Request { command, reply } = request;
        self.in_flight.set(self.in_flight.get() + 1);
        let outstanding = Outstanding {
            active: Rc::clone(self),
            reply,
            accounting: command.accounting(),
            start,
            answered: false,
        };
        let fua = !self.shared.space.writes_may_be_cached(self.features);
        spawn_local(async move {
            let status = match command.execute(&pass, fua).await {
                Ok(()) => Status::Ok,
                Err(error) => {
                    outstanding.active.shared.log_failure(&error);
                    status_of(&error)
                }
            };
            // The answer first: a drained section ends up with nothing unsaid.
            outstanding.finish(status);
            drop(pass);
        })
        .detach();
    }

    /// Writes a request's status and puts it into the used ring.
    fn answer(&self, reply: &Reply, status: Status) {
        if self.stopped.get() {
            return;
        }
        let len = match status {
            Status::Ok => reply.len_if_ok,
            Status::IoErr | Status::Unsupported => reply.len_if_failed,
        };
        let mem = self.parser.mem();
        let done = mem
            .write_obj(status as u8, reply.status_gpa)
            .map_err(virtio_queue::Error::GuestMemory)
            .and_then(|()| self.queue.borrow_mut().add_used(mem, reply.head, len));
        match done {
            Ok(()) => self.completed.set(true),
            Err(error) => self.fail(&error.into()),
        }
    }

    /// One interrupt for all that has been answered since the last one, if the
    /// driver wants it.
    fn interrupt_if_wanted(&self) {
        if !self.completed.take() || self.stopped.get() {
            return;
        }
        match self.wants_interrupt() {
            Ok(true) => self.interrupt.signal_used_buffers(),
            Ok(false) => {}
            Err(error) => self.fail(&error.into()),
        }
    }

    fn wants_interrupt(&self) -> Result<bool, virtio_queue::Error> {
        let mut queue = self.queue.borrow_mut();
        let mem = self.parser.mem();
        if queue.event_idx_enabled() {
            return queue.needs_notification(mem);
        }
        // The used index first, then what the driver wants (virtio 1.2 §2.7.7.2).
        fence(Ordering::SeqCst);
        let flags: u16 = mem
            .load(GuestAddress(queue.avail_ring()), Ordering::Relaxed)
            .map_err(virtio_queue::Error::GuestMemory)?;
        Ok(u16::from_le(flags) & VRING_AVAIL_F_NO_INTERRUPT as u16 == 0)
    }

    /// Takes no more from this queue, and tells the driver that the device needs
    /// a reset. Other queues go on.
    fn fail(&self, error: &QueueError) {
        if self.broken.replace(true) || self.stopped.get() {
            return;
        }
        self.shared.log_broken(self.index, error);
        self.interrupt.fail();
    }

    fn wake(&self) {
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }
}

impl Outstanding {
    fn finish(mut self, status: Status) {
        self.end(status);
    }

    fn end(&mut self, status: Status) {
        self.answered = true;
        if let Some((kind, bytes)) = self.accounting {
            let stats = &self.active.shared.stats[usize::from(self.active.index)];
            stats.account(kind, bytes, self.start.elapsed(), status == Status::Ok);
        }
        self.active.answer(&self.reply, status);
    }
}

impl Drop for Outstanding {
    fn drop(&mut self) {
        // A bug below must not cost the guest its request. (The other way to get
        // here is the end of the iothread, when there is nobody left to tell.)
        if !self.answered && std::thread::panicking() {
            self.end(Status::IoErr);
        }
        self.active.in_flight.set(self.active.in_flight.get() - 1);
        self.active.wake();
    }
}
