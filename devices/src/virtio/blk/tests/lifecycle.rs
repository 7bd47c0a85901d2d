//! Kicks, interrupts, reset, pause, drain and broken queues.

use std::pin::pin;
use std::sync::atomic::Ordering;
use std::task::Poll;
use std::time::Duration;

use block::test_storage::{HoldAt, Match};
use block::{Drained, IoOp};
use futures_util::poll;
use virtio_bindings::virtio_blk::*;

use super::guest::{EVENT_IDX, Guest, PLAIN, WRITE};
use super::rig::Rig;
use crate::{MmioDevice, MmioOutcome};

const IN: u32 = VIRTIO_BLK_T_IN;
const OUT: u32 = VIRTIO_BLK_T_OUT;
const NEEDS_RESET: u32 = 64;
const USED_BUFFER: u32 = 1;
const CONFIG_CHANGE: u32 = 2;

fn guest(rig: &Rig, features: u64, queues: u16) -> Guest {
    let mut config = rig.config();
    config.num_queues = queues;
    let guest = rig.guest(config);
    guest.init(features);
    guest
}

async fn drain(rig: &Rig) -> Drained {
    rig.graph.drain(&rig.backend.root(), &[]).await.unwrap()
}

#[test]
fn four_queues_are_served_by_two_iothreads() {
    let rig = Rig::with(1 << 20, 2);
    rig.run(async {
        let guest = guest(&rig, PLAIN | EVENT_IDX | 1 << VIRTIO_BLK_F_MQ, 4);
        for round in 0..50_u64 {
            for queue in 0..4 {
                let data = [round as u8 ^ queue as u8; 512];
                guest.set_used_event(queue, guest.used_index(queue));
                guest.request(queue, OUT, round * 4 + queue as u64, &data, 0);
                guest.kick(queue);
            }
            for queue in 0..4 {
                assert_eq!(guest.wait_used(queue, 1).await.len(), 1);
            }
        }
        for round in 0..50 {
            for queue in 0..4 {
                let at = (round * 4 + queue) * 512;
                assert_eq!(rig.storage.peek(at, 1), [(round ^ queue) as u8]);
            }
        }
        for queue in 0..4 {
            guest.set_used_event(queue, guest.used_index(queue));
            rig.seen.threads.lock().unwrap().clear();
            guest.run(queue, IN, 0, &[], 512).await;
            let expected = format!("io{}", queue % 2);
            assert_eq!(*rig.seen.threads.lock().unwrap(), [expected]);
        }
    });
}

#[test]
fn the_notify_register_is_as_good_as_the_event() {
    let rig = Rig::new();
    rig.run(async {
        let guest = guest(&rig, PLAIN, 1);
        guest.request(0, OUT, 0, &[1; 512], 0);
        assert!(matches!(guest.write32(0x50, 0), MmioOutcome::Done));
        guest.wait_used(0, 1).await;
        assert!(matches!(guest.write32(0x50, 1), MmioOutcome::Done));
    });
}

#[test]
fn requests_made_before_driver_ok_are_served_after_it() {
    let rig = Rig::new();
    rig.run(async {
        let guest = rig.guest(rig.config());
        guest.negotiate(PLAIN);
        guest.set_up_queue(0, super::guest::QUEUE_SIZE);
        guest.request(0, OUT, 0, &[1; 512], 0);
        guest.kick(0);
        rig.settle(0).await;
        assert_eq!(guest.used_index(0), 0);
        let _ = guest.write32(0x70, 15);
        guest.wait_used(0, 1).await;
    });
}

