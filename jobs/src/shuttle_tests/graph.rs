//! Jobs and the block layer's gates together: requests, drained sections and changes
//! of the graph that meet.

use std::sync::Arc;

use block::test_storage::TestStorage;
use block::{AttachmentKind, Backend, Graph, Node, NodeOptions, Perm, Permissions};
use shuttle::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use shuttle::{future, thread};

use super::{act, check, jobs, main_until_empty};
use crate::test_support::{Scripted, spec};
use crate::{JobDriver, JobError, JobKey, Jobs};

const READS: Permissions = Permissions {
    need: Perm::CONSISTENT_READ,
    share: Perm::ALL,
};

fn node(graph: &Graph, name: &str) -> Arc<Node> {
    let driver = TestStorage::new(4096).driver();
    graph
        .add_node(Some(name), driver, NodeOptions::default())
        .unwrap()
}

/// A job on `nodes`, started. Its body is `driver`'s, which is given the backends
/// once they are attached.
fn job(
    jobs: &Jobs,
    graph: &Graph,
    nodes: &[&Arc<Node>],
    driver: impl FnOnce(Vec<Arc<Backend>>) -> Scripted,
) -> JobKey {
    // The driver is made after the attachments, which need the job's key.
    let late = Arc::new(Late::default());
    let dynamic: Arc<dyn JobDriver> = Arc::clone(&late) as _;
    let (key, created) = jobs.lock().create(spec("j0"), &dynamic).unwrap();
    jobs.run(created);
    let backends = nodes
        .iter()
        .map(|node| {
            let user = jobs.backend_user(key, AttachmentKind::Job);
            graph.attach("", node, READS, Some(user)).unwrap()
        })
        .collect();
    late.set(driver(backends));
    jobs.act(|guard| Ok::<_, JobError>(guard.start(key)))
        .unwrap();
    key
}

/// A driver that is set after the job's creation.
#[derive(Default)]
struct Late(std::sync::OnceLock<Arc<Scripted>>);

impl Late {
    fn set(&self, driver: Scripted) {
        assert!(self.0.set(Arc::new(driver)).is_ok());
    }
}

impl JobDriver for Late {
    fn run(
        self: Arc<Self>,
        context: crate::JobContext,
    ) -> block::BoxFuture<'static, Result<(), crate::JobFailure>> {
        Arc::clone(self.0.get().unwrap()).run(context)
    }
}

/// What requests look at while they are in flight.
#[derive(Default)]
struct World {
    in_flight: AtomicUsize,
    /// A section holds.
    held: AtomicBool,
    /// The graph was changed: nobody comes to the old node any more.
    swapped: AtomicBool,
}

/// One request, which stays for a moment.
async fn request(world: &World, backend: &Arc<Backend>, old: u64) {
    let request = backend.enter().await;
    world.in_flight.fetch_add(1, SeqCst);
    for _ in 0..2 {
        assert!(!world.held.load(SeqCst), "a request in a drained section");
        if request.node().id() == old {
            assert!(!world.swapped.load(SeqCst), "a request to the old node");
        }
    }
    world.in_flight.fetch_sub(1, SeqCst);
}

#[test]
fn requests_of_guests_and_jobs_a_section_and_a_swap_of_the_graph() {
    check(|| {
        let graph = Graph::new();
        let (old, target) = (node(&graph, "old"), node(&graph, "target"));
        let guest = graph.attach("vda", &old, READS, None).unwrap();
        let jobs = jobs();
        let world = Arc::new(World::default());
        let old_id = old.id();
        let (there, counted) = (Arc::clone(&world), Arc::clone(&old));
        job(&jobs, &graph, &[&old, &target], move |backends| {
            let _keep = counted;
            Scripted::new(move |context| {
                let (world, backends) = (Arc::clone(&there), backends.clone());
                async move {
                    for _ in 0..2 {
                        for backend in &backends {
                            request(&world, backend, 0).await;
                        }
                        context.pause_point().await;
                    }
                    Ok(())
                }
            })
        });
        let guests = [0, 1].map(|_| {
            let (world, guest) = (Arc::clone(&world), Arc::clone(&guest));
            thread::spawn(move || {
                for _ in 0..2 {
                    future::block_on(request(&world, &guest, old_id));
                }
            })
        });
        let drained = future::block_on(graph.drain(&old, &[])).unwrap();
        world.held.store(true, SeqCst);
        assert_eq!(world.in_flight.load(SeqCst), 0);
        // What a pivot does: the guest goes over to the target.
        graph.replace(&old, &target, &[], &drained).unwrap();
        assert_eq!(world.in_flight.load(SeqCst), 0);
        world.swapped.store(true, SeqCst);
        world.held.store(false, SeqCst);
        drop(drained);
        for guest in guests {
            guest.join().unwrap();
        }
        assert_eq!(guest.root().id(), target.id());
        let told = main_until_empty(&jobs).replace("paused running ", "");
        assert_eq!(
            told,
            "created running waiting pending COMPLETED concluded null"
        );
        assert!(!guest.is_drained() && guest.in_flight() == 0);
    });
}

#[test]
fn a_section_a_cancel_and_the_end_of_the_body() {
    check(|| {
        let graph = Graph::new();
        let disk = node(&graph, "disk");
        let jobs = jobs();
        let key = job(&jobs, &graph, &[&disk], |backends| {
            Scripted::new(move |context| {
                let backend = Arc::clone(&backends[0]);
                async move {
                    for _ in 0..3 {
                        drop(backend.enter().await);
                        context.pause_point().await;
                        if context.is_force_cancelled() {
                            break;
                        }
                    }
                    Ok(())
                }
            })
        });
        let other = jobs.clone();
        let canceller = thread::spawn(move || {
            // Refused if the job is over.
            let _ = act(&other, key, |guard, key| guard.cancel(key, true));
        });
        let drained = future::block_on(graph.drain_all()).unwrap();
        drop(drained);
        let told = main_until_empty(&jobs);
        canceller.join().unwrap();
        let ends = told.matches("CANCELLED").count() + told.matches("COMPLETED").count();
        assert!(ends == 1 && told.ends_with("concluded null"), "{told}");
    });
}
