//! One job, event by event. Transactions are in `txn_tests`.

use super::job::{JobSettings, JobState, SoftCancel};
use super::machine::{Effect, Event, Hook};
use super::rig::{Rig, eio, mirror, settings};
use super::status::{JobStatus, JobVerb};
use crate::error::JobError;
use crate::event::{IoSide, IoStatus, OnError};
use crate::history::JobOutcome;
use crate::id::{JobId, JobKey};

const END: &str = "COMPLETED concluded null";

/// A mirror that stays in `status` until something happens to it.
fn in_status(rig: &mut Rig, status: JobStatus) -> JobKey {
    let other_waits = status == JobStatus::Waiting;
    let txn = other_waits.then(|| rig.machine.new_txn());
    let key = rig.create(
        JobSettings {
            auto_finalize: false,
            auto_dismiss: false,
            ..mirror("j0")
        },
        txn,
    );
    if other_waits {
        let other = rig.create(settings("other"), txn);
        rig.step(other, Event::Start);
    }
    if status == JobStatus::Created {
        return key;
    }
    rig.step(key, Event::Start);
    match status {
        JobStatus::Running => {}
        JobStatus::Paused => park(rig, key),
        JobStatus::Ready => rig.step(key, Event::Ready),
        JobStatus::Standby => {
            rig.step(key, Event::Ready);
            park(rig, key);
        }
        JobStatus::Waiting | JobStatus::Pending => rig.body_ok(key),
        JobStatus::Aborting => rig.body_fails(key),
        JobStatus::Concluded => {
            rig.body_fails(key);
            rig.main();
        }
        JobStatus::Undefined | JobStatus::Created | JobStatus::Null => unreachable!(),
    }
    assert_eq!(rig.status(key), status);
    key
}

fn park(rig: &mut Rig, key: JobKey) {
    rig.step(key, Event::UserPause);
    rig.step(key, Event::Park);
}

const LISTED: [JobStatus; 9] = [
    JobStatus::Created,
    JobStatus::Running,
    JobStatus::Paused,
    JobStatus::Ready,
    JobStatus::Standby,
    JobStatus::Waiting,
    JobStatus::Pending,
    JobStatus::Aborting,
    JobStatus::Concluded,
];

#[test]
fn every_verb_is_accepted_or_refused_in_every_status_as_the_table_says() {
    for status in LISTED {
        for verb in JobVerb::ALL {
            let mut rig = Rig::default();
            let key = in_status(&mut rig, status);
            let before = format!("{:?}", rig.machine.job(key));
            let result = match verb {
                JobVerb::Cancel => rig.try_step(key, Event::Cancel { force: true }),
                JobVerb::Pause => rig.try_step(key, Event::UserPause),
                JobVerb::Resume => rig.try_step(key, Event::UserResume),
                JobVerb::SetSpeed => rig.try_step(key, Event::SetSpeed(1)),
                JobVerb::Complete => rig.try_step(key, Event::Complete),
                JobVerb::Finalize => rig.try_step(key, Event::Finalize),
                JobVerb::Dismiss => rig.try_step(key, Event::Dismiss),
                JobVerb::Change => rig.machine.check_verb(key, JobVerb::Change).map(drop),
            };
            let parked = matches!(status, JobStatus::Paused | JobStatus::Standby);
            // The check for the user's own pause comes before or after the table.
            let expected = if verb == JobVerb::Resume && !parked {
                Err(JobError::NotPaused)
            } else if verb == JobVerb::Pause && parked {
                Err(JobError::AlreadyPaused)
            } else if verb.allowed_in(status) {
                Ok(())
            } else {
                Err(JobError::Verb {
                    id: "j0".to_owned(),
                    status,
                    verb,
                })
            };
            assert_eq!(result, expected, "{verb} in {status}");
            if result.is_err() {
                let after = format!("{:?}", rig.machine.job(key));
                assert_eq!(before, after, "{verb} in {status} was refused");
            }
        }
    }
}

