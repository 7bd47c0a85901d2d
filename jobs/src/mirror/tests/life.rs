//! Starts, ends and refusals.

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;

use block::runtime;
use block::test_storage::{Ended, Match, TestStorage};
use block::{IoOp, NodeOptions};

use crate::{CopyMode, JobChange, JobStatus};

use super::*;
use crate::mirror::SyncMode;

#[test]
fn a_full_mirror_becomes_ready_and_pivots() {
    with_rig(|rig| async move {
        scribble(&rig.source);
        let key = rig.start(rig.spec()).await;
        rig.jobs.flush_events();
        assert_eq!(
            rig.statuses()[..2],
            [JobStatus::Created, JobStatus::Running],
            "both are told before the answer"
        );
        rig.wait_for(JobStatus::Ready).await;
        let info = rig.jobs.query().remove(0);
        assert_eq!((info.current_progress, info.total_progress), (SIZE, SIZE));
        rig.pivot(key).await;
        assert_eq!(
            rig.statuses(),
            [
                JobStatus::Created,
                JobStatus::Running,
                JobStatus::Ready,
                JobStatus::Waiting,
                JobStatus::Pending,
                JobStatus::Concluded,
                JobStatus::Null,
            ]
        );
        rig.assert_equal();
        rig.assert_on_target();
        rig.write(0, 4096, 9).await;
        assert_eq!(rig.target.peek(0, 1), [9]);
        assert_ne!(rig.source.peek(0, 1), [9]);
    });
}

#[test]
fn the_target_is_flushed_before_the_mirror_is_ready() {
    with_rig(|rig| async move {
        scribble(&rig.source);
        rig.ready(rig.spec()).await;
        let ended = rig.target.ended();
        assert_eq!(ended.last().expect("requests").op, IoOp::Flush);
    });
}

#[test]
fn a_soft_cancel_leaves_a_copy_of_the_moment_and_the_guest_on_the_source() {
    with_rig(|rig| async move {
        scribble(&rig.source);
        let key = rig.ready(rig.spec()).await;
        rig.write(64 * KIB, 4096, 7).await;
        rig.act(|jobs| jobs.cancel(key, false));
        rig.wait_for(JobStatus::Null).await;
        assert_eq!(rig.completed(), Some(None));
        assert!(!rig.was_cancelled());
        rig.assert_on_source();
        rig.assert_equal();
        rig.write(0, 4096, 9).await;
        assert_ne!(rig.target.peek(0, 1), [9]);
    });
}

#[test]
fn a_forced_cancel_at_ready_leaves_the_guest_on_the_source() {
    with_rig(|rig| async move {
        scribble(&rig.source);
        let key = rig.ready(rig.spec()).await;
        rig.act(|jobs| jobs.cancel(key, true));
        rig.wait_for(JobStatus::Null).await;
        assert!(rig.was_cancelled());
        rig.assert_on_source();
    });
}

#[test]
fn a_mirror_can_be_started_again_after_it_was_cancelled() {
    with_rig(|rig| async move {
        scribble(&rig.source);
        for _ in 0..3 {
            let key = rig.ready(rig.spec()).await;
            rig.act(|jobs| jobs.cancel(key, true));
            rig.wait_for(JobStatus::Null).await;
            rig.events.borrow_mut().clear();
        }
        let key = rig.ready(rig.spec()).await;
        rig.pivot(key).await;
        rig.assert_on_target();
        rig.assert_equal();
    });
}

#[test]
fn sizes_that_differ_fail_the_job_and_not_the_command() {
    with_rig(|rig| async move {
        let other = TestStorage::new(SIZE * 2);
        let node = rig
            .graph
            .add_node(Some("big"), other.driver(), NodeOptions::default())
            .expect("node");
        let mut spec = rig.spec();
        spec.target = node;
        rig.start(spec).await;
        rig.wait_for(JobStatus::Null).await;
        assert_eq!(
            rig.completed().expect("an end").as_deref(),
            Some("Source and target image have different sizes")
        );
        assert_eq!(rig.disk.root().name(), "src");
    });
}

#[test]
fn an_empty_disk_is_ready_at_once() {
    with_rig_of(0, |rig| async move {
        let key = rig.ready(rig.spec()).await;
        rig.pivot(key).await;
        rig.assert_on_target();
    });
}

