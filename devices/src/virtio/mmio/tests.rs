//! The transport against a device that only remembers what it was told.

use std::cell::Cell;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use proptest::prelude::*;
use vm_memory::GuestAddress as Gpa;

use super::*;
use crate::ticket::TicketPart;

const OFFERED: u64 = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 0b101;

#[derive(Default)]
struct Dummy {
    activations: AtomicUsize,
    activated_queues: Mutex<Vec<u16>>,
    resets: AtomicUsize,
    features: AtomicU64,
    config_writes: AtomicUsize,
    accepted: Mutex<Vec<u64>>,
    /// Whether resets take time, and what keeps them from ending.
    slow: bool,
    busy: Mutex<Vec<TicketPart>>,
}

impl Dummy {
    fn ticket(&self) -> ResetTicket {
        let (ticket, parts) = ResetTicket::new(usize::from(self.slow));
        self.busy.lock().unwrap().extend(parts);
        ticket
    }
}

impl VirtioDevice for Dummy {
    fn device_type(&self) -> u32 {
        2
    }
    fn num_queues(&self) -> u16 {
        2
    }
    fn queue_max_size(&self) -> u16 {
        16
    }
    fn features(&self) -> u64 {
        OFFERED
    }
    fn features_accepted(&self, features: u64) {
        self.accepted.lock().unwrap().push(features);
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        for (i, byte) in (0_u64..).zip(data) {
            *byte = if offset.saturating_add(i) < 8 {
                (offset + i) as u8 + 1
            } else {
                0
            };
        }
    }
    fn write_config(&self, _: u64, _: &[u8], _: u64) {
        self.config_writes.fetch_add(1, Ordering::Relaxed);
    }
    fn refresh_config(&self) -> bool {
        true
    }
    fn activate(&self, activation: Activation) {
        self.activations.fetch_add(1, Ordering::Relaxed);
        self.features.store(activation.features, Ordering::Relaxed);
        *self.activated_queues.lock().unwrap() =
            activation.queues.iter().map(|(i, _)| *i).collect();
    }
    fn stop_queue(&self, _: u16) -> ResetTicket {
        self.ticket()
    }
    fn reset(&self) -> ResetTicket {
        self.resets.fetch_add(1, Ordering::Relaxed);
        self.ticket()
    }
}

struct Rig {
    device: Arc<Dummy>,
    mmio: VirtioMmio,
}

impl Rig {
    fn new(slow: bool) -> Self {
        let mem = GuestMemory::from_ranges(&[(Gpa(0), 0x10000), (Gpa(0x20000), 0x10000)]).unwrap();
        let device = Arc::new(Dummy {
            slow,
            ..Dummy::default()
        });
        let mmio = VirtioMmio::new(Arc::new(mem), Arc::clone(&device) as _).unwrap();
        Self { device, mmio }
    }

