//! A driver that writes whatever it likes into its rings.
//!
//! Guest memory is mapped with inaccessible pages around it, so that an access
//! outside of it ends the test process.

use std::cell::Cell;
use std::ptr::null_mut;
use std::sync::Arc;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use virtio_bindings::virtio_blk::*;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, GuestAddress, GuestRegionMmap};

use super::guest::{EVENT_IDX, Guest, INDIRECT_DESC, PLAIN, QUEUE_SIZE, RINGS};
use super::rig::Rig;
use crate::GuestMemory;

const REGION: usize = 8 << 20;
const GUARD: usize = 1 << 20;
/// Start of the second region: the first ends at `REGION`.
const SECOND: u64 = 16 << 20;

/// `REGION` bytes between two guards of `GUARD` bytes, never unmapped.
fn guarded_region(start: u64) -> GuestRegionMmap<()> {
    // SAFETY: a new private mapping at an address of the kernel's choice.
    let base = unsafe {
        libc::mmap(
            null_mut(),
            REGION + 2 * GUARD,
            libc::PROT_NONE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    assert_ne!(base, libc::MAP_FAILED);
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: inside the mapping above, which nobody else knows of.
    let middle = unsafe {
        let middle = base.cast::<u8>().add(GUARD);
        assert_eq!(libc::mprotect(middle.cast(), REGION, protection), 0);
        middle
    };
    // SAFETY: the middle is mapped with these rights, and stays so for ever.
    let region = unsafe {
        MmapRegionBuilder::new(REGION)
            .with_raw_mmap_pointer(middle)
            .with_mmap_prot(protection)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS)
            .build()
            .unwrap()
    };
    GuestRegionMmap::new(region, GuestAddress(start)).unwrap()
}

#[derive(Clone, Debug)]
struct Descriptor {
    gpa: u64,
    len: u32,
    flags: u16,
    next: u16,
}

fn address() -> impl Strategy<Value = u64> {
    let region = REGION as u64;
    prop_oneof![
        6 => (0..64_u64).prop_map(|i| 0x20_0000 + i * 64),
        2 => (0..0x2_0000_u64).prop_map(|offset| RINGS + offset),
        1 => (0..64_u64).prop_map(move |back| region - back),
        1 => (0..64_u64).prop_map(move |back| SECOND + region - back),
        1 => (0..64_u64).prop_map(|back| SECOND.wrapping_sub(back)),
        1 => (0..64_u64).prop_map(|back| u64::MAX - back),
        1 => any::<u64>(),
    ]
}

fn length() -> impl Strategy<Value = u32> {
    prop_oneof![
        3 => Just(16_u32),
        3 => Just(512),
        2 => Just(1),
        1 => Just(0),
        1 => Just(4096),
        1 => Just(48),
        1 => 0..70_000_u32,
        1 => Just(u32::MAX),
        1 => any::<u32>(),
    ]
}

fn descriptor() -> impl Strategy<Value = Descriptor> {
    let flags = prop_oneof![8 => 0..4_u16, 2 => 4..8_u16, 1 => any::<u16>()];
    let next = prop_oneof![8 => 0..16_u16, 1 => any::<u16>()];
    (address(), length(), flags, next).prop_map(|(gpa, len, flags, next)| Descriptor {
        gpa,
        len,
        flags,
        next,
    })
}

/// Chains of four descriptors that are almost right: header, two buffers,
/// status; now and then one of them is arbitrary.
fn table() -> impl Strategy<Value = Vec<Descriptor>> {
    let chain = (any::<bool>(), 0..16_u64).prop_map(|(reads, slot)| {
        let data = 0x30_0000 + slot * 4096;
        let flags = if reads { 3 } else { 1 };
        [
            (0x20_0000 + slot * 64, 16, 1),
            (data, 512, flags),
            (data + 512, 1024, flags),
            (data + 4000, 1, 2),
        ]
    });
    let arbitrary = prop::option::weighted(0.05, descriptor());
    let changes = prop::collection::vec(arbitrary, 16);
    (prop::collection::vec(chain, 4), changes).prop_map(|(chains, changes)| {
        (1..)
            .zip(chains.concat())
            .zip(changes)
            .map(|((next, (gpa, len, flags)), change)| {
                change.unwrap_or(Descriptor {
                    gpa,
                    len,
                    flags,
                    next,
                })
            })
            .collect()
    })
}

/// What a header may look like; garbage with a known type gets further than
/// plain garbage.
fn header() -> impl Strategy<Value = [u8; 16]> {
    let kind = prop_oneof![
        Just(VIRTIO_BLK_T_IN),
        Just(VIRTIO_BLK_T_OUT),
        Just(VIRTIO_BLK_T_FLUSH),
        Just(VIRTIO_BLK_T_GET_ID),
        Just(VIRTIO_BLK_T_DISCARD),
        Just(VIRTIO_BLK_T_WRITE_ZEROES),
        any::<u32>(),
    ];
    let sector = prop_oneof![4 => 0..2048_u64, 1 => any::<u64>()];
    (kind, sector).prop_map(|(kind, sector)| Guest::header(kind, sector))
}

#[derive(Clone, Debug)]
struct Attack {
    features: u64,
    table: Vec<Descriptor>,
    /// A second table, where indirect descriptors may find it.
    indirect: Vec<Descriptor>,
    headers: Vec<[u8; 16]>,
    avail: Vec<u16>,
    avail_index: u16,
    used_event: u16,
    avail_flags: u16,
}

fn attack() -> impl Strategy<Value = Attack> {
    let features = prop_oneof![
        Just(PLAIN),
        Just(PLAIN | EVENT_IDX),
        Just(PLAIN | EVENT_IDX | INDIRECT_DESC)
    ];
    let head = prop_oneof![
        40 => (0..4_u16).prop_map(|chain| chain * 4),
        4 => 0..16_u16,
        1 => any::<u16>()
    ];
    let index = prop_oneof![6 => 0..=16_u16, 1 => any::<u16>()];
    (
        features,
        prop_oneof![3 => table(), 1 => prop::collection::vec(descriptor(), 16)],
        prop::collection::vec(descriptor(), 4),
        prop::collection::vec(header(), 16),
        prop::collection::vec(head, QUEUE_SIZE as usize),
        index,
        any::<u16>(),
        any::<u16>(),
    )
        .prop_map(
            |(features, table, indirect, headers, avail, avail_index, used_event, flags)| Attack {
                features,
                table,
                indirect,
                headers,
                avail,
                avail_index,
                used_event,
                avail_flags: flags,
            },
        )
}

fn mount(guest: &Guest, attack: &Attack) {
    let tables = [
        (guest.ring_base(0), &attack.table),
        (0x20_0000, &attack.indirect),
    ];
    for (i, header) in (0..).zip(&attack.headers) {
        let gpa = GuestAddress(0x20_0000 + i * 64);
        guest.mem.write_slice(header, gpa).unwrap();
    }
    for (at, table) in tables {
        for (i, d) in (0..).zip(table) {
            guest.write_descriptor(at, i, (d.gpa, d.len, d.flags), d.next);
        }
    }
    let avail: Vec<u8> = attack.avail.iter().flat_map(|h| h.to_le_bytes()).collect();
    let ring = GuestAddress(guest.ring_base(0) + 0x4004);
    guest.mem.write_slice(&avail, ring).unwrap();
    guest.set_used_event(0, attack.used_event);
    guest.set_avail_flags(0, attack.avail_flags);
    guest.set_avail_index(0, attack.avail_index);
}

#[test]
fn no_ring_content_hurts_the_host_or_another_queue() {
    let rig = Rig::with(1 << 20, 2);
    let regions = vec![guarded_region(0), guarded_region(SECOND)];
    let mem = Arc::new(GuestMemory::from_regions(regions).unwrap());
    let cases = Config {
        failure_persistence: None,
        ..Config::with_cases(400)
    };
    let mut runner = TestRunner::new(cases);
    // How far the attacks got: they must not all end at the first check.
    let (served, broken) = (Cell::new(0), Cell::new(0));
    let result = runner.run(&(attack(), any::<bool>()), |(attack, same_iothread)| {
        rig.run(async {
            let mut config = rig.config();
            config.num_queues = 2;
            if same_iothread {
                config.iothreads.truncate(1);
            }
            let guest = rig.guest_with(config, Arc::clone(&mem));
            guest.init(attack.features);
            mount(&guest, &attack);
            guest.kick(0);

            // Where the attack does not write by its descriptors.
            let marker = [0x5a; 512];
            let gpa = SECOND + (4 << 20);
            guest.use_data_at(gpa);
            guest.set_used_event(1, guest.used_index(1));
            let (status, _) = guest.run(1, VIRTIO_BLK_T_OUT, 2047, &marker, 0).await;
            prop_assert_eq!(status, VIRTIO_BLK_S_OK as u8);

            rig.settle(0).await;
            let needs_reset = guest.status() & 64 != 0;
            let stats = guest.blk.stats();
            served.set(served.get() + stats.read.requests + stats.write.requests - 1);
            broken.set(broken.get() + u64::from(needs_reset));
            if let Some(ticket) = guest.reset() {
                ticket.done().await;
            }
            prop_assert_eq!(guest.status(), 0);
            // And it works again.
            guest.init(attack.features);
            guest.set_used_event(0, 0);
            let (status, _) = guest.run(0, VIRTIO_BLK_T_OUT, 0, &marker, 0).await;
            prop_assert_eq!(status, VIRTIO_BLK_S_OK as u8);
            Ok(())
        })
    });
    if let Err(error) = result {
        panic!("{error}");
    }
    let (served, broken) = (served.get(), broken.get());
    assert!(
        served > 50 && broken > 50,
        "{served} served, {broken} broken"
    );
}
