//! The end of a mirror on main: the pivot, and taking the filter out.

use std::ops::ControlFlow;
use std::rc::Rc;
use std::time::Duration;

use block::{Graph, GraphError, runtime};

use crate::JobFailure;

use super::converge::{describe, drain_failure};
use super::driver::{Ending, Held, MirrorDriver, Places};
use super::sweep::{Swept, sweep};

/// Wait before the filter's removal is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// Scans beside the guest, and the largest rest, before a late pivot holds it.
const LATE_SCANS: u32 = 8;
const LATE_REST: u64 = 1 << 20;

/// Puts the target in the place of the source, if the job was completed.
///
/// Errors: the job was cancelled, the graph refused it, or what was written since
/// could not be copied; the guest stays on the source.
pub(super) async fn prepare(driver: &MirrorDriver, graph: &Rc<Graph>) -> Result<(), JobFailure> {
    let Some(places) = driver.places() else {
        return Ok(());
    };
    if driver.ending() != Ending::Pivot {
        return Ok(());
    }
    if driver.is_cancelled() {
        return Err(JobFailure::cancelled());
    }
    let held = match driver.take_section() {
        Some(held) => held,
        None => drain_and_copy(driver, places, graph).await?,
    };
    // From a cancel on, writes of the guest are not recorded: the target may be old.
    // Nothing is awaited between this look and the replacement.
    if driver.is_cancelled() {
        driver.keep_section(held);
        return Err(JobFailure::cancelled());
    }
    // All requests are held, so nothing is left to mirror.
    driver.state().set_engaged(false);
    graph.detach(&places.target_backend);
    let replaced = graph.replace(
        &places.filter,
        &places.target,
        &[&places.filter_hold],
        &held.drained,
    );
    driver.keep_section(held);
    replaced.map_err(|error| {
        JobFailure::new(
            libc::EPERM,
            format!(
                "Cannot switch from node '{}' to node '{}': {error}",
                places.source.name(),
                places.target.name()
            ),
        )
    })
}

/// A section for a job that was finalized by hand: the guest wrote meanwhile.
async fn drain_and_copy(
    driver: &MirrorDriver,
    places: &Places,
    graph: &Rc<Graph>,
) -> Result<Held, JobFailure> {
    for _ in 0..LATE_SCANS {
        if driver.state().dirty_bytes() <= LATE_REST {
            break;
        }
        copy_dirty(driver, places).await?;
    }
    let drained = graph
        .drain(&places.source, &[&places.source_backend])
        .await
        .map_err(|error| drain_failure(&error))?;
    copy_dirty(driver, places).await?;
    places
        .target_backend
        .flush()
        .await
        .map_err(|error| JobFailure::from(&error))?;
    Ok(Held {
        drained,
        _own: None,
    })
}

async fn copy_dirty(driver: &MirrorDriver, places: &Places) -> Result<(), JobFailure> {
    let copier = driver.copier(places, 0);
    match sweep(&copier, driver.state(), |_| ControlFlow::Continue(())).await {
        Swept::Clean => Ok(()),
        Swept::Stopped => Err(JobFailure::new(
            libc::EBUSY,
            "The source or the target was drained during the switch",
        )),
        Swept::Failed(error) => {
            tracing::warn!(error = %error.error, side = describe(error.side), "late copy failed");
            Err(JobFailure::from(&error.error))
        }
    }
}

/// Takes the mirror off the graph, whichever way it ended. Idempotent.
pub(super) async fn leave(driver: &MirrorDriver, graph: &Rc<Graph>) {
    driver.state().set_engaged(false);
    let Some(places) = driver.places() else {
        return;
    };
    if !driver.leaves_now() {
        return;
    }
    graph.detach(&places.filter_hold);
    let held = match driver.take_section() {
        Some(held) => Ok(held),
        None => graph
            .drain(&places.filter, &[&places.source_backend])
            .await
            .map(|drained| Held {
                drained,
                _own: None,
            }),
    };
    let removed = held.and_then(|held| {
        let removed = graph.remove_filter(&places.filter, &held.drained);
        driver.end_section(held, places.filter.name());
        removed
    });
    graph.detach(&places.target_backend);
    graph.detach(&places.source_backend);
    if let Err(error) = removed {
        tracing::warn!(%error, filter = places.filter.name(), "mirror: the filter stays for now");
        let (graph, filter) = (Rc::clone(graph), std::sync::Arc::clone(&places.filter));
        // It passes everything on; take it out when the guest's requests end.
        runtime::spawn_local(async move {
            loop {
                runtime::sleep(RETRY).await;
                let removed = match graph.drain(&filter, &[]).await {
                    Ok(drained) => graph.remove_filter(&filter, &drained),
                    Err(error) => Err(error),
                };
                match removed {
                    Err(GraphError::DrainTimeout { .. }) => {}
                    Err(error) => {
                        tracing::error!(%error, "mirror: the filter cannot be taken out");
                        return;
                    }
                    Ok(()) => return,
                }
            }
        })
        .detach();
    }
}
