//! Interrupt lines: who has which. All are edge-triggered, raised by irqfd.

/// Id of the I/O APIC that KVM emulates.
pub const IO_APIC_ID: u8 = 0;
/// The first serial port's line, as on every PC.
pub const SERIAL_GSI: u32 = 4;

/// Lines for virtio devices: the free ISA lines first (a guest that only knows
/// the 8259s can use those), then the upper pins of the I/O APIC.
const VIRTIO_GSIS: [u32; 15] = [5, 6, 7, 10, 11, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23];

/// The line of the `index`th virtio device. Past the number of lines they are
/// shared: an edge for one device has drivers look at all on the line.
pub fn virtio_gsi(index: usize) -> u32 {
    VIRTIO_GSIS[index % VIRTIO_GSIS.len()]
}

/// Whether the `index`th of `count` virtio devices shares its line.
pub fn is_shared(count: usize, index: usize) -> bool {
    index >= VIRTIO_GSIS.len() || index + VIRTIO_GSIS.len() < count
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_exclusive_until_they_run_out() {
        let count = VIRTIO_GSIS.len();
        assert!((0..count).all(|index| !is_shared(count, index)));
        assert!(is_shared(count + 1, 0) && is_shared(count + 1, count));
        assert!(!is_shared(count + 1, 1));
        assert_eq!(virtio_gsi(count), virtio_gsi(0));
        assert!((0..count).all(|index| virtio_gsi(index) != SERIAL_GSI));
    }
}
