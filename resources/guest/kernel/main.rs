//! The embedded guest: writes self-describing sectors to its virtio-blk disks
//! and verifies them. A freestanding program; see `README.md` beside it.
//!
//! This file runs the stages; the rest is: `boot` rings and traps, `memory`
//! what the VMM hands over, `acpi`, `serial`, `clock` and `interrupt` the machine,
//! `virtio` and `disk` the device, `post` the mailbox, `worker` the workload on
//! one disk. One processor runs all of it; others stay parked.

#![no_std]
#![no_main]

mod acpi;
mod boot;
mod clock;
mod disk;
mod interrupt;
mod memory;
mod post;
mod serial;
mod virtio;
mod worker;

use core::fmt;
use core::panic::PanicInfo;

use guest::cmdline::{Config, MAX_DEVICES, PowerOff, power_off_of};
use guest::mailbox::Status;
use guest::phase::{Operation, Phases};
use guest::report;

use crate::clock::Clock;
use crate::disk::{Disk, DiskOptions};
use crate::memory::Arena;
use crate::post::Post;
use crate::serial::Serial;
use crate::worker::{Fed, Stage, Worker, span_of};

/// Room for all requests of a queue that are made to cover ground, in bytes.
const BULK_TOTAL: u64 = 4 << 20;
/// Such a request, in bytes.
const BULK: u64 = 64 << 10;

/// For the sleep control register: SLP_EN, and 5 as the type of soft-off. The
/// type should come from `\_S5` in the DSDT; 5 is what machines use.
const SOFT_OFF: u8 = 1 << 5 | 5 << 2;

/// Ring 3 begins here, with what the VMM left in ebx.
#[unsafe(no_mangle)]
extern "C" fn guest_main(start_info: u32) -> ! {
    // SAFETY: this is what the VMM left in ebx.
    let cmdline = unsafe { memory::command_line(start_info) };
    // SAFETY: as above; the VMM says where the RSDP is.
    let acpi_port = unsafe { acpi::sleep_control_port(memory::rsdp(start_info)) };
    let resolve = |how| match (how, acpi_port) {
        (PowerOff::Acpi, Some(port)) => PowerOff::Port(port, SOFT_OFF),
        (PowerOff::Acpi, None) => PowerOff::Reset,
        (how, _) => how,
    };
    let mut config = match Config::parse(cmdline) {
        Ok(config) => config,
        Err(error) => fail(format_args!("{error}"), resolve(power_off_of(cmdline))),
    };
    config.power_off = resolve(config.power_off);
    // SAFETY: as above, and this is the only arena.
    let mut arena = unsafe { Arena::new(start_info) };
    let mut guest = match Guest::new(&mut arena, &config) {
        Ok(guest) => guest,
        Err(error) => fail(
            format_args!("Device {}: {}", error.device, error.reason),
            config.power_off,
        ),
    };
    guest.run();
    // Nobody can be told if the port fails.
    let _ = guest.report(&mut Serial::new());
    power_off(config.power_off)
}

/// Why a device cannot be used.
struct SetupError {
    /// Its place on the command line, from 0.
    device: usize,
    reason: &'static str,
}

struct Guest<'a> {
    config: &'a Config,
    clock: Clock,
    workers: [Option<Worker>; MAX_DEVICES],
    post: Option<Post>,
    phases: Phases,
    filled: bool,
}

impl<'a> Guest<'a> {
    fn new(arena: &mut Arena, config: &'a Config) -> Result<Self, SetupError> {
        let mut guest = Self {
            config,
            clock: Clock::new(config.tsc_khz),
            workers: [const { None }; MAX_DEVICES],
            post: None,
            phases: Phases::new(),
            filled: false,
        };
        let mut number = 0;
        for (device, place) in config.devices().iter().enumerate() {
            let error = |reason| SetupError { device, reason };
            if config.mailbox == Some(device) {
                let options = DiskOptions {
                    queues: 1,
                    depth: 2,
                    buffer_bytes: 512,
                    event_idx: config.event_idx,
                };
                let disk = Disk::new(arena, place.base, options).map_err(|e| error(e.as_str()))?;
                guest.post = Some(Post::new(disk, config.mailbox_ms));
                continue;
            }
            // Empty places of the bus and devices of other kinds do no harm.
            if !virtio::Mmio::new(place.base).is_disk() {
                continue;
            }
            let bulk = (BULK_TOTAL / u64::from(config.depth)).min(BULK) / config.block;
            let options = DiskOptions {
                queues: config.queues,
                depth: config.depth,
                buffer_bytes: (bulk * config.block).max(config.size_max) as u32,
                event_idx: config.event_idx,
            };
            let disk = Disk::new(arena, place.base, options).map_err(|e| error(e.as_str()))?;
            if !config.block.is_multiple_of(u64::from(disk.logical_block())) {
                return Err(error("its logical blocks are larger than the block"));
            }
            if u64::from(disk.buffer_bytes()) < config.size_max {
                return Err(error("it does not take requests of this size"));
            }
            let span = span_of(config, &disk);
            if span < config.size_max {
                return Err(error("it is smaller than a request"));
            }
            let words = arena
                .filled((span / config.block) as usize, 0u64)
                .ok_or(error("not enough memory for its record"))?;
            if config.interrupts {
                interrupt::route(place.irq);
            }
            guest.workers[number] = Some(Worker::new(number as u32, config, disk, words));
            number += 1;
        }
        if number == 0 {
            return Err(SetupError {
                device: 0,
                reason: "there is no disk (virtio_mmio.device=SIZE@BASE:IRQ)",
            });
        }
        if config.interrupts {
            interrupt::enable();
        }
        Ok(guest)
    }