#[test]
fn every_status_change_is_announced_or_an_illegal_one_panics() {
    for from in LISTED {
        for to in JobStatus::ALL {
            let mut rig = Rig::default();
            let key = in_status(&mut rig, from);
            rig.machine.effects.clear();
            let change = std::panic::AssertUnwindSafe(|| {
                let mut machine = rig.machine.clone();
                machine.set_status(key, to);
                let told = |effect: &&Effect| matches!(effect, Effect::Announce(..));
                machine.effects.iter().filter(told).count()
            });
            match std::panic::catch_unwind(change) {
                Ok(news) if from.may_become(to) => {
                    assert_eq!(news, usize::from(from != to), "{from} -> {to}");
                }
                Ok(news) => {
                    if cfg!(debug_assertions) {
                        panic!("{from} -> {to} did not panic");
                    }
                    assert_eq!(news, 0, "{from} -> {to} was refused");
                }
                Err(_) => assert!(!from.may_become(to), "{from} -> {to} panicked"),
            }
        }
    }
}

#[test]
fn a_job_that_succeeds_tells_the_whole_story_in_order() {
    let mut rig = Rig::default();
    let key = rig.start(settings("j0"));
    assert_eq!(rig.started, [key]);
    rig.body_ok(key);
    let called = rig.main();
    assert_eq!(
        called,
        [(key, Hook::Prepare), (key, Hook::Finish { commit: true })]
    );
    assert_eq!(
        rig.told(key),
        format!("created running waiting pending {END}")
    );
    assert_eq!(rig.ended, [(key, JobOutcome::Completed)]);
    assert_eq!(rig.freed, [key]);
    assert!(rig.machine.txns.is_empty());
}

#[test]
fn a_mirror_is_ready_once_and_completes_when_asked() {
    let mut rig = Rig::default();
    let key = rig.start(mirror("j0"));
    rig.step(key, Event::Ready);
    rig.step(key, Event::Ready);
    rig.step(key, Event::Complete);
    assert!(rig.job(key).complete_requested);
    assert_eq!(rig.hooks, [(key, Hook::Complete)]);
    rig.body_ok(key);
    rig.main();
    assert_eq!(
        rig.told(key),
        format!("created running ready READY waiting pending {END}")
    );
}

#[test]
fn a_body_that_has_just_become_ready_is_not_shown_at_work_until_it_is_woken() {
    let mut rig = Rig::default();
    let key = rig.start(mirror("j0"));
    assert!(rig.job(key).shows_busy());
    rig.step(key, Event::Ready);
    assert!(rig.job(key).busy && !rig.job(key).shows_busy());
    rig.step(key, Event::Sleep { timer: false });
    assert!(!rig.job(key).shows_busy());
    rig.step(key, Event::Complete);
    rig.step(key, Event::WakeSelf);
    assert!(rig.job(key).shows_busy());
}

#[test]
fn a_failed_body_is_aborted_and_completed_with_its_error() {
    let mut rig = Rig::default();
    let key = rig.start(settings("j0"));
    rig.body_fails(key);
    assert_eq!(rig.main(), [(key, Hook::Finish { commit: false })]);
    assert_eq!(
        rig.told(key),
        "created running aborting COMPLETED(Input/output error) concluded null"
    );
}

#[test]
fn a_failed_prepare_is_aborted_and_completed_with_its_error() {
    let mut rig = Rig::default();
    let key = rig.start(settings("j0"));
    rig.body_ok(key);
    assert_eq!(rig.hooks.pop_front(), Some((key, Hook::Prepare)));
    rig.step(key, Event::Prepared(Err(eio())));
    assert_eq!(rig.main(), [(key, Hook::Finish { commit: false })]);
    assert_eq!(
        rig.told(key),
        "created running waiting pending aborting COMPLETED(Input/output error) concluded null"
    );
}

