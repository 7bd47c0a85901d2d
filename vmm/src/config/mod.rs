//! What a guest is made of, as the user says it: on the command line, in a
//! configuration file (TOML, or JSON by its ending), or both.
//!
//! Both ways end in one [`VmSpec`]; nothing is opened here. Flags override a
//! file's single values and add to its lists.

mod key_value;
mod values;

#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use block::BlockdevOptions;
use serde::Deserialize;

use crate::machine::{
    BootProtocol, CrashPolicy, MAX_CPUS, MAX_DISKS, MachineError, RebootPolicy, check_memory_size,
};
use crate::monitor::{ObjectOptions, QmpAddress};
use key_value::key_value_spec;
pub use values::{MemorySize, SerialSpec};

/// Most queues that a disk can have.
const MAX_QUEUES: u16 = 64;
/// Longest id of a disk: its nodes' names are longer by six, and QMP's longest
/// are of 31.
const MAX_DISK_ID_LEN: usize = 25;
/// Longest serial number of a disk (virtio 1.2 §5.2.6.1, GET_ID).
const MAX_SERIAL_LEN: usize = 20;
/// The iothread of disks that name none.
pub const DEFAULT_IOTHREAD: &str = "iothread0";

/// What is wrong with a configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("Cannot read configuration file '{}'", .path.display())]
    Read {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file does not say what a configuration can say.
    #[error("Bad configuration file '{}', {place}: {message}", .path.display())]
    Parse {
        /// Its path.
        path: PathBuf,
        /// Line and column.
        place: String,
        /// What is wrong.
        message: String,
    },
    /// Nothing to boot.
    #[error("No kernel to boot; give one with --kernel, or 'kernel' in the configuration file")]
    NoKernel,
    /// A number of vCPUs that no guest can have.
    #[error("A guest cannot have {cpus} vCPUs; give 1 to {MAX_CPUS} (--cpus)")]
    Cpus {
        /// The number.
        cpus: u8,
    },
    /// A memory size that no guest can have.
    #[error(transparent)]
    Memory(MachineError),
    /// Too many disks.
    #[error("A guest cannot have {count} disks; the most is {MAX_DISKS}")]
    TooManyDisks {
        /// How many.
        count: usize,
    },
    /// An id that QMP could not name.
    #[error(
        "Bad id '{id}' of {what}; an id is an ASCII letter, then letters, digits, '-', '.' and '_'"
    )]
    BadId {
        /// What has it.
        what: &'static str,
        /// The id.
        id: String,
    },
    /// An id that leaves no room for the names of the disk's nodes.
    #[error("Id '{id}' of a disk is too long; the most is {MAX_DISK_ID_LEN} characters")]
    LongId {
        /// The id.
        id: String,
    },
    /// Two things with one id.
    #[error("Two {what} have the id '{id}'; give each its own")]
    DuplicateId {
        /// What they are.
        what: &'static str,
        /// The id.
        id: String,
    },
    /// An iothread that is not there.
    #[error(
        "Disk '{disk}' wants iothread '{iothread}', which does not exist; add --iothread id={iothread}"
    )]
    UnknownIothread {
        /// The disk.
        disk: String,
        /// The iothread.
        iothread: String,
    },
    /// A disk of nothing, or of two things.
    #[error(
        "Disk '{disk}' is to be either an image or a node; give path=IMAGE, or node=NAME of a --blockdev"
    )]
    DiskPlace {
        /// The disk.
        disk: String,
    },
    /// What the node of a disk has been told already.
    #[error("Disk '{disk}' is a node, whose --blockdev says how it is opened; leave out {key}")]
    DiskNodeKey {
        /// The disk.
        disk: String,
        /// The key.
        key: &'static str,
    },
    /// A number of queues that no disk can have.
    #[error("Disk '{disk}' cannot have {queues} queues; give 1 to {MAX_QUEUES}")]
    Queues {
        /// The disk.
        disk: String,
        /// The number.
        queues: u16,
    },
    /// A serial number that a guest could not read.
    #[error(
        "Serial number '{serial}' of disk '{disk}' is not 1 to {MAX_SERIAL_LEN} characters of printable ASCII"
    )]
    Serial {
        /// The disk.
        disk: String,
        /// The serial number.
        serial: String,
    },
}

impl ConfigError {
    /// Whether the user has to say something else, not to mend the system.
    pub fn is_usage(&self) -> bool {
        !matches!(self, Self::Read { .. })
    }
}

/// What an image is to be taken for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ImageFormat {
    /// What the guest sees, byte by byte.
    Raw,
    /// QEMU's copy-on-write format.
    Qcow2,
}

