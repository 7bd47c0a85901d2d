//! What is remembered of jobs that have ended.

use std::sync::Arc;

use super::on_main;
use crate::test_support::{Scripted, spec, start};
use crate::{FailedRequest, IoSide, JobFailure, JobOutcome, JobSpec, JobStatus};

#[test]
fn jobs_that_have_ended_are_remembered_with_their_ends() {
    on_main(|stage| async move {
        let good = Arc::new(Scripted::new(|context| async move {
            context.progress().set_remaining(10);
            context.progress().add_done(10);
            Ok(())
        }));
        start(&stage.jobs, spec("good"), &good);
        stage.until("good", JobStatus::Null).await;

        let failure = JobFailure::from(&block::IoError {
            op: block::IoOp::Write,
            node: "target".into(),
            offset: 65536,
            len: 4096,
            errno: libc::ENOSPC,
        });
        let fails = failure.clone();
        let bad = Arc::new(Scripted::new(move |_| {
            let fails = fails.clone();
            async move { Err(fails) }
        }));
        let kept = JobSpec {
            auto_dismiss: false,
            ..spec("bad")
        };
        start(&stage.jobs, kept, &bad);
        stage.until("bad", JobStatus::Concluded).await;

        let endless = Arc::new(Scripted::new(|context| async move {
            while !context.is_force_cancelled() {
                context.kicked().await;
            }
            Ok(())
        }));
        start(&stage.jobs, spec("endless"), &endless);
        stage.verb("endless", |guard, key| guard.cancel(key, true));
        stage.until("endless", JobStatus::Null).await;

        let internal = JobSpec {
            id: None,
            internal: true,
            ..spec("x")
        };
        start(&stage.jobs, internal, &good);
        stage
            .until_true("the internal job ended", || {
                good.called().iter().filter(|what| *what == "free").count() == 2
            })
            .await;

        let history = stage.jobs.history();
        let ends: Vec<_> = history
            .iter()
            .map(|job| (job.id.as_str(), &job.outcome))
            .collect();
        assert_eq!(
            ends,
            [
                ("good", &JobOutcome::Completed),
                ("bad", &JobOutcome::Failed(failure.clone())),
                ("endless", &JobOutcome::Cancelled),
            ]
        );
        assert_eq!(
            failure.request,
            Some(FailedRequest {
                side: IoSide::Write,
                node: "target".into(),
                offset: 65536,
                len: 4096,
            })
        );
        assert_eq!(
            (history[0].current_progress, history[0].total_progress),
            (10, 10)
        );
        assert!(history.iter().all(|job| job.created <= job.ended));
        // It is told of before it is dismissed, and once.
        stage.verb("bad", |guard, key| guard.dismiss(key));
        stage.until("bad", JobStatus::Null).await;
        assert_eq!(stage.jobs.history().len(), 3);
    });
}
