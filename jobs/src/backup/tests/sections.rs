//! Drained sections of somebody else's.

use block::test_storage::Match;
use block::{CbwPolicy, GraphError, IoOp, OnCbwError};

use crate::backup::BackupSync;

use super::*;

/// Longest that a section waits which cannot be had.
const SHORTLY: Duration = Duration::from_millis(50);

/// A backup of which only the guest's requests copy something.
async fn of_new_writes(rig: &Rig, timeout: Option<Duration>) -> JobKey {
    let spec = BackupSpec {
        sync: BackupSync::None,
        policy: CbwPolicy {
            on_error: OnCbwError::BreakGuestWrite,
            timeout,
        },
        ..rig.spec()
    };
    rig.start(spec).await
}

#[test]
fn a_section_of_the_target_holds_requests_of_the_guest_that_would_be_copied_there() {
    with_rig(|rig| async move {
        let key = of_new_writes(&rig, None).await;
        let section = rig.graph.drain(&rig.node("dst"), &[]).await;
        let section = section.expect("nothing is in flight");
        rig.target.forget_ended();
        let writes = [0, CLUSTER, SIZE - 4096].map(|at| rig.begin_write(at, 4096, 7));
        // They have been begun by the time that this comes back from their thread.
        let begun = rig.guest[0].handle().call(|| async {});
        begun.await.expect("the iothread lives");
        assert!(rig.disk.is_drained());
        assert!(writes.iter().all(|write| !write.is_finished()));
        assert_eq!(rig.target.in_flight() + rig.target.ended().len(), 0);
        assert_eq!(rig.source.peek(0, 1)[0], rig.instant[0]);
        drop(section);
        for write in writes {
            write.await.expect("a guest write succeeds");
        }
        assert_eq!(rig.target.peek(0, 4096)[..], rig.instant[..4096]);
        rig.act(|jobs| jobs.cancel(key, true));
        rig.wait_for(JobStatus::Null).await;
    });
}

#[test]
fn a_section_of_the_target_waits_for_copies_that_guests_wait_for() {
    with_rig(|rig| async move {
        let key = of_new_writes(&rig, None).await;
        rig.target.hold(Match::op(IoOp::Write));
        let write = rig.begin_write(0, 4096, 7);
        rig.target.wait_held(1).await;
        let target = rig.node("dst");
        let section = rig.graph.drain_within(&target, &[], SHORTLY).await;
        assert!(matches!(section, Err(GraphError::DrainTimeout { .. })));
        let there = Rc::clone(&rig);
        let section = runtime::spawn_local(async move {
            let target = there.node("dst");
            there.graph.drain_within(&target, &[], LIMIT).await
        });
        rig.until(|| rig.disk.is_drained()).await;
        rig.target.release_all();
        let section = section.await.expect("it has ended");
        assert_eq!(rig.target.in_flight(), 0);
        drop(section);
        write.await.expect("a guest write succeeds");
        rig.act(|jobs| jobs.cancel(key, true));
        rig.wait_for(JobStatus::Null).await;
    });
}

#[test]
fn a_section_of_the_target_holds_the_guest_no_longer_than_its_own_requests_may_wait() {
    with_rig(|rig| async move {
        let key = of_new_writes(&rig, Some(Duration::from_millis(1))).await;
        rig.target.hold(Match::op(IoOp::Write));
        let write = rig.begin_write(0, 4096, 7);
        rig.target.wait_held(1).await;
        let error = write.await.expect_err("nobody waits for the copy");
        assert_eq!(error.errno, libc::ETIMEDOUT);
        // Its copy is still waited for, but not with the guest held for long.
        let target = rig.node("dst");
        let section = rig.graph.drain_within(&target, &[], LIMIT).await;
        let given_up = GraphError::to_string(&section.expect_err("the copy is under way"));
        assert!(given_up.contains("are held no longer"), "{given_up}");
        assert!(!rig.disk.is_drained());
        assert_eq!(rig.target.in_flight(), 1);
        rig.target.release_all();
        rig.until(|| rig.target.in_flight() == 0).await;
        // What ends just now may be seen a moment later.
        while rig.graph.drain(&target, &[]).await.is_err() {
            runtime::sleep(Duration::from_millis(1)).await;
        }
        rig.act(|jobs| jobs.cancel(key, true));
        rig.wait_for(JobStatus::Null).await;
    });
}

#[test]
fn a_section_of_both_disks_does_not_wait_for_itself() {
    with_rig(|rig| async move {
        rig.start(rig.spec()).await;
        let mut writes = Vec::new();
        for n in 0..32 {
            let names = if n % 2 == 0 {
                ["src", "dst"]
            } else {
                ["dst", "src"]
            };
            writes.push(rig.begin_write_on(n % 4, n as u64 * CLUSTER, 4096, 7));
            let [first, second] = names.map(|name| rig.node(name));
            let first = rig.graph.drain_within(&first, &[], LIMIT).await;
            let second = rig.graph.drain_within(&second, &[], LIMIT).await;
            assert!(first.is_ok() && second.is_ok());
        }
        for write in writes {
            write.await.expect("a guest write succeeds");
        }
        assert_eq!(rig.end().await, None);
        rig.assert_instant();
    });
}
