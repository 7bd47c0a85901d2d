//! Where bodies run and which clock they see. The block layer's runtime in
//! earnest; something simpler under the model checker and in tests.

use std::future::Future;
use std::pin::Pin;
use std::sync::mpsc;
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

    /// What keeps the thread from ending with the job.
    fn stay(&self) -> Stay {
        Stay::default()
    }
}

/// Keeps a job's own thread until it is dropped: for requests that outlive the body.
#[derive(Clone, Default)]
pub(crate) struct Stay {
    _sender: Option<mpsc::Sender<()>>,
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
            Ok(iothread) => Ok(Box::new(OwnHome::new(iothread))),
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

struct OwnHome {
    /// `None` once it is to end.
    iothread: Option<Iothread>,
    stay: Option<Stay>,
    /// Disconnected when nobody stays.
    stayed: Option<mpsc::Receiver<()>>,
}

impl OwnHome {
    fn new(iothread: Iothread) -> Self {
        let (sender, stayed) = mpsc::channel();
        Self {
            iothread: Some(iothread),
            stay: Some(Stay {
                _sender: Some(sender),
            }),
            stayed: Some(stayed),
        }
    }
}

impl Home for OwnHome {
    fn spawn(&self, start: BodyStart) {
        if let Some(iothread) = &self.iothread {
            iothread.handle().spawn(start);
        }
    }

    fn stay(&self) -> Stay {
        self.stay.clone().unwrap_or_default()
    }
}

impl Drop for OwnHome {
    fn drop(&mut self) {
        // The thread ends after its last request did; a request on a dead target
        // may take for ever, so nobody waits for that here.
        let (Some(iothread), Some(stayed)) = (self.iothread.take(), self.stayed.take()) else {
            return;
        };
        self.stay = None;
        let reaper = std::thread::Builder::new().name("job-reaper".to_owned());
        let reap = move || {
            // Nothing is ever sent: this ends when the last one who stays has gone.
            let _ = stayed.recv();
            iothread.stop();
        };
        if let Err(error) = reaper.spawn(reap) {
            tracing::error!(%error, "Cannot wait for the end of a job's iothread");
        }
    }
}
