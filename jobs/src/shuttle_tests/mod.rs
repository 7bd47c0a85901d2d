//! The shell under the model checker: all handles, wakers and the job mutex on
//! shuttle's threads. Run with
//! `RUSTFLAGS="--cfg shuttle" cargo test -p jobs shuttle_tests`.
//!
//! A lost wake-up is a deadlock here, which shuttle reports.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use block::runtime::IothreadHandle;
use block::{AttachmentKind, Graph, GraphHandle};
use futures_util::StreamExt as _;
use futures_util::future::LocalBoxFuture;
use futures_util::stream::FuturesUnordered;
use shuttle::sync::atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst};
use shuttle::{future, thread};

use crate::home::{BodyStart, Environment, Home, LocalFuture};
use crate::test_support::{Scripted, spec, start, word};
use crate::{JobContext, JobFailure, JobKey, JobSpec, JobStatus, Jobs, MainJobs};

mod graph;

/// Interleavings tried per test and scheduler.
const SCHEDULES: usize = 1000;
/// Bugs that take this many unlucky switches are found with a known probability.
const DEPTH: usize = 3;

/// Bodies on threads of the model; a clock that moves when somebody sleeps.
struct Model {
    started: Instant,
    elapsed_ms: Arc<AtomicU64>,
}

struct ModelHome;

impl Home for ModelHome {
    fn spawn(&self, start: BodyStart) {
        thread::spawn(move || future::block_on(start()));
    }
}

impl Environment for Model {
    fn home(&self, _: &str, _: Option<&IothreadHandle>) -> Result<Box<dyn Home>, JobFailure> {
        Ok(Box::new(ModelHome))
    }

    fn graph(&self) -> &GraphHandle {
        unreachable!("no body here goes to main")
    }

    fn now(&self) -> Instant {
        self.started + Duration::from_millis(self.elapsed_ms.load(SeqCst))
    }

    /// Fires sooner or later: the scheduler says when.
    fn sleep(&self, duration: Duration) -> LocalFuture {
        let elapsed = Arc::clone(&self.elapsed_ms);
        let ms = u64::try_from(duration.as_millis()).unwrap().max(1);
        Box::pin(async move {
            future::yield_now().await;
            elapsed.fetch_add(ms, SeqCst);
        })
    }
}

/// A sleep that never ends by itself, so that a lost wake-up shows.
struct NoTimers(Model);

impl Environment for NoTimers {
    fn home(
        &self,
        name: &str,
        given: Option<&IothreadHandle>,
    ) -> Result<Box<dyn Home>, JobFailure> {
        self.0.home(name, given)
    }

    fn graph(&self) -> &GraphHandle {
        self.0.graph()
    }

    fn now(&self) -> Instant {
        self.0.now()
    }

    fn sleep(&self, _: Duration) -> LocalFuture {
        Box::pin(std::future::pending())
    }
}

fn model() -> Model {
    Model {
        started: Instant::now(),
        elapsed_ms: Arc::new(AtomicU64::new(0)),
    }
}

fn jobs() -> Jobs {
    Jobs::with_environment(Box::new(model()))
}

fn jobs_without_timers() -> Jobs {
    Jobs::with_environment(Box::new(NoTimers(model())))
}

/// Random switches, and switches at few places between threads that otherwise run by
/// priority, which finds what takes one thread to be far ahead of the others.
fn check(test: impl Fn() + Send + Sync + 'static) {
    let test = Arc::new(test);
    let again = Arc::clone(&test);
    shuttle::check_random(move || test(), SCHEDULES);
    shuttle::check_pct(move || again(), SCHEDULES, DEPTH);
}

/// Besides, all interleavings in order, as far as that goes. Only for tests in which
/// nobody looks at something again and again: the first such order never ends.
fn check_in_order(test: impl Fn() + Send + Sync + 'static) {
    let test = Arc::new(test);
    let again = Arc::clone(&test);
    check(move || test());
    shuttle::check_dfs(move || again(), Some(SCHEDULES));
}

/// Main's part, on the model's first thread, until no job is left. Gives what was
/// told.
fn main_until_empty(jobs: &Jobs) -> String {
    let told: Rc<RefCell<Vec<String>>> = Rc::default();
    let sink = Rc::clone(&told);
    let main = MainJobs::new(jobs.clone(), Graph::new(), move |event| {
        sink.borrow_mut().push(word(&event));
    });
    // Each with a waker of its own, as tasks of a loop have: with one for all, the
    // wake-up of a waiter would poll those who give it, for ever. A random
    // scheduler gets out of that, one with priorities does not.
    let mut tasks = FuturesUnordered::<LocalBoxFuture<'_, ()>>::new();
    tasks.push(Box::pin(main.clone().run_quick()));
    tasks.push(Box::pin(main.clone().run_slow()));
    tasks.push(Box::pin(main.until_empty()));
    future::block_on(tasks.next());
    drop(tasks);
    main.run_quick_work();
    main.flush_events();
    let told = told.borrow();
    told.join(" ")
}

