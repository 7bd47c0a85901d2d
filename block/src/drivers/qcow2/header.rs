//! The header of a qcow2 image: what is checked before `imago` sees the image.
//!
//! The field names and offsets are those of the format's specification
//! (QEMU's docs/interop/qcow2.rst). Images are hostile: each number is checked
//! against the file before anything is allocated or followed by it.

use crate::driver::ImageDetails;
use crate::drivers::OpenError;
use crate::options::{EncryptOptions, Qcow2Options};

/// Bytes that every header has.
const V2_LEN: usize = 72;
/// Bytes of a version 3 header without optional fields.
const V3_LEN: usize = 104;
/// Bytes that tell how large the rest is.
pub(super) const FIRST_READ: usize = 512;

const INCOMPATIBLE_DIRTY: u64 = 1 << 0;
const INCOMPATIBLE_CORRUPT: u64 = 1 << 1;
const INCOMPATIBLE_DATA_FILE: u64 = 1 << 2;
const INCOMPATIBLE_COMPRESSION: u64 = 1 << 3;
const INCOMPATIBLE_EXTENDED_L2: u64 = 1 << 4;
/// Bits that are left out when an image is only read: its data can be trusted as
/// far as anything of it can.
pub(super) const HARMLESS_TO_READERS: u64 = INCOMPATIBLE_DIRTY | INCOMPATIBLE_CORRUPT;

const COMPATIBLE_LAZY_REFCOUNTS: u64 = 1 << 0;

const AUTOCLEAR_BITMAPS: u64 = 1 << 0;
const AUTOCLEAR_RAW_DATA_FILE: u64 = 1 << 1;

const EXTENSION_END: u32 = 0;
const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXTENSION_FEATURE_NAMES: u32 = 0x6803_f857;
const EXTENSION_DATA_FILE: u32 = 0x4441_5441;
/// One entry of the feature name table.
const FEATURE_NAME_LEN: u32 = 48;
/// More header extensions than any program writes.
const MAX_EXTENSIONS: usize = 256;

/// QEMU's limit: 32 MiB.
pub(super) const MAX_L1_ENTRIES: u64 = 4 << 20;
/// QEMU's limit: 8 MiB.
const MAX_REFTABLE_BYTES: u64 = 8 << 20;
/// Longest name of a backing file.
const MAX_BACKING_NAME: u32 = 1023;
/// More internal snapshots than that are no image of ours (QEMU's limit).
const MAX_SNAPSHOTS: u32 = 65536;

/// Why a file is not opened as qcow2. Texts that clients may know are QEMU's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// The magic number is missing.
    #[error("Image is not in qcow2 format")]
    NotQcow2,
    /// A version other than 2 and 3.
    #[error("Unsupported qcow2 version {0}")]
    Version(u32),
    /// Clusters smaller than 512 bytes or larger than 2 MiB.
    #[error("Unsupported cluster size: 2^{0}")]
    ClusterSize(u32),
    /// The header's own length is too small.
    #[error("qcow2 header too short")]
    TooShort,
    /// The header's own length is larger than a cluster.
    #[error("qcow2 header exceeds cluster size")]
    TooLong,
    /// A header extension reaches out of the first cluster.
    #[error("Header extension too large")]
    Extension,
    /// The extensions make no sense.
    #[error("Invalid header extensions: {0}")]
    BadExtension(&'static str),
    /// Reference counts wider than 64 bits.
    #[error("Reference count entry width too large; may not exceed 64 bits")]
    RefcountWidth,
    /// The first level table is larger than any image needs.
    #[error("Active L1 table too large")]
    L1TooLarge,
    /// The first level table does not cover the disk.
    #[error("L1 table is too small")]
    L1TooSmall,
    /// The first level table is not at a cluster, or not in the file.
    #[error("Active L1 table offset invalid")]
    L1Offset,
    /// There is no reference count table.
    #[error("Image does not contain a reference count table")]
    NoReftable,
    /// The reference count table is larger than any image needs.
    #[error("Reference count table too large")]
    ReftableTooLarge,
    /// The reference count table is not at a cluster, or not in the file.
    #[error("Reference count table offset invalid")]
    ReftableOffset,
    /// More snapshots than there can be.
    #[error("Snapshot table too large")]
    Snapshots,
    /// The disk is larger than any can be.
    #[error("Disk of {0} bytes is too large")]
    Size(u64),
    /// The backing file's name is not where it must be.
    #[error("Invalid backing file offset")]
    BackingOffset,
    /// The backing file's name is too long.
    #[error("Backing file name too long")]
    BackingName,
    /// A name in the header is no text.
    #[error("The name of the {0} in the header is not UTF-8")]
    NotText(&'static str),
    /// The content is encrypted.
    #[error(
        "Encrypted images (method {0}) are not supported: decrypt it into a new image with \
         'qemu-img convert'"
    )]
    Encrypted(u32),
    /// The image was not closed by who wrote it last.
    #[error(
        "The image is marked dirty: its reference counts may be wrong. Repair it with \
         'qemu-img check -r all', or open it with 'read-only'"
    )]
    Dirty,
    /// The image was found to be corrupt.
    #[error(
        "qcow2: Image is corrupt; cannot be opened read/write. Repair it with \
         'qemu-img check -r all', or open it with 'read-only'"
    )]
    Corrupt,
    /// Compressed clusters are not zlib's.
    #[error(
        "Compression types other than zlib are not supported: convert it with 'qemu-img convert \
         -O qcow2'"
    )]
    Compression,
    /// Clusters have subclusters.
    #[error(
        "Extended L2 entries are not supported: convert it with 'qemu-img convert -O qcow2 -o \
         extended_l2=off'"
    )]
    ExtendedL2,
    /// Features that nobody here knows.
    #[error("Unsupported qcow2 feature(s): Unknown incompatible feature: {0:x}")]
    UnknownFeatures(u64),
    /// Writing would make bitmaps wrong.
    #[error(
        "The image holds persistent bitmaps, which writes would make wrong: open it with \
         'read-only', or remove them with 'qemu-img bitmap --remove'"
    )]
    Bitmaps,
    /// Writing would make the data file differ from the image.
    #[error("Images with 'data_file_raw' are not supported for writing: open it with 'read-only'")]
    RawDataFile,
}

