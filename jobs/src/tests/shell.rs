//! The shell on the block layer's real runtime: homes, hooks, events, drained
//! sections. Where the order of threads matters, `shuttle_tests` has the rest.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use block::runtime::{self, EventLoop, Iothread, IothreadHandle};
use block::test_storage::TestStorage;
use block::{AttachmentKind, Graph, NodeOptions, Perm, Permissions};
use futures_channel::oneshot;

use super::{LIMIT, on_main, ready, steady};
use crate::test_support::{MIRROR, Scripted, spec, start};
use crate::{
    BlockJobProgress, CopyMode, JobChange, JobDriver, JobError, JobEventKind, JobFailure, JobKind,
    JobNotifier, JobSpec, JobStatus, Jobs, MainJobs, SoftCancel,
};

#[test]
fn a_job_runs_on_an_iothread_of_its_own_and_tells_its_whole_story_in_order() {
    on_main(|stage| async move {
        let home: Arc<Mutex<Option<IothreadHandle>>> = Arc::default();
        let there = Arc::clone(&home);
        let driver = Arc::new(Scripted::new(move |context| {
            *there.lock().unwrap() = runtime::current();
            async move {
                context.progress().set_remaining(10);
                context.progress().add_done(10);
                context.ready();
                while !context.is_complete_requested() {
                    context.kicked().await;
                }
                Ok(())
            }
        }));
        let weak = Arc::downgrade(&driver);
        start(&stage.jobs, spec("j0"), &driver);
        stage.until("j0", JobStatus::Ready).await;
        let home = home.lock().unwrap().take().unwrap();
        assert_eq!(home.name(), "j0");
        assert!(!home.is_current());
        stage.verb("j0", |guard, key| guard.complete(key));
        stage.until("j0", JobStatus::Null).await;
        stage
            .until_true("the job was freed", || {
                driver.called().contains(&"free".to_owned())
            })
            .await;
        assert_eq!(
            stage.told(),
            "created running ready READY waiting pending COMPLETED concluded null"
        );
        assert_eq!(
            driver.called(),
            ["run", "complete", "prepare", "commit", "clean", "free"]
        );
        {
            let events = stage.events.borrow();
            let numbers: Vec<u64> = events.iter().map(|event| event.sequence).collect();
            assert_eq!(numbers, (1..=9).collect::<Vec<u64>>());
            let progress = BlockJobProgress {
                len: 10,
                offset: 10,
                speed: 0,
            };
            assert_eq!(events[3].kind, JobEventKind::Ready(progress));
            assert_eq!(
                events[6].kind,
                JobEventKind::Completed {
                    progress,
                    error: None
                }
            );
        }
        drop(driver);
        stage
            .until_true("nothing holds the driver", || weak.upgrade().is_none())
            .await;
        while home.call(|| async {}).await.is_ok() {
            runtime::sleep(Duration::from_millis(1)).await;
        }
    });
}

#[test]
fn created_and_running_are_told_before_the_command_is_answered() {
    on_main(|stage| async move {
        start(&stage.jobs, spec("j0"), &steady());
        stage.jobs.flush_events();
        assert!(stage.told().starts_with("created running"));
        stage.jobs.cancel_all(LIMIT).await;
    });
}

#[test]
fn finalize_and_its_events_come_before_settle_ends() {
    on_main(|stage| async move {
        let driver = ready();
        let manual = JobSpec {
            auto_finalize: false,
            auto_dismiss: false,
            ..spec("j0")
        };
        let key = start(&stage.jobs, manual, &driver);
        stage.until("j0", JobStatus::Ready).await;
        stage.verb("j0", |guard, key| guard.complete(key));
        stage.until("j0", JobStatus::Pending).await;
        stage.events.borrow_mut().clear();
        stage.verb("j0", |guard, key| guard.finalize(key));
        stage.jobs.settle(key, LIMIT).await;
        assert_eq!(stage.told(), "COMPLETED concluded");
        stage.verb("j0", |guard, key| guard.dismiss(key));
        stage.jobs.settle(key, LIMIT).await;
        assert_eq!(stage.told(), "COMPLETED concluded null");
        assert_eq!(driver.called().last().unwrap(), "free");
    });
}