    fn get(&self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.mmio.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn set(&self, offset: u64, value: u32) {
        let _ = self.mmio.write(offset, &value.to_le_bytes());
    }

    fn negotiate(&self, features: u64) {
        self.set(0x70, 1);
        self.set(0x70, 3);
        self.set(0x24, 0);
        self.set(0x20, features as u32);
        self.set(0x24, 1);
        self.set(0x20, (features >> 32) as u32);
        self.set(0x70, 11);
    }

    fn queue(&self, index: u32, size: u32, desc: u64, avail: u64, used: u64) -> bool {
        self.set(0x30, index);
        self.set(0x38, size);
        for (register, address) in [(0x80, desc), (0x90, avail), (0xa0, used)] {
            self.set(register, address as u32);
            self.set(register + 4, (address >> 32) as u32);
        }
        self.set(0x44, 1);
        self.get(0x44) == 1
    }
}

#[test]
fn a_driver_finds_the_device() {
    let rig = Rig::new(false);
    assert_eq!(rig.get(0), 0x7472_6976);
    assert_eq!((rig.get(4), rig.get(8)), (2, 2));
    rig.set(0x14, 0);
    assert_eq!(rig.get(0x10), OFFERED as u32);
    rig.set(0x14, 1);
    assert_eq!(rig.get(0x10), (OFFERED >> 32) as u32);
    rig.set(0x14, 2);
    assert_eq!(rig.get(0x10), 0);
    assert_eq!(rig.get(0x34), 16);
    rig.set(0x30, 2);
    assert_eq!(rig.get(0x34), 0, "no third queue");
    assert_eq!(rig.get(0xb0), u32::MAX, "no shared memory");
}

#[test]
fn features_are_refused_unless_offered_and_version_1() {
    for (features, accepted) in [
        (1 << VIRTIO_F_VERSION_1, true),
        (OFFERED, true),
        (0b101, false),
        (OFFERED | 0b10, false),
        (OFFERED | 1 << 63, false),
    ] {
        let rig = Rig::new(false);
        rig.negotiate(features);
        assert_eq!(
            rig.get(0x70),
            if accepted { 11 } else { 3 },
            "{features:#x}"
        );
        rig.set(0x70, 15);
        let active = rig.device.activations.load(Ordering::Relaxed);
        assert_eq!(active, usize::from(accepted));
        if accepted {
            assert_eq!(rig.device.features.load(Ordering::Relaxed), features);
        }
        let told = rig.device.accepted.lock().unwrap().clone();
        assert_eq!(told, accepted.then_some(features).as_slice());
    }
}

#[test]
fn features_are_settled_once_accepted() {
    let rig = Rig::new(false);
    rig.set(0x20, 0b100);
    rig.negotiate(1 << VIRTIO_F_VERSION_1);
    rig.set(0x24, 0);
    rig.set(0x20, 0b101);
    rig.set(0x70, 15);
    assert_eq!(rig.device.features.load(Ordering::Relaxed), 1 << 32);
}

#[test]
fn status_bits_come_in_order_and_go_by_reset_only() {
    let rig = Rig::new(false);
    for bad in [2, 4, 8, 6, 10, 0x40] {
        rig.set(0x70, bad);
        assert_eq!(rig.get(0x70), 0, "{bad}");
    }
    rig.negotiate(OFFERED);
    rig.set(0x70, 3);
    assert_eq!(rig.get(0x70), 11, "FEATURES_OK cannot be taken back");
    rig.set(0x70, 15);
    rig.set(0x70, 11);
    assert_eq!(rig.get(0x70), 15);
    rig.set(0x70, 15);
    assert_eq!(rig.device.activations.load(Ordering::Relaxed), 1);
    rig.set(0x70, 15 | 128);
    assert_eq!(rig.get(0x70), 15 | 128);
    rig.set(0x70, 0);
    assert_eq!(rig.get(0x70), 0);
    assert_eq!(rig.device.resets.load(Ordering::Relaxed), 1);
}

#[test]
fn a_driver_that_failed_cannot_be_ready() {
    let rig = Rig::new(false);
    rig.negotiate(OFFERED);
    rig.set(0x70, 11 | 128);
    rig.set(0x70, 15 | 128);
    assert_eq!(rig.get(0x70), 11 | 128);
    assert_eq!(rig.device.activations.load(Ordering::Relaxed), 0);
}

#[test]
fn only_queues_inside_guest_memory_become_ready() {
    let cases = [
        ("good", 16, 0x1000, 0x2000, 0x3000, true),
        ("smaller", 2, 0x1000, 0x2000, 0x3000, true),
        ("at the end", 16, 0x1000, 0x2000, 0x10000 - 136, true),
        (
            "used past the end",
            16,
            0x1000,
            0x2000,
            0x10000 - 132,
            false,
        ),
        ("no size", 0, 0x1000, 0x2000, 0x3000, false),
        ("no power of two", 12, 0x1000, 0x2000, 0x3000, false),
        ("too big", 32, 0x1000, 0x2000, 0x3000, false),
        (
            "size beyond 16 bits",
            0x1_0010,
            0x1000,
            0x2000,
            0x3000,
            false,
        ),
        ("odd table", 16, 0x1008, 0x2000, 0x3000, false),
        ("odd avail", 16, 0x1000, 0x2001, 0x3000, false),
        ("odd used", 16, 0x1000, 0x2000, 0x3002, false),
        ("no avail", 16, 0x1000, 0, 0x3000, false),
        ("table in the hole", 16, 0x10000, 0x2000, 0x3000, false),
        ("table into the hole", 16, 0xff80, 0x2000, 0x3000, false),
        ("high", 16, 1 << 40, 0x2000, 0x3000, false),
        ("wrapping", 16, u64::MAX - 15, 0x2000, 0x3000, false),
    ];
    for (what, size, desc, avail, used, good) in cases {
        let rig = Rig::new(false);
        rig.negotiate(OFFERED);
        assert_eq!(rig.queue(1, size, desc, avail, used), good, "{what}");
        assert_eq!(rig.get(0x70) & NEEDS_RESET != 0, !good, "{what}");
        rig.set(0x70, 15);
        let queues = rig.device.activated_queues.lock().unwrap().clone();
        assert_eq!(queues, if good { vec![1] } else { vec![] }, "{what}");
        rig.set(0x70, 0);
        assert_eq!(rig.get(0x70), 0, "{what}");
    }
}

/// Counts what the queue's crate logs, which nobody limits.
struct QueueLog;

thread_local! {
    static QUEUE_LOG: Cell<usize> = const { Cell::new(0) };
}

impl log::Log for QueueLog {
    fn enabled(&self, _: &log::Metadata) -> bool {
        true
    }
    fn log(&self, record: &log::Record) {
        if record.target().starts_with("virtio_queue") {
            QUEUE_LOG.with(|count| count.set(count.get() + 1));
        }
    }
    fn flush(&self) {}
}

#[test]
fn a_driver_cannot_flood_the_log_with_bad_queues() {
    // Another test's set-up may have been first: the same one.
    let _ = log::set_logger(&QueueLog);
    log::set_max_level(log::LevelFilter::Trace);
    for (desc, avail, used) in [
        (1 << 40, 0x2000, 0x3000),
        (0x1000, 0xfffe, 0x3000),
        (0x1000, 0x2000, u64::MAX - 3),
    ] {
        let rig = Rig::new(false);
        rig.negotiate(OFFERED);
        assert!(!rig.queue(1, 16, desc, avail, used));
    }
    assert_eq!(QUEUE_LOG.get(), 0);
}

#[test]
fn a_device_that_needs_a_reset_takes_no_queue() {
    let rig = Rig::new(false);
    rig.negotiate(OFFERED);
    assert!(!rig.queue(1, 16, 1 << 40, 0x2000, 0x3000));
    assert!(!rig.queue(1, 16, 0x1000, 0x2000, 0x3000));
    assert!(!rig.queue(0, 16, 0x1000, 0x2000, 0x3000));
    rig.set(0x70, 0);
    rig.negotiate(OFFERED);
    assert!(rig.queue(1, 16, 0x1000, 0x2000, 0x3000));
}

#[test]
fn queues_are_set_up_between_features_and_driver_ok_only() {
    let rig = Rig::new(false);
    assert!(!rig.queue(0, 16, 0x1000, 0x2000, 0x3000));
    rig.negotiate(OFFERED);
    assert!(rig.queue(0, 16, 0x1000, 0x2000, 0x3000));
    // Rings of a ready queue do not move.
    rig.set(0x80, 0xffff_fff0);
    rig.set(0x44, 0);
    assert_eq!(rig.get(0x44), 0);
    rig.set(0x44, 1);
    assert_eq!(rig.get(0x44), 1);
    rig.set(0x70, 15);
    assert!(!rig.queue(1, 16, 0x1000, 0x2000, 0x3000), "too late");
    assert_eq!(*rig.device.activated_queues.lock().unwrap(), [0]);
}

#[test]
fn a_slow_reset_shows_until_it_is_done_and_then_everything_is_new() {
    let rig = Rig::new(true);
    rig.negotiate(OFFERED);
    assert!(rig.queue(0, 8, 0x1000, 0x2000, 0x3000));
    rig.set(0x70, 15);
    rig.mmio.interrupt.signal_used_buffers();
    let MmioOutcome::Wait(ticket) = rig.mmio.write(0x70, &[0; 4]) else {
        panic!("the device is busy");
    };
    assert_eq!(rig.get(0x70), 15);
    rig.set(0x70, 1);
    let _ = rig.mmio.write(0x100, &[1]);
    assert!(!rig.mmio.reset().is_done(), "the same reset");
    assert_eq!(rig.device.resets.load(Ordering::Relaxed), 1);
    assert_eq!(rig.device.config_writes.load(Ordering::Relaxed), 0);

    rig.device.busy.lock().unwrap().clear();
    assert!(ticket.is_done());
    assert_eq!((rig.get(0x70), rig.get(0x60)), (0, 0));
    rig.set(0x30, 0);
    assert_eq!(rig.get(0x44), 0);
    rig.negotiate(OFFERED);
    assert_eq!(rig.get(0x70), 11);
}

#[test]
fn interrupt_bits_stay_until_acknowledged() {
    let rig = Rig::new(false);
    rig.mmio.interrupt.signal_used_buffers();
    rig.mmio.interrupt.signal_used_buffers();
    rig.mmio.interrupt.signal_config_change();
    assert_eq!(rig.mmio.interrupt_evt().read().unwrap(), 3);
    assert_eq!(rig.get(0x60), 3);
    rig.set(0x64, 1);
    assert_eq!(rig.get(0x60), 2);
    rig.set(0x64, u32::MAX);
    assert_eq!(rig.get(0x60), 0);
}

#[test]
fn a_configuration_change_interrupts_a_running_driver_only() {
    let rig = Rig::new(false);
    rig.mmio.refresh_config();
    assert_eq!((rig.get(0xfc), rig.get(0x60)), (1, 0));
    rig.negotiate(OFFERED);
    rig.set(0x70, 15);
    rig.mmio.refresh_config();
    assert_eq!((rig.get(0xfc), rig.get(0x60)), (2, 2));
    rig.set(0x70, 0);
    assert_eq!(rig.get(0xfc), 2, "the generation survives a reset");
}

#[test]
fn registers_want_whole_words_and_configuration_takes_any_width() {
    let rig = Rig::new(false);
    let read = |offset, len: usize| {
        let mut data = [0xff; 8];
        rig.mmio.read(offset, &mut data[..len]);
        data[..len].to_vec()
    };
    assert_eq!(read(0, 1), [0]);
    assert_eq!(read(0, 8), [0; 8]);
    assert_eq!(read(2, 4), [0; 4]);
    assert_eq!(read(0x100, 1), [1]);
    assert_eq!(read(0x101, 2), [2, 3]);
    assert_eq!(read(0x103, 8), [4, 5, 6, 7, 8, 0, 0, 0]);
    assert_eq!(read(u64::MAX, 8), [0; 8]);
    let _ = rig.mmio.write(0x70, &[1]);
    let _ = rig.mmio.write(0x70, &[1, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(rig.get(0x70), 0);
}

#[derive(Clone, Debug)]
enum Access {
    Read(u64, usize),
    Write(u64, usize, u64),
    Finish,
}

fn access() -> impl Strategy<Value = Access> {
    let offset = prop_oneof![
        8 => (0..0x48_u64).prop_map(|word| word * 4),
        1 => 0..0x1000_u64,
        1 => any::<u64>(),
    ];
    let len = prop_oneof![8 => Just(4_usize), 1 => Just(1), 1 => Just(2), 1 => Just(8)];
    let status = prop_oneof![
        Just(0_u64),
        Just(1),
        Just(3),
        Just(11),
        Just(15),
        0..256_u64
    ];
    let value = prop_oneof![
        4 => 0..32_u64,
        4 => (0..64_u64).prop_map(|page| page << 12),
        1 => any::<u64>(),
    ];
    prop_oneof![
        2 => (offset.clone(), len.clone()).prop_map(|(offset, len)| Access::Read(offset, len)),
        6 => (offset, len, value).prop_map(|(o, l, v)| Access::Write(o, l, v)),
        3 => status.prop_map(|status| Access::Write(0x70, 4, status)),
        1 => Just(Access::Finish),
    ]
}

proptest! {
    #[test]
    fn no_register_access_breaks_the_rules(
        slow in any::<bool>(),
        start in prop_oneof![Just(0_u8), Just(1), Just(2)],
        accesses in prop::collection::vec(access(), 1..200),
    ) {
        let rig = Rig::new(slow);
        if start >= 1 {
            rig.negotiate(OFFERED);
        }
        if start >= 2 {
            prop_assert!(rig.queue(0, 8, 0x1000, 0x2000, 0x3000));
        }
        let mut activations = 0;
        for access in accesses {
            match access {
                Access::Read(offset, len) => rig.mmio.read(offset, &mut [0; 8][..len]),
                Access::Write(offset, len, value) => {
                    let before = rig.get(0x70);
                    let outcome = rig.mmio.write(offset, &value.to_le_bytes()[..len]);
                    let after = rig.get(0x70);
                    prop_assert!(
                        after == 0 || after & before & 15 == before & 15,
                        "status went from {before:#x} to {after:#x}"
                    );
                    if let MmioOutcome::Wait(ticket) = outcome {
                        prop_assert!(slow && !ticket.is_done());
                    }
                }
                Access::Finish => rig.device.busy.lock().unwrap().clear(),
            }
            let status = rig.get(0x70);
            prop_assert!(status & DRIVER_OK == 0 || status & 11 == 11);
            let now = rig.device.activations.load(Ordering::Relaxed);
            prop_assert!(now <= activations + 1);
            if now > activations {
                prop_assert!(status & DRIVER_OK != 0);
                let features = rig.device.features.load(Ordering::Relaxed);
                prop_assert_eq!(features & !OFFERED, 0);
            }
            activations = now;
        }
    }
}
