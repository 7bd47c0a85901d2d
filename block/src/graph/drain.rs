//! Drained sections: nobody sends requests to a node, and none is on its way.
//!
//! A section closes the gates of all backends that reach the node, tells their
//! users, and waits, with nothing held, until all is quiet. It ends when
//! [`Drained`] is dropped, or the future that would have given it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::task::Waker;
use std::time::{Duration, Instant};

use futures_util::future::{Either, poll_fn, select};

use super::error::BusyBackend;
use super::{Graph, GraphError};
use crate::backend::Backend;
use crate::leaf;
use crate::node::Node;
use crate::runtime;
use crate::sync::{Mutex, lock};

/// How often users that do not say when they become idle are asked.
const ASK_USERS: Duration = Duration::from_millis(10);

/// An active drained section. Dropping it, on any thread, ends the section: the
/// requests it held go on, unless another section holds them too.
#[derive(Debug)]
#[must_use = "the section ends when this is dropped"]
pub struct Drained {
    section: Arc<Section>,
    waited: Duration,
    /// Until when those may be held who do not reach the node, if there are any.
    held_until: Option<Instant>,
}

impl Drained {
    /// When the section should end at the latest, for those whose node it is not about:
    /// requests of guests that are saved there first ([`BackendUser::serves`]).
    ///
    /// [`BackendUser::serves`]: crate::BackendUser::serves
    pub(super) fn held_until(&self) -> Option<Instant> {
        self.held_until
    }

    /// Time since the section began to hold requests back.
    pub fn elapsed(&self) -> Duration {
        self.section.began.elapsed()
    }

    /// Time it took until everything was quiet.
    pub fn waited(&self) -> Duration {
        self.waited
    }

    /// Whether `backend` cannot send requests that this section does not know
    /// of: it is held, or its owner had it excepted.
    pub(super) fn covers(&self, graph: u64, backend: &Backend) -> bool {
        let section = &self.section;
        section.graph == graph
            && (section.except.contains(&backend.id())
                || lock(&section.members)
                    .backends
                    .iter()
                    .any(|member| member.id() == backend.id()))
    }
}

impl Drop for Drained {
    fn drop(&mut self) {
        self.section.end();
        tracing::debug!(
            node = self.section.node.as_ref().map_or("(all)", |n| n.name()),
            waited_us = self.waited.as_micros() as u64,
            held_us = self.elapsed().as_micros() as u64,
            "drained section ended"
        );
    }
}

/// What a section holds. Shared by [`Drained`] and the graph, which adds those
/// who come later.
#[derive(Debug)]
pub(super) struct Section {
    id: u64,
    graph: u64,
    /// The drained node; `None` is all of them.
    node: Option<Arc<Node>>,
    /// Ids of the backends that go on.
    except: Vec<u64>,
    began: Instant,
    /// A leaf lock: gates and users are called without it.
    members: Mutex<Members>,
}

#[derive(Debug, Default)]
struct Members {
    ended: bool,
    backends: Vec<Arc<Backend>>,
    /// Nodes whose drivers were told. Not kept open by this.
    nodes: Vec<Weak<Node>>,
}

fn begin_for(backend: &Backend) {
    backend.gate().close();
    if let Some(user) = backend.user() {
        user.drained_begin();
    }
}

fn end_for(backend: &Backend) {
    backend.gate().open();
    if let Some(user) = backend.user() {
        user.drained_end();
    }
}

impl Section {
    /// Holds `backend` too, unless it does or should not.
    fn add(&self, backend: &Arc<Backend>) {
        let known = |members: &Members| members.backends.iter().any(|m| m.id() == backend.id());
        if self.except.contains(&backend.id()) || known(&lock(&self.members)) {
            return;
        }
        // It begins before it can be seen in the list, so that whoever ends the
        // section on another thread cannot end it first.
        begin_for(backend);
        let added = {
            let mut members = lock(&self.members);
            if !members.ended {
                members.backends.push(Arc::clone(backend));
            }
            !members.ended
        };
        if !added {
            end_for(backend);
        }
    }

