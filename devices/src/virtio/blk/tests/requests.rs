//! Every request type, in every layout, right and wrong.

use block::IoOp;
use block::test_storage::Match;
use virtio_bindings::virtio_blk::*;

use super::guest::{
    CONFIG_WCE, FLUSH, Guest, INDIRECT, INDIRECT_DESC, PLAIN, VERSION_1, WRITE, range,
};
use super::rig::{DISK, Rig};

const OK: u8 = VIRTIO_BLK_S_OK as u8;
const IOERR: u8 = VIRTIO_BLK_S_IOERR as u8;
const UNSUPP: u8 = VIRTIO_BLK_S_UNSUPP as u8;

const IN: u32 = VIRTIO_BLK_T_IN;
const OUT: u32 = VIRTIO_BLK_T_OUT;
const DISCARD: u32 = VIRTIO_BLK_T_DISCARD;
const WRITE_ZEROES: u32 = VIRTIO_BLK_T_WRITE_ZEROES;

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len)
        .map(|i| (i as u8).wrapping_mul(31) ^ seed)
        .collect()
}

fn guest(rig: &Rig, features: u64) -> Guest {
    let guest = rig.guest(rig.config());
    guest.init(features);
    guest
}

#[test]
fn written_data_is_on_the_disk_and_reads_back() {
    let rig = Rig::new();
    rig.run(async {
        let guest = guest(&rig, PLAIN);
        let data = pattern(8192, 1);
        assert_eq!(guest.run(0, OUT, 3, &data, 0).await.0, OK);
        assert_eq!(rig.storage.peek(3 * 512, 8192), data);
        assert_eq!(guest.run(0, IN, 3, &[], 8192).await, (OK, data));
        assert_eq!(guest.run(0, VIRTIO_BLK_T_FLUSH, 0, &[], 0).await.0, OK);
        let ops: Vec<_> = rig.storage.ended().iter().map(|e| e.op).collect();
        assert_eq!(ops, [IoOp::Write, IoOp::Read, IoOp::Flush]);
        let stats = guest.blk.stats();
        assert_eq!((stats.write.requests, stats.write.bytes), (1, 8192));
        assert_eq!((stats.read.requests, stats.read.bytes), (1, 8192));
        assert_eq!(stats.flush.requests, 1);
        assert!(!guest.blk.take_longest_latency().is_zero());
        assert!(guest.blk.take_longest_latency().is_zero());
    });
}

#[test]
fn get_id_answers_the_serial_number_padded() {
    let rig = Rig::new();
    rig.run(async {
        let mut config = rig.config();
        config.serial = "serial-7".to_owned();
        let guest = rig.guest(config);
        guest.init(PLAIN);
        let (status, id) = guest.run(0, VIRTIO_BLK_T_GET_ID, 0, &[], 20).await;
        assert_eq!(
            (status, &id[..]),
            (OK, &b"serial-7\0\0\0\0\0\0\0\0\0\0\0\0"[..])
        );
        let (status, id) = guest.run(0, VIRTIO_BLK_T_GET_ID, 0, &[], 4).await;
        assert_eq!((status, &id[..]), (OK, &b"seri"[..]));
    });
}

#[test]
fn discards_and_zeroes_reach_the_node_with_the_unmap_wish() {
    let rig = Rig::new();
    rig.run(async {
        let guest = guest(&rig, PLAIN);
        rig.storage.poke(0, &pattern(65536, 2));
        let two = [range(0, 8, 0), range(16, 8, 0)].concat();
        assert_eq!(guest.run(0, DISCARD, 0, &two, 0).await.0, OK);
        let ended = rig.storage.ended();
        assert_eq!(
            ended
                .iter()
                .map(|e| (e.op, e.offset, e.len))
                .collect::<Vec<_>>(),
            [(IoOp::Discard, 0, 4096), (IoOp::Discard, 8192, 4096)]
        );
        let two = [range(32, 8, 0), range(40, 8, 1)].concat();
        assert_eq!(guest.run(0, WRITE_ZEROES, 0, &two, 0).await.0, OK);
        assert_eq!(rig.storage.peek(32 * 512, 8192), [0; 8192]);
        assert_eq!(*rig.seen.unmap.lock().unwrap(), [false, true]);
        let stats = guest.blk.stats();
        assert_eq!(stats.discard.bytes, 8192);
        assert_eq!(stats.write_zeroes.bytes, 8192);
    });
}