#[test]
fn settle_ends_after_its_limit_when_a_hook_hangs_and_a_cancel_still_gets_through() {
    on_main(|stage| async move {
        let (release, released) = oneshot::channel::<()>();
        let released = Mutex::new(Some(released));
        let driver = Scripted::new(|_| async { Ok(()) }).with_prepare(move || {
            let released = released.lock().unwrap().take();
            async move {
                if let Some(released) = released {
                    released.await.ok();
                }
                Ok(())
            }
        });
        let driver = Arc::new(driver);
        let key = start(&stage.jobs, spec("j0"), &driver);
        stage.until("j0", JobStatus::Pending).await;
        stage
            .until_true("prepare hangs", || {
                driver.called().contains(&"prepare".to_owned())
            })
            .await;
        stage.jobs.settle(key, Duration::from_millis(5)).await;
        assert_eq!(stage.status("j0"), JobStatus::Pending);
        // Another job's hooks that do not wait are not held up.
        let other = steady();
        start(&stage.jobs, spec("other"), &other);
        stage.verb("other", |guard, key| guard.set_speed(key, 5));
        stage
            .until_true("a quick hook was called", || {
                other.called().contains(&"set_speed(5)".to_owned())
            })
            .await;
        stage.verb("j0", |guard, key| guard.cancel(key, true));
        release.send(()).unwrap();
        stage.until("j0", JobStatus::Null).await;
        assert_eq!(stage.jobs.cancel_all(LIMIT).await, Vec::<String>::new());
        assert!(driver.called().ends_with(&[
            "abort".to_owned(),
            "clean".to_owned(),
            "free".to_owned()
        ]));
    });
}

#[test]
fn a_hook_that_hangs_holds_up_no_other_transaction_but_its_own_members() {
    on_main(|stage| async move {
        let (release, released) = oneshot::channel::<()>();
        let released = Mutex::new(Some(released));
        let hangs = Scripted::new(|_| async { Ok(()) }).with_prepare(move || {
            let released = released.lock().unwrap().take();
            async move {
                if let Some(released) = released {
                    released.await.ok();
                }
                Ok(())
            }
        });
        let (hangs, partner) = (
            Arc::new(hangs),
            Arc::new(Scripted::new(|_| async { Ok(()) })),
        );
        let txn = stage.jobs.lock().new_txn();
        let member = |id: &str| JobSpec {
            txn: Some(txn),
            ..spec(id)
        };
        let partner_key = {
            // Both are members before the first can end.
            let (hangs, partner): (Arc<dyn JobDriver>, Arc<dyn JobDriver>) =
                (hangs.clone(), partner.clone());
            let mut guard = stage.jobs.lock();
            let (first, one) = guard.create(member("hangs"), &hangs).unwrap();
            let (second, two) = guard.create(member("partner"), &partner).unwrap();
            let started = guard.start(first).and(guard.start(second));
            drop(guard);
            stage.jobs.run(one.and(two).and(started));
            second
        };
        stage
            .until_true("prepare hangs", || {
                hangs.called().contains(&"prepare".to_owned())
            })
            .await;
        let other = Arc::new(Scripted::new(|_| async { Ok(()) }));
        start(&stage.jobs, spec("other"), &other);
        stage.until("other", JobStatus::Null).await;
        assert!(other.called().contains(&"commit".to_owned()));
        assert_eq!(
            partner.called(),
            ["run"],
            "its turn comes after the first's"
        );
        release.send(()).unwrap();
        stage.jobs.settle(partner_key, LIMIT).await;
        for driver in [hangs, partner] {
            let calls = driver.called();
            let hooks = &calls[calls.len() - 4..];
            assert_eq!(hooks, ["prepare", "commit", "clean", "free"]);
        }
    });
}

