//! Tasks of one loop: spawning, waiting for the result, panics.

use std::any::Any;
use std::cell::RefCell;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use futures_util::FutureExt;
use slab::Slab;

use super::event_loop::LoopCore;
use crate::leaf;

type Panic = Box<dyn Any + Send>;

/// A task on this thread's loop.
///
/// Awaiting it gives the result, and passes a panic of the task on. Dropping it
/// detaches the task, which then runs to its end, or to the end of the loop; a
/// panic is logged at level error in any case, and harms no other task.
#[derive(Debug)]
#[must_use = "dropping a LocalTask detaches the task; say so with detach()"]
pub struct LocalTask<T> {
    /// `None` after `cancel` or `detach` only.
    task: Option<async_task::Task<Result<T, Panic>>>,
}

impl<T> LocalTask<T> {
    /// Lets the task run on its own.
    pub fn detach(mut self) {
        if let Some(task) = self.task.take() {
            task.detach();
        }
    }

    /// Stops the task and drops its future; returns when that has been done.
    /// Gives the result if it was there already.
    ///
    /// Cancel: the task is stopped all the same.
    pub async fn cancel(mut self) -> Option<T> {
        match self.task.take()?.cancel().await {
            Some(Ok(output)) => Some(output),
            Some(Err(_)) | None => None,
        }
    }

    /// Whether the task has ended.
    pub fn is_finished(&self) -> bool {
        self.task.as_ref().is_none_or(|task| task.is_finished())
    }
}

impl<T> Future for LocalTask<T> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        let Some(task) = self.task.as_mut() else {
            return Poll::Pending;
        };
        match Pin::new(task).poll(cx) {
            Poll::Ready(Ok(output)) => Poll::Ready(output),
            Poll::Ready(Err(panic)) => std::panic::resume_unwind(panic),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl<T> Drop for LocalTask<T> {
    fn drop(&mut self) {
        if let Some(task) = self.task.take() {
            task.detach();
        }
    }
}

/// Wakers of all tasks whose futures still exist, so that the end of the loop
/// can drop them.
#[derive(Default)]
pub(super) struct Registry {
    tasks: RefCell<Slab<Option<Waker>>>,
}

impl Registry {
    pub(super) fn is_empty(&self) -> bool {
        self.tasks.borrow().is_empty()
    }

    /// Wakes every task.
    pub(super) fn wake_all(&self) {
        let wakers: Vec<Waker> = self
            .tasks
            .borrow()
            .iter()
            .filter_map(|(_, waker)| waker.clone())
            .collect();
        for waker in wakers {
            waker.wake();
        }
    }
}

/// Strikes a task off the registry when its future is dropped.
struct Registered {
    registry: Rc<Registry>,
    key: usize,
}

impl Drop for Registered {
    fn drop(&mut self) {
        let waker = self.registry.tasks.borrow_mut().remove(self.key);
        drop(waker);
    }
}

/// What a panic said.
pub(super) fn panic_message(panic: &(dyn Any + Send)) -> &str {
    if let Some(message) = panic.downcast_ref::<&'static str>() {
        message
    } else if let Some(message) = panic.downcast_ref::<String>() {
        message
    } else {
        "(no message)"
    }
}

/// Runs `future` as a task of this thread's loop.
///
/// Its first poll happens in the loop, not here.
///
/// # Panics
///
/// If this thread has no loop.
pub fn spawn_local<F>(future: F) -> LocalTask<F::Output>
where
    F: Future + 'static,
    F::Output: 'static,
{
    let core = LoopCore::current();
    let registry = Rc::clone(&core.registry);
    let key = registry.tasks.borrow_mut().insert(None);
    let registered = Registered {
        registry: Rc::clone(&registry),
        key,
    };
    let shared = core.shared();
    let name = shared.name_arc();
    // Combinators, not an async block, which would keep the future twice.
    let future = AssertUnwindSafe(future).catch_unwind().map(move |result| {
        let _registered = registered;
        if let Err(panic) = &result {
            tracing::error!(
                iothread = &*name,
                "Task panicked: {}",
                panic_message(panic.as_ref())
            );
        }
        result
    });
    let (runnable, task) = async_task::spawn_local(future, move |runnable| {
        shared.schedule(runnable);
    });
    registry.tasks.borrow_mut()[key] = Some(runnable.waker());
    runnable.schedule();
    LocalTask { task: Some(task) }
}

/// Lets the other tasks of this loop, and its I/O, have a turn.
pub async fn yield_now() {
    let mut yielded = false;
    std::future::poll_fn(|cx| {
        if yielded {
            return Poll::Ready(());
        }
        yielded = true;
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

/// Runs `f` on a thread that may block, and waits for the result.
///
/// For what would stall a loop: open, lseek, ioctl, name look-ups. Never ready at
/// the first poll, so that who calls it in a loop lets others run, however fast
/// `f` is. Panics of `f` are passed on. Cancel: `f` is not run if it had not begun, else runs to its
/// end unseen.
pub async fn unblock<R, F>(f: F) -> R
where
    R: Send + 'static,
    F: FnOnce() -> R + Send + 'static,
{
    leaf::assert_none_held("a helper thread was asked");
    let task = blocking::unblock(f);
    yield_now().await;
    task.await
}

/// Runs `f` on a thread that may block, and waits for nothing. Any thread. A panic
/// of `f` ends `f` only.
pub(crate) fn unblock_detached<F>(f: F)
where
    F: FnOnce() + Send + 'static,
{
    leaf::assert_none_held("a helper thread was asked");
    blocking::unblock(f).detach();
}