/// What is known of an image from its header, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub(super) version: u32,
    /// Logarithm of the cluster size in bytes: 9 to 21.
    pub(super) cluster_bits: u32,
    /// Size of the disk in bytes.
    pub(super) size: u64,
    /// Where the first level table is, in bytes.
    pub(super) l1_offset: u64,
    /// Its entries.
    pub(super) l1_entries: u64,
    /// Where the reference count table is, in bytes.
    pub(super) reftable_offset: u64,
    /// Its length in bytes.
    pub(super) reftable_len: u64,
    /// Logarithm of the bits of a reference count: 0 to 6.
    pub(super) refcount_order: u32,
    /// Number of internal snapshots.
    pub(super) snapshots: u32,
    incompatible: u64,
    compatible: u64,
    autoclear: u64,
    crypt_method: u32,
    /// Name of the backing file.
    pub(crate) backing: Option<String>,
    /// Its format.
    pub(crate) backing_format: Option<String>,
    /// Name of the file with the data.
    pub(crate) data_file: Option<String>,
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_be_bytes(word)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_be_bytes(word)
}

/// Whether the bytes begin as a qcow2 image does.
pub(crate) fn is_qcow2(bytes: &[u8]) -> bool {
    bytes.starts_with(b"QFI\xfb")
}

/// Length of the cluster that the header is in, as its first [`FIRST_READ`] bytes
/// say.
pub(super) fn cluster_len(first: &[u8]) -> Result<usize, HeaderError> {
    if first.len() < V3_LEN || !is_qcow2(first) {
        return Err(HeaderError::NotQcow2);
    }
    let version = u32_at(first, 4);
    if !(2..=3).contains(&version) {
        return Err(HeaderError::Version(version));
    }
    let cluster_bits = u32_at(first, 20);
    if !(9..=21).contains(&cluster_bits) {
        return Err(HeaderError::ClusterSize(cluster_bits));
    }
    Ok(1 << cluster_bits)
}

/// Where the first level table and the reference count table are, as the first
/// sector of the file says: offset and length in bytes.
pub(super) fn tables(first: &[u8]) -> (TableAt, TableAt) {
    let cluster_bits = u32_at(first, 20);
    let l1 = TableAt {
        offset: u64_at(first, 40),
        len: u64::from(u32_at(first, 36)) * 8,
    };
    let reftable = TableAt {
        offset: u64_at(first, 48),
        len: u64::from(u32_at(first, 56)) << cluster_bits.min(21),
    };
    (l1, reftable)
}

/// Place of a table in the file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct TableAt {
    /// First byte.
    pub(super) offset: u64,
    /// Bytes.
    pub(super) len: u64,
}

impl TableAt {
    /// Whether it overlaps `len` bytes at `offset`.
    pub(super) fn touches(&self, offset: u64, len: u64) -> bool {
        offset < self.offset.saturating_add(self.len) && self.offset < offset.saturating_add(len)
    }
}