#[test]
fn a_pause_parks_the_body_and_a_resume_wakes_it() {
    on_main(|stage| async move {
        let driver = steady();
        start(&stage.jobs, spec("j0"), &driver);
        stage.verb("j0", |guard, key| guard.pause(key));
        stage.until("j0", JobStatus::Paused).await;
        let info = &stage.jobs.query()[0];
        assert_eq!((info.busy, info.paused), (false, true));
        assert_eq!(driver.called().last().unwrap(), "pause");
        stage.verb("j0", |guard, key| guard.resume(key));
        stage
            .until_true("resumed", || driver.called().contains(&"resume".to_owned()))
            .await;
        assert_eq!(stage.status("j0"), JobStatus::Running);
        stage.verb("j0", |guard, key| guard.pause(key));
        stage.until("j0", JobStatus::Paused).await;
        stage.verb("j0", |guard, key| guard.cancel(key, true));
        stage.until("j0", JobStatus::Null).await;
        assert_eq!(
            stage.told(),
            "created running paused running paused running aborting CANCELLED concluded null"
        );
    });
}

fn node(graph: &Graph, name: &str) -> Arc<block::Node> {
    graph
        .add_node(
            Some(name),
            TestStorage::new(1 << 20).driver(),
            NodeOptions::default(),
        )
        .unwrap()
}

fn reads() -> Permissions {
    Permissions {
        need: Perm::CONSISTENT_READ,
        share: Perm::ALL,
    }
}

#[test]
fn a_drained_section_of_the_graph_waits_until_the_job_is_parked() {
    on_main(|stage| async move {
        let graph = &stage.graph;
        let (source, target) = (node(graph, "source"), node(graph, "target"));
        let driver = steady();
        let dynamic: Arc<dyn JobDriver> = Arc::clone(&driver) as _;
        let (key, created) = stage.jobs.lock().create(spec("j0"), &dynamic).unwrap();
        stage.jobs.run(created);
        for node in [&source, &target] {
            let user = stage.jobs.backend_user(key, AttachmentKind::Job);
            assert_eq!(user.describe(), "mirror job 'j0'");
            let blocker = user.blocker();
            assert_eq!(
                blocker.as_deref(),
                Some("block device is in use by block job: mirror")
            );
            graph.attach("", node, reads(), Some(user)).unwrap();
        }
        stage
            .jobs
            .act(|guard| Ok::<_, JobError>(guard.start(key)))
            .unwrap();
        let one = graph.drain(&source, &[]).await.unwrap();
        let info = stage.jobs.query().remove(0);
        assert_eq!(
            (info.status, info.busy, info.paused),
            (JobStatus::Paused, false, true)
        );
        let all = graph.drain_all().await.unwrap();
        drop(one);
        assert_eq!(
            stage.status("j0"),
            JobStatus::Paused,
            "two edges are drained still"
        );
        drop(all);
        stage.until("j0", JobStatus::Running).await;
        stage.jobs.cancel_all(LIMIT).await;
    });
}

#[test]
fn a_job_may_drain_its_own_source_and_end_with_the_section_held() {
    on_main(|stage| async move {
        let source = node(&stage.graph, "source");
        let section = Arc::new(Mutex::new(None));
        let (node, held) = (Arc::clone(&source), Arc::clone(&section));
        let driver = Arc::new(Scripted::new(move |context| {
            let (node, held) = (Arc::clone(&node), Arc::clone(&held));
            async move {
                let own = context.own_drain();
                let drained = context
                    .graph()
                    .run(move |graph| Box::pin(async move { graph.drain(&node, &[]).await }))
                    .await
                    .unwrap()
                    .unwrap();
                *held.lock().unwrap() = Some(drained);
                drop(own);
                Ok(())
            }
        }));
        let dynamic: Arc<dyn JobDriver> = Arc::clone(&driver) as _;
        let manual = JobSpec {
            auto_finalize: false,
            ..spec("j0")
        };
        let (key, created) = stage.jobs.lock().create(manual, &dynamic).unwrap();
        stage.jobs.run(created);
        let user = stage.jobs.backend_user(key, AttachmentKind::Job);
        stage
            .graph
            .attach("", &source, reads(), Some(user))
            .unwrap();
        stage
            .jobs
            .act(|guard| Ok::<_, JobError>(guard.start(key)))
            .unwrap();
        stage.until("j0", JobStatus::Pending).await;
        assert!(stage.jobs.query()[0].paused, "as QEMU shows it");
        let drained = section.lock().unwrap().take();
        drop(drained);
        assert!(!stage.jobs.query()[0].paused);
        stage.verb("j0", |guard, key| guard.finalize(key));
        stage.until("j0", JobStatus::Null).await;
    });
}

