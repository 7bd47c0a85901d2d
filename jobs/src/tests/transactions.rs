//! Jobs that succeed or fail together, with the hooks of their drivers. The order of
//! all of it is in the journal; more histories are in `state::txn_tests`.

use std::sync::{Arc, Mutex};

use futures_channel::oneshot;

use super::{LIMIT, Stage, on_main};
use crate::test_support::{Scripted, spec};
use crate::{JobDriver, JobFailure, JobKey, JobSpec, JobStatus};

/// How a body ends once it is let go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Succeeds,
    Fails,
    /// Is force-cancelled, and then let go.
    Cancelled,
}

struct Member {
    key: JobKey,
    driver: Arc<Scripted>,
    go: Option<oneshot::Sender<()>>,
}

impl Member {
    fn let_go(&mut self) {
        // The body may be over.
        let _ = self.go.take().unwrap().send(());
    }
}

/// A driver whose body waits to be let go, or to be cancelled if it looks.
fn waiting(
    stage: &Stage,
    name: &'static str,
    end: End,
    prepared: Result<(), i32>,
) -> (Arc<Scripted>, oneshot::Sender<()>) {
    let (go, gone) = oneshot::channel::<()>();
    let gone = Mutex::new(Some(gone));
    let driver = Scripted::new(move |_| {
        let gone = gone.lock().unwrap().take().unwrap();
        async move {
            gone.await.ok();
            match end {
                End::Succeeds | End::Cancelled => Ok(()),
                End::Fails => Err(JobFailure::from_errno(libc::EIO)),
            }
        }
    })
    .with_prepare(move || async move { prepared.map_err(JobFailure::from_errno) })
    .with_journal(name, &stage.journal);
    (Arc::new(driver), go)
}

/// Members of one transaction, created before any of them is started, as one
/// command does it.
fn group<const N: usize>(
    stage: &Stage,
    specs: [JobSpec; N],
    drivers: [(Arc<Scripted>, oneshot::Sender<()>); N],
) -> [Member; N] {
    let txn = stage.jobs.lock().new_txn();
    let mut specs = specs.into_iter();
    let members = drivers.map(|(driver, go)| {
        let spec = JobSpec {
            txn: Some(txn),
            ..specs.next().unwrap()
        };
        let dynamic: Arc<dyn JobDriver> = Arc::clone(&driver) as _;
        let (key, created) = stage.jobs.lock().create(spec, &dynamic).unwrap();
        stage.jobs.run(created);
        Member {
            key,
            driver,
            go: Some(go),
        }
    });
    // The creator lets go of it early: its members keep it.
    stage.jobs.lock().close_txn(txn);
    for member in &members {
        let started = stage.jobs.lock().start(member.key);
        stage.jobs.run(started);
    }
    members
}

/// The journal from the first line that is one of `from`, without what comes before.
fn journal_from(stage: &Stage, from: &str) -> Vec<String> {
    let journal = stage.journal.lock().unwrap();
    let at = journal.iter().position(|line| line == from).unwrap();
    journal[at..].to_vec()
}

#[test]
fn prepare_comes_for_all_and_then_each_member_finishes_all_its_steps_before_the_next() {
    on_main(|stage| async move {
        let drivers = ["a", "b", "c"].map(|name| waiting(&stage, name, End::Succeeds, Ok(())));
        let mut members = group(&stage, ["a", "b", "c"].map(spec), drivers);
        for which in [2, 0] {
            members[which].let_go();
        }
        stage.until("a", JobStatus::Waiting).await;
        stage.until("c", JobStatus::Waiting).await;
        assert!(!members[0].driver.called().contains(&"prepare".to_owned()));
        members[1].let_go();
        for id in ["a", "b", "c"] {
            stage.until(id, JobStatus::Null).await;
        }
        let steps = [
            "prepare",
            "commit",
            "clean",
            "COMPLETED",
            "concluded",
            "null",
        ];
        let seen: Vec<String> = journal_from(&stage, "a.prepare")
            .into_iter()
            .filter(|line| {
                let step = line.split(['.', ':']).next_back().unwrap();
                steps.contains(&step)
            })
            .collect();
        let mut expected = vec!["a.prepare", "b.prepare", "c.prepare"]
            .into_iter()
            .map(str::to_owned)
            .collect::<Vec<_>>();
        for name in ["a", "b", "c"] {
            for step in [".commit", ".clean", ":COMPLETED", ":concluded", ":null"] {
                expected.push(format!("{name}{step}"));
            }
        }
        assert_eq!(seen, expected);
    });
}

