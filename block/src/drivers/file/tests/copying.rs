//! Ranges that are copied from file to file.

use super::*;
use crate::copy_source::{CopySource, Pieces};
use crate::dirty_bitmap::DirtyBitmap;
use crate::node::{Node, NodeOptions};
use crate::options::DetectZeroes;
use crate::runtime::EventLoop;

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at / 512 * 7 + at) as u8).collect()
}

#[test]
fn a_range_is_copied_and_nothing_beside_it() {
    let len = 3 * (128 << 10) + 1536;
    let [memory, disk] = places();
    for (one, other) in [(&memory, &memory), (&disk, &disk), (&memory, &disk)] {
        let source = image_in(one, 0);
        std::fs::write(source.path(), pattern(len + 4096)).unwrap();
        let target = image_in(other, 1 << 20);
        std::fs::write(target.path(), vec![0xee; 1 << 20]).unwrap();
        let (from, into) = (
            open_image(source.path(), false),
            open_image(target.path(), false),
        );
        let copied = EventLoop::new("test").unwrap().block_on(async {
            let range = from.file_range(512, len as u64).unwrap();
            into.copy_from(2048, range.into()).await
        });
        assert!(copied);
        let after = std::fs::read(target.path()).unwrap();
        assert!(after[..2048].iter().all(|byte| *byte == 0xee));
        assert_eq!(after[2048..2048 + len], pattern(len + 4096)[512..512 + len]);
        assert!(after[2048 + len..].iter().all(|byte| *byte == 0xee));
    }
}

#[test]
fn many_ranges_at_once_all_arrive() {
    const RANGE: u64 = 64 << 10;
    for place in places() {
        let source = image_in(&place, 0);
        std::fs::write(source.path(), pattern(4 << 20)).unwrap();
        let target = image_in(&place, 4 << 20);
        let (from, into) = (
            open_image(source.path(), false),
            open_image(target.path(), false),
        );
        EventLoop::new("test").unwrap().block_on(async {
            let copies = (0..64).map(|n| {
                let range = from.file_range(n * RANGE, RANGE).unwrap();
                into.copy_from(n * RANGE, range.into())
            });
            let copied = futures_util::future::join_all(copies).await;
            assert!(copied.iter().all(|copied| *copied));
        });
        assert_eq!(std::fs::read(target.path()).unwrap(), pattern(4 << 20));
    }
}

#[test]
fn what_cannot_be_copied_is_left_to_who_asked() {
    let source = image_in(&disk(), 64 << 10);
    let target = image_in(&disk(), 64 << 10);
    let from = open_image(source.path(), false);
    let into = open_image(target.path(), false);
    let direct = open_image(target.path(), true);
    let read_only = OpenFlags {
        read_only: true,
        ..flags(false)
    };
    let read_only = open("node", &file_options(target.path()), read_only).unwrap();
    assert!(direct.file_range(0, 512).is_none());
    EventLoop::new("test").unwrap().block_on(async {
        let range = from.file_range(0, 4096).unwrap();
        assert!(!direct.copy_from(0, range.clone().into()).await, "O_DIRECT");
        assert!(!read_only.copy_from(0, range.into()).await, "read-only");
        let past_the_end = from.file_range((64 << 10) - 512, 1024).unwrap();
        assert!(!into.copy_from(0, past_the_end.into()).await);
    });
}

#[test]
fn a_copied_range_counts_as_written_and_detected_zeroes_are_not_passed_by() {
    let source = image_in(&disk(), 64 << 10);
    let target = image_in(&disk(), 64 << 10);
    let from = open_image(source.path(), false);
    let node = |detect_zeroes| {
        let options = NodeOptions {
            detect_zeroes,
            ..NodeOptions::default()
        };
        Node::new("n", Box::new(open_image(target.path(), false)), options)
    };
    EventLoop::new("test").unwrap().block_on(async {
        let range = from.file_range(0, 8192).unwrap();
        let into = node(DetectZeroes::Off);
        let bitmap = Arc::new(DirtyBitmap::new(64 << 10, 4096).unwrap());
        into.attach_bitmap(&bitmap);
        assert!(into.copy_from(4096, range.clone()).await);
        assert_eq!(bitmap.next_dirty_area(0, 64 << 10), Some(4096..12288));
        assert!(
            !into.copy_from(60 << 10, range.clone()).await,
            "past the end"
        );
        assert!(!node(DetectZeroes::On).copy_from(0, range).await);
    });
}

