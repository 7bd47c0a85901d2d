//! Requests that the server could not take as they are.

use super::*;
use crate::nbd::client::test_server::{Offer, TestServer};
use crate::node::{Node, NodeOptions};
use crate::runtime::EventLoop;

fn with_node<F: Future<Output = ()>>(
    offer: Offer,
    test: impl FnOnce(Arc<TestServer>, Arc<Node>) -> F,
) {
    let server = Arc::new(TestServer::new(offer));
    let event_loop = EventLoop::new("test").unwrap();
    event_loop.block_on(async {
        let driver = NbdDriver::open("n", &server.options(), false, false)
            .await
            .unwrap();
        let node = Node::new(
            "n",
            Box::new(driver),
            NodeOptions {
                discard: crate::options::DiscardMode::Unmap,
                ..NodeOptions::default()
            },
        );
        test(server, node).await;
    });
}

fn filled(len: usize, byte: u8) -> IoVec {
    let iov = AlignedBuffer::new(len).io_vec(len);
    iov.fill(byte);
    iov
}

/// The disk's bytes as runs.
fn runs(disk: &[u8]) -> Vec<(u8, usize)> {
    disk.chunk_by(|a, b| a == b)
        .map(|run| (run[0], run.len()))
        .collect()
}

fn styles() -> [Offer; 3] {
    let offer = |structured, extended| Offer {
        structured,
        extended,
        ..Offer::default()
    };
    [offer(false, false), offer(true, false), offer(true, true)]
}

#[test]
fn what_is_written_can_be_read_with_every_kind_of_header() {
    for offer in styles() {
        with_node(offer, |server, node| async move {
            let write = WriteFlags::default();
            node.write(4096, filled(8192, 7), write).await.unwrap();
            let iov = filled(16384, 1);
            node.read(0, iov.clone()).await.unwrap();
            let mut bytes = vec![0; 16384];
            iov.copy_to(0, &mut bytes);
            assert_eq!(runs(&bytes), [(0, 4096), (7, 8192), (0, 4096)]);
            node.flush().await.unwrap();
            node.write_zeroes(4096, 4096, ZeroFlags::default())
                .await
                .unwrap();
            node.discard(8192, 512).await.unwrap();
            let disk = server.disk(|disk| runs(&disk[..16384]));
            assert_eq!(disk, [(0, 8704), (7, 3584), (0, 4096)]);
        });
    }
}

#[test]
fn block_status_tells_holes_where_the_server_does() {
    for offer in styles() {
        with_node(offer, |server, node| async move {
            server.disk(|disk| disk[8192..12288].fill(1));
            let hole = node.block_status(0, 1 << 20).await.unwrap();
            let data = node.block_status(8192, 1 << 20 >> 1).await.unwrap();
            assert!(data.flags.data && !data.flags.zero);
            if offer.structured {
                assert_eq!((hole.len, data.len), (8192, 4096));
                assert!(hole.flags.zero && !hole.flags.data);
            } else {
                assert_eq!(hole.len, 1 << 20);
                assert!(hole.flags.data && !hole.flags.zero);
            }
        });
    }
}

#[test]
fn another_context_tells_of_no_zeroes() {
    for offer in styles() {
        let offer = Offer {
            context: "qemu:dirty-bitmap:b",
            ..offer
        };
        let server = TestServer::new(offer);
        let event_loop = EventLoop::new("test").unwrap();
        event_loop.block_on(async {
            server.disk(|disk| disk[8192..12288].fill(1));
            let mut options = server.options();
            let other = NbdDriver::open("n", &options, false, false).await.unwrap();
            // Its own is not there: all is data.
            let extent = other.block_status(0, 1 << 20).await.unwrap();
            assert_eq!((extent.len, extent.flags), (1 << 20, DATA));
            other.close();
            options.dirty_bitmap = Some("qemu:dirty-bitmap:b".to_owned());
            let opened = NbdDriver::open("n", &options, false, false).await;
            if !offer.structured {
                let error = opened.err().expect("it is not there").to_string();
                assert!(error.contains("'qemu:dirty-bitmap:b' not found"), "{error}");
                return;
            }
            let driver = opened.unwrap();
            // The server has every flag for what is zero, of which one is of the bitmap.
            let dirty = driver.block_status(0, 1 << 20).await.unwrap();
            assert_eq!(dirty.len, 8192);
            assert!(!dirty.flags.data && !dirty.flags.zero && dirty.flags.allocated);
            let clean = driver.block_status(8192, 1 << 19).await.unwrap();
            assert_eq!((clean.len, clean.flags), (4096, DATA));
            driver.close();
        });
    }
}