key_value_spec! {
    /// A disk of the guest.
    pub struct DiskSpec {
        /// Image file or block device
        #[serde(default)]
        pub path: Option<PathBuf>,
        /// In place of a path: the node of --blockdev that the guest sees
        #[serde(default)]
        pub node: Option<String>,
        /// Format of the image (raw, qcow2); raw by default
        #[serde(default)]
        pub format: Option<ImageFormat>,
        /// File that keeps the persistent bitmaps; the image's path with .bitmaps added by default, none for devices
        #[serde(default)]
        pub bitmaps: Option<PathBuf>,
        /// Name of the disk in QMP; disk0, disk1, … by default
        #[serde(default)]
        pub id: Option<String>,
        /// The guest may only read it (on, off); off by default
        #[serde(default, deserialize_with = "values::on_off")]
        pub readonly: bool,
        /// Bypass the host's page cache, O_DIRECT (on, off); off by default
        #[serde(default, deserialize_with = "values::on_off")]
        pub direct: bool,
        /// What the guest discards is freed (on, off); on by default
        #[serde(default = "values::on", deserialize_with = "values::on_off")]
        pub discard: bool,
        /// Serial number that the guest reads, up to 20 characters
        #[serde(default)]
        pub serial: Option<String>,
        /// Number of queues, 1 to 64; 1 by default
        #[serde(default = "values::one", deserialize_with = "values::count")]
        pub queues: u16,
        /// Iothread that serves it; several, as in a+b, share its queues
        #[serde(default, deserialize_with = "values::id_list")]
        pub iothread: Vec<String>,
    }
}

key_value_spec! {
    /// A thread that serves disks.
    pub struct IothreadSpec {
        /// Its name
        pub id: String,
    }
}

/// A whole guest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub struct VmSpec {
    /// Kernel to boot.
    pub kernel: Option<PathBuf>,
    /// Its initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Its command line.
    pub cmdline: Option<String>,
    /// How it is entered.
    pub boot: Option<BootProtocol>,
    /// Number of vCPUs.
    #[serde(deserialize_with = "values::cpus")]
    pub cpus: Option<u8>,
    /// Memory.
    pub memory: Option<MemorySize>,
    /// Disks, in the order the guest finds them.
    #[serde(deserialize_with = "values::disks")]
    pub disk: Vec<DiskSpec>,
    /// Objects that nodes need: groups of limits.
    #[serde(deserialize_with = "values::objects")]
    pub object: Vec<ObjectOptions>,
    /// Nodes, in their order, after the objects and before the disks.
    #[serde(deserialize_with = "values::nodes")]
    pub blockdev: Vec<BlockdevOptions>,
    /// Iothreads.
    #[serde(deserialize_with = "values::iothreads")]
    pub iothread: Vec<IothreadSpec>,
    /// Monitor sockets.
    #[serde(deserialize_with = "values::addresses")]
    pub qmp: Vec<QmpAddress>,
    /// Where headers of images may name backing files, besides their own directory.
    #[serde(deserialize_with = "values::paths")]
    pub backing_directory: Vec<PathBuf>,
    /// The serial port.
    pub serial: Option<SerialSpec>,
    /// Start without running the guest.
    pub paused: Option<bool>,
    /// What a guest's wish for a reset does.
    pub on_reboot: Option<RebootPolicy>,
    /// What a crash of the guest does.
    pub on_crash: Option<CrashPolicy>,
}

impl VmSpec {
    /// Kernel command line by default.
    pub const DEFAULT_CMDLINE: &str = "console=ttyS0";
    /// vCPUs by default.
    pub const DEFAULT_CPUS: u8 = 1;

