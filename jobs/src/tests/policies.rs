//! What a failed request makes of a job.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use super::{LIMIT, on_main};
use crate::test_support::{Scripted, spec, start};
use crate::{ErrorAction, IoSide, IoStatus, JobFailure, JobStatus, OnError};

/// A body whose requests fail with `errnos` one after the other, and which then
/// succeeds. It counts how often it tried.
fn failing(errnos: &'static [i32], policy: OnError) -> (Arc<Scripted>, Arc<AtomicUsize>) {
    let tries = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&tries);
    let driver = Scripted::new(move |context| {
        let tries = Arc::clone(&counted);
        async move {
            for &errno in errnos {
                tries.fetch_add(1, SeqCst);
                match context.io_failed(IoSide::Write, errno, policy) {
                    ErrorAction::Report => return Err(JobFailure::from_errno(errno)),
                    ErrorAction::Ignore | ErrorAction::Stop => {
                        context.sleep(Duration::from_millis(1)).await;
                    }
                }
            }
            Ok(())
        }
    });
    (Arc::new(driver), tries)
}

#[test]
fn report_tells_and_fails_the_job_with_the_errno() {
    on_main(|stage| async move {
        let (driver, tries) = failing(&[libc::ENOSPC, libc::EIO], OnError::Report);
        start(&stage.jobs, spec("j0"), &driver);
        stage.until("j0", JobStatus::Null).await;
        assert_eq!(tries.load(SeqCst), 1);
        assert_eq!(
            stage.told(),
            "created running ERROR(report) aborting COMPLETED(No space left on device) \
             concluded null"
        );
    });
}

#[test]
fn ignore_tells_and_goes_on() {
    on_main(|stage| async move {
        let (driver, tries) = failing(&[libc::ENOSPC, libc::EIO], OnError::Ignore);
        start(&stage.jobs, spec("j0"), &driver);
        stage.until("j0", JobStatus::Null).await;
        assert_eq!(tries.load(SeqCst), 2);
        assert_eq!(
            stage.told(),
            "created running ERROR(ignore) ERROR(ignore) waiting pending COMPLETED concluded null"
        );
    });
}

#[test]
fn stop_parks_for_the_user_and_each_resume_tries_once_more() {
    for policy in [OnError::Stop, OnError::Enospc] {
        on_main(|stage| async move {
            let (driver, tries) = failing(&[libc::ENOSPC, libc::ENOSPC], policy);
            start(&stage.jobs, spec("j0"), &driver);
            for round in 1..=2 {
                stage.until("j0", JobStatus::Paused).await;
                assert_eq!(tries.load(SeqCst), round);
                let info = stage.jobs.query().remove(0);
                assert_eq!(info.io_status, IoStatus::NoSpace);
                assert!(info.paused && !info.busy);
                stage.verb("j0", |guard, key| guard.resume(key));
            }
            stage.until("j0", JobStatus::Null).await;
            assert_eq!(
                stage.told(),
                "created running ERROR(stop) paused running ERROR(stop) paused running \
                 waiting pending COMPLETED concluded null"
            );
            let resumed = driver
                .called()
                .iter()
                .filter(|it| *it == "user_resume")
                .count();
            assert_eq!(resumed, 2);
        });
    }
}

#[test]
fn stop_of_a_job_that_the_user_has_paused_already_needs_one_resume() {
    on_main(|stage| async move {
        let driver = Arc::new(Scripted::new(|context| async move {
            // The user's pause is there before the request has failed.
            while !context.is_pause_requested() {
                context.kicked().await;
            }
            context.io_failed(IoSide::Read, libc::EIO, OnError::Stop);
            context.io_failed(IoSide::Read, libc::ENOSPC, OnError::Stop);
            context.pause_point().await;
            Ok(())
        }));
        let key = start(&stage.jobs, spec("j0"), &driver);
        stage.verb("j0", |guard, key| guard.pause(key));
        // Either in the implicit pause point, before the body, or after its errors.
        stage.until("j0", JobStatus::Paused).await;
        if !driver.called().contains(&"run".to_owned()) {
            stage.verb("j0", |guard, key| guard.resume(key));
            stage
                .until_true("the body runs", || {
                    driver.called().contains(&"run".to_owned())
                })
                .await;
            stage.verb("j0", |guard, key| guard.pause(key));
            stage
                .until_true("it is parked with its errors", || {
                    stage.told().ends_with("ERROR(stop) ERROR(stop) paused")
                })
                .await;
        }
        assert_eq!(stage.pause_count(key), 1);
        assert_eq!(
            stage.jobs.query()[0].io_status,
            IoStatus::Failed,
            "the first"
        );
        stage.verb("j0", |guard, key| guard.resume(key));
        stage.until("j0", JobStatus::Null).await;
        assert!(
            stage
                .told()
                .ends_with("waiting pending COMPLETED concluded null")
        );
    });
}

#[test]
fn a_forced_cancel_of_a_job_that_an_error_has_stopped_ends_it() {
    on_main(|stage| async move {
        let (driver, _) = failing(&[libc::EIO], OnError::Stop);
        let key = start(&stage.jobs, spec("j0"), &driver);
        stage.until("j0", JobStatus::Paused).await;
        let soft = stage.jobs.lock().cancel(key, false).map(drop).unwrap_err();
        assert_eq!(
            soft.to_string(),
            "The block job for device 'j0' is currently paused"
        );
        stage.verb("j0", |guard, key| guard.cancel(key, true));
        stage.until("j0", JobStatus::Null).await;
        assert!(
            stage
                .told()
                .ends_with("paused running aborting CANCELLED concluded null")
        );
        assert!(driver.called().contains(&"user_resume".to_owned()));
        assert_eq!(stage.jobs.cancel_all(LIMIT).await, Vec::<String>::new());
    });
}