    /// Tells the driver of a node where requests may be under way, unless it was
    /// told. As [`add`](Self::add).
    fn add_node(&self, node: &Arc<Node>) {
        let told = Arc::downgrade(node);
        let known = |members: &Members| members.nodes.iter().any(|n| n.ptr_eq(&told));
        if known(&lock(&self.members)) {
            return;
        }
        node.driver().drained_begin();
        let added = {
            let mut members = lock(&self.members);
            if !members.ended {
                members.nodes.push(told);
            }
            !members.ended
        };
        if !added {
            node.driver().drained_end();
        }
    }

    fn members(&self) -> Vec<Arc<Backend>> {
        lock(&self.members).backends.clone()
    }

    fn end(&self) {
        let (backends, nodes) = {
            let mut members = lock(&self.members);
            members.ended = true;
            (
                std::mem::take(&mut members.backends),
                std::mem::take(&mut members.nodes),
            )
        };
        for node in nodes.iter().filter_map(Weak::upgrade) {
            node.driver().drained_end();
        }
        for backend in &backends {
            backend.gate().forget_drainer(self.id);
            end_for(backend);
        }
    }

    /// Whether all members are quiet; else `waker` is woken when they may be.
    ///
    /// Order matters: what is quiet must stay so while the rest is looked at.
    /// Requests behind a closed gate cannot come back; once they and the users
    /// are quiet, nobody is left to send requests that are only counted.
    fn poll_idle(&self, waker: &Waker) -> bool {
        let members = self.members();
        let quiet = |holds: bool| {
            members
                .iter()
                .filter(|backend| backend.gate().holds() == holds)
                .fold(true, |quiet, backend| {
                    backend.gate().poll_idle(self.id, waker) & quiet
                })
        };
        let held = quiet(true);
        let users = members.iter().all(|backend| !user_busy(backend)) && !self.nodes_busy();
        let counted = quiet(false);
        held && users && counted
    }

    /// Whether nodes have work of their own under way.
    fn nodes_busy(&self) -> bool {
        let nodes = self.nodes();
        nodes.iter().any(|node| node.driver().drained_poll())
    }

    fn nodes(&self) -> Vec<Arc<Node>> {
        let nodes = lock(&self.members).nodes.clone();
        nodes.iter().filter_map(Weak::upgrade).collect()
    }

    fn busy(&self) -> Vec<BusyBackend> {
        let backends = self.members().into_iter().map(|backend| BusyBackend {
            user: backend
                .user()
                .map_or_else(|| backend.describe(), |user| user.describe()),
            in_flight: backend.in_flight(),
            user_busy: user_busy(&backend),
        });
        let nodes = self.nodes().into_iter().map(|node| BusyBackend {
            user: format!("node '{}'", node.name()),
            in_flight: 0,
            user_busy: node.driver().drained_poll(),
        });
        backends
            .chain(nodes)
            .filter(|busy| busy.in_flight > 0 || busy.user_busy)
            .collect()
    }
}

fn user_busy(backend: &Backend) -> bool {
    backend.user().is_some_and(|user| user.drained_poll())
}

impl Graph {
    /// Begins a drained section of `node`: all backends that reach it, by
    /// whatever way, are held back (except those given), and their requests in
    /// flight are waited for; also those whose requests wait for such ones
    /// ([`BackendUser::serves`](crate::BackendUser::serves)). Sections nest.
    ///
    /// Fails with [`GraphError::DrainTimeout`] if they do not end in time
    /// ([`set_drain_timeout`](Self::set_drain_timeout); 2 s, or less where they themselves
    /// wait no longer, if there are such others); then requests go on.
    ///
    /// Cancel: the section ends, requests go on.
    pub async fn drain(
        &self,
        node: &Arc<Node>,
        except: &[&Arc<Backend>],
    ) -> Result<Drained, GraphError> {
        self.drain_within(node, except, self.drain_timeout.get())
            .await
    }

