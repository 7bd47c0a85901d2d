//! What a node checks, cuts and records.

use super::*;
use crate::dirty_bitmap::DirtyBitmap;
use crate::options::DetectZeroes;

#[test]
fn bad_ranges_never_reach_the_driver() {
    on_main(|graph| async move {
        let (storage, node) = disk(&graph, "a");
        let errno = |result: Result<(), IoError>| result.unwrap_err().errno;
        assert_eq!(errno(node.read(1, bytes(512, 0)).await), libc::EINVAL);
        assert_eq!(errno(node.read(0, bytes(100, 0)).await), libc::EINVAL);
        assert_eq!(errno(node.read(SIZE, bytes(512, 0)).await), libc::EIO);
        let flags = WriteFlags::default();
        assert_eq!(
            errno(node.write(SIZE - 512, bytes(1024, 0), flags).await),
            libc::ENOSPC
        );
        let last = u64::MAX / 512 * 512;
        let zero = ZeroFlags::default();
        assert_eq!(errno(node.discard(last, last).await), libc::EINVAL);
        assert_eq!(
            errno(node.write_zeroes(512, last, zero).await),
            libc::ENOSPC
        );
        assert_eq!(
            node.block_status(0, 0).await.unwrap_err().errno,
            libc::EINVAL
        );
        node.read(SIZE, bytes(0, 0)).await.unwrap();
        assert_eq!(storage.ended(), []);
    });
}

#[test]
fn a_size_that_is_no_multiple_of_a_sector_is_rounded_up() {
    on_main(|graph| async move {
        let node = graph
            .add_node(None, TestStorage::new(513).driver(), options())
            .unwrap();
        assert_eq!(node.size(), 1024);
    });
}

#[test]
fn large_requests_are_cut_to_what_the_driver_takes() {
    on_main(|graph| async move {
        let limits = Limits {
            max_transfer: 5000,
            request_alignment: 4096,
            ..Limits::default()
        };
        let storage = TestStorage::with_limits(SIZE, limits);
        let node = graph.add_node(None, storage.driver(), options()).unwrap();
        let data: Vec<u8> = (0..10240u32).map(|i| (i % 251) as u8).collect();
        let iov = bytes(data.len(), 0);
        iov.copy_from(0, &data);
        node.write(512, iov, WriteFlags::default()).await.unwrap();
        let lens: Vec<u64> = storage.ended().iter().map(|e| e.len).collect();
        assert_eq!(lens, [4096, 4096, 2048]);
        let back = bytes(data.len(), 0);
        node.read(512, back.clone()).await.unwrap();
        let mut read = vec![0; data.len()];
        back.copy_to(0, &mut read);
        assert_eq!(read, data);
    });
}

#[test]
fn zeroes_are_detected_and_unmapped_if_both_options_say_so() {
    on_main(|graph| async move {
        let detect = |detect_zeroes, discard| NodeOptions {
            detect_zeroes,
            discard,
            ..NodeOptions::default()
        };
        for (options, op, hole) in [
            (
                detect(DetectZeroes::Off, DiscardMode::Unmap),
                IoOp::Write,
                false,
            ),
            (
                detect(DetectZeroes::On, DiscardMode::Unmap),
                IoOp::WriteZeroes,
                false,
            ),
            (
                detect(DetectZeroes::Unmap, DiscardMode::Unmap),
                IoOp::WriteZeroes,
                true,
            ),
            (
                detect(DetectZeroes::Unmap, DiscardMode::Ignore),
                IoOp::WriteZeroes,
                false,
            ),
        ] {
            let storage = TestStorage::new(SIZE);
            storage.poke(0, &[1; 4096]);
            let node = graph.add_node(None, storage.driver(), options).unwrap();
            node.write(0, bytes(4096, 0), WriteFlags::default())
                .await
                .unwrap();
            assert_eq!(storage.ended()[0].op, op, "{options:?}");
            let extent = node.block_status(0, 4096).await.unwrap();
            assert_eq!(extent.flags.zero, hole, "{options:?}");
            assert_eq!(storage.peek(0, 4096), vec![0; 4096]);
        }
    });
}