#[test]
fn completions_of_one_turn_share_one_interrupt() {
    let rig = Rig::new();
    rig.run(async {
        for (features, flags, expected) in [(PLAIN, 0, 1), (PLAIN, 1, 0), (PLAIN | EVENT_IDX, 0, 1)]
        {
            let guest = guest(&rig, features, 1);
            guest.set_avail_flags(0, flags);
            rig.storage.hold_at(Match::any(), HoldAt::End);
            for sector in 0..16 {
                guest.request(0, OUT, sector, &[1; 512], 0);
            }
            guest.kick(0);
            rig.storage.wait_held(16).await;
            rig.settle(0).await;
            assert_eq!(guest.interrupts(), 0);
            // On the iothread, hence all in one turn of it.
            let storage = rig.storage.clone();
            rig.iothreads[0]
                .handle()
                .call(move || async move { storage.release_all() })
                .await
                .unwrap();
            rig.settle(0).await;
            assert_eq!(guest.used_index(0), 16);
            assert_eq!(guest.interrupts(), expected, "{features:#x}, {flags}");
            assert_eq!(guest.acknowledge(), expected as u32 * USED_BUFFER);
        }
    });
}

#[test]
fn with_event_idx_the_driver_says_which_completion_interrupts() {
    let rig = Rig::new();
    rig.run(async {
        let guest = guest(&rig, PLAIN | EVENT_IDX, 1);
        guest.set_used_event(0, 7);
        rig.storage.hold(Match::any());
        for sector in 0..12 {
            guest.request(0, OUT, sector, &[1; 512], 0);
        }
        guest.kick(0);
        rig.storage.wait_held(12).await;
        for done in 1..=12_u64 {
            assert!(rig.storage.release_one());
            rig.storage.wait_ended(done as usize).await;
            rig.settle(0).await;
            assert_eq!(u64::from(guest.used_index(0)), done);
            assert_eq!(
                guest.interrupts(),
                u64::from(done == 8),
                "completion {done}"
            );
        }
    });
}

#[test]
fn a_reset_waits_for_requests_in_flight_and_hides_their_end() {
    let rig = Rig::new();
    rig.run(async {
        for at in [HoldAt::Start, HoldAt::End] {
            let guest = guest(&rig, PLAIN, 1);
            rig.storage.hold_at(Match::op(IoOp::Read), at);
            let pending = guest.request(0, IN, 0, &[], 512);
            guest.kick(0);
            rig.storage.wait_held(1).await;

            let ticket = guest.reset().expect("a request is in flight");
            assert!(!ticket.wait_timeout(Duration::from_millis(1)));
            // Not reset yet, and nothing else is heard.
            assert_eq!(guest.status(), 15);
            assert!(matches!(guest.write32(0x70, 1), MmioOutcome::Done));
            assert!(matches!(guest.write32(0x70, 0), MmioOutcome::Wait(_)));
            rig.settle(0).await;
            assert!(!ticket.is_done());

            rig.storage.release_all();
            ticket.done().await;
            assert_eq!(guest.status(), 0);
            assert_eq!(guest.used_index(0), 0, "the used ring was touched");
            assert_eq!(guest.status_of(&pending), 0xee, "the status was touched");
            assert_eq!(guest.interrupts(), 0);

            guest.init(PLAIN);
            assert_eq!(guest.run(0, OUT, 0, &[1; 512], 0).await.0, 0);
        }
    });
}

#[test]
fn a_reset_drops_requests_that_a_drained_section_holds_back() {
    let rig = Rig::new();
    rig.run(async {
        let guest = guest(&rig, PLAIN | EVENT_IDX, 1);
        let section = drain(&rig).await;
        for sector in 0..5 {
            guest.request(0, OUT, sector, &[1; 512], 0);
        }
        guest.kick(0);
        guest.wait_taken(0).await;
        assert_eq!(rig.backend.in_flight(), 0);
        // Done although the section goes on.
        if let Some(ticket) = guest.reset() {
            ticket.done().await;
        }
        assert_eq!(guest.status(), 0);
        drop(section);
        rig.settle(0).await;
        assert_eq!(rig.storage.ended(), []);
        guest.init(PLAIN);
        assert_eq!(guest.run(0, OUT, 0, &[1; 512], 0).await.0, 0);
    });
}

