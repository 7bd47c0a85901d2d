//! Drained sections and jobs: nested, of children, from bodies and other threads,
//! around changes of the graph, and with every outcome of the job.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use block::runtime::{self, Iothread};
use block::test_storage::TestStorage;
use block::{
    AttachmentKind, Backend, BlockdevOptions, BlockdevRef, Drained, DriverOptions, Graph, Node,
    NodeOptions, Perm, Permissions, RawOptions,
};
use futures_channel::oneshot;

use super::{LIMIT, Stage, on_main, steady};
use crate::test_support::{Scripted, spec};
use crate::{JobDriver, JobError, JobFailure, JobKey, JobSpec, JobStatus};

const READS: Permissions = Permissions {
    need: Perm::CONSISTENT_READ,
    share: Perm::ALL,
};

/// A job on the upper one of two nodes, and on a target.
struct Set {
    key: JobKey,
    upper: Arc<Node>,
    lower: Arc<Node>,
    target: Arc<Node>,
    backends: [Arc<Backend>; 2],
}

fn node(graph: &Graph, name: &str) -> Arc<Node> {
    let driver = TestStorage::new(1 << 20).driver();
    graph
        .add_node(Some(name), driver, NodeOptions::default())
        .unwrap()
}

async fn set(stage: &Stage, spec: JobSpec, driver: &Arc<Scripted>) -> Set {
    let graph = &stage.graph;
    let lower = node(graph, "lower");
    let target = node(graph, "target");
    let upper = graph
        .blockdev_add(BlockdevOptions {
            node_name: Some("upper".to_owned()),
            read_only: None,
            auto_read_only: None,
            cache: Default::default(),
            discard: Default::default(),
            detect_zeroes: Default::default(),
            said: Vec::new(),
            written: Default::default(),
            driver: DriverOptions::Raw(RawOptions {
                file: BlockdevRef::Name("lower".to_owned()),
                offset: 0,
                size: None,
            }),
        })
        .await
        .unwrap();
    let dynamic: Arc<dyn JobDriver> = Arc::clone(driver) as _;
    let (key, created) = stage.jobs.lock().create(spec, &dynamic).unwrap();
    stage.jobs.run(created);
    let backends = [&upper, &target].map(|node| {
        let user = stage.jobs.backend_user(key, AttachmentKind::Job);
        graph.attach("", node, READS, Some(user)).unwrap()
    });
    stage
        .jobs
        .act(|guard| Ok::<_, JobError>(guard.start(key)))
        .unwrap();
    Set {
        key,
        upper,
        lower,
        target,
        backends,
    }
}

fn assert_parked(stage: &Stage, key: JobKey, sections: u32) {
    assert_eq!(stage.pause_count(key), sections);
    let info = stage.jobs.query().remove(0);
    let parked = (info.status, info.busy, info.paused);
    assert_eq!(parked, (JobStatus::Paused, false, true));
}

async fn assert_runs(stage: &Stage, key: JobKey) {
    stage.until("j0", JobStatus::Running).await;
    assert_eq!(stage.pause_count(key), 0);
    assert!(!stage.jobs.query()[0].paused);
}

#[test]
fn each_drained_edge_counts_once_and_the_job_is_parked_inside_and_runs_after() {
    on_main(|stage| async move {
        let set = set(&stage, spec("j0"), &steady()).await;
        let graph = &stage.graph;
        for node in [&set.upper, &set.lower, &set.target] {
            let section = graph.drain(node, &[]).await.unwrap();
            assert_parked(&stage, set.key, 1);
            drop(section);
            assert_runs(&stage, set.key).await;
        }
        let all = graph.drain_all().await.unwrap();
        assert_parked(&stage, set.key, 2);
        drop(all);
        assert_runs(&stage, set.key).await;
        stage.jobs.cancel_all(LIMIT).await;
    });
}