#[test]
fn a_failed_prepare_is_the_last_one_and_all_members_are_aborted_and_cleaned_in_turn() {
    on_main(|stage| async move {
        let drivers = [
            waiting(&stage, "a", End::Succeeds, Ok(())),
            waiting(&stage, "b", End::Succeeds, Err(libc::EPERM)),
            waiting(&stage, "c", End::Succeeds, Ok(())),
        ];
        let mut members = group(&stage, ["a", "b", "c"].map(spec), drivers);
        for member in &mut members {
            member.let_go();
        }
        for id in ["a", "b", "c"] {
            stage.until(id, JobStatus::Null).await;
        }
        // How news and quick hooks interleave is nobody's business; the steps are.
        let journal = stage.journal.lock().unwrap().clone();
        let has = |line: &str| journal.iter().any(|it| it == line);
        assert!(has("a.prepare") && has("b.prepare") && !has("c.prepare"));
        assert!(has("a.cancel(true)") && has("c.cancel(true)") && !has("b.cancel(true)"));
        let aborting: Vec<&String> = journal
            .iter()
            .filter(|line| line.ends_with(":aborting"))
            .collect();
        assert_eq!(aborting[0], "b:aborting", "the culprit, then its victims");
        let seen: Vec<String> = journal_from(&stage, "a.abort")
            .into_iter()
            .filter(|line| !line.ends_with(".free"))
            .collect();
        let expected = [
            "a.abort",
            "a.clean",
            "a:CANCELLED",
            "a:concluded",
            "a:null",
            "b.abort",
            "b.clean",
            "b:COMPLETED(Operation not permitted)",
            "b:concluded",
            "b:null",
            "c.abort",
            "c.clean",
            "c:CANCELLED",
            "c:concluded",
            "c:null",
        ];
        assert_eq!(seen, expected);
    });
}

#[test]
fn pairs_end_alike_whatever_becomes_of_each_and_whoever_is_first() {
    for ends in [
        [End::Succeeds, End::Succeeds],
        [End::Succeeds, End::Fails],
        [End::Succeeds, End::Cancelled],
        [End::Fails, End::Succeeds],
        [End::Fails, End::Fails],
        [End::Fails, End::Cancelled],
        [End::Cancelled, End::Succeeds],
        [End::Cancelled, End::Fails],
        [End::Cancelled, End::Cancelled],
    ] {
        for order in [[0, 1], [1, 0]] {
            on_main(|stage| async move {
                let drivers = [
                    waiting(&stage, "a", ends[0], Ok(())),
                    waiting(&stage, "b", ends[1], Ok(())),
                ];
                let mut members = group(&stage, ["a", "b"].map(spec), drivers);
                for which in order {
                    if ends[which] == End::Cancelled {
                        let key = members[which].key;
                        // Refused where its transaction has ended it already.
                        let _ = stage.jobs.act(|guard| guard.cancel(key, true));
                    }
                    members[which].let_go();
                    // The other one comes second, for all there is to see.
                    let id = ["a", "b"][which];
                    stage
                        .until_true("the body is over", || {
                            stage.status(id) >= JobStatus::Waiting
                        })
                        .await;
                }
                for id in ["a", "b"] {
                    stage.until(id, JobStatus::Null).await;
                }
                let first_bad = order.into_iter().find(|&it| ends[it] != End::Succeeds);
                for (which, id) in ["a", "b"].into_iter().enumerate() {
                    let told = stage.told_of(id);
                    let end = match first_bad {
                        None => "pending COMPLETED concluded null",
                        Some(culprit) if culprit == which && ends[which] == End::Fails => {
                            "aborting COMPLETED(Input/output error) concluded null"
                        }
                        Some(_) => "aborting CANCELLED concluded null",
                    };
                    assert!(told.ends_with(end), "{ends:?} {order:?} {id}: {told}");
                    let called = members[which].driver.called();
                    let count = |hook: &str| called.iter().filter(|it| *it == hook).count();
                    let committed = usize::from(first_bad.is_none());
                    assert_eq!(count("prepare"), committed, "{called:?}");
                    assert_eq!(count("commit"), committed, "{called:?}");
                    assert_eq!(count("abort"), 1 - committed, "{called:?}");
                    assert_eq!(count("clean"), 1, "{called:?}");
                }
            });
        }
    }
}