#[test]
fn held_requests_go_on_in_order_when_the_section_ends() {
    let rig = Rig::new();
    rig.run(async {
        let guest = guest(&rig, PLAIN | EVENT_IDX, 1);
        let section = drain(&rig).await;
        for sector in 0..10 {
            guest.request(0, OUT, sector, &[1; 512], 0);
            guest.kick(0);
            guest.wait_taken(0).await;
        }
        assert_eq!(guest.used_index(0), 0);
        drop(section);
        rig.storage.wait_ended(10).await;
        let offsets: Vec<_> = rig.storage.ended().iter().map(|e| e.offset / 512).collect();
        assert_eq!(offsets, (0..10).collect::<Vec<_>>());
        rig.settle(0).await;
        assert_eq!(guest.used_index(0), 10);
    });
}

#[test]
fn a_pause_waits_for_what_is_in_flight_and_takes_nothing_more() {
    let rig = Rig::new();
    rig.run(async {
        let guest = guest(&rig, PLAIN, 1);
        rig.storage.hold(Match::any());
        guest.request(0, OUT, 0, &[1; 512], 0);
        guest.kick(0);
        rig.storage.wait_held(1).await;
        {
            let mut pause = pin!(guest.blk.pause());
            assert_eq!(poll!(pause.as_mut()), Poll::Pending);
            rig.settle(0).await;
            assert_eq!(poll!(pause.as_mut()), Poll::Pending);
            rig.storage.release_all();
            pause.await;
        }
        assert_eq!(guest.used_index(0), 1, "what was in flight is answered");

        guest.request(0, OUT, 1, &[1; 512], 0);
        guest.kick(0);
        rig.settle(0).await;
        assert_eq!(guest.used_index(0), 1);
        assert_eq!(rig.storage.ended().len(), 1);

        // The kick is not lost, nor is a request without one.
        guest.blk.resume();
        guest.wait_used(0, 2).await;
    });
}

#[test]
fn a_pause_leaves_held_requests_waiting_even_when_the_section_ends() {
    let rig = Rig::new();
    rig.run(async {
        let guest = guest(&rig, PLAIN | EVENT_IDX, 1);
        let section = drain(&rig).await;
        guest.request(0, OUT, 0, &[1; 512], 0);
        guest.kick(0);
        guest.wait_taken(0).await;
        guest.blk.pause().await;
        drop(section);
        rig.settle(0).await;
        assert_eq!(rig.storage.ended(), []);
        guest.blk.resume();
        guest.wait_used(0, 1).await;
    });
}

#[test]
fn a_device_that_is_activated_while_paused_serves_nothing() {
    let rig = Rig::new();
    rig.run(async {
        let guest = rig.guest(rig.config());
        guest.blk.pause().await;
        guest.init(PLAIN);
        guest.request(0, OUT, 0, &[1; 512], 0);
        guest.kick(0);
        rig.settle(0).await;
        assert_eq!(guest.used_index(0), 0);
        guest.blk.resume();
        guest.wait_used(0, 1).await;
    });
}

#[test]
fn a_reset_ends_a_pause_of_the_queues_but_not_of_the_device() {
    let rig = Rig::new();
    rig.run(async {
        let guest = guest(&rig, PLAIN, 1);
        guest.blk.pause().await;
        guest.mmio.reset().done().await;
        guest.init(PLAIN);
        guest.request(0, OUT, 0, &[1; 512], 0);
        guest.kick(0);
        rig.settle(0).await;
        assert_eq!(guest.used_index(0), 0);
        guest.blk.resume();
        guest.wait_used(0, 1).await;
    });
}

#[test]
fn a_queue_can_be_stopped_alone_and_a_reset_waits_for_it_too() {
    let rig = Rig::new();
    rig.run(async {
        let guest = guest(&rig, PLAIN, 2);
        rig.storage.hold(Match::any().range(0..512));
        let pending = guest.request(0, IN, 0, &[], 512);
        guest.kick(0);
        rig.storage.wait_held(1).await;

        let _ = guest.write32(0x30, 0);
        let MmioOutcome::Wait(stop) = guest.write32(0x44, 0) else {
            panic!("a request is in flight");
        };
        assert_eq!(guest.read32(0x44), 1, "still in use");
        assert_eq!(guest.run(1, OUT, 1, &[1; 512], 0).await.0, 0);
        let reset = guest.reset().expect("the stopped queue is busy");
        rig.settle(0).await;
        assert!(!reset.is_done() && !stop.is_done());

        rig.storage.release_all();
        stop.done().await;
        reset.done().await;
        assert_eq!(guest.status(), 0);
        assert_eq!(guest.status_of(&pending), 0xee);
    });
}

