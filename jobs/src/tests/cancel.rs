//! Cancelling in every state, as a caller that waits for the end sees it; and what
//! races with a cancel.

use std::sync::{Arc, Mutex};

use futures_channel::oneshot;

use super::{LIMIT, Stage, on_main, ready, steady};
use crate::test_support::{Scripted, spec, start};
use crate::{JobDriver, JobKey, JobSpec, JobStatus};

/// Finalized and dismissed by hand.
fn manual(id: &str) -> JobSpec {
    JobSpec {
        auto_finalize: false,
        auto_dismiss: false,
        ..spec(id)
    }
}

/// Brings a job into `status`.
async fn in_status(stage: &Stage, status: JobStatus) -> (JobKey, Arc<Scripted>) {
    let driver = match status {
        JobStatus::Created | JobStatus::Running | JobStatus::Paused => steady(),
        _ => ready(),
    };
    if status == JobStatus::Created {
        let dynamic: Arc<dyn JobDriver> = Arc::clone(&driver) as _;
        let (key, created) = stage.jobs.lock().create(manual("j0"), &dynamic).unwrap();
        stage.jobs.run(created);
        stage.jobs.flush_events();
        return (key, driver);
    }
    let key = start(&stage.jobs, manual("j0"), &driver);
    match status {
        JobStatus::Running => {}
        JobStatus::Paused => stage.verb("j0", |guard, key| guard.pause(key)),
        _ => {
            stage.until("j0", JobStatus::Ready).await;
            match status {
                JobStatus::Standby => stage.verb("j0", |guard, key| guard.pause(key)),
                JobStatus::Pending | JobStatus::Concluded => {
                    stage.verb("j0", |guard, key| guard.complete(key));
                    stage.until("j0", JobStatus::Pending).await;
                    if status == JobStatus::Concluded {
                        stage.verb("j0", |guard, key| guard.finalize(key));
                    }
                }
                _ => {}
            }
        }
    }
    stage.until("j0", status).await;
    (key, driver)
}

#[test]
fn a_forced_cancel_that_is_waited_for_ends_a_job_in_every_state() {
    for (status, told) in [
        (JobStatus::Created, "aborting concluded null"),
        (JobStatus::Running, "aborting CANCELLED concluded"),
        (JobStatus::Paused, "running aborting CANCELLED concluded"),
        (JobStatus::Ready, "aborting CANCELLED concluded"),
        (JobStatus::Standby, "ready aborting CANCELLED concluded"),
        (JobStatus::Pending, "aborting CANCELLED concluded"),
    ] {
        on_main(|stage| async move {
            let (key, driver) = in_status(&stage, status).await;
            stage.events.borrow_mut().clear();
            stage.verb("j0", |guard, key| guard.cancel(key, true));
            let created = status == JobStatus::Created;
            let end = if created {
                JobStatus::Null
            } else {
                JobStatus::Concluded
            };
            stage.until("j0", end).await;
            stage.jobs.settle(key, LIMIT).await;
            assert_eq!(stage.told(), told, "{status}");
            if !created {
                let info = stage.jobs.query().remove(0);
                assert_eq!(info.error.as_deref(), Some("Operation canceled"));
                stage.verb("j0", |guard, key| guard.dismiss(key));
                stage.until("j0", JobStatus::Null).await;
            }
            assert_eq!(stage.jobs.cancel_all(LIMIT).await, Vec::<String>::new());
            let called = driver.called();
            assert!(called.ends_with(&["abort".into(), "clean".into(), "free".into()]));
            assert_eq!(called.contains(&"run".to_owned()), !created, "{status}");
            assert!(!called.contains(&"commit".to_owned()), "{status}");
        });
    }
}

#[test]
fn a_cancel_of_a_concluded_job_is_refused_to_users_and_dismisses_it_for_the_core() {
    on_main(|stage| async move {
        let (key, _) = in_status(&stage, JobStatus::Concluded).await;
        let refused = stage.jobs.lock().cancel(key, true).map(drop).unwrap_err();
        assert_eq!(
            refused.to_string(),
            "Job 'j0' in state 'concluded' cannot accept command verb 'cancel'"
        );
        assert_eq!(stage.jobs.cancel_all(LIMIT).await, Vec::<String>::new());
        assert!(stage.told().ends_with("COMPLETED concluded null"));
    });
}

#[test]
fn a_completion_asked_of_a_job_in_standby_is_done_once_it_is_resumed() {
    on_main(|stage| async move {
        let (key, driver) = in_status(&stage, JobStatus::Standby).await;
        stage.verb("j0", |guard, key| guard.complete(key));
        stage
            .until_true("the driver was told", || {
                driver.called().contains(&"complete".to_owned())
            })
            .await;
        assert_eq!(stage.status("j0"), JobStatus::Standby);
        assert!(!stage.jobs.query()[0].busy);
        // Asked twice, and paused again before the body has looked: still no more
        // than one end.
        stage.verb("j0", |guard, key| guard.complete(key));
        let soft = stage.jobs.lock().cancel(key, false).map(drop).unwrap_err();
        assert_eq!(
            soft.to_string(),
            "The block job for device 'j0' is currently paused"
        );
        stage.verb("j0", |guard, key| guard.resume(key));
        stage.until("j0", JobStatus::Pending).await;
        stage.verb("j0", |guard, key| guard.finalize(key));
        stage.until("j0", JobStatus::Concluded).await;
        assert_eq!(
            stage.told(),
            "created running ready READY standby ready waiting pending PENDING COMPLETED concluded"
        );
        stage.jobs.cancel_all(LIMIT).await;
    });
}

#[test]
fn a_forced_cancel_overrides_a_soft_one_and_is_not_taken_back_by_another() {
    on_main(|stage| async move {
        let (release, released) = oneshot::channel::<()>();
        let released = Mutex::new(Some(released));
        let driver = Arc::new(Scripted::new(move |context| {
            let released = released.lock().unwrap().take().unwrap();
            async move {
                context.ready();
                released.await.ok();
                assert!(context.is_force_cancelled() && !context.is_soft_cancelled());
                Ok(())
            }
        }));
        start(&stage.jobs, spec("j0"), &driver);
        stage.until("j0", JobStatus::Ready).await;
        for force in [false, true, false] {
            stage.verb("j0", |guard, key| guard.cancel(key, force));
        }
        release.send(()).unwrap();
        stage.until("j0", JobStatus::Null).await;
        assert!(stage.told().ends_with("aborting CANCELLED concluded null"));
    });
}

#[test]
fn a_body_that_returns_with_success_after_a_forced_cancel_is_cancelled() {
    on_main(|stage| async move {
        let (release, released) = oneshot::channel::<()>();
        let released = Mutex::new(Some(released));
        // Never looks at its flags.
        let driver = Arc::new(Scripted::new(move |_| {
            let released = released.lock().unwrap().take().unwrap();
            async move {
                released.await.ok();
                Ok(())
            }
        }));
        start(&stage.jobs, manual("j0"), &driver);
        stage.verb("j0", |guard, key| guard.cancel(key, false));
        release.send(()).unwrap();
        stage.until("j0", JobStatus::Concluded).await;
        let info = stage.jobs.query().remove(0);
        assert_eq!(info.error.as_deref(), Some("Operation canceled"));
        assert_eq!(stage.told(), "created running aborting CANCELLED concluded");
        stage.jobs.cancel_all(LIMIT).await;
    });
}
