//! Where bodies run and which clock they see. The block layer's runtime in
//! earnest; something simpler under the model checker and in tests.

use std::future::Future;
use std::pin::Pin;
use std::time::{Duration, Instant};

use block::GraphHandle;
use block::runtime::{self, Iothread, IothreadHandle};

use crate::error::JobFailure;

pub(crate) type LocalFuture = Pin<Box<dyn Future<Output = ()>>>;

/// Makes the body's future once it is at home.
pub(crate) type BodyStart = Box<dyn FnOnce() -> LocalFuture + Send>;

/// A thread that runs a job's body. Dropping it ends the thread if it was the
/// job's own, without waiting for that.
pub(crate) trait Home: Send {
    /// Runs a body there. If the thread ends first, the future (or `start`) is
    /// dropped.
    fn spawn(&self, start: BodyStart);
}

/// Makes homes and tells the time.
pub(crate) trait Environment: Send + Sync {
    /// The home of a job: `given`, or a thread of its own.
    fn home(&self, name: &str, given: Option<&IothreadHandle>)
    -> Result<Box<dyn Home>, JobFailure>;

    /// The way to main for bodies.
    fn graph(&self) -> &GraphHandle;

    fn now(&self) -> Instant;

    /// Ends after `duration`, not earlier. On a thread that runs bodies, or main.
    fn sleep(&self, duration: Duration) -> LocalFuture;
}

/// Iothreads and timers of the block layer.
pub(crate) struct RuntimeEnvironment {
    pub(crate) graph: GraphHandle,
}

impl Environment for RuntimeEnvironment {
    fn home(
        &self,
        name: &str,
        given: Option<&IothreadHandle>,
    ) -> Result<Box<dyn Home>, JobFailure> {
        if let Some(handle) = given {
            return Ok(Box::new(GivenHome(handle.clone())));
        }
        match Iothread::spawn_background(name) {
            Ok(iothread) => Ok(Box::new(OwnHome(Some(iothread)))),
            Err(error) => {
                let chain = error_chain(&error);
                Err(JobFailure::new(
                    libc::EAGAIN,
                    format!("Cannot start an iothread for the job: {chain}"),
                ))
            }
        }
    }

    fn graph(&self) -> &GraphHandle {
        &self.graph
    }

    fn now(&self) -> Instant {
        Instant::now()
    }

    fn sleep(&self, duration: Duration) -> LocalFuture {
        Box::pin(runtime::sleep(duration))
    }
}

fn error_chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

struct GivenHome(IothreadHandle);

impl Home for GivenHome {
    fn spawn(&self, start: BodyStart) {
        self.0.spawn(start);
    }
}

struct OwnHome(Option<Iothread>);

impl Home for OwnHome {
    fn spawn(&self, start: BodyStart) {
        if let Some(iothread) = &self.0 {
            iothread.handle().spawn(start);
        }
    }
}

impl Drop for OwnHome {
    fn drop(&mut self) {
        // The thread ends after its last request did; a request on a dead target
        // may take for ever, so nobody waits for that here.
        let Some(iothread) = self.0.take() else {
            return;
        };
        let reaper = std::thread::Builder::new().name("job-reaper".to_owned());
        if let Err(error) = reaper.spawn(move || iothread.stop()) {
            tracing::error!(%error, "Cannot wait for the end of a job's iothread");
        }
    }
}