    /// Reads a configuration file: JSON if its name ends so, else TOML.
    /// Relative paths in it are meant from where diptych runs.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.to_owned(),
            source,
        })?;
        let parse_error = |place, message: &str| ConfigError::Parse {
            path: path.to_owned(),
            place,
            message: message.lines().collect::<Vec<_>>().join(" "),
        };
        if path.extension().is_some_and(|ending| ending == "json") {
            serde_json::from_str(&text).map_err(|error| {
                let place = format!("line {}, column {}", error.line(), error.column());
                let message = error.to_string();
                // The place is said already.
                let message = message
                    .split(" at line ")
                    .next()
                    .unwrap_or_default()
                    .to_owned();
                parse_error(place, &message)
            })
        } else {
            toml::from_str(&text).map_err(|error: toml::de::Error| {
                let place = error.span().map_or_else(
                    || "somewhere".to_owned(),
                    |span| place_of(&text, span.start),
                );
                parse_error(place, error.message())
            })
        }
    }

    /// Lays `flags` over a file's values: single values override, lists add.
    pub fn overlay(self, flags: Self) -> Self {
        fn chain<T>(mut list: Vec<T>, more: Vec<T>) -> Vec<T> {
            list.extend(more);
            list
        }
        Self {
            kernel: flags.kernel.or(self.kernel),
            initrd: flags.initrd.or(self.initrd),
            cmdline: flags.cmdline.or(self.cmdline),
            boot: flags.boot.or(self.boot),
            cpus: flags.cpus.or(self.cpus),
            memory: flags.memory.or(self.memory),
            disk: chain(self.disk, flags.disk),
            object: chain(self.object, flags.object),
            blockdev: chain(self.blockdev, flags.blockdev),
            iothread: chain(self.iothread, flags.iothread),
            qmp: chain(self.qmp, flags.qmp),
            backing_directory: chain(self.backing_directory, flags.backing_directory),
            serial: flags.serial.or(self.serial),
            paused: flags.paused.or(self.paused),
            on_reboot: flags.on_reboot.or(self.on_reboot),
            on_crash: flags.on_crash.or(self.on_crash),
        }
    }

    /// Checks what can be checked without opening anything, gives each disk an
    /// id and an iothread, and lists the iothreads that are needed.
    pub fn check(&mut self) -> Result<(), ConfigError> {
        if self.kernel.is_none() {
            return Err(ConfigError::NoKernel);
        }
        let cpus = self.cpus.unwrap_or(Self::DEFAULT_CPUS);
        if !(1..=MAX_CPUS).contains(&cpus) {
            return Err(ConfigError::Cpus { cpus });
        }
        check_memory_size(self.memory.unwrap_or(MemorySize::DEFAULT).0)
            .map_err(ConfigError::Memory)?;
        if self.disk.len() > MAX_DISKS {
            return Err(ConfigError::TooManyDisks {
                count: self.disk.len(),
            });
        }
        for (index, disk) in self.disk.iter_mut().enumerate() {
            let id = disk.id.get_or_insert_with(|| format!("disk{index}"));
            let id = id.clone();
            check_disk(&id, disk.queues, disk.serial.as_deref())?;
            check_place(&id, disk)?;
            if disk.iothread.is_empty() {
                disk.iothread.push(DEFAULT_IOTHREAD.to_owned());
                if !self.iothread.iter().any(|t| t.id == DEFAULT_IOTHREAD) {
                    self.iothread.push(IothreadSpec {
                        id: DEFAULT_IOTHREAD.to_owned(),
                    });
                }
            }
        }
        check_ids(
            "disk",
            "disks",
            self.disk.iter().filter_map(|d| d.id.as_deref()),
        )?;
        check_ids(
            "iothread",
            "iothreads",
            self.iothread.iter().map(|t| t.id.as_str()),
        )?;
        for disk in &self.disk {
            for iothread in &disk.iothread {
                if !self.iothread.iter().any(|t| t.id == *iothread) {
                    return Err(ConfigError::UnknownIothread {
                        disk: disk.id.clone().unwrap_or_default(),
                        iothread: iothread.clone(),
                    });
                }
            }
        }
        Ok(())
    }
}

fn check_disk(id: &str, queues: u16, serial: Option<&str>) -> Result<(), ConfigError> {
    if id.len() > MAX_DISK_ID_LEN {
        return Err(ConfigError::LongId { id: id.to_owned() });
    }
    if !(1..=MAX_QUEUES).contains(&queues) {
        return Err(ConfigError::Queues {
            disk: id.to_owned(),
            queues,
        });
    }
    if let Some(serial) = serial
        && !((1..=MAX_SERIAL_LEN).contains(&serial.len())
            && serial.bytes().all(|byte| (0x20..0x7f).contains(&byte)))
    {
        return Err(ConfigError::Serial {
            disk: id.to_owned(),
            serial: serial.to_owned(),
        });
    }
    Ok(())
}

/// Checks that a disk is an image or a node, and that nothing is said twice of a node.
fn check_place(id: &str, disk: &DiskSpec) -> Result<(), ConfigError> {
    if disk.path.is_some() == disk.node.is_some() {
        return Err(ConfigError::DiskPlace {
            disk: id.to_owned(),
        });
    }
    let said = [
        ("format", disk.format.is_some()),
        ("bitmaps", disk.bitmaps.is_some()),
        ("direct", disk.direct),
    ];
    match said.into_iter().find(|(_, said)| *said) {
        Some((key, _)) if disk.node.is_some() => Err(ConfigError::DiskNodeKey {
            disk: id.to_owned(),
            key,
        }),
        _ => Ok(()),
    }
}

/// Checks that ids can be ids, and that no two are the same.
fn check_ids<'a>(
    what: &'static str,
    plural: &'static str,
    ids: impl Iterator<Item = &'a str>,
) -> Result<(), ConfigError> {
    let mut seen = HashSet::new();
    for id in ids {
        let well_formed = id.starts_with(|c: char| c.is_ascii_alphabetic())
            && id
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || "-._".contains(c));
        if !well_formed {
            return Err(ConfigError::BadId {
                what,
                id: id.to_owned(),
            });
        }
        if !seen.insert(id) {
            return Err(ConfigError::DuplicateId {
                what: plural,
                id: id.to_owned(),
            });
        }
    }
    Ok(())
}

/// Line and column of a byte of a text, counted from 1.
fn place_of(text: &str, offset: usize) -> String {
    let before = &text.as_bytes()[..offset.min(text.len())];
    let line = before.iter().filter(|byte| **byte == b'\n').count() + 1;
    let column = before
        .iter()
        .rev()
        .take_while(|byte| **byte != b'\n')
        .count()
        + 1;
    format!("line {line}, column {column}")
}
