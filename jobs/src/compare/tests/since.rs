//! Finished backups whose disk goes on being written: a bitmap says what is not compared.

use block::{BitmapChange, NamedBitmap, NewBitmap};

use super::*;
use crate::compare::skip::{Piece, Skip};

const CHUNK: u64 = 4096;

fn add_bitmap(rig: &Rig) -> Arc<NamedBitmap> {
    let new = NewBitmap {
        name: "since",
        granularity: Some(CHUNK as u32),
        enabled: true,
        persistent: false,
    };
    rig.node("src").add_bitmap(&new).expect("a bitmap")
}

fn spec(rig: &Rig) -> CompareSpec {
    CompareSpec {
        bitmap: Some("since".to_owned()),
        ..rig.spec()
    }
}

#[test]
fn what_was_written_since_is_left_out_and_damage_is_found() {
    with_rig(|rig| async move {
        scribble(&rig, 0..SIZE);
        let bitmap = add_bitmap(&rig);
        rig.begin_write(MIB, 512, 0).await;
        rig.begin_write(2 * MIB, 256 * KIB, 0).await;
        rig.target.poke(MIB - 1, &[0]);
        // In what is not compared.
        rig.target.poke(2 * MIB + 512, &[0]);
        rig.target.poke(3 * MIB, &[0]);
        rig.source.forget_ended();
        rig.start(spec(&rig));
        assert!(bitmap.is_busy());
        rig.concluded().await;
        assert_eq!(rig.error(), None);
        let found = rig.found();
        assert_eq!(
            found.ranges,
            [MIB - 512..MIB, 3 * MIB..3 * MIB + 512],
            "{found:?}"
        );
        assert_eq!(found.skipped_bytes, Some(CHUNK + 256 * KIB));
        assert!(found.is_complete && !bitmap.is_busy());
        assert_eq!(bitmap.bits().count_bytes(), CHUNK + 256 * KIB);
        let ended = rig.source.ended();
        let mut reads = ended.iter().filter(|it| it.op == IoOp::Read);
        assert!(
            reads.all(|it| it.offset + it.len <= 2 * MIB || it.offset >= 2 * MIB + 256 * KIB),
            "what is long is not read"
        );
    });
}

#[test]
fn what_is_written_between_the_two_reads_is_left_out() {
    with_rig(|rig| async move {
        scribble(&rig, 0..SIZE);
        add_bitmap(&rig);
        rig.source.hold(Match::op(IoOp::Read).range(MIB..MIB + 512));
        rig.start(spec(&rig));
        rig.until(|| rig.source.held() > 0).await;
        rig.until(|| rig.target_reads_at(MIB) > 0).await;
        rig.begin_write(MIB, 512, 0).await;
        rig.source.stop_holding();
        rig.source.release_all();
        rig.concluded().await;
        assert_eq!((rig.found().differences, rig.error()), (0, None));
        assert_eq!(rig.found().skipped_bytes, Some(CHUNK));
    });
}

#[test]
fn a_write_that_ends_while_candidates_are_settled_is_left_out() {
    with_rig(|rig| async move {
        scribble(&rig, 0..SIZE);
        add_bitmap(&rig);
        // On the disk, and in no bitmap yet.
        rig.source.hold_at(Match::op(IoOp::Write), HoldAt::End);
        let write = rig.begin_write(MIB, 512, 0);
        rig.until(|| rig.source.held() > 0).await;
        rig.target.poke(2 * MIB, &[0]);
        rig.start(spec(&rig));
        // The section of the first candidates waits for it.
        rig.until(|| rig.disk.is_drained()).await;
        rig.source.stop_holding();
        rig.source.release_all();
        write.await;
        rig.concluded().await;
        assert_eq!(rig.error(), None);
        assert_eq!(rig.found().ranges, one(2 * MIB..2 * MIB + 512));
        // The rest of its chunk was found to be the same before.
        assert_eq!(rig.found().skipped_bytes, Some(512));
    });
}

#[test]
fn places_that_are_written_all_the_time_are_left_out_at_once() {
    with_rig(|rig| async move {
        scribble(&rig, 0..SIZE);
        add_bitmap(&rig);
        rig.target.poke(2 * MIB, &[0]);
        let writer = {
            let (rig, mut byte) = (Rc::clone(&rig), 0u8);
            runtime::spawn_local(async move {
                while rig.status() != Some(JobStatus::Concluded) {
                    // Never what the target has there.
                    byte = byte.wrapping_add(2);
                    rig.begin_write(3 * MIB, CHUNK, byte).await;
                }
            })
        };
        rig.start(spec(&rig));
        rig.concluded().await;
        writer.await;
        let found = rig.found();
        assert_eq!(rig.error(), None, "{found:?}");
        assert_eq!(found.ranges, one(2 * MIB..2 * MIB + 512));
        assert_eq!(found.undecided_bytes, 0);
    });
}

