//! The ACPI tables: reduced hardware (ACPI 6.5 §4.1), enough for a guest to
//! find its processors, its serial port, its virtio-mmio devices and the
//! registers that power it off or reset it.
//!
//! Interrupt lines keep PC defaults (ISA lines identity-mapped, edge, active
//! high), so the MADT needs no source overrides.

use acpi_tables::Aml;
use acpi_tables::aml::{
    Device, EISAName, IO, Interrupt, Memory32Fixed, Name, Package, Path, ResourceTemplate, Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;

use super::{irq, layout};

const OEM_ID: [u8; 6] = *b"DIPTYC";
const OEM_TABLE_ID: [u8; 8] = *b"DIPTYCH ";
const OEM_REVISION: u32 = 1;

/// `SLP_TYP` of the soft-off state (S5), as the DSDT names it and as the sleep
/// control register has to be written.
pub const SLEEP_TYPE_S5: u8 = 5;

/// FADT boot architecture flags (§5.2.9.3): no VGA and no CMOS RTC to probe
/// for. Bit 1 (8042 present) stays clear: there is only its reset line.
const BOOT_ARCH_NO_VGA_NO_RTC: u16 = 1 << 2 | 1 << 5;

/// What the tables have to describe.
#[derive(Clone, Debug)]
pub struct AcpiSpec {
    /// Number of vCPUs; their APIC ids count from 0.
    pub cpus: u8,
    /// The virtio-mmio devices: window and interrupt of each.
    pub virtio: Vec<VirtioMmioSpec>,
    /// First port of the 16550 and its interrupt.
    pub serial: (u16, u32),
    /// The power registers.
    pub power: PowerRegisters,
}

/// Window and interrupt of one virtio-mmio device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VirtioMmioSpec {
    /// Address of its window of `VIRTIO_MMIO_SIZE` bytes.
    pub gpa: u64,
    /// Its interrupt.
    pub gsi: u32,
}

/// I/O ports of the power registers (§4.8.4.6, §4.8.3.7).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PowerRegisters {
    /// SLEEP_CONTROL_REG.
    pub sleep_control: u16,
    /// SLEEP_STATUS_REG.
    pub sleep_status: u16,
    /// RESET_REG.
    pub reset: u16,
    /// What to write there.
    pub reset_value: u8,
}

/// The tables as bytes, to be put at [`layout::ACPI_TABLES_GPA`]. The first
/// are the RSDP.
pub fn build(spec: &AcpiSpec) -> Vec<u8> {
    let mut image = Image {
        base: layout::ACPI_TABLES_GPA,
        bytes: vec![0; Rsdp::len()],
    };
    let dsdt = image.append(dsdt(spec).as_slice());
    let fadt = image.append(&bytes_of(&fadt(spec, dsdt)));
    let madt = image.append(madt(spec).as_slice());
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = image.append(&bytes_of(&xsdt));
    let rsdp = bytes_of(&Rsdp::new(OEM_ID, xsdt));
    image.bytes[..rsdp.len()].copy_from_slice(&rsdp);
    image.bytes
}

/// The tables placed so far.
struct Image {
    base: u64,
    bytes: Vec<u8>,
}

impl Image {
    /// Appends a table and gives its address.
    fn append(&mut self, table: &[u8]) -> u64 {
        let start = self.bytes.len().next_multiple_of(16);
        self.bytes.resize(start, 0);
        self.bytes.extend_from_slice(table);
        self.base + start as u64
    }
}

fn bytes_of(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn fadt(spec: &AcpiSpec, dsdt: u64) -> acpi_tables::fadt::FADT {
    let port = |port: u16| {
        GAS::new(
            AddressSpace::SystemIo,
            8,
            0,
            AccessSize::ByteAccess,
            u64::from(port),
        )
    };
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::Wbinvd)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup)
        .flag(Flags::HwReducedAcpi);
    fadt.iapc_boot_arch = BOOT_ARCH_NO_VGA_NO_RTC.into();
    fadt.sleep_control_reg = port(spec.power.sleep_control);
    fadt.sleep_status_reg = port(spec.power.sleep_status);
    fadt.reset_reg = port(spec.power.reset);
    fadt.reset_value = spec.power.reset_value;
    fadt.finalize()
}

/// MADT (§5.2.12), written by hand as far as `acpi_tables` lacks structures.
fn madt(spec: &AcpiSpec) -> Sdt {
    const HEADER_LEN: u32 = 36 + 8;
    const REVISION: u8 = 5;
    const LOCAL_APIC_NMI: u8 = 4;
    let mut madt = Sdt::new(
        *b"APIC",
        HEADER_LEN,
        REVISION,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
    );
    madt.write_u32(36, layout::LOCAL_APIC_GPA as u32);
    // Flags stay 0: no pair of 8259s to be masked, the guest uses the I/O APIC.
    let mut structures = Vec::new();
    for cpu in 0..spec.cpus {
        ProcessorLocalApic::new(cpu, cpu, EnabledStatus::Enabled).to_aml_bytes(&mut structures);
    }
    IoApic::new(irq::IO_APIC_ID, layout::IO_APIC_GPA as u32, 0).to_aml_bytes(&mut structures);
    // All processors, polarity and trigger as the bus has them, LINT1.
    structures.extend_from_slice(&[LOCAL_APIC_NMI, 6, 0xff, 0, 0, 1]);
    madt.append_slice(&structures);
    madt
}