#[test]
fn manual_finalize_and_dismiss_stop_in_pending_and_concluded() {
    let mut rig = Rig::default();
    let key = rig.start(JobSettings {
        auto_finalize: false,
        auto_dismiss: false,
        ..mirror("j0")
    });
    rig.body_ok(key);
    assert!(rig.hooks.is_empty());
    assert_eq!(rig.told(key), "created running waiting pending PENDING");
    rig.step(key, Event::Finalize);
    rig.step(key, Event::Finalize);
    assert_eq!(rig.hooks.len(), 1, "finalized once");
    rig.main();
    assert_eq!(rig.status(key), JobStatus::Concluded);
    assert!(matches!(
        rig.machine.create(settings("j0"), 0, None),
        Err(JobError::IdInUse { .. })
    ));
    rig.step(key, Event::Dismiss);
    assert_eq!(
        rig.told(key),
        format!("created running waiting pending PENDING {END}")
    );
    assert_ne!(rig.create(settings("j0"), None), key);
}

#[test]
fn a_job_that_could_not_be_set_up_vanishes_without_a_hook() {
    let mut rig = Rig::default();
    let key = rig.create(settings("j0"), None);
    rig.step(key, Event::SetUpFailed);
    assert_eq!(rig.told(key), "created null");
    assert!(rig.hooks.is_empty());
    assert_eq!(rig.freed, [key]);
    assert!(rig.machine.txns.is_empty());
    // Whatever comes late for it does nothing.
    rig.step(key, Event::Start);
    rig.step(key, Event::DrainedEnd);
    rig.body_ok(key);
    assert_eq!(rig.told(key), "created null");
}

#[test]
fn an_internal_job_says_nothing_and_another_kind_of_job_says_its_status_only() {
    let mut rig = Rig::default();
    let internal = rig.start(JobSettings {
        id: None,
        ..mirror("unused")
    });
    rig.step(internal, Event::Ready);
    rig.body_ok(internal);
    rig.main();
    assert_eq!(rig.told(internal), "");
    assert_eq!(rig.freed, [internal]);

    let create = rig.start(JobSettings {
        block_job: false,
        ..settings("c")
    });
    rig.body_fails(create);
    rig.main();
    assert_eq!(rig.told(create), "created running aborting concluded null");
}

// Cancelling.

/// What is told after a cancel in each status, and whether the job has to be
/// dismissed.
fn cancelled(status: JobStatus, force: bool) -> (String, JobStatus) {
    let mut rig = Rig::default();
    let key = in_status(&mut rig, status);
    if !force && rig.job(key).user_paused {
        rig.step(key, Event::UserResume);
    }
    rig.news.clear();
    rig.hooks.clear();
    rig.step(key, Event::Cancel { force });
    assert!(
        rig.hooks
            .iter()
            .any(|(_, hook)| matches!(hook, Hook::Cancel { .. }))
    );
    if rig.job(key).busy {
        rig.body_ok(key);
    }
    for (other, job) in rig
        .machine
        .jobs
        .clone()
        .into_iter()
        .filter(|(other, _)| *other != key)
    {
        assert!(job.force_cancel, "the rest of the transaction");
        rig.body_ok(other);
    }
    rig.main();
    (rig.told(key), rig.status(key))
}

#[test]
fn a_forced_cancel_ends_a_job_in_every_status() {
    use JobStatus::*;
    let table = [
        (Created, "aborting concluded null", Null),
        (Running, "aborting CANCELLED concluded", Concluded),
        (Paused, "running aborting CANCELLED concluded", Concluded),
        (Ready, "aborting CANCELLED concluded", Concluded),
        (Standby, "ready aborting CANCELLED concluded", Concluded),
        (Waiting, "aborting CANCELLED concluded", Concluded),
        (Pending, "aborting CANCELLED concluded", Concluded),
    ];
    for (status, told, end) in table {
        assert_eq!(cancelled(status, true), (told.to_owned(), end), "{status}");
    }
}

#[test]
fn a_body_that_is_ready_just_after_a_forced_cancel_is_not_told_to_be() {
    let mut rig = Rig::default();
    let key = rig.start(mirror("j0"));
    rig.step(key, Event::Cancel { force: true });
    rig.step(key, Event::Ready);
    rig.body_ok(key);
    rig.main();
    let told = rig.told(key);
    assert!(!told.to_lowercase().contains("ready"), "{told}");
}