#[test]
fn what_is_left_out_and_cannot_be_read_is_not_undecided() {
    with_rig(|rig| async move {
        scribble(&rig, 0..SIZE);
        add_bitmap(&rig);
        rig.begin_write(MIB, 512, 0).await;
        rig.source
            .fail(Match::op(IoOp::Read).range(MIB..MIB + 512), libc::EIO);
        rig.start(CompareSpec {
            on_source_error: OnError::Ignore,
            ..spec(&rig)
        });
        rig.concluded().await;
        let found = rig.found();
        assert!(rig.error().is_some() && found.undecided_bytes > 0);
        assert!(found.undecided_bytes.is_multiple_of(CHUNK));
        assert_eq!(found.skipped_bytes, Some(CHUNK));
    });
}

#[test]
fn a_bitmap_under_a_filter_of_the_source_will_do() {
    with_rig(|rig| async move {
        scribble(&rig, 0..SIZE);
        add_bitmap(&rig);
        // Its filter is where the guest's disk is.
        rig.mirror().await;
        rig.start(spec(&rig));
        rig.concluded().await;
        assert_eq!(rig.error(), None);
        assert_eq!(rig.found().skipped_bytes, Some(0));
    });
}

#[test]
fn a_bitmap_that_cannot_tell_is_refused_and_left_as_it_was() {
    with_rig(|rig| async move {
        let refused = |spec| start_compare(&rig.graph, &rig.jobs, spec).expect_err("refused");
        let error = refused(spec(&rig));
        assert!(matches!(error, CompareError::NoSuchBitmap(_)), "{error}");
        let bitmap = add_bitmap(&rig);
        BitmapChange::disable(&bitmap).expect("disable").commit();
        let error = refused(spec(&rig));
        assert!(matches!(error, CompareError::NotRecording(_)), "{error}");
        assert!(!bitmap.is_busy());
        BitmapChange::enable(&bitmap).expect("enable").commit();
        let hold = bitmap.hold().expect("it is free");
        let error = refused(spec(&rig));
        assert!(matches!(error, CompareError::NamedBitmap(_)), "{error}");
        assert!(bitmap.is_busy(), "by whom it was");
        drop(hold);
        // A later mistake.
        let error = refused(CompareSpec {
            speed: -1,
            ..spec(&rig)
        });
        assert!(matches!(error, CompareError::Job(_)), "{error}");
        assert!(!bitmap.is_busy());
    });
}

#[test]
fn long_dirty_runs_are_cut_out_and_short_ones_read_through() {
    with_rig(|rig| async move {
        let bitmap = add_bitmap(&rig);
        let skip = Skip::new(&bitmap);
        let bits = bitmap.bits();
        let whole = 0..SIZE;
        assert_eq!(skip.first_piece(&whole, MIB), Piece::Read(0..MIB));
        bits.set(8 * KIB, CHUNK);
        bits.set(128 * KIB, 64 * KIB);
        bits.set(SIZE - 512, 512);
        assert_eq!(skip.first_piece(&whole, MIB), Piece::Read(0..128 * KIB));
        assert_eq!(skip.first_piece(&whole, 512), Piece::Read(0..512));
        let rest = 128 * KIB..SIZE;
        let out = 128 * KIB..192 * KIB;
        assert_eq!(skip.first_piece(&rest, 512), Piece::LeaveOut(out));
        // In the midst of it, and at an end.
        let inner = 160 * KIB + 512..164 * KIB;
        assert_eq!(
            skip.first_piece(&inner, MIB),
            Piece::LeaveOut(inner.clone())
        );
        let tail = SIZE - 512..SIZE;
        assert_eq!(skip.first_piece(&tail, MIB), Piece::LeaveOut(tail.clone()));
        // What the bitmap has not, since its disk is smaller.
        let past = SIZE..2 * SIZE;
        assert_eq!(skip.first_piece(&past, MIB), Piece::Read(SIZE..SIZE + MIB));

        let mut ranges = Vec::from([8 * KIB + 512..9 * KIB, 120 * KIB..200 * KIB, SIZE..SIZE + 1]);
        let left_out = skip.leave_out(&mut ranges);
        assert_eq!(left_out, 512 + 64 * KIB);
        assert_eq!(
            ranges,
            [120 * KIB..128 * KIB, 192 * KIB..200 * KIB, SIZE..SIZE + 1]
        );
    });
}
