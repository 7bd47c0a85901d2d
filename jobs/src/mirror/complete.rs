//! The end of a mirror on main: the pivot, and taking the filter out.

use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use block::{Drained, Graph, GraphError, Permissions, runtime};
use futures_util::future::{Either, select};

use crate::JobFailure;
use crate::copying::{
    CopyError, PATIENCE, detach_when_idle, take_out, take_out_some_time, wait_until_idle,
};

use super::body::with_patience;
use super::converge::{
    ENDING_DOUBLINGS, HOLD_LIMIT, HOLD_RETRY, SECTION_BYTES, describe, drain_failure,
};
use super::driver::{Ending, Held, MirrorDriver, Places, shows};
use super::sweep::{Flushes, OPERATIONS, Sweep, Swept};

/// Drained sections that a late pivot may try.
const LATE_SECTIONS: u32 = 16;
/// Time without any progress after which a late pivot is given up.
const LATE_STALL: Duration = Duration::from_secs(30);
/// Wait while somebody else drains a node.
const BUSY: Duration = Duration::from_millis(10);

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
    adopt_read_only(places, graph).await;
    // Persistent bitmaps go on on the target.
    let room = driver.take_room();
    let bitmaps = graph
        .copy_kept_bitmaps(places.lowest(), &places.target, room.as_ref())
        .await;
    // From a cancel on, writes of the guest are not recorded: the target may be old.
    // Nothing is awaited between this look and the replacement.
    if driver.is_cancelled() {
        driver.keep_section(held);
        return Err(JobFailure::cancelled());
    }
    // All requests are held, so nothing is left to mirror.
    driver.state().set_engaged(false);
    let replaced = replace(places, graph, &held.drained);
    if replaced.is_ok() {
        bitmaps.commit();
    }
    driver.keep_section(held);
    replaced.map_err(|reason| {
        JobFailure::new(
            libc::EPERM,
            format!(
                "Cannot switch from node '{}' to node '{}': {reason}",
                places.lowest().name(),
                places.target.name()
            ),
        )
    })
}

/// Makes the target read-only where that in whose place it comes is: who has that opened
/// so wants to write none of it. As in QEMU, the pivot does not depend on it.
async fn adopt_read_only(places: &Places, graph: &Graph) {
    let read_only = places.lowest().read_only();
    if places.target.read_only() == read_only {
        return;
    }
    // Nothing is copied any more.
    let adopted = match graph.set_permissions(&places.target_backend, Permissions::IDLE) {
        Ok(()) => graph.set_read_only(&places.target, read_only).await,
        Err(error) => Err(error),
    };
    if let Err(error) = adopted {
        tracing::warn!(
            %error,
            target_node = places.target.name(),
            read_only,
            "mirror: the target does not become what the source is"
        );
    }
}

/// Puts the target in its place: that of the filter with all below it, or that of the
/// node that the user named.
fn replace(places: &Places, graph: &Graph, drained: &Drained) -> Result<(), String> {
    let (old, hold) = match (&places.replaces, &places.replaces_hold) {
        (Some(old), Some(hold)) => (old, hold),
        _ => (&places.filter, &places.filter_hold),
    };
    // The graph may have changed since the start.
    if places.replaces.is_some() && !shows(&places.source, old) {
        return Err(format!(
            "node '{}' no longer shows it",
            places.source.name()
        ));
    }
    // It stays attached until the guest is on it: a target that nobody else owns would
    // go.
    graph
        .set_permissions(&places.target_backend, Permissions::IDLE)
        .and_then(|()| graph.replace(old, &places.target, &[hold], drained))
        .map_err(|error| error.to_string())
}

/// A section for a job that was finalized by hand: the guest wrote meanwhile.
async fn drain_and_copy(
    driver: &MirrorDriver,
    places: &Places,
    graph: &Rc<Graph>,
) -> Result<Held, JobFailure> {
    let state = driver.state();
    // Before the guest is held.
    let room = graph.make_room_for_bitmaps(places.lowest(), &places.target);
    driver.keep_room(room.await);
    // What is dirty only becomes less from here on.
    state.set_catching_up(true);
    let mut late = Late {
        driver,
        places,
        graph,
        sweep: Sweep::new(driver.copier(places, OPERATIONS), Arc::clone(state)),
    };
    let result = late.run().await;
    // What is in flight, on a target that hangs, does not hold up main.
    runtime::spawn_local(late.sweep.leave()).detach();
    result
}

/// What became of the rest in a drained section.
enum Rest {
    Copied,
    /// It takes too long.
    Slow,
    /// Somebody else drains a node, who goes first.
    Drained,
}

/// The rest of a mirror that was finalized by hand, on main.
struct Late<'a> {
    driver: &'a MirrorDriver,
    places: &'a Places,
    graph: &'a Rc<Graph>,
    sweep: Sweep,
}

