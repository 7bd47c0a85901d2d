//! Pairs of jobs in one transaction, of which one is cancelled, in every pair of states.

use std::sync::Arc;

use super::{LIMIT, Stage, on_main, ready, steady};
use crate::test_support::{Scripted, spec};
use crate::{JobDriver, JobError, JobKey, JobSpec, JobStatus};

const IDS: [&str; 2] = ["a", "b"];

/// A driver that can be brought into `status`.
fn driver_for(status: JobStatus) -> Arc<Scripted> {
    match status {
        JobStatus::Created | JobStatus::Running | JobStatus::Paused => steady(),
        _ => ready(),
    }
}

/// A pair in one transaction, finalized and dismissed by hand, created and not started.
fn pair(stage: &Stage, statuses: [JobStatus; 2]) -> [(JobKey, Arc<Scripted>); 2] {
    let txn = stage.jobs.lock().new_txn();
    let mut ids = IDS.into_iter();
    let members = statuses.map(|status| {
        let driver = driver_for(status);
        let spec = JobSpec {
            txn: Some(txn),
            auto_finalize: false,
            auto_dismiss: false,
            ..spec(ids.next().unwrap())
        };
        let dynamic: Arc<dyn JobDriver> = Arc::clone(&driver) as _;
        let (key, created) = stage.jobs.lock().create(spec, &dynamic).unwrap();
        stage.jobs.run(created);
        (key, driver)
    });
    // Whoever made the transaction does not keep it.
    stage.jobs.lock().close_txn(txn);
    members
}

/// Brings a created job on its way to `status`: some need the other member for it.
async fn bring(stage: &Stage, id: &str, status: JobStatus) {
    if status == JobStatus::Created {
        return;
    }
    let start = |guard: &mut crate::JobsGuard<'_>, key| Ok::<_, JobError>(guard.start(key));
    stage.verb(id, start);
    match status {
        JobStatus::Running => {}
        JobStatus::Paused => stage.verb(id, |guard, key| guard.pause(key)),
        _ => {
            stage.until(id, JobStatus::Ready).await;
            match status {
                JobStatus::Ready => {}
                JobStatus::Standby => stage.verb(id, |guard, key| guard.pause(key)),
                _ => stage.verb(id, |guard, key| guard.complete(key)),
            }
        }
    }
}

/// What is told of a job that is cancelled in `status`.
fn end_of(status: JobStatus) -> &'static str {
    match status {
        JobStatus::Created => "aborting concluded null",
        JobStatus::Paused => "running aborting CANCELLED concluded",
        JobStatus::Standby => "ready aborting CANCELLED concluded",
        _ => "aborting CANCELLED concluded",
    }
}

#[test]
fn a_forced_cancel_of_one_of_a_pair_ends_both_whatever_state_each_is_in() {
    use JobStatus::{Created, Paused, Pending, Ready, Running, Standby, Waiting};
    let alone = [Created, Running, Paused, Ready, Standby, Waiting];
    let mut pairs = vec![[Pending, Pending]];
    for one in alone {
        // One that waits, waits for the other.
        let others = alone.into_iter().filter(|it| [one, *it] != [Waiting; 2]);
        pairs.extend(others.map(|other| [one, other]));
    }
    for statuses in pairs {
        for which in [0, 1] {
            on_main(|stage| async move {
                let members = pair(&stage, statuses);
                for (id, status) in IDS.into_iter().zip(statuses) {
                    bring(&stage, id, status).await;
                }
                for (id, status) in IDS.into_iter().zip(statuses) {
                    stage.until(id, status).await;
                }
                stage.events.borrow_mut().clear();
                stage.verb(IDS[which], |guard, key| guard.cancel(key, true));
                for (id, status) in IDS.into_iter().zip(statuses) {
                    let end = match status {
                        Created => JobStatus::Null,
                        _ => JobStatus::Concluded,
                    };
                    stage.until(id, end).await;
                }
                for (key, _) in &members {
                    stage.jobs.settle(*key, LIMIT).await;
                }
                for (id, status) in IDS.into_iter().zip(statuses) {
                    let told = stage.told_of(id);
                    assert_eq!(told, end_of(status), "{statuses:?} {which} {id}");
                }
                assert_eq!(stage.jobs.cancel_all(LIMIT).await, Vec::<String>::new());
                for (_, driver) in members {
                    let called = driver.called();
                    let count = |hook: &str| called.iter().filter(|it| *it == hook).count();
                    assert_eq!(
                        ["prepare", "commit", "abort", "clean", "free"].map(count),
                        [0, 0, 1, 1, 1],
                        "{statuses:?} {which}: {called:?}"
                    );
                }
            });
        }
    }
}

#[test]
fn a_concluded_pair_is_dismissed_one_by_one_and_not_cancelled() {
    on_main(|stage| async move {
        let members = pair(&stage, [JobStatus::Concluded; 2]);
        for id in IDS {
            bring(&stage, id, JobStatus::Pending).await;
        }
        stage.until("a", JobStatus::Pending).await;
        stage.verb("b", |guard, key| guard.finalize(key));
        for (id, (key, _)) in IDS.into_iter().zip(&members) {
            stage.until(id, JobStatus::Concluded).await;
            assert!(stage.jobs.lock().cancel(*key, true).is_err());
        }
        stage.verb("a", |guard, key| guard.dismiss(key));
        assert_eq!(stage.status("b"), JobStatus::Concluded);
        assert_eq!(stage.jobs.cancel_all(LIMIT).await, Vec::<String>::new());
        for id in IDS {
            assert!(stage.told_of(id).ends_with("COMPLETED concluded null"));
        }
    });
}

/// One member ends of its own accord just when the other is cancelled: whoever is first,
/// both are cancelled.
#[test]
fn a_member_that_ends_first_is_cancelled_with_the_one_that_is_cancelled_then() {
    for ends_first in [false, true] {
        on_main(|stage| async move {
            let members = pair(&stage, [JobStatus::Ready, JobStatus::Running]);
            bring(&stage, "a", JobStatus::Ready).await;
            bring(&stage, "b", JobStatus::Running).await;
            let [(a, _), (b, _)] = &members;
            // Both verbs are there before either body can look.
            let both = |guard: &mut crate::JobsGuard<'_>| {
                let mut effects = Vec::new();
                for complete in [ends_first, !ends_first] {
                    match complete {
                        // A member that was cancelled with the other takes it no more.
                        true => effects.extend(guard.complete(*a)),
                        false => effects.push(guard.cancel(*b, true)?),
                    }
                }
                Ok::<_, JobError>(effects.into_iter().reduce(crate::Effects::and).unwrap())
            };
            stage.jobs.act(both).unwrap();
            for id in IDS {
                stage.until(id, JobStatus::Concluded).await;
            }
            for id in IDS {
                let told = stage.told_of(id);
                assert!(told.ends_with("aborting CANCELLED concluded"), "{told}");
            }
            stage.jobs.cancel_all(LIMIT).await;
        });
    }
}
