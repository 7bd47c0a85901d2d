//! Loading a kernel into the guest's memory, and the state the first vCPU
//! starts with.
//!
//! One file per protocol: [`elf`] recognises and loads vmlinux files, which are
//! entered by [`pvh`] or [`linux64`]; [`bzimage`] loads what distributions ship
//! and enters it by [`linux64`] too. The machine around the kernel (ACPI, vCPUs)
//! is not known here.

mod bzimage;
mod elf;
mod linux64;
mod pvh;
mod registers;

#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use linux_loader::cmdline::Cmdline;
use vm_memory::{Bytes, GuestAddress};

use super::layout::{self, GpaRange};
use super::memory::GuestMemory;

pub use registers::Entry;

/// How an ELF kernel is entered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum BootProtocol {
    /// PVH where the kernel has its note, else the 64-bit Linux protocol.
    #[default]
    Auto,
    /// The 32-bit PVH entry.
    Pvh,
    /// The 64-bit Linux boot protocol.
    Linux64,
}

/// Why a kernel could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file could not be opened or read.
    #[error("Cannot read {what} '{}'; check the path and its permissions", .path.display())]
    Read {
        /// What the file is for.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Not a file that could be loaded into memory.
    #[error("The {what} '{}' is not a regular file", .path.display())]
    NotAFile {
        /// What the file is for.
        what: &'static str,
        /// Its path.
        path: PathBuf,
    },
    /// The file is no kernel.
    #[error(
        "'{}' is not a kernel that can be booted ({reason}); give an x86-64 ELF vmlinux or a bzImage",
        .path.display()
    )]
    NotAKernel {
        /// Path of the file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// PVH was asked for, and the kernel has no such entry.
    #[error("Kernel '{}' has no PVH entry; use --boot linux64 or a kernel with CONFIG_PVH", .path.display())]
    NoPvhEntry {
        /// Path of the kernel.
        path: PathBuf,
    },
    /// PVH was asked for a bzImage.
    #[error("'{}' is a bzImage, which cannot be entered by PVH; give the vmlinux, or leave --boot out", .path.display())]
    PvhBzImage {
        /// Path of the kernel.
        path: PathBuf,
    },
    /// The kernel does not fit.
    #[error(
        "Kernel '{}' does not fit into {} MiB of guest memory, or its file is cut short; give the guest more (--memory)",
        .path.display(), .memory / layout::MIB
    )]
    KernelTooBig {
        /// Path of the kernel.
        path: PathBuf,
        /// The guest's memory in bytes.
        memory: u64,
    },
    /// The initrd does not fit.
    #[error(
        "Initrd '{}' ({len} bytes) does not fit beside the kernel into {} MiB of guest memory; give the guest more (--memory)",
        .path.display(), .memory / layout::MIB
    )]
    InitrdTooBig {
        /// Path of the initrd.
        path: PathBuf,
        /// Its length in bytes.
        len: u64,
        /// The guest's memory in bytes.
        memory: u64,
    },
    /// The command line cannot be given to a kernel.
    #[error(
        "Bad kernel command line ({reason}); it may have up to {} characters of ASCII, device arguments included",
        layout::CMDLINE_CAPACITY - 1
    )]
    Cmdline {
        /// What is wrong with it.
        reason: String,
    },
    /// Guest memory could not be written.
    #[error("Cannot write boot data at guest address {gpa:#x}")]
    Memory {
        /// Where.
        gpa: u64,
        /// Why.
        source: Box<vm_memory::GuestMemoryError>,
    },
}

/// A virtio-mmio device, for guests that learn of it by the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MmioArgument {
    /// Address of its window.
    pub gpa: u64,
    /// Its interrupt.
    pub gsi: u32,
}

/// What is to be booted. The files stay open, so that a restart of the guest
/// boots the same kernel even if its path has got a new file meanwhile.
#[derive(Debug)]
pub struct BootImages {
    kernel: NamedFile,
    initrd: Option<NamedFile>,
    cmdline: String,
    protocol: BootProtocol,
}

/// An open file and how the user called it.
#[derive(Debug)]
struct NamedFile {
    what: &'static str,
    path: PathBuf,
    file: File,
}

impl NamedFile {
    fn open(what: &'static str, path: &Path) -> Result<Self, BootError> {
        let read_error = |source| BootError::Read {
            what,
            path: path.to_owned(),
            source,
        };
        // A FIFO is not waited for; for a regular file the flag means nothing.
        let file = File::options()
            .read(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(path)
            .map_err(read_error)?;
        if !file.metadata().map_err(read_error)?.is_file() {
            return Err(BootError::NotAFile {
                what,
                path: path.to_owned(),
            });
        }
        Ok(Self {
            what,
            path: path.to_owned(),
            file,
        })
    }

    fn len(&self) -> Result<u64, BootError> {
        Ok(self
            .file
            .metadata()
            .map_err(|source| self.read_error(source))?
            .len())
    }

    fn read_error(&self, source: io::Error) -> BootError {
        BootError::Read {
            what: self.what,
            path: self.path.clone(),
            source,
        }
    }
}

impl BootImages {
    /// Opens the files. `cmdline` is the user's part of the command line.
    pub fn open(
        kernel: &Path,
        initrd: Option<&Path>,
        cmdline: &str,
        protocol: BootProtocol,
    ) -> Result<Self, BootError> {
        Ok(Self {
            kernel: NamedFile::open("kernel", kernel)?,
            initrd: initrd
                .map(|path| NamedFile::open("initrd", path))
                .transpose()?,
            cmdline: cmdline.to_owned(),
            protocol,
        })
    }

