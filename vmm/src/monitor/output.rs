//! What a session has to say and its client has not read yet.
//!
//! The queue is bounded, and a client that stops reading harms nobody else:
//!
//! - its commands are no longer read once [`HIGH_WATER`] bytes wait, so that
//!   replies cannot pile up;
//! - events cannot be held back, and a client that missed some could no longer
//!   trust what it knows. So once [`MAX_BACKLOG`] bytes wait the connection is
//!   cut, which the client notices when it reads again.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::io::{self, Write};
use std::task::{Poll, Waker};

use block::runtime::{AsyncFd, Interest};

use super::connection::Connection;

/// Bytes waiting beyond which no further command is read.
pub(super) const HIGH_WATER: usize = 64 << 10;
/// Bytes waiting beyond which an event ends the session.
pub(super) const MAX_BACKLOG: usize = 1 << 20;

/// Wakes whoever waits for something on this thread to change.
#[derive(Debug, Default)]
pub(super) struct Changed(RefCell<Vec<Waker>>);

impl Changed {
    /// Something changed: every waiter looks again.
    pub(super) fn notify(&self) {
        let wakers = std::mem::take(&mut *self.0.borrow_mut());
        for waker in wakers {
            waker.wake();
        }
    }

    /// Waits until `look` finds something; it is asked again at each
    /// [`notify`](Self::notify). Cancel: nothing is left behind but a waker.
    pub(super) async fn until<R>(&self, mut look: impl FnMut() -> Option<R>) -> R {
        poll_fn(|cx| {
            if let Some(found) = look() {
                return Poll::Ready(found);
            }
            let mut wakers = self.0.borrow_mut();
            if !wakers.iter().any(|waker| waker.will_wake(cx.waker())) {
                wakers.push(cx.waker().clone());
            }
            Poll::Pending
        })
        .await
    }
}

/// The queue of one session. Main thread only.
#[derive(Debug, Default)]
pub(super) struct Output {
    bytes: RefCell<VecDeque<u8>>,
    /// Nothing is added any more; the writer ends when all is written.
    finished: Cell<bool>,
    /// The client let too many events pile up.
    overrun: Cell<bool>,
    changed: Changed,
}

impl Output {
    /// Bytes not written yet.
    pub(super) fn backlog(&self) -> usize {
        self.bytes.borrow().len()
    }

    /// Queues a reply.
    pub(super) fn push(&self, line: &[u8]) {
        if !self.finished.get() {
            self.bytes.borrow_mut().extend(line);
            self.changed.notify();
        }
    }

    /// Queues an event, or gives the session up.
    pub(super) fn push_event(&self, line: &[u8]) {
        if self.backlog() + line.len() > MAX_BACKLOG {
            self.overrun.set(true);
            self.changed.notify();
        } else {
            self.push(line);
        }
    }

    /// Lets the writer end once everything is written.
    pub(super) fn finish(&self) {
        self.finished.set(true);
        self.changed.notify();
    }

    /// Waits until the client has read enough for another command.
    pub(super) async fn has_room(&self) {
        self.changed
            .until(|| (self.backlog() < HIGH_WATER).then_some(()))
            .await;
    }

    /// Writes what is queued until [`finish`](Self::finish) was called and all
    /// is written.
    ///
    /// Errors: the client is gone, or let too much pile up (`TimedOut`).
    /// Cancel: bytes written are off the queue, all others on it.
    pub(super) async fn write_to(&self, stream: &AsyncFd<Connection>) -> io::Result<()> {
        loop {
            let more = self
                .changed
                .until(|| {
                    if self.overrun.get() {
                        Some(Err(overrun()))
                    } else if self.backlog() > 0 {
                        Some(Ok(true))
                    } else {
                        self.finished.get().then_some(Ok(false))
                    }
                })
                .await?;
            if !more {
                return Ok(());
            }
            self.write_some(stream).await?;
            self.changed.notify();
        }
    }

    /// One write, or an error if the queue overruns while it waits.
    async fn write_some(&self, stream: &AsyncFd<Connection>) -> io::Result<()> {
        let write = stream.io(Interest::Writable, |mut stream| {
            let mut bytes = self.bytes.borrow_mut();
            let written = stream.write(bytes.as_slices().0)?;
            if written == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            bytes.drain(..written);
            Ok(())
        });
        let overran = self.changed.until(|| self.overrun.get().then_some(()));
        futures_util::pin_mut!(write, overran);
        match futures_util::future::select(write, overran).await {
            futures_util::future::Either::Left((result, _)) => result,
            futures_util::future::Either::Right(_) => Err(overrun()),
        }
    }
}

fn overrun() -> io::Error {
    io::Error::new(
        io::ErrorKind::TimedOut,
        "It does not read the events it is sent",
    )
}