#[test]
fn writes_beside_copies_all_arrive() {
    const RANGE: u64 = 512 << 10;
    const RANGES: u64 = 8;
    let [memory, _] = places();
    let source = image_in(&memory, 0);
    std::fs::write(source.path(), pattern((RANGES * RANGE) as usize)).unwrap();
    let target = image_in(&memory, 2 * RANGES * RANGE);
    let (from, into) = (
        open_image(source.path(), false),
        open_image(target.path(), false),
    );
    EventLoop::new("test").unwrap().block_on(async {
        let copies = (0..RANGES).map(|n| {
            let range = from.file_range(n * RANGE, RANGE).unwrap();
            into.copy_from(n * RANGE, range.into())
        });
        let copies = futures_util::future::join_all(copies);
        let into = &into;
        let writes = async {
            for at in (RANGES * RANGE..2 * RANGES * RANGE).step_by(16384) {
                let write = |at: u64| {
                    let iov = AlignedBuffer::new(4096).io_vec(4096);
                    iov.fill((at / 4096) as u8);
                    into.write(at, iov, WriteFlags::default())
                };
                let pair = futures_util::future::join(write(at), write(at + 4096));
                let (one, other) = pair.await;
                one.and(other).unwrap();
                crate::runtime::yield_now().await;
            }
        };
        let (copied, ()) = futures_util::future::join(copies, writes).await;
        assert!(copied.iter().all(|copied| *copied));
    });
    let after = std::fs::read(target.path()).unwrap();
    let half = (RANGES * RANGE) as usize;
    assert_eq!(after[..half], pattern(half));
    for at in (half..2 * half).step_by(4096) {
        let byte = match at / 4096 % 4 {
            0 | 1 => (at / 4096) as u8,
            _ => 0,
        };
        assert!(after[at..at + 4096].iter().all(|it| *it == byte), "{at}");
    }
}

#[test]
fn of_a_range_only_the_parts_that_are_meant_are_copied() {
    const LEN: usize = 1 << 20;
    for place in places() {
        let source = image_in(&place, 0);
        std::fs::write(source.path(), pattern(LEN)).unwrap();
        let target = image_in(&place, 0);
        std::fs::write(target.path(), vec![0xee; LEN]).unwrap();
        let node = |path: &std::path::Path| {
            let options = NodeOptions::default();
            Node::new("node", Box::new(open_image(path, false)), options)
        };
        let (from, into) = (node(source.path()), node(target.path()));
        let bitmap = Arc::new(DirtyBitmap::new(LEN as u64, 4096).unwrap());
        into.attach_bitmap(&bitmap);
        // The second is longer than what is copied between two looks at other writes.
        let parts = [0..4096, 8192..299_008, 400_384..400_896, 900_096..u64::MAX];
        let copied = EventLoop::new("test").unwrap().block_on(async {
            let range = from.file_range(4096, 512_000).unwrap();
            into.copy_from(8192, range.only(parts.clone())).await
        });
        assert!(copied);
        let mut expected = vec![0xee; LEN];
        for part in &parts[..3] {
            let (start, end) = (part.start as usize, part.end as usize);
            let content = pattern(LEN)[4096 + start..4096 + end].to_vec();
            expected[8192 + start..8192 + end].copy_from_slice(&content);
        }
        assert!(std::fs::read(target.path()).unwrap() == expected);
        assert!(bitmap.is_dirty(8192) && bitmap.is_dirty(8192 + 400_384));
        assert!(!bitmap.is_dirty(8192 + 4096), "between two parts");
        assert!(!bitmap.is_dirty(8192 + 350_000));
    }
}

#[test]
fn pieces_in_memory_are_written_where_they_belong_and_marked() {
    const LEN: usize = 1 << 20;
    for place in places() {
        let target = image_in(&place, 0);
        std::fs::write(target.path(), vec![0xee; LEN]).unwrap();
        let options = NodeOptions::default();
        let into = Node::new("node", Box::new(open_image(target.path(), false)), options);
        let bitmap = Arc::new(DirtyBitmap::new(LEN as u64, 4096).unwrap());
        into.attach_bitmap(&bitmap);
        let places = [900 << 10, 0, 8192, 64 << 10];
        let piece = |at: u64| {
            let iov = AlignedBuffer::new(4096).io_vec(4096);
            iov.fill((at >> 12) as u8);
            (at, iov)
        };
        let (start, pieces) = Pieces::new(places.map(piece).into()).unwrap();
        let from = CopySource::Memory(pieces);
        let (written, outside) = EventLoop::new("test").unwrap().block_on(async {
            // The last one would be behind the end.
            let outside = into.copy_from(200 << 10, from.clone()).await;
            (into.copy_from(start, from).await, outside)
        });
        assert!(written && !outside);
        let after = std::fs::read(target.path()).unwrap();
        for (at, block) in after.chunks(4096).enumerate() {
            let at = (at << 12) as u64;
            let byte = match places.contains(&at) {
                true => (at >> 12) as u8,
                false => 0xee,
            };
            assert!(block.iter().all(|it| *it == byte), "{at}");
            assert_eq!(bitmap.is_dirty(at), places.contains(&at), "{at}");
        }
        assert_eq!(after.len(), LEN);
    }
}
