//! The guest's command line: what to do, and with which devices.
//!
//! The grammar is in `resources/guest/README.md`. Words that are not ours are
//! ignored, since a VMM adds its own; a wrong value of one of ours is an
//! error, since a test must not pass because of a slip of the pen.

use core::fmt;

use crate::phase::Operation;

/// The most virtio-mmio devices that are looked at.
pub const MAX_DEVICES: usize = 16;

/// A device given by `virtio_mmio.device=`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Device {
    /// Guest-physical address of its registers.
    pub base: u64,
    /// Its interrupt line (GSI).
    pub irq: u32,
}

/// How blocks are chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Anywhere, evenly.
    Random,
    /// One after the other, from the start again at the end.
    Sequential,
}

/// How the end of the run is told to the VMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerOff {
    /// ACPI's sleep control register, where the tables name one; else the
    /// reset.
    Acpi,
    /// The keyboard controller's reset line (0xfe to port 0x64).
    Reset,
    /// A byte to an I/O port, as of a debug exit device.
    Port(u16, u8),
    /// Nothing: the processor halts for good.
    Halt,
}

/// What the command line says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    devices: [Device; MAX_DEVICES],
    nr_devices: usize,
    /// Index of the device that is the mailbox (see [`crate::mailbox`]).
    pub mailbox: Option<usize>,
    /// How often the mailbox is looked at, in ms.
    pub mailbox_ms: u64,
    /// Queues to use per disk, 1..=16; fewer if the device has fewer.
    pub queues: u16,
    /// Requests under way per queue, 1..=256; fewer if the queue is shorter.
    pub depth: u16,
    /// Smallest request, in bytes: a multiple of the block.
    pub size_min: u64,
    /// Largest request, in bytes: a multiple of the block, at most 1 MiB.
    pub size_max: u64,
    /// What has one generation, in bytes: a multiple of 512.
    pub block: u64,
    /// How much of each disk to use, in bytes; 0 for all of it.
    pub span: u64,
    /// How much of it to write once before the first phase, in bytes.
    pub fill: u64,
    /// How blocks are chosen.
    pub order: Order,
    /// Weights of the operations, by [`Operation::index`].
    pub mix: [u32; 5],
    /// Requests per second and disk at most; 0 for no limit.
    pub rate: u64,
    /// How long to run, in ms; 0 for no limit.
    pub time_ms: u64,
    /// How many requests to make per disk; 0 for no limit.
    pub requests: u64,
    /// Where the random numbers start.
    pub seed: u64,
    /// Sleep for interrupts rather than poll the rings.
    pub interrupts: bool,
    /// Accept EVENT_IDX where offered.
    pub event_idx: bool,
    /// Read everything back at the end.
    pub verify: bool,
    /// Read the disk at the start and take over what earlier runs wrote.
    pub adopt: bool,
    /// Frequency of the time stamp counter; 0 to ask the processor.
    pub tsc_khz: u64,
    /// How to end.
    pub power_off: PowerOff,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            devices: [Device::default(); MAX_DEVICES],
            nr_devices: 0,
            mailbox: None,
            mailbox_ms: 10,
            queues: 1,
            depth: 32,
            size_min: 4096,
            size_max: 4096,
            block: 4096,
            span: 0,
            fill: 0,
            order: Order::Random,
            mix: [1, 0, 0, 0, 0],
            rate: 0,
            time_ms: 0,
            requests: 0,
            seed: 1,
            interrupts: false,
            event_idx: true,
            verify: true,
            adopt: false,
            tsc_khz: 0,
            power_off: PowerOff::Acpi,
        }
    }
}

/// Which word is wrong, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CmdlineError<'a> {
    /// The word, or what several words disagree about.
    pub word: &'a str,
    /// What is wrong with it.
    pub reason: &'static str,
}

impl fmt::Display for CmdlineError<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Bad command line at '{}': {}", self.word, self.reason)
    }
}

impl core::error::Error for CmdlineError<'_> {}