#[test]
fn a_soft_cancel_lets_a_ready_mirror_finish_and_stops_any_other() {
    use JobStatus::*;
    let table = [
        (Created, "aborting concluded null", Null),
        (Running, "aborting CANCELLED concluded", Concluded),
        (Ready, "waiting pending PENDING", Pending),
        (Standby, "waiting pending PENDING", Pending),
        (Pending, "aborting CANCELLED concluded", Concluded),
    ];
    for (status, told, end) in table {
        assert_eq!(cancelled(status, false), (told.to_owned(), end), "{status}");
    }
}

#[test]
fn a_cancelled_job_says_operation_canceled_unless_it_has_a_better_reason() {
    for (result, text) in [
        (Ok(()), "Operation canceled"),
        (Err(eio()), "Input/output error"),
    ] {
        let mut rig = Rig::default();
        let key = rig.start(JobSettings {
            auto_dismiss: false,
            ..settings("j0")
        });
        rig.step(key, Event::Cancel { force: false });
        rig.step(key, Event::BodyReturned(result));
        rig.main();
        assert_eq!(
            rig.told(key),
            "created running aborting CANCELLED concluded"
        );
        assert_eq!(rig.job(key).failure.as_ref().unwrap().message, text);
    }
}

#[test]
fn a_cancel_lifts_the_users_pause_but_not_a_drained_sections() {
    let mut rig = Rig::default();
    let key = in_status(&mut rig, JobStatus::Standby);
    rig.step(key, Event::DrainedBegin);
    assert_eq!(
        rig.refusal(key, Event::Cancel { force: false }),
        "The block job for device 'j0' is currently paused"
    );
    rig.step(key, Event::UserResume);
    rig.step(key, Event::Cancel { force: false });
    assert_eq!(rig.status(key), JobStatus::Standby, "still drained");
    rig.step(key, Event::UserPause);
    rig.step(key, Event::Cancel { force: true });
    let job = rig.job(key);
    assert_eq!((job.pause_count, job.user_paused), (1, false));
    assert_eq!(job.status, JobStatus::Ready, "a forced cancel unparks");
    rig.body_ok(key);
    rig.step(key, Event::DrainedEnd);
    assert_eq!(rig.job(key).pause_count, 0);
}

#[test]
fn a_job_that_is_being_cancelled_cannot_be_completed() {
    let mut rig = Rig::default();
    let key = in_status(&mut rig, JobStatus::Ready);
    rig.step(key, Event::Cancel { force: false });
    assert_eq!(
        rig.refusal(key, Event::Complete),
        "The active block job 'j0' cannot be completed"
    );
    let other = rig.start(settings("other"));
    rig.step(other, Event::Ready);
    assert_eq!(
        rig.refusal(other, Event::Complete),
        "The active block job 'other' cannot be completed"
    );
}

#[test]
fn a_cancel_while_prepare_runs_aborts_once_prepare_has_ended() {
    for result in [Ok(()), Err(eio())] {
        let mut rig = Rig::default();
        let key = in_status(&mut rig, JobStatus::Pending);
        rig.step(key, Event::Finalize);
        rig.step(key, Event::Cancel { force: true });
        assert_eq!(rig.status(key), JobStatus::Aborting);
        assert_eq!(rig.hooks.pop_front(), Some((key, Hook::Prepare)));
        assert_eq!(
            rig.hooks.pop_front(),
            Some((key, Hook::Cancel { force: true }))
        );
        assert!(rig.hooks.is_empty(), "abort waits for the end of prepare");
        rig.step(key, Event::Prepared(result));
        assert_eq!(rig.main(), [(key, Hook::Finish { commit: false })]);
        assert!(rig.told(key).ends_with("aborting CANCELLED concluded"));
        assert_eq!(
            rig.job(key).failure.as_ref().unwrap().message,
            "Operation canceled"
        );
    }
}

#[test]
fn a_cancel_while_commit_runs_comes_too_late() {
    let mut rig = Rig::default();
    let key = in_status(&mut rig, JobStatus::Pending);
    rig.step(key, Event::Finalize);
    rig.hooks.clear();
    rig.step(key, Event::Prepared(Ok(())));
    rig.step(key, Event::Cancel { force: true });
    rig.main();
    assert!(rig.told(key).ends_with("COMPLETED concluded"));
    assert_eq!(rig.job(key).failure, None);
}