    /// As [`drain`](Self::drain), but waits no longer than `timeout` for requests:
    /// for those who would rather go on than hold the guest.
    pub async fn drain_within(
        &self,
        node: &Arc<Node>,
        except: &[&Arc<Backend>],
        timeout: Duration,
    ) -> Result<Drained, GraphError> {
        let except = except.iter().map(|backend| backend.id()).collect();
        self.drain_section(Some(Arc::clone(node)), except, timeout)
            .await
    }

    /// Begins a drained section of all nodes. As [`drain`](Self::drain).
    pub async fn drain_all(&self) -> Result<Drained, GraphError> {
        self.drain_section(None, Vec::new(), self.drain_timeout.get())
            .await
    }

    async fn drain_section(
        &self,
        node: Option<Arc<Node>>,
        except: Vec<u64>,
        timeout: Duration,
    ) -> Result<Drained, GraphError> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        leaf::assert_none_held("a drained section was begun");
        let section = Arc::new(Section {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            graph: self.id,
            node,
            except,
            began: Instant::now(),
            members: Mutex::default(),
        });
        // From here on, dropping this ends what has begun.
        let mut drained = Drained {
            section: Arc::clone(&section),
            waited: Duration::ZERO,
            held_until: None,
        };
        self.sections.borrow_mut().push(Arc::downgrade(&section));
        self.inherit_sections();

        loop {
            // Somebody may have come meanwhile.
            let patience = self.patience(&section);
            let for_others = patience.is_some_and(|patience| patience < timeout);
            let deadline = section.began + patience.unwrap_or(timeout).min(timeout);
            drained.held_until = patience.map(|patience| section.began + patience);
            let idle = poll_fn(|cx| match section.poll_idle(cx.waker()) {
                true => std::task::Poll::Ready(()),
                false => std::task::Poll::Pending,
            });
            let now = Instant::now();
            let tick = std::pin::pin!(runtime::sleep(
                ASK_USERS.min(deadline.saturating_duration_since(now))
            ));
            match select(idle, tick).await {
                Either::Left(_) => break,
                Either::Right(_) if Instant::now() >= deadline => {
                    let busy = section.busy();
                    if busy.is_empty() {
                        // The last one ended just now: look once more.
                        continue;
                    }
                    return Err(GraphError::DrainTimeout {
                        waited: section.began.elapsed(),
                        for_others,
                        busy,
                    });
                }
                Either::Right(_) => {}
            }
        }
        drained.waited = section.began.elapsed();
        for backend in section.members() {
            backend.gate().forget_drainer(section.id);
        }
        Ok(drained)
    }

    /// How long a section may hold those who do not reach its node, if there are any.
    fn patience(&self, section: &Section) -> Option<Duration> {
        let node = section.node.as_ref()?;
        let topology = self.topology.borrow();
        topology.patience_of_others(node.id(), &section.except)
    }

    /// Adds to each active section the backends that reach its node by now.
    pub(super) fn inherit_sections(&self) {
        let sections = {
            let mut sections = self.sections.borrow_mut();
            sections.retain(|section| section.strong_count() > 0);
            sections.clone()
        };
        for section in sections.iter().filter_map(Weak::upgrade) {
            let (backends, nodes) = {
                let topology = self.topology.borrow();
                let backends = match &section.node {
                    Some(node) => topology.backends_to_drain(node.id()),
                    None => topology
                        .backends
                        .iter()
                        .map(|entry| Arc::clone(&entry.backend))
                        .collect(),
                };
                let held = backends
                    .iter()
                    .filter(|backend| !section.except.contains(&backend.id()));
                let nodes = topology.below(held.map(|backend| backend.id()));
                (backends, nodes)
            };
            for backend in backends {
                section.add(&backend);
            }
            // Gates are closed by now: what drivers let go is what is in flight.
            for node in nodes {
                section.add_node(&node);
            }
        }
    }
}