#[test]
fn a_notification_wakes_an_idle_body_and_is_not_lost_when_it_comes_early() {
    on_main(|stage| async move {
        let notifier: Arc<Mutex<Option<JobNotifier>>> = Arc::default();
        let rounds = Arc::new(AtomicUsize::new(0));
        let (there, count) = (Arc::clone(&notifier), Arc::clone(&rounds));
        let driver = Arc::new(Scripted::new(move |context| {
            let notifier = context.notifier();
            // Before anybody sleeps.
            notifier.notify();
            *there.lock().unwrap() = Some(notifier);
            let count = Arc::clone(&count);
            async move {
                while !context.is_force_cancelled() {
                    context.idle().await;
                    count.fetch_add(1, SeqCst);
                }
                Ok(())
            }
        }));
        start(&stage.jobs, spec("j0"), &driver);
        for round in 1..4 {
            stage
                .until_true("woken", || rounds.load(SeqCst) == round)
                .await;
            stage
                .until_true("idle again", || !stage.jobs.query()[0].busy)
                .await;
            notifier.lock().unwrap().as_ref().unwrap().notify();
        }
        stage.jobs.cancel_all(LIMIT).await;
    });
}

#[test]
fn the_end_of_the_process_ends_jobs_in_every_state() {
    on_main(|stage| async move {
        let manual = |id: &str| JobSpec {
            auto_finalize: false,
            auto_dismiss: false,
            ..spec(id)
        };
        let dynamic: Arc<dyn JobDriver> = steady();
        let (_, created) = stage
            .jobs
            .lock()
            .create(manual("created"), &dynamic)
            .unwrap();
        stage.jobs.run(created);
        start(&stage.jobs, manual("running"), &steady());
        start(&stage.jobs, manual("paused"), &steady());
        start(&stage.jobs, manual("ready"), &ready());
        start(&stage.jobs, manual("standby"), &ready());
        let done = || Arc::new(Scripted::new(|_| async { Ok(()) }));
        start(&stage.jobs, manual("pending"), &done());
        let concluded = JobSpec {
            auto_finalize: true,
            ..manual("concluded")
        };
        start(&stage.jobs, concluded, &done());
        stage.until("ready", JobStatus::Ready).await;
        stage.until("standby", JobStatus::Ready).await;
        stage.verb("paused", |guard, key| guard.pause(key));
        stage.verb("standby", |guard, key| guard.pause(key));
        for status in [
            JobStatus::Paused,
            JobStatus::Standby,
            JobStatus::Pending,
            JobStatus::Concluded,
        ] {
            stage.until(status.name(), status).await;
        }
        assert_eq!(stage.jobs.cancel_all(LIMIT).await, Vec::<String>::new());
        assert_eq!(stage.jobs.query(), []);
        let told = stage.told();
        assert_eq!(told.matches("CANCELLED").count(), 5, "{told}");
        assert_eq!(told.matches("null").count(), 7, "{told}");
    });
}

#[test]
fn a_job_that_does_not_end_is_named_after_the_limit() {
    on_main(|stage| async move {
        let (release, released) = oneshot::channel::<()>();
        let released = Mutex::new(Some(released));
        let driver = Arc::new(Scripted::new(move |_| {
            let released = released.lock().unwrap().take().unwrap();
            async move {
                released.await.ok();
                Ok(())
            }
        }));
        start(&stage.jobs, spec("stuck"), &driver);
        let left = stage.jobs.cancel_all(Duration::from_millis(5)).await;
        assert_eq!(left, ["stuck"]);
        release.send(()).unwrap();
        assert_eq!(stage.jobs.cancel_all(LIMIT).await, Vec::<String>::new());
    });
}

#[test]
fn a_job_whose_given_home_ends_fails() {
    on_main(|stage| async move {
        let home = Iothread::spawn("shared").unwrap();
        let given = JobSpec {
            home: Some(home.handle().clone()),
            ..spec("j0")
        };
        start(&stage.jobs, given, &ready());
        stage.until("j0", JobStatus::Ready).await;
        home.stop();
        stage.until("j0", JobStatus::Null).await;
        assert!(
            stage.told().ends_with(
                "aborting COMPLETED(The job's iothread ended before the job) concluded null"
            ),
            "{}",
            stage.told()
        );
    });
}

