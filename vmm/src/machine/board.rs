//! The devices of a machine and where they are: address windows, ports and
//! interrupt lines. They outlive a restart of the guest; KVM's part does not.

use std::io::Write;
use std::sync::Arc;

use devices::{AcpiPm, Bus, I8042, ResetTicket, Serial, VirtioBlk, VirtioMmio};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::acpi::{self, AcpiSpec, PowerRegisters, VirtioMmioSpec};
use super::boot::{BootError, BootImages, Entry, MmioArgument};
use super::memory::{self, GuestMemory};
use super::vcpu::Buses;
use super::{MachineError, irq, layout};
use crate::vm_control::DiskInfo;

/// First port of the serial port (COM1).
const SERIAL_PORT: u16 = 0x3f8;
/// First port of the ACPI power registers.
const ACPI_PM_PORT: u16 = 0x600;

/// What a guest finds that jumps to the reset vector, as Linux does on reduced
/// hardware without EFI, where it tries neither the ACPI reset register nor the
/// keyboard controller: `mov al, 0xfe; out 0x64, al; hlt; jmp` back to `hlt`.
const RESET_CODE: [u8; 7] = [0xb0, 0xfe, 0xe6, 0x64, 0xf4, 0xeb, 0xfd];

/// A virtio device in its place.
pub struct VirtioSlot {
    /// The disk behind the transport.
    pub disk: Arc<VirtioBlk>,
    /// The transport.
    pub transport: Arc<VirtioMmio>,
    /// Address of its window.
    pub gpa: u64,
    /// Its interrupt line.
    pub gsi: u32,
}

/// All devices of a machine, and its memory.
pub struct Board {
    /// The guest's memory.
    pub mem: Arc<GuestMemory>,
    /// Memory size in bytes.
    pub memory: u64,
    /// Number of vCPUs.
    pub cpus: u8,
    /// How vCPUs reach the devices.
    pub buses: Arc<Buses>,
    /// The disks.
    pub virtio: Vec<VirtioSlot>,
    /// The serial port.
    pub serial: Arc<Serial>,
    /// Signalled when the guest powers off.
    pub power_off_evt: Arc<EventFd>,
    /// Signalled when the guest wants to be reset.
    pub reset_evt: Arc<EventFd>,
}

impl Board {
    /// Makes the memory and puts all devices in their places. `serial_output`
    /// is written on vCPU threads.
    pub fn new(
        memory: u64,
        cpus: u8,
        disks: &[Arc<VirtioBlk>],
        serial_output: Box<dyn Write + Send>,
    ) -> Result<Self, MachineError> {
        let mem = memory::allocate(memory)?;
        let device_error = |what| move |source| MachineError::Device { what, source };
        let event = || {
            EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
                .map(Arc::new)
                .map_err(device_error("power events"))
        };
        let power_off_evt = event()?;
        let reset_evt = event()?;
        let serial = Arc::new(Serial::new(serial_output).map_err(device_error("serial port"))?);
        let mut buses = Buses {
            pio: Bus::new(),
            mmio: Bus::new(),
        };
        buses.pio.insert(
            SERIAL_PORT.into(),
            Serial::PORTS.into(),
            Arc::clone(&serial) as _,
        )?;
        buses.pio.insert(
            I8042::BASE_PORT.into(),
            I8042::PORTS.into(),
            Arc::new(I8042::new(Arc::clone(&reset_evt))),
        )?;
        buses.pio.insert(
            ACPI_PM_PORT.into(),
            AcpiPm::PORTS.into(),
            Arc::new(AcpiPm::new(
                Arc::clone(&power_off_evt),
                Arc::clone(&reset_evt),
            )),
        )?;
        let mut virtio = Vec::with_capacity(disks.len());
        for (index, disk) in disks.iter().enumerate() {
            let transport = VirtioMmio::new(Arc::clone(&mem), Arc::clone(disk) as _)
                .map(Arc::new)
                .map_err(device_error("virtio device"))?;
            let gpa = layout::virtio_mmio_gpa(index);
            buses
                .mmio
                .insert(gpa, VirtioMmio::LEN, Arc::clone(&transport) as _)?;
            virtio.push(VirtioSlot {
                disk: Arc::clone(disk),
                transport,
                gpa,
                gsi: irq::virtio_gsi(index),
            });
        }
        Ok(Self {
            mem,
            memory,
            cpus,
            buses: Arc::new(buses),
            virtio,
            serial,
            power_off_evt,
            reset_evt,
        })
    }

    /// Writes the firmware tables and the kernel into the guest's memory, which
    /// is zeroed or was [cleared](memory::clear).
    pub fn load(&self, images: &BootImages) -> Result<Entry, MachineError> {
        let tables = acpi::build(&AcpiSpec {
            cpus: self.cpus,
            virtio: self
                .virtio
                .iter()
                .map(|slot| VirtioMmioSpec {
                    gpa: slot.gpa,
                    gsi: slot.gsi,
                })
                .collect(),
            serial: (SERIAL_PORT, irq::SERIAL_GSI),
            power: PowerRegisters {
                sleep_control: ACPI_PM_PORT + AcpiPm::SLEEP_CONTROL_OFFSET,
                sleep_status: ACPI_PM_PORT + AcpiPm::SLEEP_STATUS_OFFSET,
                reset: ACPI_PM_PORT + AcpiPm::RESET_OFFSET,
                reset_value: AcpiPm::RESET_VALUE,
            },
        });
        let arguments: Vec<_> = self
            .virtio
            .iter()
            .map(|slot| MmioArgument {
                gpa: slot.gpa,
                gsi: slot.gsi,
            })
            .collect();
        let entry = images.load(&self.mem, self.memory, layout::ACPI_TABLES_GPA, &arguments)?;
        // After the kernel: an ELF file may claim any address.
        for (gpa, bytes) in [
            (layout::ACPI_TABLES_GPA, &tables[..]),
            (layout::RESET_VECTOR_GPA, &RESET_CODE),
        ] {
            self.mem
                .write_slice(bytes, GuestAddress(gpa))
                .map_err(|source| BootError::Memory {
                    gpa,
                    source: Box::new(source),
                })?;
        }
        Ok(entry)
    }

    /// The disks, for the monitor.
    pub fn disk_infos(&self) -> Vec<DiskInfo> {
        self.virtio
            .iter()
            .map(|slot| DiskInfo {
                id: slot.disk.id().to_owned(),
                qdev: format!("/machine/virtio-mmio@{:x}/virtio-backend", slot.gpa),
            })
            .collect()
    }

    /// Waits until no disk has a request in flight; none takes new ones. With
    /// the vCPUs parked only. Cancel: the disks are paused all the same.
    pub async fn pause_devices(&self) {
        let pauses = self.virtio.iter().map(|slot| slot.disk.pause());
        futures_util::future::join_all(pauses).await;
    }

    /// Lets the disks go on.
    pub fn resume_devices(&self) {
        self.virtio.iter().for_each(|slot| slot.disk.resume());
    }

    /// Resets all devices. Guest memory may be reused when all tickets are done.
    pub fn reset_devices(&self) -> Vec<ResetTicket> {
        self.serial.reset();
        // Requests for power-off or reset that came before are answered by it.
        // Nothing to read is the usual case.
        let _ = self.power_off_evt.read();
        let _ = self.reset_evt.read();
        self.virtio
            .iter()
            .map(|slot| slot.transport.reset())
            .collect()
    }
}
