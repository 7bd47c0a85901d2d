//! Reads that hang keep nobody.

use super::*;

#[test]
fn a_cancel_does_not_wait_for_a_read_that_hangs() {
    with_rig(|rig| async move {
        scribble(&rig, 0..SIZE);
        rig.target.hold(Match::op(IoOp::Read));
        let key = rig.start(rig.spec());
        rig.until(|| rig.target.held() > 0).await;
        rig.jobs.act(|jobs| jobs.cancel(key, true)).expect("cancel");
        rig.until(|| rig.status() == Some(JobStatus::Concluded))
            .await;
        let history = rig.jobs.history();
        assert_eq!(
            history.last().expect("an end").outcome,
            JobOutcome::Cancelled
        );
        // The node is the job's as long as it is read.
        let target = rig.node("dst");
        assert!(rig.graph.check_not_blocked(&target).is_err());
        rig.target.stop_holding();
        rig.target.release_all();
        rig.until(|| rig.graph.check_not_blocked(&target).is_ok())
            .await;
    });
}

#[test]
fn a_drained_section_of_one_node_does_not_wait_for_the_other() {
    with_rig(|rig| async move {
        scribble(&rig, 0..SIZE);
        rig.target.hold(Match::op(IoOp::Read));
        rig.start(rig.spec());
        rig.until(|| rig.target.held() > 0).await;
        let source = rig.node("src");
        let drained = rig.graph.drain(&source, &[]).await;
        drop(drained.expect("nothing of the source is in flight"));
        rig.target.stop_holding();
        rig.target.release_all();
        rig.concluded().await;
        assert_eq!(rig.error(), None);
    });
}

#[test]
fn what_a_request_that_hangs_may_have_written_is_not_decided() {
    with_rig(|rig| async move {
        scribble(&rig, 0..SIZE);
        rig.source.hold_at(Match::op(IoOp::Write), HoldAt::End);
        let write = rig.begin_write(MIB, 512, 7);
        rig.until(|| rig.source.held() > 0).await;
        rig.start(rig.spec());
        rig.concluded().await;
        let found = rig.found();
        assert_eq!((found.differences, found.undecided_bytes), (0, 512));
        assert!(rig.error().is_some());
        rig.source.stop_holding();
        rig.source.release_all();
        write.await;
    });
}

#[test]
fn a_cancel_does_not_wait_for_a_second_look_that_hangs() {
    with_rig(|rig| async move {
        scribble(&rig, 0..SIZE);
        rig.target.hold(Match::op(IoOp::Read).range(MIB..MIB + 512));
        let key = rig.start(rig.spec());
        rig.until(|| rig.target.held() > 0).await;
        rig.until(|| rig.source_was_read_at(MIB)).await;
        rig.begin_write(MIB, 4096, 7).await;
        rig.target.poke(MIB, &[7; 4096]);
        while rig.target.release_one() {}
        // A candidate, which is read again since it was written.
        rig.until(|| rig.target.held() > 0).await;
        rig.jobs.act(|jobs| jobs.cancel(key, true)).expect("cancel");
        rig.until(|| rig.status() == Some(JobStatus::Concluded))
            .await;
        assert!(rig.target.held() > 0, "nobody waited for it");
        let target = rig.node("dst");
        assert!(rig.graph.check_not_blocked(&target).is_err());
        rig.target.release_all();
        rig.until(|| rig.graph.check_not_blocked(&target).is_ok())
            .await;
    });
}

#[test]
fn a_failure_is_told_though_another_read_hangs() {
    with_rig(|rig| async move {
        scribble(&rig, 0..SIZE);
        rig.target.hold(Match::op(IoOp::Read).range(0..512));
        rig.source
            .fail(Match::op(IoOp::Read).range(MIB..MIB + 512), libc::EIO);
        rig.start(rig.spec());
        rig.until(|| rig.status() == Some(JobStatus::Concluded))
            .await;
        assert_eq!(rig.error().as_deref(), Some("Input/output error"));
        assert!(rig.target.held() > 0, "nobody waited for it");
    });
}