impl Config {
    /// Reads a command line.
    ///
    /// Errors: a word of ours with a value it cannot have, or values that do
    /// not fit together.
    pub fn parse(cmdline: &str) -> Result<Self, CmdlineError<'_>> {
        let mut config = Self::default();
        let mut size_given = false;
        let mut block_given = false;
        for word in cmdline.split_ascii_whitespace() {
            let Some((key, value)) = word.split_once('=') else {
                continue;
            };
            size_given |= key == "size";
            block_given |= key == "block";
            config
                .set(key, value)
                .map_err(|reason| CmdlineError { word, reason })?;
        }
        if size_given && !block_given {
            config.block = config.size_min;
        }
        config.check()?;
        Ok(config)
    }

    /// The virtio-mmio devices, in the order given.
    pub fn devices(&self) -> &[Device] {
        &self.devices[..self.nr_devices]
    }

    /// The operation that a random number below [`Self::total_weight`] means.
    pub fn operation(&self, mut number: u64) -> Operation {
        for operation in Operation::ALL {
            let weight = u64::from(self.mix[operation.index()]);
            if number < weight {
                return operation;
            }
            number -= weight;
        }
        Operation::Write
    }

    /// The sum of the mix.
    pub fn total_weight(&self) -> u64 {
        self.mix.iter().map(|&weight| u64::from(weight)).sum()
    }

    fn set(&mut self, key: &str, value: &str) -> Result<(), &'static str> {
        match key {
            "virtio_mmio.device" => self.add_device(value)?,
            "mailbox" => self.mailbox = Some(number(value, 0, MAX_DEVICES as u64 - 1)? as usize),
            "mailbox_ms" => self.mailbox_ms = number(value, 1, 10_000)?,
            "queues" => self.queues = number(value, 1, 16)? as u16,
            "depth" => self.depth = number(value, 1, 256)? as u16,
            "size" => {
                let (min, max) = value.split_once('-').unwrap_or((value, value));
                self.size_min = size(min)?;
                self.size_max = size(max)?;
            }
            "block" => self.block = size(value)?,
            "span" => self.span = size(value)?,
            "fill" if value == "all" => self.fill = u64::MAX,
            "fill" => self.fill = size(value)?,
            "order" => {
                self.order = match value {
                    "random" => Order::Random,
                    "sequential" => Order::Sequential,
                    _ => return Err("random or sequential is expected"),
                }
            }
            "mix" => self.mix = mix(value)?,
            "rate" => self.rate = number(value, 0, 1_000_000_000)?,
            "time" => self.time_ms = number(value, 0, 86_400_000)?,
            "requests" => self.requests = number(value, 0, u64::MAX)?,
            "seed" => self.seed = number(value, 0, u64::MAX)?,
            "wait" => {
                self.interrupts = match value {
                    "poll" => false,
                    "irq" => true,
                    _ => return Err("poll or irq is expected"),
                }
            }
            "event_idx" => self.event_idx = on_off(value)?,
            "verify" => self.verify = on_off(value)?,
            "adopt" => self.adopt = on_off(value)?,
            "tsc_khz" => self.tsc_khz = number(value, 0, 100_000_000)?,
            "poweroff" => self.power_off = power_off(value)?,
            _ => {}
        }
        Ok(())
    }

    fn add_device(&mut self, value: &str) -> Result<(), &'static str> {
        const FORM: &str = "SIZE@BASE:IRQ is expected";
        let (_, place) = value.split_once('@').ok_or(FORM)?;
        let mut parts = place.split(':');
        let base = integer(parts.next().ok_or(FORM)?).ok_or(FORM)?;
        let irq = integer(parts.next().ok_or(FORM)?).ok_or(FORM)?;
        if base >= 1 << 32 {
            return Err("the guest maps the first 4 GiB only");
        }
        let slot = self
            .devices
            .get_mut(self.nr_devices)
            .ok_or("there are more devices than the guest takes")?;
        *slot = Device {
            base,
            irq: u32::try_from(irq).map_err(|_| FORM)?,
        };
        self.nr_devices += 1;
        Ok(())
    }

    fn check(&self) -> Result<(), CmdlineError<'static>> {
        let wrong = |word, reason| Err(CmdlineError { word, reason });
        if self.block == 0 || !self.block.is_multiple_of(512) {
            return wrong("block", "a multiple of 512 is expected");
        }
        let fits = |size: u64| size != 0 && size.is_multiple_of(self.block);
        if !fits(self.size_min) || !fits(self.size_max) {
            return wrong("size", "a multiple of the block is expected");
        }
        if self.size_min > self.size_max || self.size_max > 1 << 20 {
            return wrong("size", "the smaller comes first, and 1 MiB is the most");
        }
        if self.total_weight() == 0 {
            return wrong("mix", "nothing has a weight");
        }
        if self.mailbox.is_some_and(|index| index >= self.nr_devices) {
            return wrong("mailbox", "there is no such device");
        }
        Ok(())
    }
}