#[test]
fn parts_of_large_blocks_are_rewritten_with_what_is_around_them() {
    let offer = Offer {
        size: 64 << 10,
        blocks: Some((4096, 8192)),
        ..Offer::default()
    };
    with_node(offer, |server, node| async move {
        server.disk(|disk| disk.fill(1));
        let write = WriteFlags::default();
        // Inside one block, over a border, and over more than the server takes.
        node.write(512, filled(512, 2), write).await.unwrap();
        node.write(7680, filled(1024, 3), write).await.unwrap();
        node.write(16896, filled(20480, 4), write).await.unwrap();
        node.write_zeroes(40448, 8704, ZeroFlags::default())
            .await
            .unwrap();
        // Only whole blocks are given up.
        node.discard(52736, 8704).await.unwrap();
        let disk = server.disk(|disk| runs(disk));
        let expected = [
            (1, 512),
            (2, 512),
            (1, 6656),
            (3, 1024),
            (1, 8192),
            (4, 20480),
            (1, 3072),
            (0, 8704),
            (1, 4096),
            (0, 8192),
            (1, 4096),
        ];
        // The server would have refused what is not of whole blocks.
        assert_eq!(disk, expected);
        let iov = filled(1536, 9);
        node.read(7168, iov.clone()).await.unwrap();
        let mut bytes = vec![0; 1536];
        iov.copy_to(0, &mut bytes);
        assert_eq!(runs(&bytes), [(1, 512), (3, 1024)]);
        let extent = node.block_status(40960 + 512, 4096).await.unwrap();
        assert!(extent.flags.zero);
        assert_eq!(extent.len, 4096);
    });
}

#[test]
fn writes_to_one_large_block_do_not_undo_each_other() {
    let offer = Offer {
        size: 64 << 10,
        blocks: Some((4096, 8192)),
        ..Offer::default()
    };
    with_node(offer, |server, node| async move {
        let writes = (0..8u64).map(|i| {
            let iov = filled(512, i as u8 + 1);
            node.write(i * 512, iov, WriteFlags::default())
        });
        for result in futures_util::future::join_all(writes).await {
            result.unwrap();
        }
        let expected: Vec<_> = (1..=8).map(|i| (i, 512)).collect();
        assert_eq!(server.disk(|disk| runs(&disk[..4096])), expected);
    });
}

#[test]
fn the_last_sector_of_an_odd_export_reads_as_zeroes_past_its_end() {
    let offer = Offer {
        size: 1000,
        ..Offer::default()
    };
    with_node(offer, |server, node| async move {
        assert_eq!(node.size(), 1024);
        server.disk(|disk| disk.fill(5));
        let iov = filled(1024, 9);
        node.read(0, iov.clone()).await.unwrap();
        let mut bytes = vec![0; 1024];
        iov.copy_to(0, &mut bytes);
        assert_eq!(runs(&bytes), [(5, 1000), (0, 24)]);
        let iov = filled(1024, 6);
        iov.slice(1000, 24).fill(0);
        node.write(0, iov, WriteFlags::default()).await.unwrap();
        assert_eq!(server.disk(|disk| runs(disk)), [(6, 1000)]);
        let error = node
            .write(512, filled(512, 7), WriteFlags::default())
            .await
            .unwrap_err();
        assert_eq!(error.errno, libc::ENOSPC);
        node.write_zeroes(512, 512, ZeroFlags::default())
            .await
            .unwrap();
        assert_eq!(server.disk(|disk| runs(disk)), [(6, 512), (0, 488)]);
        assert_eq!(node.block_status(512, 512).await.unwrap().len, 512);
    });
}

