//! Address ranges and the devices behind them, for MMIO and port I/O.
//!
//! Decoding an exit is here; where devices sit is the machine's business.

use std::sync::Arc;

use crate::ticket::ResetTicket;

/// What the vCPU thread has to do after a register write.
#[must_use = "a reset that nobody waits for lets the guest reuse memory that I/O still writes"]
#[derive(Debug)]
pub enum MmioOutcome {
    /// Nothing: enter the guest again.
    Done,
    /// Enter the guest only when this ticket is done: a queue or the device is
    /// being stopped, and until then host I/O may still write guest memory.
    Wait(ResetTicket),
}

/// Registers in the guest's physical address space.
///
/// Threads: any vCPU thread, several at once. Neither method waits for anything.
pub trait MmioDevice: Send + Sync {
    /// Fills `data` (1 to 8 bytes) from `offset`, counted from the device's base.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// Takes `data` (1 to 8 bytes) at `offset`.
    fn write(&self, offset: u64, data: &[u8]) -> MmioOutcome;
}

/// Registers in the guest's I/O port space.
///
/// Threads: any vCPU thread, several at once.
pub trait PioDevice: Send + Sync {
    /// Fills `data` (1, 2 or 4 bytes) from port `offset`, counted from the
    /// device's first port.
    fn read(&self, offset: u16, data: &mut [u8]);

    /// Takes `data` (1, 2 or 4 bytes) at port `offset`.
    fn write(&self, offset: u16, data: &[u8]);
}

/// A range that cannot be given to a device.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum BusError {
    /// Empty, or past the end of the address space.
    #[error("Range of {len:#x} bytes at {base:#x} is not a range of addresses")]
    InvalidRange {
        /// First address.
        base: u64,
        /// Length in bytes.
        len: u64,
    },
    /// Another device is there.
    #[error("Range of {len:#x} bytes at {base:#x} overlaps the device at {other:#x}")]
    Overlap {
        /// First address.
        base: u64,
        /// Length in bytes.
        len: u64,
        /// First address of the device that is there.
        other: u64,
    },
}

struct Slot<D: ?Sized> {
    base: u64,
    last: u64,
    device: Arc<D>,
}

/// Address ranges and their devices.
///
/// Filled once, then shared: looking up takes no lock.
pub struct Bus<D: ?Sized> {
    /// Sorted by base, no two overlap.
    slots: Vec<Slot<D>>,
}

impl<D: ?Sized> Default for Bus<D> {
    fn default() -> Self {
        Self { slots: Vec::new() }
    }
}

impl<D: ?Sized> Bus<D> {
    /// A bus without devices.
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts `device` at `base`, for `len` bytes (or ports).
    ///
    /// # Errors
    ///
    /// If the range is empty, wraps, or is not free.
    pub fn insert(&mut self, base: u64, len: u64, device: Arc<D>) -> Result<(), BusError> {
        let last = len
            .checked_sub(1)
            .and_then(|less| base.checked_add(less))
            .ok_or(BusError::InvalidRange { base, len })?;
        let at = self.slots.partition_point(|slot| slot.base < base);
        let neighbours = [at.checked_sub(1), Some(at)];
        for slot in neighbours
            .into_iter()
            .flatten()
            .filter_map(|i| self.slots.get(i))
        {
            if slot.base <= last && base <= slot.last {
                return Err(BusError::Overlap {
                    base,
                    len,
                    other: slot.base,
                });
            }
        }
        self.slots.insert(at, Slot { base, last, device });
        Ok(())
    }

    /// The device that has all of `len` bytes at `addr`, and the offset in it.
    pub fn find(&self, addr: u64, len: usize) -> Option<(&Arc<D>, u64)> {
        let at = self.slots.partition_point(|slot| slot.base <= addr);
        let slot = self.slots.get(at.checked_sub(1)?)?;
        let last = addr.checked_add(u64::try_from(len).ok()?.checked_sub(1)?)?;
        (last <= slot.last).then_some((&slot.device, addr - slot.base))
    }

    /// All devices, by rising address.
    pub fn devices(&self) -> impl Iterator<Item = (u64, &Arc<D>)> {
        self.slots.iter().map(|slot| (slot.base, &slot.device))
    }
}

impl Bus<dyn MmioDevice> {
    /// Reads from the device at `addr`; without one, all bits read as set.
    pub fn read(&self, addr: u64, data: &mut [u8]) {
        match self.find(addr, data.len()) {
            Some((device, offset)) => device.read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// Writes to the device at `addr`; without one, nothing happens.
    pub fn write(&self, addr: u64, data: &[u8]) -> MmioOutcome {
        match self.find(addr, data.len()) {
            Some((device, offset)) => device.write(offset, data),
            None => MmioOutcome::Done,
        }
    }
}

impl Bus<dyn PioDevice> {
    /// Reads from the device at `port`; without one, all bits read as set.
    pub fn read(&self, port: u16, data: &mut [u8]) {
        match self.find(port.into(), data.len()) {
            Some((device, offset)) => device.read(offset as u16, data),
            None => data.fill(0xff),
        }
    }

    /// Writes to the device at `port`; without one, nothing happens.
    pub fn write(&self, port: u16, data: &[u8]) {
        if let Some((device, offset)) = self.find(port.into(), data.len()) {
            device.write(offset as u16, data);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bus() -> Bus<&'static str> {
        let mut bus = Bus::new();
        bus.insert(0x1000, 0x100, Arc::new("low")).unwrap();
        bus.insert(0x3000, 0x100, Arc::new("high")).unwrap();
        bus.insert(u64::MAX, 1, Arc::new("last")).unwrap();
        bus
    }

    #[test]
    fn an_access_finds_the_device_that_holds_all_of_it() {
        let bus = bus();
        let at = |addr, len| bus.find(addr, len).map(|(d, offset)| (**d, offset));
        assert_eq!(at(0x1000, 4), Some(("low", 0)));
        assert_eq!(at(0x10fc, 4), Some(("low", 0xfc)));
        assert_eq!(at(0x10fd, 4), None);
        assert_eq!(at(0xfff, 1), None);
        assert_eq!(at(0x3001, 1), Some(("high", 1)));
        assert_eq!(at(u64::MAX, 1), Some(("last", 0)));
        assert_eq!(at(u64::MAX, 2), None);
        assert_eq!(at(0x1000, 0), None);
    }

    #[test]
    fn a_range_is_given_to_one_device_only() {
        let mut bus = bus();
        for (base, len) in [(0xf01, 0x100), (0x10ff, 1), (0x800, 0x4000), (0x1000, 1)] {
            assert_eq!(
                bus.insert(base, len, Arc::new("second")),
                Err(BusError::Overlap {
                    base,
                    len,
                    other: 0x1000
                })
            );
        }
        bus.insert(0x1100, 0x1f00, Arc::new("between")).unwrap();
        assert!(matches!(
            bus.insert(0x5000, 0, Arc::new("empty")),
            Err(BusError::InvalidRange { .. })
        ));
        assert!(matches!(
            bus.insert(u64::MAX - 1, 4, Arc::new("wraps")),
            Err(BusError::InvalidRange { .. })
        ));
    }
}