#[test]
fn one_member_finalized_by_hand_holds_all_and_finalizing_any_finalizes_all() {
    for which in ["a", "b"] {
        on_main(|stage| async move {
            let drivers = ["a", "b"].map(|name| waiting(&stage, name, End::Succeeds, Ok(())));
            let manual = JobSpec {
                auto_finalize: false,
                ..spec("b")
            };
            let mut members = group(&stage, [spec("a"), manual], drivers);
            for member in &mut members {
                member.let_go();
            }
            stage.until("a", JobStatus::Pending).await;
            stage.until("b", JobStatus::Pending).await;
            assert_eq!(stage.told_of("a"), "created running waiting pending");
            assert_eq!(
                stage.told_of("b"),
                "created running waiting pending PENDING"
            );
            stage.verb(which, |guard, key| guard.finalize(key));
            stage.jobs.settle(members[0].key, LIMIT).await;
            for id in ["a", "b"] {
                assert!(stage.told_of(id).ends_with("COMPLETED concluded null"));
            }
        });
    }
}

#[test]
fn jobs_of_a_group_that_was_not_started_can_be_taken_back() {
    on_main(|stage| async move {
        let txn = stage.jobs.lock().new_txn();
        let member = |id: &str| JobSpec {
            txn: Some(txn),
            ..spec(id)
        };
        let (driver, _go) = waiting(&stage, "a", End::Succeeds, Ok(()));
        let dynamic: Arc<dyn JobDriver> = Arc::clone(&driver) as _;
        let (a, created) = stage.jobs.lock().create(member("a"), &dynamic).unwrap();
        stage.jobs.run(created);
        // The second action of the command fails: the first is cancelled.
        let refused = stage.jobs.lock().create(member("a"), &dynamic);
        assert!(refused.is_err());
        stage.jobs.act(|guard| guard.cancel(a, true)).unwrap();
        stage.jobs.settle(a, LIMIT).await;
        assert_eq!(stage.told(), "created aborting concluded null");
        assert_eq!(driver.called(), ["cancel(true)", "abort", "clean", "free"]);
        // It takes nobody any more, whether it is still there or not.
        let late = stage.jobs.lock().create(member("c"), &dynamic);
        assert!(late.is_err());
        stage.jobs.lock().close_txn(txn);
    });
}

#[test]
fn a_member_with_nothing_to_do_is_aborted_when_another_fails_much_later() {
    on_main(|stage| async move {
        let drivers = [
            waiting(&stage, "a", End::Succeeds, Ok(())),
            waiting(&stage, "b", End::Fails, Ok(())),
        ];
        let mut members = group(&stage, ["a", "b"].map(spec), drivers);
        members[0].let_go();
        stage.until("a", JobStatus::Waiting).await;
        members[1].let_go();
        for id in ["a", "b"] {
            stage.until(id, JobStatus::Null).await;
        }
        assert_eq!(
            stage.told_of("a"),
            "created running waiting aborting CANCELLED concluded null"
        );
        assert!(members[0].driver.called().contains(&"abort".to_owned()));
    });
}