#[test]
fn zeroes_are_written_as_data_where_the_driver_cannot_do_better() {
    on_main(|graph| async move {
        let (storage, node) = disk(&graph, "a");
        storage.poke(0, &[1; 8192]);
        storage.fail(Match::op(IoOp::WriteZeroes), libc::EOPNOTSUPP);
        let strict = ZeroFlags {
            no_fallback: true,
            ..ZeroFlags::default()
        };
        let error = node.write_zeroes(0, 8192, strict).await.unwrap_err();
        assert_eq!(error.errno, libc::EOPNOTSUPP);
        assert_eq!(storage.peek(0, 8192), vec![1; 8192]);
        node.write_zeroes(0, 8192, ZeroFlags::default())
            .await
            .unwrap();
        assert_eq!(storage.peek(0, 8192), vec![0; 8192]);
    });
}

#[test]
fn discards_do_nothing_unless_the_option_says_so() {
    on_main(|graph| async move {
        let storage = TestStorage::new(SIZE);
        storage.poke(0, &[1; 4096]);
        let ignore = NodeOptions::default();
        let node = graph.add_node(None, storage.driver(), ignore).unwrap();
        let bitmap = Arc::new(DirtyBitmap::new(SIZE, 4096).unwrap());
        node.attach_bitmap(&bitmap);
        node.discard(0, 4096).await.unwrap();
        assert_eq!(storage.ended(), []);
        assert!(bitmap.is_clean());
        let (storage, node) = disk(&graph, "unmap");
        storage.fail_once(Match::op(IoOp::Discard), libc::EOPNOTSUPP);
        node.discard(0, 4096).await.unwrap();
    });
}

#[test]
fn bitmaps_have_the_range_when_the_write_ends_however_it_ends() {
    on_main(|graph| async move {
        let (storage, node) = disk(&graph, "a");
        let bitmap = Arc::new(DirtyBitmap::new(SIZE, 4096).unwrap());
        let dirty = || {
            let ranges = bitmap.take(0, SIZE).into_iter();
            ranges.map(|r| (r.start, r.end)).collect::<Vec<_>>()
        };
        node.attach_bitmap(&bitmap);

        node.write(512, bytes(4096, 1), WriteFlags::default())
            .await
            .unwrap();
        assert_eq!(dirty(), [(0, 8192)]);
        node.write_zeroes(8192, 512, ZeroFlags::default())
            .await
            .unwrap();
        node.discard(16384, 4096).await.unwrap();
        assert_eq!(dirty(), [(8192, 12288), (16384, 20480)]);

        storage.fail_once(Match::any(), libc::EIO);
        let failed = node.write(0, bytes(512, 1), WriteFlags::default()).await;
        assert_eq!(failed.unwrap_err().errno, libc::EIO);
        assert_eq!(dirty(), [(0, 4096)]);

        // One that is refused at the door changes nothing.
        let refused = node.write(1, bytes(512, 1), WriteFlags::default()).await;
        assert!(refused.is_err());
        assert!(bitmap.is_clean());

        // Abandoned midway.
        storage.hold(Match::any());
        {
            let mut write = Box::pin(node.write(4096, bytes(512, 1), WriteFlags::default()));
            assert!(poll_once(&mut write).await.is_none());
        }
        assert_eq!(dirty(), [(4096, 8192)]);
        storage.release_all();

        node.detach_bitmap(&bitmap);
        node.write(0, bytes(512, 1), WriteFlags::default())
            .await
            .unwrap();
        assert!(bitmap.is_clean());
    });
}