/// See [`Header::check_options`]; `cluster_size` in bytes.
pub(super) fn check_options(
    options: &Qcow2Options,
    version: u32,
    cluster_size: u64,
) -> Result<(), OpenError> {
    let fits = |size: u64| size.is_power_of_two() && (512..=cluster_size).contains(&size);
    if options.l2_cache_entry_size.is_some_and(|size| !fits(size)) {
        return Err(OpenError::L2CacheEntrySize { cluster_size });
    }
    if options.lazy_refcounts && version < 3 {
        return Err(OpenError::LazyRefcounts);
    }
    match &options.encrypt {
        // One that is encrypted is not opened.
        Some(said) => Err(OpenError::NotEncrypted(said.format)),
        None => Ok(()),
    }
}

impl Header {
    /// Reads a header from the first cluster of a file of `file_len` bytes.
    pub(super) fn parse(cluster: &[u8], file_len: u64) -> Result<Self, HeaderError> {
        let cluster_size = cluster_len(cluster)?;
        let version = u32_at(cluster, 4);
        let cluster_bits = u32_at(cluster, 20);
        let (mut incompatible, mut compatible, mut autoclear) = (0, 0, 0);
        let mut refcount_order = 4;
        let mut header_len = V2_LEN;
        if version >= 3 {
            incompatible = u64_at(cluster, 72);
            compatible = u64_at(cluster, 80);
            autoclear = u64_at(cluster, 88);
            refcount_order = u32_at(cluster, 96);
            header_len = u32_at(cluster, 100) as usize;
            if header_len < V3_LEN {
                return Err(HeaderError::TooShort);
            }
            if header_len > cluster_size {
                return Err(HeaderError::TooLong);
            }
        }
        if refcount_order > 6 {
            return Err(HeaderError::RefcountWidth);
        }
        let mut header = Self {
            version,
            cluster_bits,
            size: u64_at(cluster, 24),
            l1_offset: u64_at(cluster, 40),
            l1_entries: u32_at(cluster, 36).into(),
            reftable_offset: u64_at(cluster, 48),
            reftable_len: u64::from(u32_at(cluster, 56)) << cluster_bits,
            refcount_order,
            snapshots: u32_at(cluster, 60),
            incompatible,
            compatible,
            autoclear,
            crypt_method: u32_at(cluster, 32),
            backing: None,
            backing_format: None,
            data_file: None,
        };
        header.check_tables(file_len)?;
        header.backing = backing_name(cluster, cluster_size)?;
        header.read_extensions(cluster, header_len)?;
        Ok(header)
    }

    /// Refuses options that the image does not allow.
    pub(crate) fn check_options(&self, options: &Qcow2Options) -> Result<(), OpenError> {
        check_options(options, self.version, 1 << self.cluster_bits)
    }

    fn check_tables(&self, file_len: u64) -> Result<(), HeaderError> {
        let cluster_size = 1 << self.cluster_bits;
        let inside = |offset: u64, len: u64| {
            offset.is_multiple_of(cluster_size)
                && offset.checked_add(len).is_some_and(|end| {
                    // The last cluster of a file may be cut off.
                    end <= file_len.next_multiple_of(cluster_size)
                })
        };
        // As large as an offset can be.
        if self.size > 1 << 61 {
            return Err(HeaderError::Size(self.size));
        }
        if self.l1_entries > MAX_L1_ENTRIES {
            return Err(HeaderError::L1TooLarge);
        }
        // A table of one cluster maps cluster_size / 8 clusters.
        let per_entry_bits = 2 * self.cluster_bits - 3;
        if self.size.div_ceil(1 << per_entry_bits) > self.l1_entries {
            return Err(HeaderError::L1TooSmall);
        }
        if !inside(self.l1_offset, self.l1_entries * 8) {
            return Err(HeaderError::L1Offset);
        }
        if self.reftable_len == 0 {
            return Err(HeaderError::NoReftable);
        }
        if self.reftable_len > MAX_REFTABLE_BYTES {
            return Err(HeaderError::ReftableTooLarge);
        }
        if self.reftable_offset == 0 || !inside(self.reftable_offset, self.reftable_len) {
            return Err(HeaderError::ReftableOffset);
        }
        if self.snapshots > MAX_SNAPSHOTS {
            return Err(HeaderError::Snapshots);
        }
        Ok(())
    }

