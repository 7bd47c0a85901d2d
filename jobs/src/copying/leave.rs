//! Taking a job's filter and its attachments off the graph, without holding the guest for
//! longer than a moment.

use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use block::{Backend, CancelReach, Graph, GraphError, Node, runtime};

/// First and longest wait before the filter's removal is tried again; doubles.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// First and longest wait before requests to the target of a cancelled job are let go
/// again; doubles.
const LET_GO: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(100));
/// How often is looked whether a request has ended that outlives the job.
const IDLE_LOOK: Duration = Duration::from_millis(100);
/// How long a body that has to end waits for its requests before it leaves them behind;
/// and time without an answer after which a node counts as hung.
pub(crate) const PATIENCE: Duration = Duration::from_secs(1);
/// Longest that the guest is held to take the filter out.
const LEAVE_DRAIN: Duration = Duration::from_secs(1);

/// Holds the guest for a short time only: the filter passes everything on.
pub(crate) async fn take_out(graph: &Graph, filter: &Arc<Node>) -> Result<(), GraphError> {
    let drained = graph.drain_within(filter, &[], LEAVE_DRAIN).await?;
    graph.remove_filter(filter, &drained)
}

/// Takes the filter out when the guest's requests end some time: goes on by itself.
pub(crate) fn take_out_some_time(graph: &Rc<Graph>, filter: &Arc<Node>) {
    let (graph, filter) = (Rc::clone(graph), Arc::clone(filter));
    runtime::spawn_local(async move { keep_taking_out(&graph, &filter).await }).detach();
}

/// Takes the filter out when the guest's requests end some time.
async fn keep_taking_out(graph: &Graph, filter: &Arc<Node>) {
    let mut pause = RETRY.0;
    loop {
        runtime::sleep(pause).await;
        pause = (pause * 2).min(RETRY.1);
        match take_out(graph, filter).await {
            Ok(()) | Err(GraphError::NotFound { .. }) => return,
            Err(error) => {
                tracing::warn!(%error, filter = filter.name(), "a job's filter stays for now");
            }
        }
    }
}

/// Lets the requests to the target end that wait for a server to return or for a limit
/// of its rate, or were sent to a server that is silent, and those that are still on
/// their way there.
pub(crate) fn let_target_go(target: &Arc<Backend>) {
    target.root().cancel_in_flight(CancelReach::Hanging);
    // Weakly: main must not be the last to hold the node, since that closes its file.
    let target = Arc::downgrade(target);
    runtime::spawn_local(async move {
        let mut pause = LET_GO.0;
        loop {
            runtime::sleep(pause).await;
            pause = (pause * 2).min(LET_GO.1);
            match target.upgrade() {
                Some(target) if target.in_flight() > 0 => {
                    target.root().cancel_in_flight(CancelReach::Hanging)
                }
                _ => return,
            }
        }
    })
    .detach();
}

/// Waits for what is in flight, as long as that may take unless something hangs.
pub(crate) async fn wait_until_idle(backends: &[&Arc<Backend>]) {
    let patience = Instant::now() + PATIENCE;
    while backends.iter().any(|it| it.in_flight() > 0) && Instant::now() < patience {
        runtime::sleep(Duration::from_millis(1)).await;
    }
}

/// Detaches at once if nothing is in flight, else as soon as nothing is. Until then
/// the node stays the job's, since it may still be written.
pub(crate) fn detach_when_idle(graph: &Rc<Graph>, backend: &Arc<Backend>) {
    if backend.in_flight() == 0 {
        graph.detach(backend);
        return;
    }
    let (graph, backend) = (Rc::clone(graph), Arc::clone(backend));
    runtime::spawn_local(async move {
        while backend.in_flight() > 0 {
            runtime::sleep(IDLE_LOOK).await;
        }
        graph.detach(&backend);
    })
    .detach();
}