#[test]
fn sections_nest_in_any_order_and_only_the_last_end_lets_the_job_go() {
    on_main(|stage| async move {
        let set = set(&stage, spec("j0"), &steady()).await;
        let graph = &stage.graph;
        for order in [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]] {
            let mut sections: Vec<Option<Drained>> = Vec::new();
            // The upper one's section reaches it by one edge, all of them by two.
            sections.push(Some(graph.drain(&set.upper, &[]).await.unwrap()));
            sections.push(Some(graph.drain(&set.lower, &[]).await.unwrap()));
            sections.push(Some(graph.drain_all().await.unwrap()));
            sections.push(Some(graph.drain(&set.lower, &[]).await.unwrap()));
            assert_parked(&stage, set.key, 5);
            let mut left = 5;
            for which in order {
                sections[which] = None;
                left -= if which == 2 { 2 } else { 1 };
                if left > 0 {
                    assert_parked(&stage, set.key, left);
                }
            }
            assert_runs(&stage, set.key).await;
        }
        stage.jobs.cancel_all(LIMIT).await;
    });
}

#[test]
fn a_pause_of_the_users_and_a_section_hold_the_job_together() {
    on_main(|stage| async move {
        let set = set(&stage, spec("j0"), &steady()).await;
        let section = stage.graph.drain(&set.upper, &[]).await.unwrap();
        stage.verb("j0", |guard, key| guard.pause(key));
        assert_parked(&stage, set.key, 2);
        drop(section);
        assert_parked(&stage, set.key, 1);
        let section = stage.graph.drain_all().await.unwrap();
        stage.verb("j0", |guard, key| guard.resume(key));
        assert_parked(&stage, set.key, 2);
        drop(section);
        assert_runs(&stage, set.key).await;
        stage.jobs.cancel_all(LIMIT).await;
    });
}

/// What becomes of a job that ends while a section of its nodes is waited for.
async fn outcome(stage: &Stage, body: Result<(), i32>, prepare: Result<(), i32>) -> String {
    let (go, gone) = oneshot::channel::<()>();
    let gone = Mutex::new(Some(gone));
    let driver = Scripted::new(move |_| {
        let gone = gone.lock().unwrap().take().unwrap();
        async move {
            // In the middle of a request: no pause point here.
            gone.await.ok();
            body.map_err(JobFailure::from_errno)
        }
    })
    .with_prepare(move || async move { prepare.map_err(JobFailure::from_errno) });
    let driver = Arc::new(driver);
    let set = set(stage, spec("j0"), &driver).await;
    stage
        .until_true("the body runs", || {
            driver.called().contains(&"run".to_owned())
        })
        .await;
    let graph = std::rc::Rc::clone(&stage.graph);
    let node = Arc::clone(&set.lower);
    let draining = runtime::spawn_local(async move { graph.drain(&node, &[]).await });
    stage
        .until_true("the section waits for the job", || {
            stage.pause_count(set.key) == 1
        })
        .await;
    assert!(!draining.is_finished());
    go.send(()).unwrap();
    let section = draining.await.unwrap();
    stage.until("j0", JobStatus::Null).await;
    for backend in &set.backends {
        stage.graph.detach(backend);
    }
    drop(section);
    stage.told()
}

#[test]
fn a_section_is_over_when_the_job_is_whatever_its_outcome() {
    let tail = |body, prepare, end: &'static str| {
        on_main(|stage| async move {
            let told = outcome(&stage, body, prepare).await;
            assert_eq!(told, format!("created running {end} concluded null"));
        });
    };
    tail(Ok(()), Ok(()), "waiting pending COMPLETED");
    tail(
        Err(libc::EIO),
        Ok(()),
        "aborting COMPLETED(Input/output error)",
    );
    tail(
        Ok(()),
        Err(libc::EPERM),
        "waiting pending aborting COMPLETED(Operation not permitted)",
    );
}