/// `w80,r20`: a letter for the operation, then its weight.
fn mix(value: &str) -> Result<[u32; 5], &'static str> {
    const FORM: &str = "w, r, f, d or z with a weight is expected, as in w80,r20";
    let mut weights = [0; 5];
    for part in value.split(',') {
        let mut chars = part.chars();
        let operation = match chars.next() {
            Some('w') => Operation::Write,
            Some('r') => Operation::Read,
            Some('f') => Operation::Flush,
            Some('d') => Operation::Discard,
            Some('z') => Operation::WriteZeroes,
            _ => return Err(FORM),
        };
        let weight = integer(chars.as_str()).ok_or(FORM)?;
        weights[operation.index()] = u32::try_from(weight).map_err(|_| FORM)?;
    }
    Ok(weights)
}

/// How to end by a command line that is wrong elsewhere.
pub fn power_off_of(cmdline: &str) -> PowerOff {
    let values = cmdline
        .split_ascii_whitespace()
        .filter_map(|word| word.strip_prefix("poweroff="));
    values
        .filter_map(|value| power_off(value).ok())
        .next_back()
        .unwrap_or(PowerOff::Acpi)
}

fn power_off(value: &str) -> Result<PowerOff, &'static str> {
    const FORM: &str = "acpi, reset, halt or PORT:BYTE is expected";
    match value {
        "acpi" => Ok(PowerOff::Acpi),
        "reset" => Ok(PowerOff::Reset),
        "halt" => Ok(PowerOff::Halt),
        _ => {
            let (port, byte) = value.split_once(':').ok_or(FORM)?;
            let port = integer(port).and_then(|port| u16::try_from(port).ok());
            let byte = integer(byte).and_then(|byte| u8::try_from(byte).ok());
            Ok(PowerOff::Port(port.ok_or(FORM)?, byte.ok_or(FORM)?))
        }
    }
}

fn on_off(value: &str) -> Result<bool, &'static str> {
    match value {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err("on or off is expected"),
    }
}

fn number(value: &str, min: u64, max: u64) -> Result<u64, &'static str> {
    match integer(value) {
        Some(number) if (min..=max).contains(&number) => Ok(number),
        Some(_) => Err("the number is out of range"),
        None => Err("a number is expected"),
    }
}

/// A number of bytes: k, M, G and T multiply by powers of 1024.
fn size(value: &str) -> Result<u64, &'static str> {
    let (digits, shift) = match value.as_bytes().last() {
        Some(b'k' | b'K') => (&value[..value.len() - 1], 10),
        Some(b'M') => (&value[..value.len() - 1], 20),
        Some(b'G') => (&value[..value.len() - 1], 30),
        Some(b'T') => (&value[..value.len() - 1], 40),
        _ => (value, 0),
    };
    integer(digits)
        .and_then(|number| number.checked_mul(1 << shift))
        .ok_or("a size is expected, as in 4k or 256M")
}