    /// All stages, one after the other.
    fn run(&mut self) {
        if self.config.adopt {
            self.stage(Stage::Adopt);
        }
        if self.config.fill > 0 {
            self.stage(Stage::Fill);
        }
        self.filled = true;
        self.phases.begin(self.clock.now_ns());
        self.stage(Stage::Work);
        self.phases.end(self.clock.now_ns());
        self.stage(Stage::Settle);
        self.stage(Stage::Flush);
        if self.config.verify {
            self.stage(Stage::Verify);
        }
    }

    /// Runs one stage on all disks until all have ended it.
    fn stage(&mut self, stage: Stage) {
        let start_ns = self.clock.now_ns();
        for worker in self.workers.iter_mut().flatten() {
            worker.begin(start_ns);
        }
        loop {
            let now_ns = self.clock.now_ns();
            let mut progress = false;
            for worker in self.workers.iter_mut().flatten() {
                progress |= worker.harvest(stage, now_ns, &mut self.phases);
            }
            self.poll_mailbox(stage, now_ns);
            let stop = stage == Stage::Work && self.shall_stop(now_ns - start_ns);
            let mut ended = true;
            let mut may_sleep = self.config.interrupts && !progress;
            for worker in self.workers.iter_mut().flatten() {
                let fed = worker.feed(stage, self.config, &self.clock, stop);
                ended &= fed == Fed::Done && worker.in_flight() == 0;
                may_sleep &= fed != Fed::Later;
            }
            if ended {
                return;
            }
            if may_sleep {
                self.sleep();
            } else if !progress {
                clock::relax();
            }
        }
    }

    fn poll_mailbox(&mut self, stage: Stage, now_ns: u64) {
        let Some(post) = &mut self.post else {
            return;
        };
        let phases = &self.phases;
        let workers = &self.workers;
        let filled = self.filled;
        post.poll(now_ns, || Status {
            phase: phases.current() as u64,
            writes: sum(phases, |phase| phase.requests[Operation::Write.index()]),
            written_bytes: sum(phases, |phase| phase.written_bytes),
            errors: workers.iter().flatten().map(Worker::errors).sum(),
            filled,
        });
        if stage == Stage::Work {
            self.phases.enter(post.order().phase as usize, now_ns);
        }
    }

    /// Whether the workload has lasted long enough.
    fn shall_stop(&self, worked_ns: u64) -> bool {
        let limit_ns = match (self.config.time_ms, self.config.requests) {
            // Something must end it.
            (0, 0) if self.post.is_none() => 1_000_000_000,
            (0, _) => u64::MAX,
            (time_ms, _) => time_ms * 1_000_000,
        };
        worked_ns >= limit_ns || self.post.as_ref().is_some_and(|post| post.order().finish)
    }

    /// Sleeps until a disk has ended a request. Some are under way.
    fn sleep(&mut self) {
        let mut idle = true;
        for worker in self.workers.iter_mut().flatten() {
            idle &= worker.disk_mut().prepare_sleep();
        }
        if idle {
            boot::wait_for_interrupt();
        }
        for worker in self.workers.iter_mut().flatten() {
            worker.disk_mut().end_sleep();
        }
        if idle {
            interrupt::end();
        }
    }

    fn report(&self, out: &mut Serial) -> fmt::Result {
        report::write_report(
            out,
            self.config.block,
            self.clock.khz,
            self.workers.iter().flatten().map(Worker::report),
            self.phases.begun(),
        )
    }
}

fn sum(phases: &Phases, of: impl Fn(&guest::phase::Phase) -> u64) -> u64 {
    phases.begun().iter().map(of).sum()
}

/// Says why the guest cannot go on, and ends.
fn fail(message: fmt::Arguments<'_>, how: PowerOff) -> ! {
    // Nobody can be told if the port fails.
    let _ = report::write_error(&mut Serial::new(), message);
    power_off(how)
}

fn power_off(how: PowerOff) -> ! {
    match how {
        PowerOff::Acpi | PowerOff::Reset => boot::out8(0x64, 0xfe),
        PowerOff::Port(port, byte) => boot::out8(port, byte),
        PowerOff::Halt => {}
    }
    boot::halt()
}

/// Ring 0 goes on here after an exception that is none of its services.
#[unsafe(no_mangle)]
extern "C" fn guest_fault(vector: u64, error_code: u64, rip: u64, address: u64) -> ! {
    fail(
        format_args!("Fault {vector} ({error_code:#x}) at {rip:#x}, address {address:#x}"),
        PowerOff::Reset,
    )
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    let (file, line) = info
        .location()
        .map_or(("?", 0), |place| (place.file(), place.line()));
    fail(
        format_args!("Panic at {file}:{line}: {}", info.message()),
        PowerOff::Reset,
    )
}