    /// Loads everything into `mem`, which has `memory` bytes and is otherwise
    /// untouched, and says how the first vCPU has to start.
    ///
    /// `rsdp` is the address of the ACPI root pointer; `devices` are named on
    /// the command line.
    pub fn load(
        &self,
        mem: &GuestMemory,
        memory: u64,
        rsdp: u64,
        devices: &[MmioArgument],
    ) -> Result<Entry, BootError> {
        let cmdline = full_cmdline(&self.cmdline, devices)?;
        let mut head = [0; 0x206];
        let mut kernel = &self.kernel.file;
        kernel
            .rewind()
            .and_then(|()| read_up_to(&mut kernel, &mut head))
            .map_err(|source| self.kernel.read_error(source))?;

        let loaded = if head[..4] == *b"\x7fELF" {
            elf::load(&self.kernel, &head, mem, memory, self.protocol)?
        } else if head[0x202..0x206] == *b"HdrS" {
            if self.protocol == BootProtocol::Pvh {
                return Err(BootError::PvhBzImage {
                    path: self.kernel.path.clone(),
                });
            }
            bzimage::load(&self.kernel, mem, memory)?
        } else {
            return Err(not_a_kernel(
                &self.kernel,
                "neither an ELF file nor a bzImage",
            ));
        };

        let initrd = self
            .initrd
            .as_ref()
            .map(|initrd| load_initrd(initrd, mem, memory, &loaded))
            .transpose()?;
        write(mem, layout::CMDLINE_GPA, &cmdline)?;
        let boot_data = BootData {
            memory,
            rsdp,
            cmdline_len: cmdline.len() as u32 - 1,
            initrd,
        };
        match loaded.entry {
            LoadedEntry::Pvh { entry } => {
                pvh::write_start_info(mem, &boot_data)?;
                Ok(Entry::Pvh { entry })
            }
            LoadedEntry::Linux64 { entry, header } => {
                linux64::write_boot_data(mem, &boot_data, header)?;
                Ok(Entry::Linux64 { entry })
            }
        }
    }
}

/// What the protocols tell the kernel.
struct BootData {
    /// Memory size in bytes.
    memory: u64,
    /// Address of the ACPI root pointer.
    rsdp: u64,
    /// Length of the command line, which is at `CMDLINE_GPA`, without its NUL.
    cmdline_len: u32,
    /// Where the initrd is.
    initrd: Option<GpaRange>,
}

/// A kernel that is in memory.
struct Loaded {
    /// First address that the kernel neither holds nor needs to start.
    kernel_end: u64,
    /// Highest address that an initrd may end at (exclusive).
    initrd_limit: u64,
    entry: LoadedEntry,
}

enum LoadedEntry {
    Pvh {
        entry: u32,
    },
    Linux64 {
        entry: u64,
        header: linux_loader::bootparam::setup_header,
    },
}

fn not_a_kernel(kernel: &NamedFile, reason: impl ToString) -> BootError {
    BootError::NotAKernel {
        path: kernel.path.clone(),
        reason: reason.to_string(),
    }
}

/// Reads until `buf` is full or the file ends.
fn read_up_to(file: &mut impl Read, mut buf: &mut [u8]) -> io::Result<()> {
    while !buf.is_empty() {
        match file.read(buf) {
            Ok(0) => break,
            Ok(n) => buf = &mut buf[n..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Puts the initrd as high as it may be, so that it is out of the way of a
/// kernel that unpacks or moves itself.
fn load_initrd(
    initrd: &NamedFile,
    mem: &GuestMemory,
    memory: u64,
    loaded: &Loaded,
) -> Result<GpaRange, BootError> {
    const PAGE: u64 = 0x1000;
    let len = initrd.len()?;
    let too_big = || BootError::InitrdTooBig {
        path: initrd.path.clone(),
        len,
        memory,
    };
    let limit = loaded.initrd_limit.min(layout::low_memory_end(memory));
    let start = limit.checked_sub(len).ok_or_else(too_big)? & !(PAGE - 1);
    if start < loaded.kernel_end.max(layout::HIGH_RAM_GPA) {
        return Err(too_big());
    }
    let mut file = &initrd.file;
    file.seek(SeekFrom::Start(0))
        .map_err(|source| initrd.read_error(source))?;
    mem.read_exact_volatile_from(GuestAddress(start), &mut file, len as usize)
        .map_err(|error| initrd.read_error(io::Error::other(error)))?;
    Ok(GpaRange { start, len })
}

/// The user's command line with the devices' arguments, as bytes with a NUL.
fn full_cmdline(user: &str, devices: &[MmioArgument]) -> Result<Vec<u8>, BootError> {
    let bad = |error: linux_loader::cmdline::Error| BootError::Cmdline {
        reason: error.to_string(),
    };
    let mut cmdline = Cmdline::try_from(user.trim(), layout::CMDLINE_CAPACITY).map_err(bad)?;
    for device in devices {
        cmdline
            .add_virtio_mmio_device(
                layout::VIRTIO_MMIO_SIZE,
                GuestAddress(device.gpa),
                device.gsi,
                None,
            )
            .map_err(bad)?;
    }
    Ok(cmdline.as_cstring().map_err(bad)?.into_bytes_with_nul())
}

fn write(mem: &GuestMemory, gpa: u64, bytes: &[u8]) -> Result<(), BootError> {
    mem.write_slice(bytes, GuestAddress(gpa))
        .map_err(|source| BootError::Memory {
            gpa,
            source: Box::new(source),
        })
}

fn write_obj<T: vm_memory::ByteValued>(
    mem: &GuestMemory,
    gpa: u64,
    value: T,
) -> Result<(), BootError> {
    write(mem, gpa, value.as_slice())
}
