//! The rate limit as a body meets it, on a clock that a test moves by hand.

use std::sync::{Arc, Mutex};
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use block::runtime::{self, EventLoop, IothreadHandle};
use block::{Graph, GraphHandle};

use crate::home::{Environment, Home, LocalFuture, RuntimeEnvironment};
use crate::test_support::{Scripted, spec, start};
use crate::{Effects, JobError, JobFailure, JobKey, JobSpec, Jobs, JobsGuard};

/// The time, and who waits for which.
#[derive(Clone)]
struct Clock {
    start: Instant,
    inner: Arc<Mutex<(Duration, Vec<Waker>)>>,
}

impl Clock {
    fn new() -> Self {
        Self {
            start: Instant::now(),
            inner: Arc::default(),
        }
    }

    fn now(&self) -> Duration {
        self.inner.lock().unwrap().0
    }

    fn advance_to_ms(&self, ms: u64) {
        let wakers = {
            let mut inner = self.inner.lock().unwrap();
            inner.0 = Duration::from_millis(ms);
            std::mem::take(&mut inner.1)
        };
        wakers.into_iter().for_each(Waker::wake);
    }
}

struct ManualEnvironment {
    clock: Clock,
    runtime: RuntimeEnvironment,
}

impl Environment for ManualEnvironment {
    fn home(
        &self,
        name: &str,
        given: Option<&IothreadHandle>,
    ) -> Result<Box<dyn Home>, JobFailure> {
        self.runtime.home(name, given)
    }

    fn graph(&self) -> &GraphHandle {
        self.runtime.graph()
    }

    fn now(&self) -> Instant {
        self.clock.start + self.clock.now()
    }

    fn sleep(&self, duration: Duration) -> LocalFuture {
        let clock = self.clock.clone();
        let end = clock.now() + duration;
        Box::pin(std::future::poll_fn(move |cx| {
            if clock.now() >= end {
                return Poll::Ready(());
            }
            clock.inner.lock().unwrap().1.push(cx.waker().clone());
            Poll::Pending
        }))
    }
}

struct Stage {
    jobs: Jobs,
    clock: Clock,
    key: JobKey,
    driver: Arc<Scripted>,
    /// When the body's throttled requests were let go, in ms.
    let_go: Arc<Mutex<Vec<u128>>>,
}

/// A job at 1000 bytes/s whose body sends one request of 1000 bytes and asks when
/// the next may go.
fn throttled<Fut: Future<Output = ()>>(test: impl FnOnce(Stage) -> Fut) {
    let main = EventLoop::new("main").unwrap();
    main.block_on(async {
        let graph = Graph::new();
        let clock = Clock::new();
        let jobs = Jobs::with_environment(Box::new(ManualEnvironment {
            clock: clock.clone(),
            runtime: RuntimeEnvironment {
                graph: graph.handle(),
            },
        }));
        let let_go: Arc<Mutex<Vec<u128>>> = Arc::default();
        let (log, time) = (Arc::clone(&let_go), clock.clone());
        let driver = Arc::new(Scripted::new(move |context| {
            let (log, time) = (Arc::clone(&log), time.clone());
            async move {
                context.throttle(1000).await;
                log.lock().unwrap().push(time.now().as_millis());
                Ok(())
            }
        }));
        // On this very thread, so that the test sees each step.
        let spec = JobSpec {
            speed: 1000,
            home: runtime::current(),
            ..spec("j0")
        };
        let key = start(&jobs, spec, &driver);
        let stage = Stage {
            jobs,
            clock,
            key,
            driver,
            let_go,
        };
        stage.quiet().await;
        test(stage).await;
    });
}

impl Stage {
    /// Until the body has done what it can do now.
    async fn quiet(&self) {
        loop {
            runtime::yield_now().await;
            if !self.jobs.query()[0].busy && self.driver.called().contains(&"run".to_owned()) {
                return;
            }
        }
    }

    async fn verb(
        &self,
        verb: impl FnOnce(&mut JobsGuard<'_>, JobKey) -> Result<Effects, JobError>,
    ) {
        self.jobs.act(|guard| verb(guard, self.key)).unwrap();
        self.quiet().await;
    }

    fn let_go(&self) -> Vec<u128> {
        self.let_go.lock().unwrap().clone()
    }
}

#[test]
fn pauses_sections_and_kicks_do_not_shorten_the_wait() {
    throttled(|stage| async move {
        for ms in (10..1000).step_by(10) {
            stage.clock.advance_to_ms(ms);
            stage.quiet().await;
            stage
                .verb(|guard, key| Ok(guard.drained_begin(key).and(guard.drained_end(key))))
                .await;
            stage.verb(|guard, key| guard.pause(key)).await;
            stage.verb(|guard, key| guard.resume(key)).await;
            assert_eq!(stage.let_go(), [], "at {ms} ms");
        }
        stage.clock.advance_to_ms(1000);
        stage.quiet().await;
        assert_eq!(stage.let_go(), [1000]);
    });
}

#[test]
fn a_wait_that_ends_during_a_pause_is_over_when_the_job_goes_on() {
    throttled(|stage| async move {
        stage.verb(|guard, key| guard.pause(key)).await;
        stage.clock.advance_to_ms(5000);
        stage.quiet().await;
        assert_eq!(stage.let_go(), []);
        stage.verb(|guard, key| guard.resume(key)).await;
        assert_eq!(stage.let_go(), [5000]);
    });
}

#[test]
fn a_higher_limit_counts_at_once_and_a_lower_one_from_the_next_look() {
    throttled(|stage| async move {
        stage.verb(|guard, key| guard.set_speed(key, 500)).await;
        // A section makes the body look.
        stage
            .verb(|guard, key| Ok(guard.drained_begin(key).and(guard.drained_end(key))))
            .await;
        stage.clock.advance_to_ms(1000);
        stage.quiet().await;
        assert_eq!(stage.let_go(), [], "now 1000 bytes take 2 s");
        stage.verb(|guard, key| guard.set_speed(key, 800)).await;
        stage.clock.advance_to_ms(1249);
        stage.quiet().await;
        assert_eq!(stage.let_go(), []);
        stage.clock.advance_to_ms(1250);
        stage.quiet().await;
        assert_eq!(stage.let_go(), [1250]);
    });
}

#[test]
fn no_limit_any_more_and_a_forced_cancel_end_the_wait_at_once() {
    throttled(|stage| async move {
        stage.verb(|guard, key| guard.set_speed(key, 0)).await;
        assert_eq!(stage.let_go(), [0]);
    });
    throttled(|stage| async move {
        stage.verb(|guard, key| guard.cancel(key, true)).await;
        assert_eq!(stage.let_go(), [0]);
    });
}