#[test]
fn header_data_and_status_may_be_cut_anywhere() {
    let rig = Rig::new();
    rig.run(async {
        let guest = guest(&rig, PLAIN);
        let data = pattern(1024, 3);

        // One buffer with header and data, cut into odd pieces.
        let bytes = [&Guest::header(OUT, 2)[..], &data].concat();
        for cuts in [vec![1040], vec![7, 9, 1024], vec![3, 0, 10, 500, 527]] {
            let mut gpa = guest.store(&bytes);
            let mut parts = Vec::new();
            for cut in &cuts {
                parts.push((gpa, *cut, 0));
                gpa += u64::from(*cut);
            }
            let status = guest.store(&[0xee]);
            parts.extend([(status, 0, WRITE), (status, 1, WRITE)]);
            rig.storage.poke(1024, &[0; 1024]);
            guest.make_available(0, guest.chain(0, &parts));
            guest.kick(0);
            assert_eq!(guest.wait_used(0, 1).await[0].1, 1);
            assert_eq!(guest.load(status, 1), [OK]);
            assert_eq!(rig.storage.peek(1024, 1024), data, "cut into {cuts:?}");
        }

        // Data and status in one buffer; and the status in the last of several.
        for cuts in [vec![1025], vec![1, 1023, 1], vec![1000, 25, 0]] {
            let header = guest.store(&Guest::header(IN, 2));
            let start = guest.store(&[0xee; 1025]);
            let mut parts = vec![(header, 16, 0)];
            let mut gpa = start;
            for cut in &cuts {
                parts.push((gpa, *cut, WRITE));
                gpa += u64::from(*cut);
            }
            guest.make_available(0, guest.chain(0, &parts));
            guest.kick(0);
            assert_eq!(guest.wait_used(0, 1).await[0].1, 1025);
            assert_eq!(guest.load(start, 1024), data);
            assert_eq!(guest.load(start + 1024, 1), [OK], "cut into {cuts:?}");
        }
    });
}

#[test]
fn indirect_tables_work_alone_and_after_direct_descriptors() {
    let rig = Rig::new();
    rig.run(async {
        let guest = guest(&rig, PLAIN | INDIRECT_DESC);
        let data = pattern(2048, 4);
        for direct_header in [false, true] {
            rig.storage.poke(0, &[0; 2048]);
            let header = (guest.store(&Guest::header(OUT, 0)), 16, 0);
            let status = guest.store(&[0xee]);
            let first = (guest.store(&data[..512]), 512, 1);
            let second = (guest.store(&data[512..]), 1536, 1);
            let mut inside = vec![first, second, (status, 1, WRITE)];
            let mut parts = vec![];
            if direct_header {
                parts.push(header);
            } else {
                inside.insert(0, (header.0, header.1, 1));
            }
            let table = guest.alloc(16 * inside.len());
            for (i, part) in (0..).zip(&inside) {
                guest.write_descriptor(table, i, *part, i + 1);
            }
            parts.push((table, 16 * inside.len() as u32, INDIRECT));
            guest.make_available(0, guest.chain(0, &parts));
            guest.kick(0);
            guest.wait_used(0, 1).await;
            assert_eq!(guest.load(status, 1), [OK]);
            assert_eq!(rig.storage.peek(0, 2048), data);
        }
    });
}

