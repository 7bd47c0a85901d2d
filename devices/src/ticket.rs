//! Waiting for something that ends on several iothreads, from any thread.

use std::fmt;
use std::future::poll_fn;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};
use std::time::Duration;

/// Done when every queue that had to stop has stopped, and none of its requests
/// is in the kernel any more.
///
/// A vCPU thread waits in slices with [`Self::wait_timeout`], so that it can heed
/// pause and exit requests meanwhile; a task on main awaits [`Self::done`].
/// Clones are the same ticket.
#[derive(Clone)]
pub struct ResetTicket(Arc<Shared>);

struct Shared {
    /// A leaf lock: nothing else is taken, and nobody woken, while it is held.
    state: Mutex<State>,
    done: Condvar,
}

struct State {
    /// Parts that are not done yet.
    remaining: usize,
    /// Tasks in [`ResetTicket::done`].
    wakers: Vec<Waker>,
}

/// One of the things that a ticket waits for: done when dropped.
pub(crate) struct TicketPart(Arc<Shared>);

impl ResetTicket {
    /// A ticket that waits for `parts` parts.
    pub(crate) fn new(parts: usize) -> (Self, Vec<TicketPart>) {
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                remaining: parts,
                wakers: Vec::new(),
            }),
            done: Condvar::new(),
        });
        let parts = (0..parts)
            .map(|_| TicketPart(Arc::clone(&shared)))
            .collect();
        (Self(shared), parts)
    }

    /// Whether it is done.
    pub fn is_done(&self) -> bool {
        self.0.lock().remaining == 0
    }

    /// Blocks until it is done, `timeout` at the longest. Says whether it is done.
    pub fn wait_timeout(&self, timeout: Duration) -> bool {
        let (state, _) = self
            .0
            .done
            .wait_timeout_while(self.0.lock(), timeout, |state| state.remaining > 0)
            .unwrap_or_else(PoisonError::into_inner);
        state.remaining == 0
    }

    /// Waits until it is done. Cancel: dropping the future only stops waiting.
    pub async fn done(&self) {
        poll_fn(|cx| {
            let mut state = self.0.lock();
            if state.remaining == 0 {
                return Poll::Ready(());
            }
            if !state.wakers.iter().any(|w| w.will_wake(cx.waker())) {
                state.wakers.push(cx.waker().clone());
            }
            Poll::Pending
        })
        .await;
    }
}

impl fmt::Debug for ResetTicket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResetTicket")
            .field("done", &self.is_done())
            .finish()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics under this lock, and its state is whole at any time.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for TicketPart {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.remaining -= 1;
        if state.remaining > 0 {
            return;
        }
        let wakers = std::mem::take(&mut state.wakers);
        drop(state);
        self.0.done.notify_all();
        for waker in wakers {
            waker.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    #[test]
    fn a_ticket_is_done_when_its_last_part_is_dropped() {
        let (ticket, mut parts) = ResetTicket::new(2);
        parts.pop();
        assert!(!ticket.wait_timeout(Duration::ZERO));
        let waiter = thread::spawn({
            let ticket = ticket.clone();
            move || ticket.wait_timeout(Duration::from_secs(60))
        });
        parts.pop();
        assert!(waiter.join().unwrap());
        assert!(ticket.is_done());
    }

    #[test]
    fn a_ticket_without_parts_is_done() {
        assert!(ResetTicket::new(0).0.is_done());
    }
}