#[test]
fn a_stopped_queue_stays_stopped_until_the_reset() {
    let rig = Rig::new();
    rig.run(async {
        let guest = guest(&rig, PLAIN, 1);
        let _ = guest.write32(0x30, 0);
        if let MmioOutcome::Wait(stop) = guest.write32(0x44, 0) {
            stop.done().await;
        }
        assert_eq!(guest.read32(0x44), 0);
        let _ = guest.write32(0x44, 1);
        assert_eq!(guest.read32(0x44), 0);
        guest.request(0, OUT, 0, &[1; 512], 0);
        guest.kick(0);
        rig.settle(0).await;
        assert_eq!(guest.used_index(0), 0);
    });
}

#[test]
fn a_broken_queue_asks_for_a_reset_and_leaves_the_others_alone() {
    let rig = Rig::new();
    rig.run(async {
        type Break = fn(&Guest);
        let ways: &[(&str, Break)] = &[
            ("loop", |guest| {
                let header = guest.store(&Guest::header(IN, 0));
                let base = guest.ring_base(0);
                guest.write_descriptor(base, 0, (header, 16, 1), 1);
                guest.write_descriptor(base, 1, (header, 16, 1), 0);
                guest.make_available(0, 0);
            }),
            ("head out of range", |guest| guest.make_available(0, 64)),
            ("next out of range", |guest| {
                let header = guest.store(&Guest::header(IN, 0));
                guest.write_descriptor(guest.ring_base(0), 0, (header, 16, 1), 64);
                guest.make_available(0, 0);
            }),
            ("avail index jumps", |guest| guest.set_avail_index(0, 65)),
            ("nothing writable", |guest| {
                let header = guest.store(&Guest::header(OUT, 0));
                guest.make_available(0, guest.chain(0, &[(header, 16, 0), (header, 512, 0)]));
            }),
            ("status outside memory", |guest| {
                let header = guest.store(&Guest::header(OUT, 0));
                guest.make_available(0, guest.chain(0, &[(header, 16, 0), (8 << 20, 1, WRITE)]));
            }),
            ("readable after writable", |guest| {
                let header = guest.store(&Guest::header(OUT, 0));
                let parts = [(header, 1, WRITE), (header, 16, 0), (header, 1, WRITE)];
                guest.make_available(0, guest.chain(0, &parts));
            }),
            ("indirect inside indirect", |guest| {
                let table = guest.alloc(32);
                guest.write_descriptor(table, 0, (table, 16, 4), 0);
                guest.make_available(0, guest.chain(0, &[(table, 32, 4)]));
            }),
            ("indirect table cut", |guest| {
                let table = guest.alloc(32);
                guest.make_available(0, guest.chain(0, &[(table, 17, 4)]));
            }),
            ("indirect table outside memory", |guest| {
                guest.make_available(0, guest.chain(0, &[(8 << 20, 32, 4)]));
            }),
            ("indirect chain too long", |guest| {
                let table = guest.alloc(16 * 300);
                for i in 0..300 {
                    guest.write_descriptor(table, i, (table, 16, 1), i + 1);
                }
                guest.make_available(0, guest.chain(0, &[(table, 16 * 300, 4)]));
            }),
        ];
        for (what, break_queue) in ways {
            let guest = guest(&rig, PLAIN, 2);
            break_queue(&guest);
            guest.kick(0);
            while guest.interrupted().await.1 & CONFIG_CHANGE == 0 {}
            assert_eq!(guest.status(), 15 | NEEDS_RESET, "{what}");
            guest.kick(0);
            assert_eq!(guest.run(1, OUT, 0, &[1; 512], 0).await.0, 0, "{what}");
            assert_eq!(guest.used_index(0), 0, "{what}");
            if let Some(ticket) = guest.reset() {
                ticket.done().await;
            }
            guest.init(PLAIN);
            assert_eq!(guest.run(0, OUT, 0, &[1; 512], 0).await.0, 0, "{what}");
        }
    });
}

