//! Readiness of file descriptors.

use std::future::poll_fn;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::rc::Rc;
use std::task::{Poll, Waker};

use event_manager::EventSet;
use slab::Slab;

use super::event_loop::LoopCore;

/// What an operation waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interest {
    /// Something can be read or accepted, or the peer has gone.
    Readable,
    /// Something can be written, or the peer has gone.
    Writable,
}

/// All descriptors of a loop.
#[derive(Default)]
pub(super) struct Fds {
    fds: Slab<FdState>,
}

struct FdState {
    /// What epoll has been told.
    registered: EventSet,
    waiters: Vec<(WaiterId, Interest, Waker)>,
    next_id: WaiterId,
}

/// Never used twice, so that a late clean-up hits nobody else's waker.
type WaiterId = u64;

impl Fds {
    /// Takes the wakers of those who wait for `events` of descriptor `token`.
    pub(super) fn ready(&mut self, token: u32, events: EventSet) -> Vec<Waker> {
        let Some(state) = self.fds.get_mut(token as usize) else {
            return Vec::new();
        };
        let broken = events.intersects(EventSet::ERROR | EventSet::HANG_UP);
        let readable = broken || events.intersects(EventSet::IN | EventSet::READ_HANG_UP);
        let writable = broken || events.contains(EventSet::OUT);
        state
            .waiters
            .extract_if(.., |(_, interest, _)| match interest {
                Interest::Readable => readable,
                Interest::Writable => writable,
            })
            .map(|(_, _, waker)| waker)
            .collect()
    }
}

/// A non-blocking descriptor whose readiness this thread's loop watches.
///
/// Stays on the thread that made it. The descriptor must be in non-blocking mode
/// and pollable, and must not be in another `AsyncFd` at the same time.
pub struct AsyncFd<T: AsRawFd> {
    // Before `inner`, since a descriptor must leave epoll before it is closed.
    registration: Registration,
    inner: T,
}

struct Registration {
    core: Rc<LoopCore>,
    fd: RawFd,
    token: u32,
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.core.remove_fd(self.fd);
        let state = self.core.fds.borrow_mut().fds.remove(self.token as usize);
        drop(state);
    }
}

/// Takes its waker back if the operation is dropped.
struct Waiter<'a> {
    registration: &'a Registration,
    id: Option<WaiterId>,
}

impl Waiter<'_> {
    fn set(&mut self, interest: Interest, waker: &Waker) {
        self.clear();
        let mut fds = self.registration.core.fds.borrow_mut();
        if let Some(state) = fds.fds.get_mut(self.registration.token as usize) {
            let id = state.next_id;
            state.next_id += 1;
            state.waiters.push((id, interest, waker.clone()));
            self.id = Some(id);
        }
    }

    fn clear(&mut self) {
        let Some(id) = self.id.take() else { return };
        let mut fds = self.registration.core.fds.borrow_mut();
        let state = fds.fds.get_mut(self.registration.token as usize);
        let waiter = state.and_then(|state| {
            let at = state.waiters.iter().position(|(other, ..)| *other == id)?;
            Some(state.waiters.swap_remove(at))
        });
        drop(fds);
        // Outside the borrow: a waker may own anything.
        drop(waiter);
    }
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        self.clear();
    }
}

impl<T: AsRawFd> AsyncFd<T> {
    /// Watches `inner`. Fails with `EPERM` if it cannot be polled (a regular
    /// file).
    ///
    /// # Panics
    ///
    /// If this thread has no loop.
    pub fn new(inner: T) -> io::Result<Self> {
        let core = LoopCore::current();
        let fd = inner.as_raw_fd();
        let registered = EventSet::IN | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        let key = core.fds.borrow_mut().fds.insert(FdState {
            registered,
            waiters: Vec::new(),
            next_id: 0,
        });
        let added = u32::try_from(key)
            .map_err(io::Error::other)
            .and_then(|token| core.add_fd(fd, token, registered).map(|()| token));
        match added {
            Ok(token) => Ok(Self {
                registration: Registration { core, fd, token },
                inner,
            }),
            Err(error) => {
                core.fds.borrow_mut().fds.remove(key);
                Err(error)
            }
        }
    }

    /// The descriptor's owner.
    pub fn get_ref(&self) -> &T {
        &self.inner
    }

    /// Tries `op`; as often as it says `WouldBlock`, waits for `interest` and
    /// tries again. `EINTR` is tried again at once.
    ///
    /// Several operations may wait at the same time. Cancel: what `op` has done
    /// is done, nothing more is.
    pub async fn io<R>(
        &self,
        interest: Interest,
        mut op: impl FnMut(&T) -> io::Result<R>,
    ) -> io::Result<R> {
        let mut waiter = Waiter {
            registration: &self.registration,
            id: None,
        };
        poll_fn(|cx| {
            loop {
                match op(&self.inner) {
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        // An edge between `op` and here waits in epoll, which
                        // only this thread reads, later.
                        if let Err(error) = self.registration.want(interest) {
                            return Poll::Ready(Err(error));
                        }
                        waiter.set(interest, cx.waker());
                        return Poll::Pending;
                    }
                    result => return Poll::Ready(result),
                }
            }
        })
        .await
    }
}

impl Registration {
    /// Tells epoll of `interest`. Writability is asked for only once somebody
    /// wants it: eventfds report it with each read.
    fn want(&self, interest: Interest) -> io::Result<()> {
        if interest == Interest::Readable {
            return Ok(());
        }
        let mut fds = self.core.fds.borrow_mut();
        let Some(state) = fds.fds.get_mut(self.token as usize) else {
            return Ok(());
        };
        if state.registered.contains(EventSet::OUT) {
            return Ok(());
        }
        let events = state.registered | EventSet::OUT;
        self.core.modify_fd(self.fd, self.token, events)?;
        state.registered = events;
        Ok(())
    }
}
