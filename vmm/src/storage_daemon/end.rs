//! The end of the storage daemon: who asks for it, and what is done in which
//! order within which time.

use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;

use anyhow::Context;
use block::Graph;
use block::runtime::sleep;
use futures_util::future::{Either, join, select};

use crate::monitor::Monitor;
use crate::signals::EndSignals;

/// How long the end may take in all, so that it takes no longer than 5 s
/// as seen from outside.
pub(super) const LIMIT: Duration = Duration::from_millis(4500);
/// How long exports and jobs may take to end, side by side: requests of one may hang
/// in the other.
const USERS_TIME: Duration = Duration::from_secs(2);
/// How long nodes may take to be flushed and closed, while clients read their last
/// replies, which may take as long.
const NODES_TIME: Duration = Duration::from_secs(2);

/// How much of that flushing may take.
const FLUSH_TIME: Duration = Duration::from_millis(1500);

/// What could not be ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum EndError {
    /// Jobs.
    #[error("Jobs '{0}' did not end in time; their storage does not answer, and is left as it is")]
    Jobs(String),
    /// Exports.
    #[error("Requests of exports '{0}' did not end in time; last writes may be lost")]
    Exports(String),
    /// Nodes.
    #[error("Nodes were not flushed and closed in time; last writes may be lost")]
    Nodes,
}

/// Returns when somebody wants the program to end: a client, the user or the system.
pub(super) async fn asked_for(monitor: &Rc<Monitor>, signals: &EndSignals) -> anyhow::Result<()> {
    match select(pin!(monitor.quit_requested()), pin!(signals.next())).await {
        Either::Left(((), _)) => Ok(()),
        Either::Right((result, _)) => result.map(drop).context("Cannot wait for signals"),
    }
}

/// Ends in order: exports and jobs, then nodes, and clients, who are told how the jobs ended.
/// No step goes on for longer than its time; storage that hangs when the event loop
/// waits for its last requests is the watchdog's.
///
/// Errors: storage hung, and was left as a crash would leave it.
pub(super) async fn all(monitor: &Monitor, graph: &Graph) -> Result<(), EndError> {
    monitor.request_quit();
    let exports = monitor.exports().close_all(USERS_TIME);
    let jobs = monitor.jobs().cancel_all(USERS_TIME);
    let (exports, jobs) = join(exports, jobs).await;
    let nodes = in_time(NODES_TIME, close_nodes(graph));
    let (closed, ()) = join(nodes, monitor.close()).await;
    if !jobs.is_empty() {
        return Err(EndError::Jobs(jobs.join("', '")));
    }
    if !exports.is_empty() {
        return Err(EndError::Exports(exports.join("', '")));
    }
    if closed != Some(true) {
        return Err(EndError::Nodes);
    }
    Ok(())
}

/// Waits for `work`, but not longer than `limit`; `None` if it was not done.
async fn in_time<T>(limit: Duration, work: impl Future<Output = T>) -> Option<T> {
    match select(pin!(work), pin!(sleep(limit))).await {
        Either::Left((done, _)) => Some(done),
        Either::Right(_) => None,
    }
}

/// Flushes what may have been written, then takes the nodes away, users before
/// those that they use. What is in use for ever is left. Says whether the flush was
/// done in time.
async fn close_nodes(graph: &Graph) -> bool {
    let flushed = in_time(FLUSH_TIME, graph.flush_all()).await.is_some();
    let nodes = graph.nodes().into_iter().filter(|node| node.monitor_owned);
    let mut left: Vec<String> = nodes.map(|node| node.name).collect();
    loop {
        let mut in_use = Vec::new();
        // The newest first: the others cannot use them.
        for name in left.iter().rev() {
            if graph.blockdev_del(name).await.is_err() {
                in_use.push(name.clone());
            }
        }
        if in_use.is_empty() || in_use.len() == left.len() {
            return flushed;
        }
        in_use.reverse();
        left = in_use;
    }
}
