//! Jobs that succeed or fail together.

use super::job::JobSettings;
use super::machine::{Event, Hook};
use super::rig::{Rig, eio, settings};
use super::status::JobStatus;
use crate::error::JobError;
use crate::id::JobKey;

const COMMIT: Hook = Hook::Finish { commit: true };
const ABORT: Hook = Hook::Finish { commit: false };

const SUCCESS: &str = "created running waiting pending COMPLETED concluded null";
const CANCELLED: &str = "created running aborting CANCELLED concluded null";
const FAILED: &str = "created running aborting COMPLETED(Input/output error) concluded null";

fn pair(rig: &mut Rig) -> (JobKey, JobKey) {
    pair_of(rig, settings("ja"), settings("jb"))
}

fn pair_of(rig: &mut Rig, a: JobSettings, b: JobSettings) -> (JobKey, JobKey) {
    let txn = rig.machine.new_txn();
    let a = rig.create(a, Some(txn));
    let b = rig.create(b, Some(txn));
    rig.step(a, Event::Start);
    rig.step(b, Event::Start);
    (a, b)
}

#[test]
fn both_succeed_and_each_finishes_all_its_steps_before_the_next() {
    let mut rig = Rig::default();
    let (a, b) = pair(&mut rig);
    rig.body_ok(b);
    assert_eq!(rig.status(b), JobStatus::Waiting);
    rig.body_ok(a);
    let called = rig.main();
    assert_eq!(
        called,
        [
            (a, Hook::Prepare),
            (b, Hook::Prepare),
            (a, COMMIT),
            (b, COMMIT)
        ]
    );
    assert_eq!(rig.told(a), SUCCESS);
    assert_eq!(rig.told(b), SUCCESS);
    let order: Vec<JobKey> = rig.news[rig.news.len() - 6..]
        .iter()
        .map(|(key, _)| *key)
        .collect();
    assert_eq!(order, [a, a, a, b, b, b]);
    assert!(rig.machine.txns.is_empty());
}

#[test]
fn one_that_fails_takes_a_running_one_with_it() {
    let mut rig = Rig::default();
    let (a, b) = pair(&mut rig);
    rig.body_fails(a);
    assert!(rig.job(b).force_cancel);
    assert_eq!(rig.woken, [b]);
    assert!(
        !rig.hooks.iter().any(|(_, hook)| *hook == ABORT),
        "nobody is cleaned up before all bodies are over"
    );
    rig.body_ok(b);
    assert_eq!(rig.main(), [(a, ABORT), (b, ABORT)]);
    assert_eq!(rig.told(a), FAILED);
    assert_eq!(rig.told(b), CANCELLED);
}

#[test]
fn one_that_fails_takes_a_waiting_one_with_it() {
    let mut rig = Rig::default();
    let (a, b) = pair(&mut rig);
    rig.body_ok(a);
    rig.body_fails(b);
    assert_eq!(rig.main(), [(a, ABORT), (b, ABORT)]);
    assert_eq!(
        rig.told(a),
        "created running waiting aborting CANCELLED concluded null"
    );
    assert_eq!(rig.told(b), FAILED);
}

#[test]
fn one_that_fails_takes_a_parked_one_and_a_created_one_with_it() {
    let mut rig = Rig::default();
    let txn = rig.machine.new_txn();
    let keys = ["ja", "jb", "jc"].map(|id| rig.create(settings(id), Some(txn)));
    let [a, b, c] = keys;
    rig.step(a, Event::Start);
    rig.step(b, Event::Start);
    rig.step(b, Event::DrainedBegin);
    rig.step(b, Event::Park);
    rig.body_fails(a);
    assert!(rig.job(b).busy, "unparked to run to its end");
    rig.step(c, Event::Start);
    assert_eq!(rig.started, [a, b], "its transaction has failed before");
    rig.body_ok(b);
    rig.main();
    assert_eq!(rig.told(a), FAILED);
    assert_eq!(
        rig.told(b),
        "created running paused running aborting CANCELLED concluded null"
    );
    assert_eq!(rig.told(c), "created aborting concluded null");
    assert_eq!(rig.freed, keys);
}

#[test]
fn both_fail_and_each_tells_its_own_error_unless_it_was_a_victim_first() {
    let mut rig = Rig::default();
    let (a, b) = pair(&mut rig);
    rig.body_fails(a);
    rig.body_fails(b);
    rig.main();
    assert_eq!(rig.told(a), FAILED);
    // Force-cancelled by the time it failed: a victim.
    assert_eq!(rig.told(b), CANCELLED);
}

#[test]
fn a_cancel_of_one_cancels_both() {
    let mut rig = Rig::default();
    let (a, b) = pair(&mut rig);
    rig.step(b, Event::Cancel { force: true });
    assert!(!rig.job(a).force_cancel, "its body has not returned yet");
    rig.body_ok(b);
    rig.body_ok(a);
    rig.main();
    assert_eq!(rig.told(a), CANCELLED);
    assert_eq!(rig.told(b), CANCELLED);
}