#[test]
fn bad_requests_end_in_their_status_and_change_nothing() {
    let rig = Rig::new();
    rig.run(async {
        let guest = guest(&rig, PLAIN);
        let sectors = DISK / 512;
        let block = [0xaa; 512];
        // What is wrong, type, sector, data out, length in, expected status.
        type Case<'a> = (&'a str, u32, u64, &'a [u8], u32, u8);
        let cases: &[Case<'_>] = &[
            ("past the end", OUT, sectors, &block, 0, IOERR),
            ("across the end", OUT, sectors - 1, &[0; 1024], 0, IOERR),
            ("sector overflow", OUT, u64::MAX, &block, 0, IOERR),
            ("byte overflow", OUT, 1 << 55, &block, 0, IOERR),
            ("half a sector", OUT, 0, &[0; 256], 0, IOERR),
            ("read past the end", IN, sectors, &[], 512, IOERR),
            ("read of half a sector", IN, 0, &[], 100, IOERR),
            ("unknown type", 77, 0, &[], 512, UNSUPP),
            ("SCSI", VIRTIO_BLK_T_SCSI_CMD, 0, &block, 0, UNSUPP),
            ("discard without range", DISCARD, 0, &[], 0, IOERR),
            ("half a range", DISCARD, 0, &range(0, 8, 0)[..8], 0, IOERR),
            ("too many", DISCARD, 0, &range(0, 8, 0).repeat(17), 0, IOERR),
            ("discard unmap", DISCARD, 0, &range(0, 8, 1), 0, UNSUPP),
            ("bad flag", WRITE_ZEROES, 0, &range(0, 8, 2), 0, UNSUPP),
            ("outside", DISCARD, 0, &range(sectors, 1, 0), 0, IOERR),
            ("too long", DISCARD, 0, &range(0, u32::MAX, 0), 0, IOERR),
            (
                "second range outside",
                WRITE_ZEROES,
                0,
                &[range(0, 8, 0), range(sectors, 8, 0)].concat(),
                0,
                IOERR,
            ),
        ];
        for (what, kind, sector, out, in_len, expected) in cases {
            let (status, _) = guest.run(0, *kind, *sector, out, *in_len).await;
            assert_eq!(status, *expected, "{what}");
        }
        assert_eq!(rig.storage.ended(), []);
        assert_eq!(guest.status(), 15);
    });
}

#[test]
fn buffers_outside_guest_memory_and_short_headers_are_io_errors() {
    let rig = Rig::new();
    rig.run(async {
        let guest = guest(&rig, PLAIN);
        let header = guest.store(&Guest::header(OUT, 0));
        let in_header = guest.store(&Guest::header(IN, 0));
        let hole = 8 << 20;
        let status = guest.store(&[0xee]);
        let chains = [
            vec![(header, 16, 0), (hole, 512, 0), (status, 1, WRITE)],
            vec![(header, 16, 0), (hole - 256, 512, 0), (status, 1, WRITE)],
            vec![
                (header, 16, 0),
                (u64::MAX - 255, 512, 0),
                (status, 1, WRITE),
            ],
            vec![
                (in_header, 16, 0),
                (hole - 256, 512, WRITE),
                (status, 1, WRITE),
            ],
            vec![
                (in_header, 16, 0),
                (hole, u32::MAX - 255, WRITE),
                (status, 1, WRITE),
            ],
            vec![(hole, 16, 0), (status, 1, WRITE)],
            vec![(header, 15, 0), (status, 1, WRITE)],
            vec![(status, 1, WRITE)],
        ];
        for parts in chains {
            guest.mem_status_reset(status);
            guest.make_available(0, guest.chain(0, &parts));
            guest.kick(0);
            guest.wait_used(0, 1).await;
            assert_eq!(guest.load(status, 1), [IOERR], "{parts:x?}");
        }
        assert_eq!(rig.storage.ended(), []);
        assert_eq!(guest.status(), 15);
    });
}

#[test]
fn a_buffer_may_cross_neighbouring_regions_of_memory() {
    let rig = Rig::new();
    rig.run(async {
        let regions = [
            (vm_memory::GuestAddress(0), 4 << 20),
            (vm_memory::GuestAddress(4 << 20), 4 << 20),
        ];
        let mem = crate::GuestMemory::from_ranges(&regions).unwrap();
        let guest = rig.guest_with(rig.config(), mem.into());
        guest.init(PLAIN);
        let data = pattern(4096, 5);
        rig.storage.poke(0, &data);
        let gpa = (4 << 20) - 1000;
        let header = guest.store(&Guest::header(IN, 0));
        let status = guest.store(&[0xee]);
        let parts = [(header, 16, 0), (gpa, 4096, WRITE), (status, 1, WRITE)];
        guest.make_available(0, guest.chain(0, &parts));
        guest.kick(0);
        guest.wait_used(0, 1).await;
        assert_eq!(guest.load(status, 1), [OK]);
        assert_eq!(guest.load(gpa, 4096), data);
    });
}

#[test]
fn failures_of_the_node_become_the_status_that_fits() {
    let rig = Rig::new();
    rig.run(async {
        let guest = guest(&rig, PLAIN);
        for (errno, expected) in [
            (libc::EIO, IOERR),
            (libc::ENOSPC, IOERR),
            (libc::EOPNOTSUPP, UNSUPP),
        ] {
            rig.storage.fail_once(Match::op(IoOp::Write), errno);
            assert_eq!(guest.run(0, OUT, 0, &[1; 512], 0).await.0, expected);
        }
        assert_eq!(guest.run(0, OUT, 0, &[1; 512], 0).await.0, OK);
        assert_eq!(guest.blk.stats().write.failed, 3);
    });
}