/// Works until it is told to end; parks where it should.
async fn steady(context: JobContext) -> Result<(), JobFailure> {
    while !context.is_force_cancelled() && !context.is_complete_requested() {
        context.idle().await;
    }
    Ok(())
}

fn act(
    jobs: &Jobs,
    key: JobKey,
    verb: impl FnOnce(&mut crate::JobsGuard<'_>, JobKey) -> Result<crate::Effects, crate::JobError>,
) -> Result<(), crate::JobError> {
    jobs.act(|guard| verb(guard, key))
}

#[test]
fn a_cancel_reaches_a_body_that_goes_to_sleep() {
    check_in_order(|| {
        let jobs = jobs_without_timers();
        let driver = Arc::new(Scripted::new(|context| async move {
            while !context.is_force_cancelled() {
                context.sleep(Duration::from_secs(1)).await;
            }
            Ok(())
        }));
        let key = start(&jobs, spec("j0"), &driver);
        let other = jobs.clone();
        let canceller =
            thread::spawn(move || act(&other, key, |guard, key| guard.cancel(key, true)));
        let told = main_until_empty(&jobs);
        canceller.join().unwrap().unwrap();
        assert_eq!(told, "created running aborting CANCELLED concluded null");
    });
}

#[test]
fn a_timer_a_kick_and_a_cancel_race_and_one_waker_wins() {
    check(|| {
        let jobs = jobs();
        let driver = Arc::new(Scripted::new(|context| async move {
            for _ in 0..3 {
                context.sleep(Duration::from_millis(1)).await;
            }
            Ok(())
        }));
        let key = start(&jobs, spec("j0"), &driver);
        let threads = [0, 1].map(|which| {
            let jobs = jobs.clone();
            thread::spawn(move || {
                if which == 0 {
                    let effects = jobs.lock().drained_begin(key);
                    jobs.run(effects);
                    let effects = jobs.lock().drained_end(key);
                    jobs.run(effects);
                } else {
                    // Refused if the job is over.
                    let _ = act(&jobs, key, |guard, key| guard.cancel(key, true));
                }
            })
        });
        let told = main_until_empty(&jobs);
        for thread in threads {
            thread.join().unwrap();
        }
        assert!(told.ends_with("concluded null"), "{told}");
        let ends = told.matches("CANCELLED").count() + told.matches("COMPLETED").count();
        assert_eq!(ends, 1, "{told}");
    });
}

#[test]
fn a_notification_from_an_io_path_is_not_lost() {
    check(|| {
        let jobs = jobs_without_timers();
        let (send, receive) = std::sync::mpsc::channel();
        let dirty = Arc::new(AtomicUsize::new(0));
        let work = Arc::clone(&dirty);
        let driver = Arc::new(Scripted::new(move |context| {
            let work = Arc::clone(&work);
            send.send(context.notifier()).unwrap();
            async move {
                // Copies what a guest has dirtied, and waits for more.
                let mut copied = 0;
                loop {
                    copied += work.swap(0, SeqCst);
                    if copied == 2 {
                        return Ok(());
                    }
                    context.idle().await;
                }
            }
        }));
        start(&jobs, spec("j0"), &driver);
        let guest = thread::spawn(move || {
            let notifier = loop {
                if let Ok(notifier) = receive.try_recv() {
                    break notifier;
                }
                thread::yield_now();
            };
            for _ in 0..2 {
                dirty.fetch_add(1, SeqCst);
                notifier.notify();
            }
        });
        let told = main_until_empty(&jobs);
        guest.join().unwrap();
        assert_eq!(
            told,
            "created running waiting pending COMPLETED concluded null"
        );
    });
}

#[test]
fn a_pause_races_with_the_end_of_the_body() {
    check_in_order(|| {
        let jobs = jobs_without_timers();
        let driver = Arc::new(Scripted::new(|context| async move {
            context.pause_point().await;
            Ok(())
        }));
        let key = start(&jobs, spec("j0"), &driver);
        let user = jobs.clone();
        let user = thread::spawn(move || {
            if act(&user, key, |guard, key| guard.pause(key)).is_ok() {
                // The job may be over by now, paused or not.
                let _ = act(&user, key, |guard, key| guard.resume(key));
            }
        });
        let told = main_until_empty(&jobs);
        user.join().unwrap();
        let told = told.replace("paused running ", "");
        assert_eq!(
            told,
            "created running waiting pending COMPLETED concluded null"
        );
    });
}

#[test]
fn finalize_and_cancel_from_two_monitors_give_one_end() {
    check(|| {
        let jobs = jobs_without_timers();
        let driver = Arc::new(Scripted::new(|_| async { Ok(()) }));
        let manual = JobSpec {
            auto_finalize: false,
            ..spec("j0")
        };
        let key = start(&jobs, manual, &driver);
        let monitors = [0, 1].map(|which| {
            let jobs = jobs.clone();
            thread::spawn(move || {
                // Until the job is pending or gone.
                loop {
                    let status = jobs.query().first().map(|job| job.status);
                    if !matches!(
                        status,
                        Some(JobStatus::Running | JobStatus::Waiting | JobStatus::Created)
                    ) {
                        break;
                    }
                    thread::yield_now();
                }
                let _ = act(&jobs, key, |guard, key| {
                    if which == 0 {
                        guard.finalize(key)
                    } else {
                        guard.cancel(key, true)
                    }
                });
            })
        });
        let told = main_until_empty(&jobs);
        for monitor in monitors {
            monitor.join().unwrap();
        }
        let calls = driver.called();
        let commits = calls.iter().filter(|call| *call == "commit").count();
        let aborts = calls.iter().filter(|call| *call == "abort").count();
        assert_eq!(commits + aborts, 1, "{calls:?}");
        assert_eq!(calls.iter().filter(|call| *call == "free").count(), 1);
        let end = if commits == 1 {
            "pending PENDING COMPLETED concluded null"
        } else {
            "pending PENDING aborting CANCELLED concluded null"
        };
        assert!(told.ends_with(end), "{told} {calls:?}");
    });
}

#[test]
fn a_drained_section_is_never_told_that_a_working_body_is_idle() {
    check(|| {
        let jobs = jobs();
        let working = Arc::new(AtomicUsize::new(0));
        let inside = Arc::clone(&working);
        let driver = Arc::new(Scripted::new(move |context| {
            let inside = Arc::clone(&inside);
            async move {
                for _ in 0..3 {
                    inside.store(1, SeqCst);
                    future::yield_now().await;
                    inside.store(0, SeqCst);
                    context.pause_point().await;
                }
                Ok(())
            }
        }));
        let key = start(&jobs, spec("j0"), &driver);
        let user = jobs.backend_user(key, AttachmentKind::Job);
        let drainer = thread::spawn(move || {
            user.drained_begin();
            while user.drained_poll() {
                thread::yield_now();
            }
            for _ in 0..3 {
                assert_eq!(working.load(SeqCst), 0, "works inside a drained section");
                thread::yield_now();
            }
            user.drained_end();
        });
        let told = main_until_empty(&jobs);
        drainer.join().unwrap();
        assert!(told.ends_with("COMPLETED concluded null"), "{told}");
    });
}

#[test]
fn two_members_of_a_transaction_end_alike_however_a_failure_and_a_cancel_meet() {
    check(|| {
        let jobs = jobs_without_timers();
        let txn = jobs.lock().new_txn();
        let member = |id: &str| JobSpec {
            txn: Some(txn),
            ..spec(id)
        };
        let quick = Arc::new(Scripted::new(|context| async move {
            context.pause_point().await;
            Ok(())
        }));
        let slow = Arc::new(Scripted::new(steady));
        let mut created = Vec::new();
        for (id, driver) in [("quick", &quick), ("slow", &slow)] {
            let driver: Arc<dyn crate::JobDriver> = Arc::clone(driver) as _;
            let (key, effects) = jobs.lock().create(member(id), &driver).unwrap();
            jobs.run(effects);
            created.push(key);
        }
        for &key in &created {
            let effects = jobs.lock().start(key);
            jobs.run(effects);
        }
        let key = created[1];
        let other = jobs.clone();
        let canceller =
            thread::spawn(move || act(&other, key, |guard, key| guard.cancel(key, true)));
        let told = main_until_empty(&jobs);
        canceller.join().unwrap().unwrap();
        assert_eq!(told.matches("CANCELLED").count(), 2, "{told}");
        for driver in [quick, slow] {
            let calls = driver.called();
            assert!(calls.contains(&"abort".to_owned()), "{calls:?}");
            assert!(!calls.contains(&"commit".to_owned()), "{calls:?}");
        }
    });
}

#[test]
fn a_section_that_begins_and_ends_around_a_start_leaves_the_job_running() {
    check(|| {
        let jobs = jobs_without_timers();
        let driver = Arc::new(Scripted::new(steady));
        let dynamic: Arc<dyn crate::JobDriver> = driver;
        let (key, created) = jobs.lock().create(spec("j0"), &dynamic).unwrap();
        jobs.run(created);
        let user = jobs.backend_user(key, AttachmentKind::Job);
        let drainer = thread::spawn(move || {
            user.drained_begin();
            while user.drained_poll() {
                thread::yield_now();
            }
            user.drained_end();
        });
        jobs.act(|guard| Ok::<_, crate::JobError>(guard.start(key)))
            .unwrap();
        drainer.join().unwrap();
        act(&jobs, key, |guard, key| guard.cancel(key, true)).unwrap();
        let told = main_until_empty(&jobs).replace("paused running ", "");
        assert_eq!(told, "created running aborting CANCELLED concluded null");
    });
}