// Pausing and waking.

#[test]
fn a_pause_in_created_is_seen_as_running_then_paused() {
    let mut rig = Rig::default();
    let key = rig.create(settings("j0"), None);
    rig.step(key, Event::UserPause);
    assert_eq!(rig.job(key).pause_count, 2);
    rig.step(key, Event::Start);
    rig.step(key, Event::Park);
    assert_eq!(rig.told(key), "created running paused");
    assert!(!rig.job(key).busy);
    rig.step(key, Event::UserResume);
    assert_eq!(rig.told(key), "created running paused running");
    assert!(rig.job(key).busy);
}

#[test]
fn a_job_with_two_drained_edges_goes_on_when_both_sections_have_ended() {
    let mut rig = Rig::default();
    let key = rig.start(settings("j0"));
    rig.step(key, Event::DrainedBegin);
    rig.step(key, Event::DrainedBegin);
    assert!(rig.job(key).is_drain_busy());
    assert_eq!(rig.woken, [key], "kicked once");
    rig.step(key, Event::Park);
    assert_eq!(rig.job(key).pause_count, 2);
    assert!(!rig.job(key).is_drain_busy());
    rig.step(key, Event::DrainedEnd);
    assert_eq!(rig.status(key), JobStatus::Paused);
    rig.step(key, Event::DrainedEnd);
    assert_eq!(rig.status(key), JobStatus::Running);
    assert_eq!(rig.woken, [key, key]);
}

#[test]
fn a_pause_taken_back_before_the_pause_point_parks_nobody() {
    let mut rig = Rig::default();
    let key = rig.start(settings("j0"));
    rig.step(key, Event::DrainedBegin);
    rig.step(key, Event::DrainedEnd);
    rig.step(key, Event::Park);
    assert!(rig.job(key).busy);
    assert_eq!(rig.told(key), "created running");
}

#[test]
fn one_of_several_wakers_wins() {
    let mut rig = Rig::default();
    let key = in_status(&mut rig, JobStatus::Ready);
    rig.step(key, Event::Sleep { timer: true });
    assert!(!rig.job(key).busy);
    rig.step(key, Event::Complete);
    assert!(rig.job(key).busy && !rig.job(key).sleeping);
    rig.step(key, Event::WakeSelf);
    rig.step(key, Event::DrainedBegin);
    assert_eq!(rig.woken, [key, key], "woken, and then kicked once");
}

#[test]
fn a_kick_between_looking_and_sleeping_is_not_lost() {
    let mut rig = Rig::default();
    let key = in_status(&mut rig, JobStatus::Ready);
    rig.step(key, Event::Complete);
    rig.step(key, Event::Sleep { timer: true });
    assert!(
        rig.job(key).busy,
        "does not sleep: there is something to see"
    );
    rig.step(key, Event::Sleep { timer: true });
    assert!(!rig.job(key).busy, "has seen it");
}

#[test]
fn only_a_higher_speed_wakes_a_sleeping_job() {
    for (from, to, wakes) in [
        (10, 20, true),
        (10, 0, true),
        (20, 10, false),
        (10, 10, false),
        (0, 10, false),
    ] {
        let mut rig = Rig::default();
        let (key, effects) = rig.machine.create(settings("j0"), from, None).unwrap();
        rig.absorb(effects);
        rig.step(key, Event::Start);
        rig.step(key, Event::Sleep { timer: true });
        rig.step(key, Event::SetSpeed(to));
        assert_eq!(rig.job(key).busy, wakes, "{from} -> {to}");
        assert_eq!(rig.job(key).limit.speed(), to);
        assert_eq!(rig.hooks, [(key, Hook::SetSpeed(to))]);
    }
}