fn dsdt(spec: &AcpiSpec) -> Sdt {
    const HEADER_LEN: u32 = 36;
    const REVISION: u8 = 2;
    let mut aml = Vec::new();
    let soft_off = Package::new(vec![&SLEEP_TYPE_S5, &0_u8, &0_u8, &0_u8]);
    Name::new("_S5_".into(), &soft_off).to_aml_bytes(&mut aml);

    // Resource order: consumer, edge, active high, exclusive.
    let edge = |gsi: u32| Interrupt::new(true, true, false, false, gsi);
    let (port, gsi) = spec.serial;
    Scope::new(
        "_SB_".into(),
        vec![&Device::new(
            "COM1".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0501")),
                &Name::new("_UID".into(), &1_u8),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![&IO::new(port, port, 1, 8), &edge(gsi)]),
                ),
            ],
        )],
    )
    .to_aml_bytes(&mut aml);

    for (index, device) in spec.virtio.iter().enumerate() {
        let shared = irq::is_shared(spec.virtio.len(), index);
        let interrupt = Interrupt::new(true, true, false, shared, device.gsi);
        let window = Memory32Fixed::new(true, device.gpa as u32, layout::VIRTIO_MMIO_SIZE as u32);
        Scope::new(
            "_SB_".into(),
            vec![&Device::new(
                Path::new(&format!("VR{index:02X}")),
                vec![
                    &Name::new("_HID".into(), &"LNRO0005"),
                    &Name::new("_UID".into(), &(index as u8)),
                    &Name::new(
                        "_CRS".into(),
                        &ResourceTemplate::new(vec![&window, &interrupt]),
                    ),
                ],
            )],
        )
        .to_aml_bytes(&mut aml);
    }

    let mut dsdt = Sdt::new(
        *b"DSDT",
        HEADER_LEN,
        REVISION,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
    );
    dsdt.append_slice(&aml);
    dsdt
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(cpus: u8, disks: usize) -> AcpiSpec {
        AcpiSpec {
            cpus,
            virtio: (0..disks)
                .map(|index| VirtioMmioSpec {
                    gpa: layout::virtio_mmio_gpa(index),
                    gsi: irq::virtio_gsi(index),
                })
                .collect(),
            serial: (0x3f8, 4),
            power: PowerRegisters {
                sleep_control: 0x600,
                sleep_status: 0x601,
                reset: 0x602,
                reset_value: 1,
            },
        }
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    fn u32_at(bytes: &[u8], offset: usize) -> u32 {
        u32::from_le_bytes(bytes[offset..offset + 4].try_into().unwrap())
    }

    fn u64_at(bytes: &[u8], offset: usize) -> u64 {
        u64::from_le_bytes(bytes[offset..offset + 8].try_into().unwrap())
    }

    /// The table at a guest address, checked.
    fn table<'a>(image: &'a [u8], gpa: u64, signature: &[u8; 4]) -> &'a [u8] {
        let start = (gpa - layout::ACPI_TABLES_GPA) as usize;
        let len = u32_at(image, start + 4) as usize;
        let table = &image[start..start + len];
        assert_eq!(&table[..4], signature);
        assert_eq!(sum(table), 0, "checksum");
        table
    }

    #[test]
    fn every_table_is_reached_from_the_root_and_has_a_valid_checksum() {
        for (cpus, disks) in [(1, 0), (2, 1), (32, 32)] {
            let image = build(&spec(cpus, disks));
            assert!(image.len() as u64 <= layout::ACPI_TABLES_SIZE);
            assert_eq!(&image[..8], b"RSD PTR ");
            assert_eq!(sum(&image[..20]), 0);
            assert_eq!(sum(&image[..36]), 0);
            let xsdt = table(&image, u64_at(&image, 24), b"XSDT");
            let fadt = table(&image, u64_at(xsdt, 36), b"FACP");
            table(&image, u64_at(fadt, 140), b"DSDT");
            let madt = table(&image, u64_at(xsdt, 44), b"APIC");
            assert_eq!(madt.len(), 44 + 8 * usize::from(cpus) + 12 + 6);
        }
    }

    #[test]
    fn the_fadt_is_reduced_hardware_with_sleep_and_reset_registers() {
        let image = build(&spec(1, 1));
        let xsdt = table(&image, u64_at(&image, 24), b"XSDT");
        let fadt = table(&image, u64_at(xsdt, 36), b"FACP");
        let flags = u32_at(fadt, 112);
        assert_ne!(flags & 1 << 20, 0, "HW_REDUCED_ACPI");
        assert_ne!(flags & 1 << 10, 0, "RESET_REG_SUP");
        assert_eq!(u64_at(fadt, 116 + 4), 0x602);
        assert_eq!(fadt[128], 1);
        assert_eq!(u64_at(fadt, 244 + 4), 0x600);
        assert_eq!(u64_at(fadt, 256 + 4), 0x601);
    }

    #[test]
    fn each_disk_is_a_device_with_its_window_and_interrupt() {
        let image = build(&spec(1, 20));
        let xsdt = table(&image, u64_at(&image, 24), b"XSDT");
        let fadt = table(&image, u64_at(xsdt, 36), b"FACP");
        let dsdt = table(&image, u64_at(fadt, 140), b"DSDT");
        let count = |needle: &[u8]| dsdt.windows(needle.len()).filter(|w| *w == needle).count();
        assert_eq!(count(b"LNRO0005"), 20);
        for index in 0..20 {
            assert_eq!(count(format!("VR{index:02X}").as_bytes()), 1);
            // Fixed memory range: tag, length 9, writable, base, size.
            let mut window = vec![0x86, 9, 0, 1];
            window.extend((layout::virtio_mmio_gpa(index) as u32).to_le_bytes());
            window.extend((layout::VIRTIO_MMIO_SIZE as u32).to_le_bytes());
            assert_eq!(count(&window), 1);
        }
    }
}