#[test]
fn a_cancel_of_a_waiting_one_cancels_both() {
    let mut rig = Rig::default();
    let (a, b) = pair(&mut rig);
    rig.body_ok(a);
    rig.step(a, Event::Cancel { force: true });
    assert_eq!(rig.status(a), JobStatus::Aborting);
    assert!(rig.job(b).force_cancel);
    // The kick found a body that was just returning.
    rig.body_ok(b);
    rig.main();
    assert!(rig.told(a).ends_with("aborting CANCELLED concluded null"));
    assert_eq!(rig.told(b), CANCELLED);
}

#[test]
fn a_prepare_that_fails_aborts_those_that_were_prepared_too() {
    for culprit in [0, 1] {
        let mut rig = Rig::default();
        let (a, b) = pair(&mut rig);
        rig.body_ok(a);
        rig.body_ok(b);
        for (n, key) in [a, b].into_iter().enumerate().take(culprit + 1) {
            assert_eq!(rig.hooks.pop_front(), Some((key, Hook::Prepare)));
            let result = if n == culprit { Err(eio()) } else { Ok(()) };
            rig.step(key, Event::Prepared(result));
        }
        assert_eq!(rig.main(), [(a, ABORT), (b, ABORT)]);
        let ends = [a, b].map(|key| rig.told(key).contains("CANCELLED"));
        assert_eq!(ends, [culprit != 0, culprit != 1], "victims are cancelled");
    }
}

#[test]
fn one_that_wants_to_be_finalized_by_hand_holds_all_and_any_may_be_finalized() {
    for which in [0, 1] {
        let mut rig = Rig::default();
        let manual = JobSettings {
            auto_finalize: false,
            auto_dismiss: false,
            ..settings("ja")
        };
        let keys = pair_of(&mut rig, manual, settings("jb"));
        let keys = [keys.0, keys.1];
        for key in keys {
            rig.body_ok(key);
        }
        assert!(rig.hooks.is_empty());
        assert_eq!(rig.told(keys[0]), "created running waiting pending PENDING");
        assert_eq!(rig.told(keys[1]), "created running waiting pending");
        rig.step(keys[which], Event::Finalize);
        rig.main();
        assert_eq!(rig.status(keys[0]), JobStatus::Concluded);
        assert_eq!(rig.status(keys[1]), JobStatus::Null);
    }
}

#[test]
fn a_cancel_of_a_pending_one_cancels_both() {
    let mut rig = Rig::default();
    let manual = JobSettings {
        auto_finalize: false,
        ..settings("ja")
    };
    let (a, b) = pair_of(&mut rig, manual, settings("jb"));
    rig.body_ok(a);
    rig.body_ok(b);
    rig.step(b, Event::Cancel { force: false });
    assert_eq!(rig.main(), [(a, ABORT), (b, ABORT)]);
    for key in [a, b] {
        assert!(
            rig.told(key).ends_with("aborting CANCELLED concluded null"),
            "{}",
            rig.told(key)
        );
    }
}

#[test]
fn a_cancel_of_one_while_another_commits_comes_too_late() {
    let mut rig = Rig::default();
    let (a, b) = pair(&mut rig);
    rig.body_ok(a);
    rig.body_ok(b);
    for key in [a, b] {
        assert_eq!(rig.hooks.pop_front(), Some((key, Hook::Prepare)));
        rig.step(key, Event::Prepared(Ok(())));
    }
    assert_eq!(rig.hooks.pop_front(), Some((a, COMMIT)));
    rig.step(b, Event::Cancel { force: true });
    rig.step(a, Event::Finished);
    rig.main();
    assert_eq!(rig.told(a), SUCCESS);
    assert_eq!(rig.told(b), SUCCESS);
}

#[test]
fn one_that_could_not_be_set_up_no_longer_holds_the_others() {
    let mut rig = Rig::default();
    let txn = rig.machine.new_txn();
    let a = rig.create(settings("ja"), Some(txn));
    let b = rig.create(settings("jb"), Some(txn));
    rig.step(a, Event::Start);
    rig.body_ok(a);
    rig.step(b, Event::SetUpFailed);
    rig.main();
    assert_eq!(rig.told(a), SUCCESS);
    assert_eq!(rig.told(b), "created null");
}

#[test]
fn a_transaction_takes_no_member_once_it_ends_and_one_without_members_can_be_closed() {
    let mut rig = Rig::default();
    let txn = rig.machine.new_txn();
    let a = rig.create(settings("ja"), Some(txn));
    rig.step(a, Event::Start);
    rig.body_ok(a);
    assert_eq!(
        rig.machine.create(settings("jb"), 0, Some(txn)).map(drop),
        Err(JobError::TxnClosed)
    );
    rig.machine.close_txn(txn);
    rig.main();
    assert_eq!(rig.told(a), SUCCESS);
    let empty = rig.machine.new_txn();
    rig.machine.close_txn(empty);
    assert!(rig.machine.txns.is_empty());
}