#[test]
fn a_body_may_drain_what_another_job_works_on_and_that_one_parks() {
    on_main(|stage| async move {
        let victim = set(&stage, spec("j0"), &steady()).await;
        let (held, holds) = oneshot::channel::<()>();
        let (go, gone) = oneshot::channel::<()>();
        let parts = Mutex::new(Some((held, gone, Arc::clone(&victim.lower))));
        let drainer = Scripted::new(move |context| {
            let (held, gone, node) = parts.lock().unwrap().take().unwrap();
            async move {
                let section = context
                    .graph()
                    .run(move |graph| Box::pin(async move { graph.drain(&node, &[]).await }))
                    .await
                    .unwrap()
                    .unwrap();
                held.send(()).unwrap();
                gone.await.ok();
                // Ended on this iothread.
                drop(section);
                Ok(())
            }
        });
        crate::test_support::start(&stage.jobs, spec("j1"), &Arc::new(drainer));
        holds.await.unwrap();
        assert_eq!(stage.pause_count(victim.key), 1);
        assert_eq!(stage.status("j0"), JobStatus::Paused);
        go.send(()).unwrap();
        stage.until("j1", JobStatus::Null).await;
        assert_runs(&stage, victim.key).await;
        stage.jobs.cancel_all(LIMIT).await;
    });
}

#[test]
fn a_job_moves_with_a_change_of_the_graph_in_the_section_that_parks_it() {
    on_main(|stage| async move {
        let set = set(&stage, spec("j0"), &steady()).await;
        let graph = &stage.graph;
        let section = graph.drain(&set.upper, &[]).await.unwrap();
        assert_parked(&stage, set.key, 1);
        // A user who comes meanwhile is held too, and one that goes is let go.
        let late = graph.attach("", &set.lower, READS, None).unwrap();
        assert!(!late.is_drained(), "the section is of the node above");
        let target = &set.backends[1];
        graph.detach(target);
        let user = stage.jobs.backend_user(set.key, AttachmentKind::Job);
        let again = graph.attach("", &set.upper, READS, Some(user)).unwrap();
        assert_parked(&stage, set.key, 2);
        drop(section);
        assert_runs(&stage, set.key).await;
        let section = graph.drain(&set.target, &[]).await.unwrap();
        assert_eq!(
            stage.pause_count(set.key),
            0,
            "it has no edge there any more"
        );
        drop(section);
        stage.jobs.cancel_all(LIMIT).await;
        drop((late, again));
    });
}

#[test]
fn a_job_of_one_iothread_parks_for_sections_that_end_on_others() {
    on_main(|stage| async move {
        let threads: Vec<Iothread> = ["io0", "io1", "io2"]
            .into_iter()
            .map(|name| Iothread::spawn(name).unwrap())
            .collect();
        let home = threads[0].handle().clone();
        let given = JobSpec {
            home: Some(home.clone()),
            ..spec("j0")
        };
        let where_it_runs: Arc<Mutex<Vec<bool>>> = Arc::default();
        let seen = Arc::clone(&where_it_runs);
        let driver = Arc::new(Scripted::new(move |context| {
            let seen = Arc::clone(&seen);
            let home = home.clone();
            async move {
                while !context.is_force_cancelled() {
                    seen.lock().unwrap().push(home.is_current());
                    context.sleep(Duration::from_millis(1)).await;
                }
                Ok(())
            }
        }));
        let set = set(&stage, given, &driver).await;
        for round in 0..20 {
            let section = stage.graph.drain(&set.lower, &[]).await.unwrap();
            assert_parked(&stage, set.key, 1);
            let other = threads[1 + round % 2].handle();
            other
                .call(move || async move { drop(section) })
                .await
                .unwrap();
            assert_runs(&stage, set.key).await;
        }
        stage.jobs.cancel_all(LIMIT).await;
        assert!(where_it_runs.lock().unwrap().iter().all(|home| *home));
    });
}

#[test]
fn a_section_does_not_finish_a_job_that_has_much_to_do_at_a_low_speed() {
    on_main(|stage| async move {
        let driver = Arc::new(Scripted::new(|context| async move {
            context.progress().set_remaining(1 << 40);
            while !context.is_force_cancelled() {
                // For days.
                context.throttle(1 << 30).await;
            }
            Ok(())
        }));
        let slow = JobSpec {
            speed: 1000,
            ..spec("j0")
        };
        let set = set(&stage, slow, &driver).await;
        for _ in 0..3 {
            let all = stage.graph.drain_all().await.unwrap();
            assert_parked(&stage, set.key, 2);
            drop(all);
            assert_runs(&stage, set.key).await;
        }
        assert_eq!(stage.jobs.query()[0].current_progress, 0);
        assert_eq!(stage.jobs.cancel_all(LIMIT).await, Vec::<String>::new());
    });
}