#[test]
fn a_disk_that_ends_within_a_chunk_is_copied_to_its_end() {
    let size = SIZE + 512 * 3;
    with_rig_of(size, |rig| async move {
        scribble(&rig.source);
        let key = rig.ready(rig.spec()).await;
        let info = rig.jobs.query().remove(0);
        assert_eq!((info.current_progress, info.total_progress), (size, size));
        rig.write(size - 512, 512, 3).await;
        rig.pivot(key).await;
        rig.assert_equal();
    });
}

#[test]
fn sync_none_copies_only_what_is_written() {
    with_rig(|rig| async move {
        scribble(&rig.source);
        let mut spec = rig.spec();
        spec.sync = SyncMode::None;
        let key = rig.ready(spec).await;
        let info = rig.jobs.query().remove(0);
        assert_eq!((info.current_progress, info.total_progress), (0, 0));
        rig.write(128 * KIB, 512, 7).await;
        rig.act(|jobs| jobs.cancel(key, false));
        rig.wait_for(JobStatus::Null).await;
        assert!(rig.target.peek(0, 512).iter().all(|b| *b == 0));
        let chunk = 64 * KIB as usize;
        let copied = rig.target.peek(128 * KIB, chunk) == rig.source.peek(128 * KIB, chunk);
        assert!(copied, "the whole chunk that was written");
        assert!(rig.target.peek(192 * KIB, 512).iter().all(|b| *b == 0));
    });
}

#[test]
fn a_sparse_source_leaves_a_sparse_target_and_zeroes_are_not_written() {
    with_rig_of(64 << 20, |rig| async move {
        rig.source.poke(5 << 20, &[1; 4096]);
        rig.source.poke(40 << 20, &[2; 8192]);
        let key = rig.ready(rig.spec()).await;
        rig.pivot(key).await;
        rig.assert_equal();
        let ended = rig.target.ended();
        let written: u64 = ended
            .iter()
            .filter(|e| e.op == IoOp::Write)
            .map(|e| e.len)
            .sum();
        assert_eq!(written, 4096 + 8192);
        assert!(ended.iter().all(|e| e.op != IoOp::WriteZeroes));
        let reads = rig.source.ended();
        let reads = reads.iter().filter(|e| e.op == IoOp::Read).count();
        assert!(reads <= 4, "{reads} reads");
    });
}

#[test]
fn old_data_of_the_target_is_zeroed_where_the_source_is_a_hole() {
    for unmap in [true, false] {
        with_rig(|rig| async move {
            scribble(&rig.target);
            rig.source.poke(64 * KIB, &[5; 4096]);
            let mut spec = rig.spec();
            spec.unmap = unmap;
            let key = rig.ready(spec).await;
            rig.pivot(key).await;
            rig.assert_equal();
            let node = rig.node("dst");
            let extent = node.block_status(SIZE / 2, SIZE / 2).await.expect("status");
            assert_eq!(extent.flags.zero, unmap, "unmapped only if it may be");
        });
    }
}

#[test]
fn granularities_from_512_bytes_to_more_than_the_disk_work() {
    for granularity in [512, 4096, 1 << 20, 64 << 20] {
        with_rig(|rig| async move {
            scribble(&rig.source);
            let mut spec = rig.spec();
            spec.granularity = granularity;
            spec.buf_size = 4096;
            let key = rig.ready(spec).await;
            rig.write(512, 1024, 7).await;
            rig.pivot(key).await;
            rig.assert_equal();
            rig.assert_on_target();
        });
    }
}