#[test]
fn a_section_of_the_jobs_own_does_not_wait_for_it() {
    let mut rig = Rig::default();
    let key = rig.start(mirror("j0"));
    rig.step(key, Event::OwnDrainBegin);
    rig.step(key, Event::DrainedBegin);
    assert!(!rig.job(key).is_drain_busy());
    rig.body_ok(key);
    rig.step(key, Event::OwnDrainEnd);
    assert_eq!(rig.job(key).pause_count, 1, "shown as paused until it ends");
    assert!(!rig.job(key).is_drain_busy(), "its body is over");
    rig.step(key, Event::DrainedEnd);
    assert_eq!(rig.job(key).pause_count, 0);
}

#[test]
fn a_body_dropped_while_it_sleeps_or_is_parked_fails_the_job() {
    for status in [JobStatus::Paused, JobStatus::Standby, JobStatus::Running] {
        let mut rig = Rig::default();
        let key = in_status(&mut rig, status);
        if status == JobStatus::Running {
            rig.step(key, Event::Sleep { timer: false });
        }
        rig.body_fails(key);
        rig.main();
        assert_eq!(rig.status(key), JobStatus::Concluded);
    }
}

#[test]
fn nothing_wakes_a_body_that_was_not_started_or_is_over() {
    for status in [JobStatus::Created, JobStatus::Pending, JobStatus::Concluded] {
        let mut rig = Rig::default();
        let key = in_status(&mut rig, status);
        rig.woken.clear();
        for event in [
            Event::WakeSelf,
            Event::DrainedBegin,
            Event::DrainedEnd,
            Event::Park,
            Event::Sleep { timer: true },
            Event::Ready,
        ] {
            rig.step(key, event);
        }
        assert!(rig.woken.is_empty());
        assert!(!rig.job(key).busy);
        assert_eq!(rig.status(key), status);
    }
}

// Errors of requests.

fn flags(job: &JobState) -> (u32, bool, IoStatus) {
    (job.pause_count, job.user_paused, job.io_status)
}

#[test]
fn policy_stop_pauses_for_the_user_and_resume_clears_the_io_status() {
    let mut rig = Rig::default();
    let key = rig.start(mirror("j0"));
    let failed = |errno, policy| Event::IoFailed {
        side: IoSide::Write,
        errno,
        policy,
    };
    rig.step(key, failed(libc::ENOSPC, OnError::Enospc));
    rig.step(key, failed(libc::EIO, OnError::Stop));
    assert_eq!(flags(rig.job(key)), (1, true, IoStatus::NoSpace));
    rig.step(key, Event::Park);
    assert_eq!(rig.refusal(key, Event::UserPause), "Job is already paused");
    rig.step(key, Event::UserResume);
    assert_eq!(flags(rig.job(key)), (0, false, IoStatus::Ok));
    assert_eq!(
        rig.told(key),
        "created running ERROR(write,stop) ERROR(write,stop) paused running"
    );
    assert_eq!(rig.hooks, [(key, Hook::UserResume)]);
}

#[test]
fn policies_report_and_ignore_only_tell() {
    let mut rig = Rig::default();
    let key = rig.start(mirror("j0"));
    for policy in [OnError::Report, OnError::Ignore, OnError::Enospc] {
        rig.step(
            key,
            Event::IoFailed {
                side: IoSide::Read,
                errno: libc::EIO,
                policy,
            },
        );
    }
    assert_eq!(flags(rig.job(key)), (0, false, IoStatus::Ok));
    assert_eq!(
        rig.told(key),
        "created running ERROR(read,report) ERROR(read,ignore) ERROR(read,report)"
    );
}

#[test]
fn an_id_is_unique_over_all_kinds_of_jobs_and_free_after_null() {
    let mut rig = Rig::default();
    let key = rig.create(settings("j0"), None);
    let again = JobSettings {
        id: Some(JobId::new("j0").unwrap()),
        block_job: false,
        soft_cancel: SoftCancel::Forces,
        ..settings("j0")
    };
    let refused = rig.machine.create(again.clone(), 0, None).unwrap_err();
    assert_eq!(refused.to_string(), "Job ID 'j0' already in use");
    rig.step(key, Event::SetUpFailed);
    rig.create(again, None);
}
