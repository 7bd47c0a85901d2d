//! Threads that do I/O: one `event-manager` loop, one io_uring and one
//! single-threaded executor each. The main thread has the same loop.
//!
//! What does not live here: what the io_uring requests say (the file driver,
//! by `crate::uring`), and any knowledge of nodes.
//!
//! # A turn of the loop
//!
//! Ready tasks run (a bounded number); one `io_uring_enter` submits what they
//! queued; completions are harvested from shared memory; due timers fire; then
//! epoll waits, if nothing is ready. An idle loop sleeps in epoll until a
//! descriptor, the ring, a timer or another thread has something for it.
//!
//! # Threads and locks
//!
//! Tasks are not `Send` and stay on their thread. Wakers are: one used on its own
//! loop costs no system call and no lock; one used elsewhere queues the task
//! under a leaf lock held for a few instructions, and rings an eventfd only if
//! the loop sleeps.

mod async_fd;
mod error;
mod event_loop;
mod iothread;
mod task;
mod timers;
mod wake_queue;

pub use async_fd::{AsyncFd, Interest};
pub use error::RuntimeError;
pub use event_loop::{EventLoop, current};
pub(crate) use iothread::stand_back;
pub use iothread::{Iothread, IothreadHandle};
pub(crate) use task::unblock_detached;
pub use task::{LocalTask, spawn_local, unblock, yield_now};
pub use timers::{sleep, sleep_until};

pub(crate) use event_loop::current_ring;

#[cfg(all(test, not(shuttle)))]
mod tests;