impl Late<'_> {
    async fn run(&mut self) -> Result<Held, JobFailure> {
        let mut pause = HOLD_RETRY.0;
        let mut attempt = 0;
        while attempt < LATE_SECTIONS {
            self.copy_beside_the_guest().await?;
            let drained = match self.drain().await? {
                Ok(drained) => drained,
                // Requests of the guest hang: those that do not are to go on.
                Err(error @ GraphError::DrainTimeout { .. }) if attempt + 1 < LATE_SECTIONS => {
                    tracing::warn!(%error, "mirror: the guest could not be held");
                    self.stop(pause).await;
                    pause = (pause * 2).min(HOLD_RETRY.1);
                    attempt += 1;
                    continue;
                }
                Err(error) => return Err(drain_failure(&error)),
            };
            let doublings = attempt.min(ENDING_DOUBLINGS);
            let limit = self.driver.settings().section_limit * (1 << doublings);
            match self.copy_the_rest(limit).await? {
                Rest::Copied => {
                    return Ok(Held {
                        drained,
                        _own: None,
                    });
                }
                Rest::Slow => attempt += 1,
                Rest::Drained => {}
            }
            drop(drained);
            runtime::sleep(BUSY).await;
        }
        Err(slow_target())
    }

    /// Copies until little is left, and flushes that.
    async fn copy_beside_the_guest(&mut self) -> Result<(), JobFailure> {
        let mut stalled = Duration::ZERO;
        loop {
            let began = Instant::now();
            let mut progress = false;
            let stop = self.stop(PATIENCE);
            let swept = self.sweep.copy(SECTION_BYTES, |_| progress = true, stop);
            let swept = match swept.await {
                Swept::Done => self.flush_beside_the_guest().await,
                other => other,
            };
            if progress {
                stalled = Duration::ZERO;
            }
            match swept {
                Swept::Done => {
                    // What is dirty only becomes less from here on.
                    self.driver.state().set_catching_up(true);
                    return Ok(());
                }
                Swept::Failed(error) => return Err(late_failure(&error)),
                Swept::Stopped if self.driver.is_cancelled() => {
                    return Err(JobFailure::cancelled());
                }
                Swept::Stopped if progress => {}
                // Somebody drains a node for a moment.
                Swept::Stopped if began.elapsed() < PATIENCE => runtime::sleep(BUSY).await,
                Swept::Stopped if stalled < LATE_STALL => {
                    // The guest does not wait for a target that hangs.
                    self.driver.state().set_catching_up(false);
                    stalled += PATIENCE;
                }
                Swept::Stopped => return Err(slow_target()),
            }
        }
    }

    /// Flushes the target, again if the guest's requests have written much meanwhile.
    async fn flush_beside_the_guest(&mut self) -> Swept {
        let mut flushes = Flushes::new();
        loop {
            let began = Instant::now();
            let swept = self.sweep.flush(self.stop(PATIENCE)).await;
            let active = self.driver.state().mirrors_actively();
            if !matches!(swept, Swept::Done) || !active || !flushes.again(began.elapsed()) {
                return swept;
            }
        }
    }

    /// In a drained section.
    async fn copy_the_rest(&mut self, limit: Duration) -> Result<Rest, JobFailure> {
        let until = Instant::now() + limit;
        let mut stop = pin!(self.stop(limit));
        let swept = match self.sweep.copy(0, |_| (), stop.as_mut()).await {
            Swept::Done => self.sweep.flush(stop).await,
            other => other,
        };
        match swept {
            Swept::Done if self.driver.state().dirty.is_clean() => Ok(Rest::Copied),
            Swept::Done => Ok(Rest::Slow),
            Swept::Failed(error) => Err(late_failure(&error)),
            Swept::Stopped if self.driver.is_cancelled() => Err(JobFailure::cancelled()),
            Swept::Stopped if Instant::now() < until => Ok(Rest::Drained),
            Swept::Stopped => Ok(Rest::Slow),
        }
    }

    /// Errors: the job was cancelled.
    async fn drain(&self) -> Result<Result<Drained, GraphError>, JobFailure> {
        let except = self.places.own_backends();
        let drained = self
            .graph
            .drain_within(self.places.lowest(), &except, HOLD_LIMIT);
        let drained = pin!(drained);
        let state = self.driver.state();
        let drained = select(drained, state.disengaged());
        match with_patience(state, drained).await.0 {
            Either::Left((drained, _)) => Ok(drained),
            Either::Right(_) => Err(JobFailure::cancelled()),
        }
    }

    /// Ends after `limit`, or when the job is cancelled.
    fn stop(&self, limit: Duration) -> impl Future<Output = ()> + use<> {
        let state = Arc::clone(self.driver.state());
        async move {
            let timer = pin!(runtime::sleep(limit));
            select(timer, state.disengaged()).await;
        }
    }
}

fn late_failure(error: &CopyError) -> JobFailure {
    tracing::warn!(error = %error.error, side = describe(error.side), "late copy failed");
    JobFailure::from(&error.error)
}

fn slow_target() -> JobFailure {
    JobFailure::new(
        libc::ETIMEDOUT,
        "What the guest wrote since the job was completed cannot be copied in time: the target \
         is too slow, or hangs",
    )
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
    drop(driver.take_room());
    graph.detach(&places.filter_hold);
    if let Some(hold) = &places.replaces_hold {
        graph.detach(hold);
    }
    let removed = match driver.take_section() {
        Some(held) => {
            let removed = graph.remove_filter(&places.filter, &held.drained);
            driver.end_section(held, places.filter.name());
            match removed {
                // The graph has changed: the section was that of another node.
                Err(GraphError::NotDrained { .. }) => take_out(graph, &places.filter).await,
                removed => removed,
            }
        }
        None => take_out(graph, &places.filter).await,
    };
    // The guest's last writes of the target end soon, unless it hangs.
    let backends = [&places.target_backend, &places.source_backend];
    wait_until_idle(&backends).await;
    for backend in backends {
        detach_when_idle(graph, backend);
    }
    if let Err(error) = removed {
        tracing::warn!(%error, filter = places.filter.name(), "mirror: the filter stays for now");
        take_out_some_time(graph, &places.filter);
    }
}
