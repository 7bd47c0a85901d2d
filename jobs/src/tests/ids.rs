//! Ids: which are well-formed, over what they are unique, and when they are free
//! again. And jobs without one.

use std::sync::Arc;

use super::{LIMIT, on_main, steady};
use crate::test_support::{MIRROR, Scripted, spec, start};
use crate::{
    ErrorAction, IoSide, JobDriver, JobError, JobKind, JobSpec, JobStatus, OnError, SoftCancel,
};

/// Creates a job and takes that back; gives the refusal.
fn refusal(stage: &super::Stage, spec: JobSpec) -> Option<String> {
    let driver: Arc<dyn JobDriver> = steady();
    let created = stage.jobs.lock().create(spec, &driver);
    match created {
        Ok((key, created)) => {
            let undone = stage.jobs.lock().set_up_failed(key);
            stage.jobs.run(created.and(undone));
            None
        }
        Err(error) => Some(error.to_string()),
    }
}

#[test]
fn ids_are_checked_at_creation_and_a_job_needs_one() {
    on_main(|stage| async move {
        let missing = refusal(&stage, JobSpec::new(MIRROR));
        assert_eq!(missing.as_deref(), Some("Invalid job ID ''"));
        for bad in [
            "", "0", "9j", " j", "-j", ".j", "_j", "#j", "j 0", "j/0", "ä",
        ] {
            assert_eq!(
                refusal(&stage, spec(bad)),
                Some(format!("Invalid job ID '{bad}'"))
            );
        }
        for good in ["j", "J0", "a-b.c_d", "z9"] {
            assert_eq!(refusal(&stage, spec(good)), None);
        }
        assert_eq!(refusal(&stage, spec(&"j".repeat(100_000))), None);
        assert_eq!(stage.jobs.query(), []);
    });
}

#[test]
fn an_id_is_taken_over_all_types_until_its_job_is_dismissed_and_then_free() {
    const CREATE: JobKind = JobKind {
        name: "create",
        block_job: false,
        soft_cancel: SoftCancel::Forces,
        completes: false,
    };
    on_main(|stage| async move {
        let manual = JobSpec {
            auto_dismiss: false,
            ..spec("j0")
        };
        let fails = Scripted::new(|_| async { Err(crate::JobFailure::from_errno(libc::EIO)) });
        start(&stage.jobs, manual.clone(), &Arc::new(fails));
        let create = || JobSpec {
            id: Some("j0".to_owned()),
            ..JobSpec::new(CREATE)
        };
        stage.until("j0", JobStatus::Concluded).await;
        for spec in [spec("j0"), create()] {
            let taken = refusal(&stage, spec);
            assert_eq!(taken.as_deref(), Some("Job ID 'j0' already in use"));
        }
        assert_eq!(refusal(&stage, spec("J0")), None, "ids have case");
        stage.verb("j0", |guard, key| guard.dismiss(key));
        assert_eq!(refusal(&stage, create()), None);
        // Free again at once, also by one that could not be set up.
        assert_eq!(refusal(&stage, create()), None);
        start(&stage.jobs, create(), &steady());
        let taken = refusal(&stage, spec("j0"));
        assert_eq!(taken.as_deref(), Some("Job ID 'j0' already in use"));
        stage.jobs.cancel_all(LIMIT).await;
    });
}

/// Whatever an internal job does, nobody is told, nobody finds it, and it takes
/// nobody's id.
#[test]
fn an_internal_job_is_nowhere_to_be_seen() {
    on_main(|stage| async move {
        let internal = JobSpec {
            internal: true,
            auto_finalize: false,
            ..JobSpec::new(MIRROR)
        };
        let driver = Arc::new(Scripted::new(|context| async move {
            let action = context.io_failed(IoSide::Read, libc::EIO, OnError::Ignore);
            assert_eq!(action, ErrorAction::Ignore);
            context.ready();
            while !context.is_complete_requested() {
                context.idle().await;
            }
            Ok(())
        }));
        let key = start(&stage.jobs, internal.clone(), &driver);
        // A second one does not get into its way.
        let other = start(&stage.jobs, internal, &steady());
        assert_eq!(stage.jobs.query(), []);
        for id in ["", "internal"] {
            assert_eq!(stage.jobs.lock().find(id), Err(JobError::NotFound));
            assert!(stage.jobs.lock().find_block_job(id).is_err());
        }
        let asked = |ask: &str| driver.called().iter().any(|call| call == ask);
        stage
            .until_true("it can be completed", || {
                stage.jobs.act(|guard| guard.complete(key)).is_ok()
            })
            .await;
        stage
            .until_true("it can be finalized", || {
                stage.jobs.act(|guard| guard.finalize(key)).is_ok()
            })
            .await;
        stage.until_true("it was freed", || asked("free")).await;
        assert!(asked("commit"));
        stage.jobs.act(|guard| guard.cancel(other, true)).unwrap();
        assert_eq!(stage.jobs.cancel_all(LIMIT).await, Vec::<String>::new());
        assert_eq!(stage.told(), "");
    });
}

#[test]
fn bad_specs_are_refused_and_leave_nothing() {
    on_main(|stage| async move {
        let dynamic: Arc<dyn JobDriver> = steady();
        let refused = |spec: JobSpec| {
            let result = stage.jobs.lock().create(spec, &dynamic);
            result.map(drop).unwrap_err().to_string()
        };
        assert_eq!(refused(JobSpec::new(MIRROR)), "Invalid job ID ''");
        assert_eq!(refused(spec("0bad")), "Invalid job ID '0bad'");
        let internal = JobSpec {
            internal: true,
            ..spec("j0")
        };
        assert_eq!(
            refused(internal),
            "Cannot specify job ID 'j0' for an internal job"
        );
        assert_eq!(Arc::strong_count(&dynamic), 1);
        assert_eq!(stage.jobs.query(), []);
    });
}