#[test]
fn durable_writes_are_flushed_where_the_server_knows_no_fua() {
    let fua = WriteFlags {
        fua: true,
        unchanged: false,
    };
    with_node(Offer::default(), |server, node| async move {
        node.write(0, filled(512, 1), fua).await.unwrap();
        assert_eq!(
            server.take_log(),
            [(command::WRITE, command_flag::FUA, 0, 512)]
        );
    });
    let offer = Offer {
        flags: transmission_flag::HAS_FLAGS | transmission_flag::SEND_FLUSH,
        ..Offer::default()
    };
    with_node(offer, |server, node| async move {
        node.write(0, filled(512, 1), fua).await.unwrap();
        assert_eq!(
            server.take_log(),
            [(command::WRITE, 0, 0, 512), (command::FLUSH, 0, 0, 0)]
        );
        // Zeroes that the server cannot write are written as data by the node.
        node.write_zeroes(0, 512, ZeroFlags::default())
            .await
            .unwrap();
        assert_eq!(server.take_log(), [(command::WRITE, 0, 0, 512)]);
    });
}

#[test]
fn zeroes_say_what_may_become_of_the_space() {
    let offer = Offer {
        flags: Offer::default().flags | transmission_flag::SEND_FAST_ZERO,
        ..Offer::default()
    };
    with_node(offer, |server, node| async move {
        let cases = [
            (false, false, command_flag::NO_HOLE),
            (true, false, 0),
            (true, true, command_flag::FAST_ZERO),
        ];
        for (may_unmap, no_fallback, flags) in cases {
            let zero = ZeroFlags {
                fua: false,
                may_unmap,
                no_fallback,
            };
            node.write_zeroes(0, 4096, zero).await.unwrap();
            assert_eq!(server.take_log(), [(command::WRITE_ZEROES, flags, 0, 4096)]);
        }
    });
}

#[test]
fn an_export_for_reading_only_needs_a_node_that_is() {
    let server = TestServer::new(Offer {
        flags: transmission_flag::HAS_FLAGS | transmission_flag::READ_ONLY,
        ..Offer::default()
    });
    let event_loop = EventLoop::new("test").unwrap();
    let open = |read_only, auto| {
        event_loop.block_on(NbdDriver::open("n", &server.options(), read_only, auto))
    };
    let error = open(false, false).err().unwrap();
    assert_eq!(error.to_string(), "Could not open image: Permission denied");
    assert!(open(true, false).unwrap().read_only());
    assert!(open(false, true).unwrap().read_only());
}

#[test]
fn file_names_are_qemus() {
    let unix = |path: &str| SocketAddress::Unix {
        path: path.into(),
        is_abstract: false,
        tight: true,
    };
    let inet = SocketAddress::Inet(crate::options::InetAddress {
        host: "h".into(),
        port: "10809".into(),
        ipv4: None,
        ipv6: None,
        keep_alive: false,
    });
    assert_eq!(filename(&unix("/a/b"), ""), "nbd+unix://?socket=/a/b");
    assert_eq!(filename(&unix("/a"), "e x"), "nbd+unix:///e x?socket=/a");
    assert_eq!(filename(&inet, ""), "nbd://h:10809");
    assert_eq!(filename(&inet, "e"), "nbd://h:10809/e");
}

#[test]
fn opening_waits_for_each_server_in_the_tree_as_long_as_it_may() {
    use std::time::Duration;

    use crate::options::{BlockdevOptions, BlockdevRef, DriverOptions, RawOptions};

    let nbd = |seconds| {
        DriverOptions::Nbd(NbdOptions {
            server: SocketAddress::Unix {
                path: "/s".into(),
                is_abstract: false,
                tight: true,
            },
            export: String::new(),
            dirty_bitmap: None,
            reconnect_delay: Duration::ZERO,
            open_timeout: Duration::from_secs(seconds),
        })
    };
    let raw = |file| {
        BlockdevOptions::new(DriverOptions::Raw(RawOptions {
            file,
            offset: 0,
            size: None,
        }))
    };
    let inline = |driver| BlockdevRef::Inline(Box::new(BlockdevOptions::new(driver)));
    let patience = |file| raw(file).server_patience().map(|waits| waits.as_secs());
    assert_eq!(patience(inline(nbd(0))), Some(30));
    assert_eq!(patience(inline(nbd(300))), Some(300));
    assert_eq!(patience(BlockdevRef::Name("n".into())), None);
}