#[test]
fn refusals_speak_qemus_words_and_leave_nothing_behind() {
    with_rig(|rig| async move {
        let refused = async |change: &dyn Fn(&mut MirrorSpec)| {
            let mut spec = rig.spec();
            change(&mut spec);
            let error = rig.try_start(spec).await.expect_err("a refusal");
            rig.assert_on_source();
            assert!(rig.jobs.query().is_empty());
            error.to_string()
        };
        let texts = [
            refused(&|s| s.target = s.source.clone()).await,
            refused(&|s| s.granularity = 1000).await,
            refused(&|s| s.sync = SyncMode::Incremental).await,
            refused(&|s| s.filter_node_name = Some("dst".to_owned())).await,
            refused(&|s| s.filter_node_name = Some("9bad".to_owned())).await,
            refused(&|s| s.replaces = Some("nosuch".to_owned())).await,
        ];
        assert_eq!(
            texts,
            [
                "Can't mirror node into itself",
                "Parameter 'granularity' expects a power of 2",
                "Sync mode 'incremental' not supported",
                "Duplicate nodes with node-name='dst'",
                "Invalid node-name: '9bad'",
                "Failed to find node with node-name='nosuch'",
            ]
        );
        assert!(rig.statuses().is_empty(), "none of these made a job");
        assert_eq!(
            refused(&|s| s.job_id = "0bad".to_owned()).await,
            "Invalid job ID '0bad'"
        );
        rig.target.refuse_permissions(true);
        refused(&|_| ()).await;
        rig.jobs.flush_events();
        assert_eq!(rig.statuses(), [JobStatus::Created, JobStatus::Null]);
    });
}

#[test]
fn nodes_of_a_mirror_are_not_for_a_second_one() {
    with_rig(|rig| async move {
        let other = TestStorage::new(SIZE);
        let other = rig
            .graph
            .add_node(Some("other"), other.driver(), NodeOptions::default())
            .expect("node");
        rig.ready(rig.spec()).await;
        let refused = async |source: &Arc<Node>, target: &Arc<Node>| {
            let spec = MirrorSpec::new("j1", Arc::clone(source), Arc::clone(target));
            rig.try_start(spec)
                .await
                .expect_err("a refusal")
                .to_string()
        };
        let (src, dst) = (rig.node("src"), rig.node("dst"));
        assert_eq!(
            refused(&other, &dst).await,
            "Node 'dst' is busy: block device is in use by block job: mirror"
        );
        assert_eq!(
            refused(&other, &src).await,
            "Node 'src' is busy: block device is in use by block job: mirror"
        );
        assert_eq!(refused(&src, &other).await, "Need a root block node");
        assert_eq!(
            refused(&rig.disk.root(), &other).await,
            "Need a root block node"
        );
    });
}

#[test]
fn a_named_filter_is_seen_while_the_job_lives() {
    with_rig(|rig| async move {
        let mut spec = rig.spec();
        spec.filter_node_name = Some("flt".to_owned());
        let key = rig.ready(spec).await;
        assert_eq!(rig.node("flt").driver_name(), "mirror_top");
        assert_eq!(rig.disk.root().name(), "flt");
        rig.graph.detach(&rig.disk);
        let error = rig.graph.blockdev_del("flt").await.expect_err("in use");
        assert_eq!(
            error.to_string(),
            "Node 'flt' is busy: block device is in use by block job: mirror"
        );
        rig.pivot(key).await;
        assert!(rig.graph.find_node("flt").is_err());
    });
}

#[test]
fn a_speed_limit_holds_the_copier_and_lifting_it_lets_it_go() {
    with_rig(|rig| async move {
        scribble(&rig.source);
        let mut spec = rig.spec();
        spec.speed = 64 * KIB as i64;
        spec.buf_size = 64 * KIB as i64;
        let key = rig.start(spec).await;
        rig.target.wait_ended(1).await;
        runtime::sleep(Duration::from_millis(150)).await;
        let info = rig.jobs.query().remove(0);
        assert_eq!(info.status, JobStatus::Running);
        assert!(info.current_progress < SIZE / 2);
        rig.act(|jobs| jobs.set_speed(key, 0));
        rig.wait_for(JobStatus::Ready).await;
        rig.pivot(key).await;
        rig.assert_equal();
    });
}

#[test]
fn a_slow_speed_limit_puts_one_request_in_flight_and_not_a_window() {
    with_rig(|rig| async move {
        scribble(&rig.source);
        rig.source.hold(Match::op(IoOp::Read));
        let mut spec = rig.spec();
        spec.speed = 64 * KIB as i64;
        let key = rig.start(spec).await;
        rig.source.wait_held(1).await;
        // The body begins nothing more, and parks when what it has begun has ended.
        rig.act(|jobs| jobs.pause(key));
        rig.source.release_all();
        rig.wait_for(JobStatus::Paused).await;
        let reads = rig.source.ended();
        let reads = reads.iter().filter(|e| e.op == IoOp::Read).count();
        assert_eq!(reads, 1);
    });
}

