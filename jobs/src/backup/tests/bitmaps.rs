//! Incremental backups, and what becomes of the bitmap.

use std::collections::BTreeSet;

use block::test_storage::Match;
use block::{IoOp, NamedBitmap, NewBitmap};

use crate::backup::{BackupSync, BitmapMode, prepare_backup};

use super::*;

/// Numbers of the clusters that are dirty in a bitmap.
fn dirty(bitmap: &NamedBitmap) -> BTreeSet<u64> {
    let bits = bitmap.bits();
    let clusters = (0..SIZE / CLUSTER).filter(|cluster| bits.is_dirty(cluster * CLUSTER));
    clusters.collect()
}

fn add_bitmap(rig: &Rig) -> Arc<NamedBitmap> {
    let new = NewBitmap {
        name: "b0",
        granularity: Some(CLUSTER as u32),
        enabled: true,
        persistent: false,
    };
    rig.node("src").add_bitmap(&new).expect("a bitmap")
}

fn spec(rig: &Rig, sync: BackupSync, mode: BitmapMode) -> BackupSpec {
    BackupSpec {
        sync,
        bitmap: Some("b0".to_owned()),
        bitmap_mode: Some(mode),
        ..rig.spec()
    }
}

#[test]
fn an_incremental_backup_copies_what_was_written_since_the_last_one() {
    with_rig(|rig| async move {
        let bitmap = add_bitmap(&rig);
        for cluster in [3, 5, 40] {
            rig.write(cluster * CLUSTER + 4096, 512, 7).await;
        }
        let mut spec = rig.spec();
        spec.sync = BackupSync::Incremental;
        spec.bitmap = Some("b0".to_owned());
        rig.start(spec).await;
        assert!(bitmap.is_busy());
        // After the instant: for the next one.
        rig.write(5 * CLUSTER, 512, 8).await;
        rig.write(6 * CLUSTER, 512, 8).await;
        assert_eq!(rig.end().await, None);
        let written: BTreeSet<u64> = rig
            .target
            .ended()
            .iter()
            .filter(|it| it.op == IoOp::Write)
            .flat_map(|it| it.offset / CLUSTER..(it.offset + it.len).div_ceil(CLUSTER))
            .collect();
        assert_eq!(written, BTreeSet::from([3, 5, 40]));
        assert_eq!(rig.target.peek(5 * CLUSTER + 4096, 1), [7]);
        assert_eq!(
            rig.target.peek(5 * CLUSTER, 1)[0],
            rig.instant[5 * CLUSTER as usize]
        );
        assert_eq!(dirty(&bitmap), BTreeSet::from([5, 6]));
        assert!(bitmap.is_recording() && !bitmap.is_busy());
        rig.assert_no_traces();
    });
}

/// One row of the table: P = {1, 2}, S = {2, 9}, and U what was not copied of P. The
/// body has copied cluster 1 when cluster 2 fails, or the job is cancelled.
fn result(sync: BackupSync, mode: BitmapMode, fails: bool) -> BTreeSet<u64> {
    let left = Rc::new(RefCell::new(BTreeSet::new()));
    let result = Rc::clone(&left);
    with_rig(move |rig| async move {
        let bitmap = add_bitmap(&rig);
        for cluster in [1, 2] {
            rig.write(cluster * CLUSTER, 512, 7).await;
        }
        if fails {
            let failing = 2 * CLUSTER..3 * CLUSTER;
            rig.target
                .fail(Match::op(IoOp::Write).range(failing), libc::EIO);
        }
        rig.source
            .hold(Match::op(IoOp::Read).range(CLUSTER..3 * CLUSTER));
        let mut spec = spec(&rig, sync, mode);
        spec.perf.max_workers = 1;
        spec.perf.max_chunk = CLUSTER as i64;
        rig.start(spec).await;
        rig.source.wait_held(1).await;
        rig.write(9 * CLUSTER, 512, 8).await;
        let write = rig.begin_write_on(1, 2 * CLUSTER, 512, 8);
        rig.source.release_all();
        // It fails if its cluster cannot be saved, and is written in part all the same
        // as far as the bitmap knows.
        let _ = write.await;
        rig.wait_for(JobStatus::Null).await;
        assert!(!bitmap.is_busy() && bitmap.is_recording());
        *left.borrow_mut() = dirty(&bitmap);
        rig.assert_no_traces();
    });
    result.borrow().clone()
}

#[test]
fn after_a_success_the_bitmap_has_what_its_mode_says() {
    for sync in [BackupSync::Bitmap, BackupSync::Full] {
        for mode in [BitmapMode::OnSuccess, BitmapMode::Always] {
            assert_eq!(
                result(sync, mode, false),
                BTreeSet::from([2, 9]),
                "{sync:?} {mode:?}"
            );
        }
    }
    let never = result(BackupSync::Bitmap, BitmapMode::Never, false);
    assert_eq!(never, BTreeSet::from([1, 2, 9]));
}

#[test]
fn after_a_failure_the_bitmap_has_what_its_mode_says() {
    for mode in [BitmapMode::OnSuccess, BitmapMode::Never] {
        let left = result(BackupSync::Bitmap, mode, true);
        assert!(
            left.is_superset(&BTreeSet::from([1, 2, 9])),
            "{mode:?}: {left:?}"
        );
        assert!(left.len() == 3, "{mode:?}: {left:?}");
    }
    // Cluster 1 was copied, and not written since.
    let always = result(BackupSync::Bitmap, BitmapMode::Always, true);
    assert_eq!(always, BTreeSet::from([2, 9]));
    let full = result(BackupSync::Full, BitmapMode::Always, true);
    assert!(full.contains(&2) && full.contains(&60), "{full:?}");
    assert!(!full.contains(&1), "{full:?}");
}

#[test]
fn a_cancelled_incremental_loses_nothing() {
    with_rig(|rig| async move {
        let bitmap = add_bitmap(&rig);
        rig.write(CLUSTER, 512, 7).await;
        let mut spec = spec(&rig, BackupSync::Bitmap, BitmapMode::OnSuccess);
        spec.auto_finalize = false;
        let key = rig.start(spec).await;
        rig.wait_for(JobStatus::Pending).await;
        rig.write(2 * CLUSTER, 512, 7).await;
        rig.act(|jobs| jobs.cancel(key, true));
        rig.wait_for(JobStatus::Null).await;
        assert_eq!(dirty(&bitmap), BTreeSet::from([1, 2]));
    });
}

#[test]
fn a_bitmap_in_use_is_refused_and_a_backup_taken_back_leaves_it_as_it_was() {
    with_rig(|rig| async move {
        let bitmap = add_bitmap(&rig);
        rig.write(CLUSTER, 512, 7).await;
        let drained = rig.graph.drain(&rig.node("src"), &[]).await.unwrap();
        let always = spec(&rig, BackupSync::Full, BitmapMode::Always);
        let prepared = prepare_backup(&rig.graph, &rig.jobs, always, &drained).unwrap();
        let again = spec(&rig, BackupSync::Bitmap, BitmapMode::Never);
        let refused = prepare_backup(&rig.graph, &rig.jobs, again, &drained);
        let text = refused.err().map(|error| error.to_string());
        let busy = "Bitmap 'b0' is currently in use by another operation and cannot be used";
        assert_eq!(text.as_deref(), Some(busy));
        prepared.take_back(&drained);
        drop(drained);
        rig.wait_for(JobStatus::Null).await;
        assert_eq!(dirty(&bitmap), BTreeSet::from([1]));
        assert!(!bitmap.is_busy());
    });
}