#[test]
fn a_bitmap_attached_while_a_write_is_in_flight_records_it() {
    on_main(|graph| async move {
        let (storage, node) = disk(&graph, "a");
        storage.hold_at(Match::op(IoOp::Write), HoldAt::End);
        let held = spawn_local({
            let node = Arc::clone(&node);
            async move { node.write(0, bytes(512, 1), WriteFlags::default()).await }
        });
        storage.wait_held(1).await;
        let bitmap = Arc::new(DirtyBitmap::new(SIZE, 4096).unwrap());
        node.attach_bitmap(&bitmap);
        storage.release_all();
        held.await.unwrap();
        assert!(bitmap.is_dirty(0));
    });
}

#[test]
fn flushes_and_fua_stop_at_a_node_that_ignores_them() {
    on_main(|graph| async move {
        let storage = TestStorage::new(SIZE);
        let mut no_flush = options();
        no_flush.cache.no_flush = true;
        let node = graph.add_node(None, storage.driver(), no_flush).unwrap();
        node.flush().await.unwrap();
        assert_eq!(storage.ended(), []);
        let (storage, node) = disk(&graph, "a");
        node.flush().await.unwrap();
        assert_eq!(storage.ended()[0].op, IoOp::Flush);
    });
}

#[test]
fn a_write_threshold_is_told_once_by_the_first_write_past_it() {
    on_main(|graph| async move {
        let (_storage, node) = disk(&graph, "a");
        let backend = attach(&graph, "vda", &node);
        let told = Arc::new(Mutex::new(Vec::new()));
        let tell = {
            let told = Arc::clone(&told);
            move |bytes| told.lock().unwrap().push(bytes)
        };
        node.set_write_threshold(4096, tell.clone());
        write(&backend, 4096 - 512, 1).await.unwrap();
        assert_eq!(
            (told.lock().unwrap().len(), node.write_threshold()),
            (0, 4096)
        );
        write(&backend, 4096, 1).await.unwrap();
        write(&backend, 8192, 1).await.unwrap();
        assert_eq!(*told.lock().unwrap(), [512]);
        assert_eq!(node.write_threshold(), 0);
        node.set_write_threshold(4096, tell.clone());
        let zeroes = ZeroFlags::default();
        backend.write_zeroes(8192, 4096, zeroes).await.unwrap();
        assert_eq!(*told.lock().unwrap(), [512, 8192]);
        node.set_write_threshold(4096, tell.clone());
        backend.discard(8192, 512).await.unwrap();
        assert_eq!(*told.lock().unwrap(), [512, 8192, 4608]);
        node.set_write_threshold(4096, tell.clone());
        node.set_write_threshold(0, tell);
        write(&backend, 8192, 1).await.unwrap();
        assert_eq!(told.lock().unwrap().len(), 3);
    });
}

#[test]
fn requests_are_measured_from_their_beginning_to_their_end_while_somebody_wants_it() {
    on_main(|graph| async move {
        let (storage, node) = disk(&graph, "a");
        let backend = attach(&graph, "vda", &node);
        let meters = [(); 2].map(|()| Arc::new(crate::GuestLatency::default()));
        backend.measure(&meters[0]);
        backend.measure(&meters[1]);
        storage.hold(Match::op(IoOp::Write));
        let held = spawn_local({
            let backend = Arc::clone(&backend);
            async move { write(&backend, 0, 1).await }
        });
        storage.wait_held(1).await;
        assert!(meters.iter().all(|meter| meter.take().is_none()));
        backend.measure_no_more(&meters[1]);
        storage.release_all();
        held.await.unwrap();
        assert_eq!(meters[0].take().map(|felt| felt.count), Some(1));
        assert!(meters[1].take().is_none(), "it ended after that");
        backend.measure_no_more(&meters[0]);
        assert!(!backend.is_measured());
        write(&backend, 0, 1).await.unwrap();
        assert!(meters[0].take().is_none());
        // Those of jobs are no guests.
        let user = User {
            holds: false,
            ..User::new(AttachmentKind::Job)
        };
        graph
            .attach("", &node, Permissions::IDLE, Some(Arc::new(user)))
            .unwrap();
        let guests = graph.guests_of(&[Arc::clone(&node), node]);
        assert!(guests.len() == 1 && guests[0].id() == backend.id());
    });
}
