//! The shell on the block layer's real runtime, one file per theme, and the stage
//! that the tests share. Where the order of threads matters, `shuttle_tests` has
//! the rest; the machine by itself is tested in `state`.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use block::Graph;
use block::runtime::{self, EventLoop};
use futures_util::future::{Either, select};

use crate::test_support::{Journal, Scripted, word};
use crate::{Effects, JobError, JobEvent, JobKey, JobStatus, Jobs, JobsGuard, MainJobs};

mod cancel;
mod drain;
mod history;
mod ids;
mod leaf;
mod pairs;
mod policies;
mod shell;
mod throttle;
mod transactions;

/// Longer than anything here takes; a bound, not a wait.
const LIMIT: Duration = Duration::from_secs(30);

pub(super) struct Stage {
    pub(super) jobs: MainJobs,
    pub(super) graph: Rc<Graph>,
    /// What the sink was given.
    pub(super) events: Rc<RefCell<Vec<JobEvent>>>,
    /// Hooks (`a.commit`) of drivers that write to it, and events (`a:concluded`).
    pub(super) journal: Journal,
}

/// Runs `test` on a main loop with jobs.
pub(super) fn on_main<Fut: Future<Output = ()>>(test: impl FnOnce(Stage) -> Fut) {
    let main = EventLoop::new("main").unwrap();
    main.block_on(async {
        let graph = Graph::new();
        let events = Rc::new(RefCell::new(Vec::new()));
        let sink = Rc::clone(&events);
        let journal = Journal::default();
        let written = Arc::clone(&journal);
        let jobs = Jobs::new(graph.handle()).attach_main(Rc::clone(&graph), move |event| {
            let line = format!("{}:{}", event.id, word(&event));
            written.lock().unwrap().push(line);
            sink.borrow_mut().push(event);
        });
        test(Stage {
            jobs,
            graph,
            events,
            journal,
        })
        .await;
    });
}

impl Stage {
    pub(super) fn told(&self) -> String {
        let events = self.events.borrow();
        let words: Vec<String> = events.iter().map(word).collect();
        words.join(" ")
    }

    /// What was told of one job.
    pub(super) fn told_of(&self, id: &str) -> String {
        let events = self.events.borrow();
        let of = events.iter().filter(|event| event.id.as_str() == id);
        let words: Vec<String> = of.map(word).collect();
        words.join(" ")
    }

    /// Reasons for the job to be parked.
    pub(super) fn pause_count(&self, key: JobKey) -> u32 {
        let locked = self.jobs.shared.lock();
        locked
            .core
            .machine
            .job(key)
            .map_or(0, |job| job.pause_count)
    }

    pub(super) fn status(&self, id: &str) -> JobStatus {
        self.jobs
            .query()
            .iter()
            .find(|job| job.id.as_str() == id)
            .map_or(JobStatus::Null, |job| job.status)
    }

    /// Waits until the job is in `status`.
    pub(super) async fn until(&self, id: &str, status: JobStatus) {
        self.until_true(&format!("{id} is {status}"), || self.status(id) == status)
            .await;
    }

    pub(super) async fn until_true(&self, what: &str, mut test: impl FnMut() -> bool) {
        let wait = std::pin::pin!(async {
            while !test() {
                runtime::sleep(Duration::from_millis(1)).await;
            }
        });
        let limit = std::pin::pin!(runtime::sleep(LIMIT));
        if let Either::Right(_) = select(wait, limit).await {
            panic!("waited in vain until {what}; told: {}", self.told());
        }
        self.jobs.flush_events();
    }

    pub(super) fn verb(
        &self,
        id: &str,
        verb: impl FnOnce(&mut JobsGuard<'_>, JobKey) -> Result<Effects, JobError>,
    ) {
        self.jobs
            .act(|guard| {
                let key = guard.find(id)?;
                verb(guard, key)
            })
            .unwrap();
    }
}

/// Works in small steps until it is told to end.
pub(super) fn steady() -> Arc<Scripted> {
    Arc::new(Scripted::new(|context| async move {
        while !context.is_force_cancelled() && !context.is_complete_requested() {
            context.sleep(Duration::from_millis(1)).await;
        }
        Ok(())
    }))
}

/// Becomes ready, and then idles until it is told to end.
pub(super) fn ready() -> Arc<Scripted> {
    Arc::new(Scripted::new(|context| async move {
        context.progress().set_remaining(4096);
        context.progress().add_done(4096);
        context.ready();
        while !context.is_force_cancelled()
            && !context.is_soft_cancelled()
            && !context.is_complete_requested()
        {
            context.idle().await;
        }
        Ok(())
    }))
}