#[test]
fn a_speed_limit_does_not_make_the_guest_write_the_target() {
    let size = 1 << 20;
    with_rig_of(size, |rig| async move {
        scribble(&rig.source);
        let mut spec = rig.spec();
        spec.speed = 32 << 20;
        let key = rig.start(spec).await;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let guest = rig.guest(0, move |disk| async move {
            while !stopped.load(SeqCst) {
                for offset in (0..size).step_by(4096) {
                    let data = filled(512, 7);
                    disk.write(offset, data, WriteFlags::default()).await?;
                }
                runtime::yield_now().await;
            }
            Ok(())
        });
        // Several passes over a disk that the guest dirties faster than the limit.
        let copies = |ended: &Ended| ended.op == IoOp::Write && ended.offset == 0;
        // On a busy machine the guest may fall behind, and the mirror be ready.
        let passes = || rig.target.ended().into_iter().filter(copies).count();
        rig.until(|| passes() >= 5 || rig.statuses().contains(&JobStatus::Ready))
            .await;
        let by_guest = |ended: &Ended| ended.op == IoOp::Write && ended.len == 512;
        assert!(!rig.target.ended().iter().any(by_guest));
        // Without the limit it converges.
        rig.act(|jobs| jobs.set_speed(key, 0));
        rig.wait_for(JobStatus::Ready).await;
        stop.store(true, SeqCst);
        guest.await.expect("the guest never fails");
        rig.pivot(key).await;
        rig.assert_equal();
    });
}

#[test]
fn pause_stops_the_copying_and_resume_goes_on_with_it() {
    with_rig(|rig| async move {
        scribble(&rig.source);
        rig.target.hold(Match::op(IoOp::Write));
        let key = rig.start(rig.spec()).await;
        rig.target.wait_held(1).await;
        rig.act(|jobs| jobs.pause(key));
        rig.target.release_all();
        rig.wait_for(JobStatus::Paused).await;
        assert_eq!(rig.target.in_flight() + rig.source.in_flight(), 0);
        rig.write(0, 4096, 7).await;
        assert_eq!(rig.target.in_flight(), 0);
        rig.act(|jobs| jobs.resume(key));
        rig.wait_for(JobStatus::Ready).await;
        rig.pivot(key).await;
        rig.assert_equal();
    });
}

#[test]
fn write_blocking_writes_reach_the_target_before_they_end() {
    with_rig(|rig| async move {
        scribble(&rig.source);
        let mut spec = rig.spec();
        spec.copy_mode = CopyMode::WriteBlocking;
        let key = rig.ready(spec).await;
        rig.until(|| rig.jobs.query()[0].actively_synced == Some(true))
            .await;
        rig.write(4096, 512, 7).await;
        rig.assert_equal();
        rig.write_zeroes(512, 512, true).await;
        rig.assert_equal();
        rig.write_zeroes(SIZE / 2, SIZE / 4, true).await;
        rig.assert_equal();
        rig.write(1 << 20, 3 << 20, 8).await;
        rig.assert_equal();
        assert_eq!(rig.jobs.query()[0].actively_synced, Some(true));
        rig.pivot(key).await;
        rig.assert_equal();
    });
}

#[test]
fn a_large_write_blocking_write_is_on_both_sides_while_the_copier_is_held_off() {
    with_rig(|rig| async move {
        scribble(&rig.source);
        let mut spec = rig.spec();
        spec.copy_mode = CopyMode::WriteBlocking;
        spec.speed = 64 * KIB as i64;
        spec.buf_size = 64 * KIB as i64;
        rig.start(spec).await;
        rig.target.wait_ended(1).await;
        rig.write(SIZE - 64 * KIB, 64 * KIB, 0x99).await;
        let there = rig.target.peek(SIZE - 64 * KIB, 64 * KIB as usize);
        assert!(there.iter().all(|b| *b == 0x99));
    });
}