#[test]
fn a_driver_that_makes_more_available_than_it_has_is_cut_off() {
    let rig = Rig::new();
    rig.run(async {
        let guest = guest(&rig, PLAIN, 1);
        let section = drain(&rig).await;
        let pending = guest.request(0, OUT, 0, &[1; 512], 0);
        for _ in 0..=super::guest::QUEUE_SIZE {
            guest.make_available(0, pending.head);
            guest.kick(0);
            rig.settle(0).await;
        }
        assert_eq!(guest.status(), 15 | NEEDS_RESET);
        drop(section);
        rig.settle(0).await;
        assert!(rig.storage.ended().len() <= super::guest::QUEUE_SIZE.into());
    });
}

#[test]
fn a_resized_disk_is_announced_once() {
    let rig = Rig::new();
    rig.run(async {
        let guest = guest(&rig, PLAIN, 1);
        let capacity = || {
            let mut bytes = [0; 8];
            guest.mmio.read(0x100, &mut bytes);
            u64::from_le_bytes(bytes)
        };
        assert_eq!(capacity(), 2048);
        let generation = guest.read32(0xfc);
        guest.mmio.refresh_config();
        assert_eq!((guest.interrupts(), guest.read32(0xfc)), (0, generation));

        rig.seen.size.store(1 << 19, Ordering::Relaxed);
        assert_eq!(capacity(), 2048, "a new size is not taken over silently");
        guest.mmio.refresh_config();
        assert_eq!(guest.interrupted().await, (1, CONFIG_CHANGE));
        assert_eq!(capacity(), 1024);
        assert_eq!(guest.read32(0xfc), generation + 1);
        assert_eq!(guest.run(0, OUT, 1024, &[1; 512], 0).await.0, 1);
    });
}

#[test]
fn the_longest_latency_includes_the_wait_at_a_drained_backend() {
    let rig = Rig::new();
    rig.run(async {
        let guest = guest(&rig, PLAIN | EVENT_IDX, 1);
        let section = drain(&rig).await;
        guest.request(0, OUT, 0, &[1; 512], 0);
        guest.kick(0);
        guest.wait_taken(0).await;
        let start = std::time::Instant::now();
        block::runtime::sleep(Duration::from_millis(20)).await;
        let waited = start.elapsed();
        drop(section);
        guest.wait_used(0, 1).await;
        assert!(guest.blk.take_longest_latency() >= waited);
    });
}

#[test]
fn a_panic_below_costs_the_guest_an_error_and_nothing_more() {
    let rig = Rig::new();
    rig.run(async {
        let guest = guest(&rig, PLAIN, 1);
        rig.seen.panic.store(true, Ordering::Relaxed);
        let io_error = VIRTIO_BLK_S_IOERR as u8;
        assert_eq!(guest.run(0, IN, 0, &[], 512).await.0, io_error);
        assert_eq!(guest.run(0, IN, 0, &[], 512).await.0, 0);
        rig.settle(0).await;
        assert_eq!(rig.backend.in_flight(), 0);
        if let Some(ticket) = guest.reset() {
            ticket.done().await;
        }
        assert_eq!(guest.status(), 0);
    });
}

#[test]
fn dropping_the_device_stops_its_queues() {
    let rig = Rig::new();
    rig.run(async {
        let guest = guest(&rig, PLAIN, 1);
        let mem = std::sync::Arc::downgrade(&guest.mem);
        assert_eq!(guest.run(0, OUT, 0, &[1; 512], 0).await.0, 0);
        drop(guest);
        rig.settle(0).await;
        assert!(mem.upgrade().is_none(), "a queue keeps guest memory mapped");
    });
}