/// A decimal number, or a hexadecimal one after `0x`.
fn integer(value: &str) -> Option<u64> {
    match value.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => value.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_empty_line_gives_the_defaults() {
        assert_eq!(Config::parse(""), Ok(Config::default()));
        assert_eq!(Config::parse("quiet console=ttyS0"), Ok(Config::default()));
    }

    #[test]
    fn everything_can_be_said() {
        let config = Config::parse(
            "virtio_mmio.device=4K@0xd0000000:5 virtio_mmio.device=512@0xfeb00e00:12:3 \
             mailbox=1 mailbox_ms=5 queues=4 depth=64 size=4k-64k block=4096 span=1G fill=all \
             order=sequential mix=w70,r20,f1,d5,z4 rate=5000 time=250 requests=9 seed=7 wait=irq \
             event_idx=off verify=off adopt=on tsc_khz=2000000 poweroff=0x604:0x34",
        )
        .unwrap();
        assert_eq!(
            config.devices(),
            [
                Device {
                    base: 0xd000_0000,
                    irq: 5
                },
                Device {
                    base: 0xfeb0_0e00,
                    irq: 12
                }
            ]
        );
        let expected = Config {
            devices: config.devices,
            nr_devices: 2,
            mailbox: Some(1),
            mailbox_ms: 5,
            queues: 4,
            depth: 64,
            size_min: 4096,
            size_max: 65536,
            block: 4096,
            span: 1 << 30,
            fill: u64::MAX,
            order: Order::Sequential,
            mix: [70, 20, 1, 5, 4],
            rate: 5000,
            time_ms: 250,
            requests: 9,
            seed: 7,
            interrupts: true,
            event_idx: false,
            verify: false,
            adopt: true,
            tsc_khz: 2_000_000,
            power_off: PowerOff::Port(0x604, 0x34),
        };
        assert_eq!(config, expected);
    }

    #[test]
    fn the_block_is_the_smallest_request_unless_given() {
        assert_eq!(Config::parse("size=64k").unwrap().block, 65536);
        assert_eq!(Config::parse("size=64k block=4k").unwrap().block, 4096);
    }

    #[test]
    fn wrong_values_are_named() {
        for line in [
            "depth=0",
            "depth=many",
            "size=4k-2M",
            "size=64k-4k",
            "size=6k block=4k",
            "block=100",
            "mix=q1",
            "mix=w0",
            "mix=w",
            "mailbox=0",
            "virtio_mmio.device=512",
            "virtio_mmio.device=512@0x100000000:1",
            "fill=half",
            "span=99999999999999T",
            "verify=yes",
            "poweroff=0x604",
            "order=any",
            "wait=long",
        ] {
            let error = Config::parse(line).unwrap_err();
            let key = line.split('=').next().unwrap();
            assert!(error.word.starts_with(key), "{line}: {error}");
        }
    }

    #[test]
    fn the_end_is_known_however_wrong_the_rest() {
        let end = power_off_of("depth=none poweroff=halt poweroff=0x501:0");
        assert_eq!(end, PowerOff::Port(0x501, 0));
        assert_eq!(power_off_of("poweroff=never"), PowerOff::Acpi);
    }

    #[test]
    fn too_many_devices_are_an_error() {
        let line = "virtio_mmio.device=1@2:3 ".repeat(MAX_DEVICES + 1);
        assert!(Config::parse(&line).is_err());
    }

    #[test]
    fn operations_follow_the_mix() {
        let config = Config::parse("mix=w2,f1").unwrap();
        let of: Vec<_> = (0..config.total_weight())
            .map(|number| config.operation(number))
            .collect();
        assert_eq!(of, [Operation::Write, Operation::Write, Operation::Flush]);
    }

    proptest! {
        #[test]
        fn no_line_makes_it_panic(line in "(([a-z_]{1,9}|size|mix|virtio_mmio.device|poweroff)=[-0-9a-zA-Z@:,]{0,20} ){0,4}") {
            let _ = Config::parse(&line);
        }
    }
}