#[test]
fn copy_mode_can_be_made_blocking_and_not_be_undone() {
    with_rig(|rig| async move {
        scribble(&rig.source);
        let key = rig.ready(rig.spec()).await;
        let change = |mode| {
            let request = rig.jobs.lock().change(key, Some(JobChange::CopyMode(mode)));
            request.expect("the verb is accepted").apply()
        };
        assert!(change(CopyMode::Background).is_ok(), "no change");
        assert!(change(CopyMode::WriteBlocking).is_ok());
        assert!(change(CopyMode::Background).is_err());
        rig.until(|| rig.jobs.query()[0].actively_synced == Some(true))
            .await;
        rig.write(0, 4096, 7).await;
        rig.assert_equal();
        rig.pivot(key).await;
        rig.assert_on_target();
    });
}

#[test]
fn a_job_that_waits_to_be_finalized_does_not_hold_the_guest_and_loses_nothing() {
    with_rig(|rig| async move {
        scribble(&rig.source);
        let mut spec = rig.spec();
        spec.auto_finalize = false;
        let key = rig.ready(spec).await;
        rig.act(|jobs| jobs.complete(key));
        rig.wait_for(JobStatus::Pending).await;
        rig.write(0, 4096, 7).await;
        rig.write(1 << 20, 512, 8).await;
        rig.act(|jobs| jobs.finalize(key));
        rig.wait_for(JobStatus::Null).await;
        rig.assert_on_target();
        rig.assert_equal();
    });
}

#[test]
fn a_writer_that_comes_during_a_mirror_is_seen_by_it() {
    with_rig(|rig| async move {
        scribble(&rig.source);
        rig.graph.detach(&rig.disk);
        let key = rig.ready(rig.spec()).await;
        let late = rig
            .graph
            .attach("late", &rig.node("src"), device(), None)
            .expect("a writer may come");
        let io = rig.guest[2].handle().clone();
        let backend = Arc::clone(&late);
        io.call(move || async move {
            backend
                .write(0, filled(4096, 7), WriteFlags::default())
                .await
        })
        .await
        .expect("iothread")
        .expect("write");
        rig.pivot(key).await;
        rig.assert_equal();
        assert_eq!(late.root().name(), "dst");
    });
}

#[test]
fn what_write_blocking_writes_put_on_the_target_is_flushed_before_the_pivot() {
    with_rig(|rig| async move {
        scribble(&rig.source);
        let mut spec = rig.spec();
        spec.copy_mode = CopyMode::WriteBlocking;
        let key = rig.ready(spec).await;
        for zeroes in [false, true] {
            rig.target.forget_ended();
            if zeroes {
                rig.write_zeroes(SIZE / 2, 64 * KIB, true).await;
            } else {
                rig.write(4096, 4096, 7).await;
            }
            assert_eq!(
                rig.target.ended().len(),
                1,
                "one request of the guest's own"
            );
        }
        rig.pivot(key).await;
        let last = rig.target.ended().pop().expect("requests");
        assert_eq!(last.op, IoOp::Flush);
        rig.assert_equal();
    });
}

#[test]
fn the_source_of_a_backup_is_not_mirrored_to() {
    use crate::backup::{BackupSpec, BackupSync, start_backup};
    with_rig(|rig| async move {
        let node = |name: &str| {
            let driver = TestStorage::new(SIZE).driver();
            let added = rig
                .graph
                .add_node(Some(name), driver, NodeOptions::default());
            added.expect("a node")
        };
        let backup = BackupSpec {
            sync: BackupSync::None,
            filter_node_name: Some("saving".to_owned()),
            ..BackupSpec::new("b0", rig.node("dst"), node("saved"))
        };
        let key = start_backup(&rig.graph, &rig.jobs, backup)
            .await
            .expect("the backup starts");
        let refused = rig.try_start(rig.spec()).await.unwrap_err().to_string();
        assert_eq!(
            refused,
            "Permission conflict on node 'dst': permissions 'write' are both required by an \
             unnamed block device (uses node 'dst' as 'root' child) and unshared by node \
             'saving' (uses node 'dst' as 'file' child)."
        );
        rig.act(|jobs| jobs.cancel(key, true));
        rig.until(|| rig.graph.nodes().len() == 3).await;
    });
}