    fn read_extensions(&mut self, cluster: &[u8], start: usize) -> Result<(), HeaderError> {
        let text = |data: &[u8], what| {
            String::from_utf8(data.to_vec()).map_err(|_| HeaderError::NotText(what))
        };
        let mut at = start;
        for _ in 0..MAX_EXTENSIONS {
            if at + 8 > cluster.len() {
                // A version 2 image may end its list by the end of the header.
                return match self.version {
                    2 => Ok(()),
                    _ => Err(HeaderError::Extension),
                };
            }
            let (kind, len) = (u32_at(cluster, at), u32_at(cluster, at + 4));
            if kind == EXTENSION_END {
                return Ok(());
            }
            at += 8;
            let data = at
                .checked_add(len as usize)
                .and_then(|end| cluster.get(at..end))
                .ok_or(HeaderError::Extension)?;
            match kind {
                EXTENSION_BACKING_FORMAT => {
                    self.backing_format = Some(text(data, "backing file's format")?);
                }
                EXTENSION_DATA_FILE => self.data_file = Some(text(data, "data file")?),
                EXTENSION_FEATURE_NAMES if len % FEATURE_NAME_LEN != 0 => {
                    return Err(HeaderError::BadExtension("feature name table is cut off"));
                }
                _ => {}
            }
            at += (len as usize).next_multiple_of(8);
        }
        Err(HeaderError::BadExtension("too many"))
    }

    /// Refuses what is said wrongly of an image that is encrypted: before it is refused.
    pub(super) fn check_encryption(&self, said: &EncryptOptions) -> Result<(), OpenError> {
        let found = match self.crypt_method {
            1 => "aes",
            2 => "luks",
            _ => return Ok(()),
        };
        match &said.key_secret {
            _ if found != said.format => Err(OpenError::OtherEncryption {
                found,
                said: said.format,
            }),
            Some(id) => Err(OpenError::NoSecret(id.clone())),
            None => Ok(()),
        }
    }

    /// Whether an image with this header can be served. `read_only`: it is not to
    /// be written.
    pub(super) fn check_features(&self, read_only: bool) -> Result<(), HeaderError> {
        if self.crypt_method != 0 {
            return Err(HeaderError::Encrypted(self.crypt_method));
        }
        if self.incompatible & INCOMPATIBLE_COMPRESSION != 0 {
            return Err(HeaderError::Compression);
        }
        if self.incompatible & INCOMPATIBLE_EXTENDED_L2 != 0 {
            return Err(HeaderError::ExtendedL2);
        }
        let unknown = self.incompatible & !(HARMLESS_TO_READERS | INCOMPATIBLE_DATA_FILE);
        if unknown != 0 {
            return Err(HeaderError::UnknownFeatures(unknown));
        }
        if read_only {
            return Ok(());
        }
        if self.incompatible & INCOMPATIBLE_CORRUPT != 0 {
            return Err(HeaderError::Corrupt);
        }
        if self.incompatible & INCOMPATIBLE_DIRTY != 0 {
            return Err(HeaderError::Dirty);
        }
        // Bits that nobody knows may be cleared by who writes (that is what they are
        // for), and `imago` clears all. What is known must stay true.
        if self.autoclear & AUTOCLEAR_BITMAPS != 0 {
            return Err(HeaderError::Bitmaps);
        }
        if self.autoclear & AUTOCLEAR_RAW_DATA_FILE != 0 {
            return Err(HeaderError::RawDataFile);
        }
        Ok(())
    }

    /// What is told of the image.
    pub(super) fn details(&self) -> ImageDetails {
        ImageDetails {
            version: self.version,
            refcount_bits: 1 << self.refcount_order,
            lazy_refcounts: self.compatible & COMPATIBLE_LAZY_REFCOUNTS != 0,
            corrupt: self.incompatible & INCOMPATIBLE_CORRUPT != 0,
            dirty: self.incompatible & INCOMPATIBLE_DIRTY != 0,
            data_file: self.data_file.clone(),
            data_file_raw: self.autoclear & AUTOCLEAR_RAW_DATA_FILE != 0,
            backing_filename: self.backing.clone(),
            backing_format: self.backing_format.clone(),
        }
    }

    /// Whether the data is in a file of its own.
    pub(crate) fn needs_data_file(&self) -> bool {
        self.incompatible & INCOMPATIBLE_DATA_FILE != 0
    }
}

fn backing_name(cluster: &[u8], cluster_size: usize) -> Result<Option<String>, HeaderError> {
    let (offset, len) = (u64_at(cluster, 8), u32_at(cluster, 16));
    if offset == 0 {
        return Ok(None);
    }
    if len > MAX_BACKING_NAME {
        return Err(HeaderError::BackingName);
    }
    let end = offset
        .checked_add(len.into())
        .filter(|end| *end < cluster_size as u64)
        .ok_or(HeaderError::BackingOffset)?;
    let name = cluster
        .get(offset as usize..end as usize)
        .ok_or(HeaderError::BackingOffset)?;
    if name.is_empty() {
        return Ok(None);
    }
    String::from_utf8(name.to_vec())
        .map(Some)
        .map_err(|_| HeaderError::NotText("backing file"))
}
