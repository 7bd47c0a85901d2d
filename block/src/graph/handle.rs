//! How other threads get at the graph: they send main a function.

use std::future::Future;
use std::rc::{Rc, Weak};

use futures_channel::{mpsc, oneshot};
use futures_util::StreamExt as _;

use super::{Graph, GraphError, LocalFuture};
use crate::driver::BoxFuture;
use crate::runtime;

type Job = Box<dyn FnOnce(Rc<Graph>) -> LocalFuture<'static, ()> + Send>;

/// A way to the graph from any thread.
#[derive(Clone, Debug)]
pub struct GraphHandle {
    jobs: mpsc::UnboundedSender<Job>,
}

impl GraphHandle {
    /// Runs `f` on main with the graph, and gives the result of its future.
    /// Fails with [`GraphError::MainGone`] if main's loop or the graph has gone.
    ///
    /// Several run side by side, as tasks of main's loop. Cancel: what was sent
    /// runs to its end all the same, and its result is dropped on main.
    pub fn run<R, F>(&self, f: F) -> impl Future<Output = Result<R, GraphError>> + Send + use<R, F>
    where
        R: Send + 'static,
        F: FnOnce(Rc<Graph>) -> BoxFuture<'static, R> + Send + 'static,
    {
        let (done, result) = oneshot::channel();
        let job: Job = Box::new(move |graph| {
            Box::pin(async move {
                // Nobody may be waiting any more.
                let _ = done.send(f(graph).await);
            })
        });
        let sent = self.jobs.unbounded_send(job).is_ok();
        async move {
            if !sent {
                return Err(GraphError::MainGone);
            }
            result.await.map_err(|_| GraphError::MainGone)
        }
    }
}

impl Graph {
    /// A handle for other threads. On main's loop only (inside
    /// `EventLoop::block_on`), which serves it as long as the graph lives.
    pub fn handle(self: &Rc<Self>) -> GraphHandle {
        let mut handle = self.handle.borrow_mut();
        handle
            .get_or_insert_with(|| {
                let (jobs, received) = mpsc::unbounded();
                runtime::spawn_local(serve(Rc::downgrade(self), received)).detach();
                GraphHandle { jobs }
            })
            .clone()
    }
}

async fn serve(graph: Weak<Graph>, mut received: mpsc::UnboundedReceiver<Job>) {
    while let Some(job) = received.next().await {
        let Some(graph) = graph.upgrade() else {
            return;
        };
        runtime::spawn_local(job(graph)).detach();
    }
}
