//! Main's part: it delivers events in order, calls hooks, and waits for jobs.

use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::ops::Deref;
use std::pin::pin;
use std::rc::Rc;
use std::task::{Poll, Waker};
use std::time::Duration;

use block::{Graph, runtime};
use futures_util::future::{Either, select};
use futures_util::stream::{FuturesUnordered, StreamExt};

use crate::id::JobKey;
use crate::monitor::Jobs;
use crate::shared::MainWork;
use crate::state::{Event, Hook};
use crate::sync;

/// The jobs, on main: what only main may do. Everything else is [`Jobs`], to which
/// this dereferences. A handle: clones mean the same.
#[derive(Clone)]
pub struct MainJobs {
    jobs: Jobs,
    main: Rc<Main>,
}

struct Main {
    graph: Rc<Graph>,
    sink: RefCell<Box<dyn FnMut(crate::event::JobEvent)>>,
    delivering: Cell<bool>,
    /// Waiters of `settle` and `cancel_all`.
    waiters: RefCell<Vec<Waker>>,
}

impl Deref for MainJobs {
    type Target = Jobs;

    fn deref(&self) -> &Jobs {
        &self.jobs
    }
}

impl Jobs {
    /// Gives the jobs their main thread: two tasks of its event loop deliver events
    /// to `sink` in order and call hooks with `graph`. To be called once, on main.
    pub fn attach_main(
        &self,
        graph: Rc<Graph>,
        sink: impl FnMut(crate::event::JobEvent) + 'static,
    ) -> MainJobs {
        let main = MainJobs::new(self.clone(), graph, sink);
        runtime::spawn_local(main.clone().run_quick()).detach();
        runtime::spawn_local(main.clone().run_slow()).detach();
        main
    }
}

impl MainJobs {
    pub(crate) fn new(
        jobs: Jobs,
        graph: Rc<Graph>,
        sink: impl FnMut(crate::event::JobEvent) + 'static,
    ) -> Self {
        Self {
            jobs,
            main: Rc::new(Main {
                graph,
                sink: RefCell::new(Box::new(sink)),
                delivering: Cell::new(false),
                waiters: RefCell::new(Vec::new()),
            }),
        }
    }

    /// Delivers all events that have happened. The sink may call this; then the
    /// outer call goes on delivering.
    pub fn flush_events(&self) {
        sync::assert_unlocked("events were delivered");
        if self.main.delivering.replace(true) {
            return;
        }
        loop {
            let event = self.jobs.shared.lock().core.outbox.pop_front();
            let Some(event) = event else {
                break;
            };
            (self.main.sink.borrow_mut())(event);
        }
        self.main.delivering.set(false);
    }

    /// Waits while the job's transaction is being finalized or cleaned up, at most
    /// `limit`, and delivers the events of that. So what a verb has caused is told
    /// before its answer, unless it hangs.
    ///
    /// Cancel: nothing is left behind.
    pub async fn settle(&self, key: JobKey, limit: Duration) {
        let settled = self.until(|jobs| !jobs.lock().is_finishing_locked(key));
        self.at_most(limit, settled).await;
        self.run_quick_work();
        self.flush_events();
    }

    /// Force-cancels every job, dismisses those that are concluded, and waits until
    /// none is left: for the end of the process. Gives the ids of those that are
    /// left after `limit`.
    ///
    /// Cancel: the jobs stay cancelled.
    pub async fn cancel_all(&self, limit: Duration) -> Vec<String> {
        let gone = self.until(|jobs| {
            let effects = jobs.lock().cancel_all_locked();
            let left = !jobs.lock().is_empty_locked();
            jobs.run(effects);
            !left
        });
        self.at_most(limit, gone).await;
        self.run_quick_work();
        self.flush_events();
        self.jobs.lock().ids_locked()
    }