#[test]
fn a_read_only_disk_takes_no_writes() {
    let rig = Rig::new();
    rig.run(async {
        let mut config = rig.config();
        config.read_only = true;
        let guest = rig.guest(config);
        guest.init(PLAIN | 1 << VIRTIO_BLK_F_RO);
        assert_eq!(guest.run(0, OUT, 0, &[1; 512], 0).await.0, IOERR);
        assert_eq!(guest.run(0, DISCARD, 0, &range(0, 8, 0), 0).await.0, IOERR);
        assert_eq!(
            guest.run(0, WRITE_ZEROES, 0, &range(0, 8, 0), 0).await.0,
            IOERR
        );
        assert_eq!(guest.run(0, IN, 0, &[], 512).await.0, OK);
        assert_eq!(rig.storage.ended().len(), 1);
    });
}

#[test]
fn blocks_larger_than_a_sector_bound_all_requests() {
    let rig = Rig::new();
    rig.run(async {
        let mut config = rig.config();
        config.logical_block_size = 4096;
        let guest = rig.guest(config);
        guest.init(PLAIN);
        assert_eq!(guest.run(0, OUT, 1, &[1; 4096], 0).await.0, IOERR);
        assert_eq!(guest.run(0, OUT, 8, &[1; 512], 0).await.0, IOERR);
        assert_eq!(guest.run(0, OUT, 8, &[1; 4096], 0).await.0, OK);
    });
}

#[test]
fn writes_are_forced_out_unless_the_driver_can_and_will_flush() {
    let rig = Rig::new();
    rig.run(async {
        // Features, value written to `writeback`, expected FUA.
        let cases = [
            (VERSION_1, None, true),
            (VERSION_1 | FLUSH, None, false),
            (VERSION_1 | FLUSH, Some(0), false),
            (VERSION_1 | FLUSH | CONFIG_WCE, None, false),
            (VERSION_1 | FLUSH | CONFIG_WCE, Some(0), true),
            // Who cannot flush must not be cached unasked.
            (VERSION_1 | CONFIG_WCE, None, true),
            (VERSION_1 | CONFIG_WCE, Some(1), false),
            (VERSION_1 | FLUSH | CONFIG_WCE, None, false),
        ];
        let guest = rig.guest(rig.config());
        for (features, writeback, expected) in cases {
            guest.init(features);
            if let Some(value) = writeback {
                let _ = crate::MmioDevice::write(&guest.mmio, 0x120, &[value]);
            }
            rig.seen.fua.lock().unwrap().clear();
            assert_eq!(guest.run(0, OUT, 0, &[1; 512], 0).await.0, OK);
            let zeroes = range(0, 8, 0);
            assert_eq!(guest.run(0, WRITE_ZEROES, 0, &zeroes, 0).await.0, OK);
            assert_eq!(
                *rig.seen.fua.lock().unwrap(),
                [expected; 2],
                "features {features:#x}, writeback {writeback:?}"
            );
            if let Some(ticket) = guest.reset() {
                ticket.done().await;
            }
        }
    });
}

#[test]
fn a_huge_request_goes_out_in_pieces() {
    let mib = 1 << 20;
    let rig = Rig::with(40 * mib, 1);
    rig.run(async {
        let guest = guest(&rig, PLAIN);
        let header = guest.store(&Guest::header(OUT, 0));
        let data = guest.store(&pattern(mib as usize, 6));
        let status = guest.store(&[0xee]);
        let mut parts = vec![(header, 16, 0)];
        parts.extend([(data, mib as u32, 0); 36]);
        parts.push((status, 1, WRITE));
        guest.make_available(0, guest.chain(0, &parts));
        guest.kick(0);
        guest.wait_used(0, 1).await;
        assert_eq!(guest.load(status, 1), [OK]);
        let ended = rig.storage.ended();
        let lens: Vec<_> = ended
            .iter()
            .map(|e| (e.offset / mib, e.len / mib))
            .collect();
        assert_eq!(lens, [(0, 16), (16, 16), (32, 4)]);
        assert_eq!(
            rig.storage.peek(35 * mib, mib as usize),
            pattern(mib as usize, 6)
        );
    });
}