#[test]
fn lookups_of_the_two_families_see_what_they_should() {
    on_main(|stage| async move {
        const CREATE: JobKind = JobKind {
            name: "create",
            block_job: false,
            soft_cancel: SoftCancel::Forces,
            completes: false,
        };
        start(
            &stage.jobs,
            JobSpec {
                id: Some("c".to_owned()),
                ..JobSpec::new(CREATE)
            },
            &steady(),
        );
        start(&stage.jobs, spec("m"), &steady());
        start(
            &stage.jobs,
            JobSpec {
                internal: true,
                ..JobSpec::new(MIRROR)
            },
            &steady(),
        );
        {
            let guard = stage.jobs.lock();
            assert!(guard.find("c").is_ok() && guard.find("m").is_ok());
            assert!(guard.find_block_job("m").is_ok());
            assert_eq!(guard.find("internal"), Err(JobError::NotFound));
            let error = guard.find_block_job("c").unwrap_err();
            assert_eq!(error.to_string(), "Block job 'c' not found");
        }
        let ids: Vec<String> = stage
            .jobs
            .query()
            .iter()
            .map(|job| job.id.to_string())
            .collect();
        assert_eq!(ids, ["m", "c"], "newest first");
        assert_eq!(stage.jobs.query()[0].actively_synced, Some(true));
        stage.jobs.cancel_all(LIMIT).await;
        assert!(!stage.told().is_empty());
    });
}

#[test]
fn speed_and_changes_are_checked_in_order() {
    on_main(|stage| async move {
        let driver = ready();
        let key = start(&stage.jobs, spec("j0"), &driver);
        stage.until("j0", JobStatus::Ready).await;
        let error = stage.jobs.lock().set_speed(key, -1).map(drop).unwrap_err();
        assert_eq!(error, JobError::NegativeSpeed);
        stage.verb("j0", |guard, key| guard.set_speed(key, 1000));
        assert_eq!(stage.jobs.query()[0].speed, 1000);
        let request = stage
            .jobs
            .lock()
            .change(key, Some(JobChange::CopyMode(CopyMode::WriteBlocking)))
            .unwrap();
        assert_eq!(request.apply().unwrap_err().to_string(), "Not now");
        stage.jobs.cancel_all(LIMIT).await;
        let gone = stage.jobs.lock().set_speed(key, -1).map(drop);
        assert_eq!(gone, Err(JobError::NotFound));
    });
}

#[test]
fn a_prepare_that_fails_makes_the_job_fail() {
    on_main(|stage| async move {
        let driver = Scripted::new(|_| async { Ok(()) })
            .with_prepare(|| async { Err(JobFailure::from_errno(libc::EPERM)) });
        start(&stage.jobs, spec("j0"), &Arc::new(driver));
        stage.until("j0", JobStatus::Null).await;
        assert!(
            stage
                .told()
                .ends_with("pending aborting COMPLETED(Operation not permitted) concluded null")
        );
    });
}

#[test]
fn a_sink_may_ask_for_delivery_itself() {
    let main = EventLoop::new("main").unwrap();
    main.block_on(async {
        let graph = Graph::new();
        let slot: Rc<RefCell<Option<MainJobs>>> = Rc::default();
        let count = Rc::new(AtomicUsize::new(0));
        let (there, seen) = (Rc::clone(&slot), Rc::clone(&count));
        let jobs = Jobs::new(graph.handle()).attach_main(Rc::clone(&graph), move |_| {
            seen.fetch_add(1, SeqCst);
            if let Some(jobs) = &*there.borrow() {
                jobs.flush_events();
            }
        });
        *slot.borrow_mut() = Some(jobs.clone());
        let done = Arc::new(AtomicBool::new(false));
        let body = Arc::clone(&done);
        let driver = Scripted::new(move |_| {
            body.store(true, SeqCst);
            async { Ok(()) }
        });
        start(&jobs, spec("j0"), &Arc::new(driver));
        while !jobs.query().is_empty() {
            runtime::yield_now().await;
        }
        jobs.flush_events();
        assert!(done.load(SeqCst));
        assert_eq!(count.load(SeqCst), 7);
        slot.borrow_mut().take();
    });
}