    /// Waits until no job is left, without doing anything about that.
    #[cfg(all(test, shuttle))]
    pub(crate) async fn until_empty(&self) {
        self.until(|jobs| jobs.lock().is_empty_locked()).await;
    }

    async fn at_most(&self, limit: Duration, work: impl Future<Output = ()>) {
        let timer = self.jobs.shared.environment.sleep(limit);
        if let Either::Right(_) = select(pin!(work), timer).await {
            tracing::warn!(?limit, "Jobs take longer than they should");
        }
    }

    /// Waits for what only main's work changes.
    async fn until(&self, test: impl Fn(&Jobs) -> bool) {
        poll_fn(|cx| {
            // Registered before the test. Main is one thread, so nothing happens
            // in between, but the order is the rule.
            self.main.waiters.borrow_mut().push(cx.waker().clone());
            if test(&self.jobs) {
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        })
        .await;
    }

    fn wake_waiters(&self) {
        let waiters = self.main.waiters.take();
        for waiter in waiters {
            waiter.wake();
        }
    }

    /// Main's first task: events and hooks that do not wait.
    pub(crate) async fn run_quick(self) {
        poll_fn(|cx| {
            self.jobs.shared.main_quick.register(cx.waker());
            self.run_quick_work();
            self.flush_events();
            self.wake_waiters();
            Poll::<()>::Pending
        })
        .await;
    }

    /// Main's second task: hooks that may wait. The machine asks for the next hook of
    /// a transaction when the one before has ended; so these run one at a time, and
    /// those of another transaction beside them: one that hangs is waited for by
    /// nobody else.
    pub(crate) async fn run_slow(self) {
        let mut running = FuturesUnordered::new();
        loop {
            poll_fn(|cx| {
                self.jobs.shared.main_slow.register(cx.waker());
                while let Some(work) = self.next_slow() {
                    // What was asked before, first: a `complete` before its `prepare`.
                    self.run_quick_work();
                    running.push(self.call_slow(work));
                }
                match running.poll_next_unpin(cx) {
                    Poll::Ready(Some(())) => Poll::Ready(()),
                    Poll::Ready(None) | Poll::Pending => Poll::Pending,
                }
            })
            .await;
            self.flush_events();
            self.wake_waiters();
        }
    }

    fn next_slow(&self) -> Option<MainWork> {
        self.jobs.shared.lock().core.slow.pop_front()
    }

    pub(crate) fn run_quick_work(&self) {
        loop {
            let work = self.jobs.shared.lock().core.quick.pop_front();
            match work {
                None => return,
                Some(MainWork::Free(slot, home)) => {
                    slot.driver.free();
                    drop(home);
                }
                Some(MainWork::Hook(slot, hook)) => match hook {
                    Hook::UserResume => slot.driver.user_resume(),
                    Hook::Cancel { force } => slot.driver.cancel(force),
                    Hook::Complete => slot.driver.complete(),
                    Hook::SetSpeed(speed) => slot.driver.set_speed(speed),
                    Hook::Prepare | Hook::Finish { .. } => {
                        debug_assert!(false, "a hook that waits in the queue of quick ones");
                    }
                },
            }
        }
    }

    async fn call_slow(&self, work: MainWork) {
        let MainWork::Hook(slot, hook) = work else {
            debug_assert!(false, "the queue of hooks that wait holds only these");
            return;
        };
        let graph = &self.main.graph;
        let outcome = match hook {
            Hook::Prepare => Event::Prepared(slot.driver.prepare(graph).await),
            Hook::Finish { commit } => {
                if commit {
                    slot.driver.commit(graph).await;
                } else {
                    slot.driver.abort(graph).await;
                }
                slot.driver.clean(graph).await;
                Event::Finished
            }
            Hook::UserResume | Hook::Cancel { .. } | Hook::Complete | Hook::SetSpeed(_) => {
                debug_assert!(false, "a quick hook in the queue of hooks that wait");
                return;
            }
        };
        self.jobs.happen(slot.key, outcome);
    }
}
