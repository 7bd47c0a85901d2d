//! What a disk is made of, the features it offers, and its configuration space
//! (virtio 1.2 §5.2.3, §5.2.4).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use block::{Backend, runtime::IothreadHandle};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_ID_BYTES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

/// Unit of `sector` fields and of the capacity, whatever the block size.
pub(super) const SECTOR: u64 = 512;

/// Most ranges in one DISCARD or WRITE_ZEROES request.
pub(super) const MAX_RANGES: u32 = 16;
/// Largest range of a discard, in sectors: 1 GiB.
pub(super) const MAX_DISCARD_SECTORS: u32 = 1 << 21;
/// Largest range of zeroes, in sectors: 128 MiB, since it may have to be
/// written as data.
pub(super) const MAX_WRITE_ZEROES_SECTORS: u32 = 1 << 18;

const MAX_QUEUES: u16 = 64;
const QUEUE_SIZES: std::ops::RangeInclusive<u16> = 4..=1024;
const BLOCK_SIZES: std::ops::RangeInclusive<u32> = 512..=65536;

/// A disk of a guest.
#[derive(Clone)]
pub struct VirtioBlkConfig {
    /// Name in messages.
    pub id: String,
    /// What GET_ID answers: at most 20 bytes; may be empty.
    pub serial: String,
    /// Where its data is.
    pub backend: Arc<Backend>,
    /// The guest must not write.
    pub read_only: bool,
    /// Number of queues, 1 to 64.
    pub num_queues: u16,
    /// Largest size of each queue, a power of two from 4 to 1024.
    pub queue_size: u16,
    /// Where the queues are served: queue `i` on iothread `i % len`.
    pub iothreads: Vec<IothreadHandle>,
    /// Smallest unit of requests, in bytes: a power of two from 512 to 65536.
    pub logical_block_size: u32,
    /// Best unit of writes, in bytes: a power of two, at least the logical one.
    pub physical_block_size: u32,
    /// Whether writes are cached until a flush, unless the driver says
    /// otherwise. Else each write is durable when it ends.
    pub write_cache: bool,
    /// Offer DISCARD and WRITE_ZEROES. Not offered on a read-only disk.
    pub discard: bool,
}

impl VirtioBlkConfig {
    /// A disk with one queue of 256 entries, and blocks of 512 bytes in 4 KiB.
    pub fn new(id: &str, backend: Arc<Backend>, iothreads: Vec<IothreadHandle>) -> Self {
        Self {
            id: id.to_owned(),
            serial: String::new(),
            backend,
            read_only: false,
            num_queues: 1,
            queue_size: 256,
            iothreads,
            logical_block_size: 512,
            physical_block_size: 4096,
            write_cache: true,
            discard: true,
        }
    }

    pub(super) fn check(&self) -> Result<(), BlkConfigError> {
        let id = || self.id.clone();
        if self.iothreads.is_empty() {
            return Err(BlkConfigError::NoIothread { id: id() });
        }
        if !(1..=MAX_QUEUES).contains(&self.num_queues) {
            return Err(BlkConfigError::NumQueues {
                id: id(),
                num_queues: self.num_queues,
            });
        }
        if !QUEUE_SIZES.contains(&self.queue_size) || !self.queue_size.is_power_of_two() {
            return Err(BlkConfigError::QueueSize {
                id: id(),
                queue_size: self.queue_size,
            });
        }
        let (logical, physical) = (self.logical_block_size, self.physical_block_size);
        if ![logical, physical]
            .iter()
            .all(|size| BLOCK_SIZES.contains(size) && size.is_power_of_two())
            || physical < logical
        {
            return Err(BlkConfigError::BlockSize {
                id: id(),
                logical,
                physical,
            });
        }
        if self.serial.len() > VIRTIO_BLK_ID_BYTES as usize {
            return Err(BlkConfigError::Serial {
                id: id(),
                serial: self.serial.clone(),
            });
        }
        Ok(())
    }

    /// The features that the disk offers.
    pub(super) fn features(&self) -> u64 {
        let mut features = bit(VIRTIO_F_VERSION_1)
            | bit(VIRTIO_RING_F_INDIRECT_DESC)
            | bit(VIRTIO_RING_F_EVENT_IDX)
            | bit(VIRTIO_BLK_F_SEG_MAX)
            | bit(VIRTIO_BLK_F_BLK_SIZE)
            | bit(VIRTIO_BLK_F_TOPOLOGY)
            | bit(VIRTIO_BLK_F_FLUSH)
            | bit(VIRTIO_BLK_F_CONFIG_WCE);
        if self.num_queues > 1 {
            features |= bit(VIRTIO_BLK_F_MQ);
        }
        if self.read_only {
            features |= bit(VIRTIO_BLK_F_RO);
        } else if self.discard {
            features |= bit(VIRTIO_BLK_F_DISCARD) | bit(VIRTIO_BLK_F_WRITE_ZEROES);
        }
        features
    }
}

/// A disk that cannot be.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum BlkConfigError {
    /// No iothread to serve its queues.
    #[error("Disk '{id}' has no iothread to run on")]
    NoIothread {
        /// The disk.
        id: String,
    },
    /// Wrong number of queues.
    #[error("Disk '{id}' cannot have {num_queues} queues: use 1 to {MAX_QUEUES}")]
    NumQueues {
        /// The disk.
        id: String,
        /// What was asked for.
        num_queues: u16,
    },
    /// Wrong size of queues.
    #[error(
        "Disk '{id}' cannot have queues of {queue_size} entries: use a power of two from {} to {}",
        QUEUE_SIZES.start(), QUEUE_SIZES.end()
    )]
    QueueSize {
        /// The disk.
        id: String,
        /// What was asked for.
        queue_size: u16,
    },
    /// Wrong block sizes.
    #[error(
        "Disk '{id}' cannot have logical blocks of {logical} and physical blocks of {physical} \
         bytes: use powers of two from {} to {}, the logical one not larger",
        BLOCK_SIZES.start(), BLOCK_SIZES.end()
    )]
    BlockSize {
        /// The disk.
        id: String,
        /// Logical block size in bytes.
        logical: u32,
        /// Physical block size in bytes.
        physical: u32,
    },
    /// The serial number is too long.
    #[error("Serial number '{serial}' of disk '{id}' is longer than {VIRTIO_BLK_ID_BYTES} bytes")]
    Serial {
        /// The disk.
        id: String,
        /// What was asked for.
        serial: String,
    },
}

/// The configuration space: what is constant, and what changes while the guest
/// runs.
pub(super) struct ConfigSpace {
    /// In bytes, a multiple of the logical block size. Own synchronisation:
    /// written at reset and configuration change.
    capacity: AtomicU64,
    /// The `writeback` field. Own synchronisation: written by the driver and when
    /// its features are accepted (under the transport's lock), and at reset.
    writeback: AtomicBool,
}

/// Offset and length of the fields that the driver may write.
const WRITEBACK_OFFSET: u64 = 32;
const CONFIG_LEN: usize = 60;

impl ConfigSpace {
    pub(super) fn new(config: &VirtioBlkConfig) -> Self {
        let space = Self {
            capacity: AtomicU64::new(0),
            writeback: AtomicBool::new(config.write_cache),
        };
        space.refresh_capacity(config);
        space
    }

    /// Takes over the backend's size. Returns whether it changed.
    pub(super) fn refresh_capacity(&self, config: &VirtioBlkConfig) -> bool {
        let block = u64::from(config.logical_block_size);
        let capacity = config.backend.size() / block * block;
        self.capacity.swap(capacity, Ordering::AcqRel) != capacity
    }

    /// In bytes.
    pub(super) fn capacity(&self) -> u64 {
        self.capacity.load(Ordering::Acquire)
    }

    pub(super) fn reset(&self, config: &VirtioBlkConfig) {
        self.writeback.store(config.write_cache, Ordering::Release);
        self.refresh_capacity(config);
    }

    /// A driver that knows of the field and cannot flush finds it 0 (virtio 1.2
    /// §5.2.5.2): else what it writes would never be durable.
    pub(super) fn features_accepted(&self, features: u64) {
        if features & bit(VIRTIO_BLK_F_CONFIG_WCE) != 0 && features & bit(VIRTIO_BLK_F_FLUSH) == 0 {
            self.writeback.store(false, Ordering::Release);
        }
    }

    /// Whether writes may stay in a cache until the driver flushes: what the
    /// `writeback` field says if the driver knows of it, else whether the driver
    /// can flush (virtio 1.2 §5.2.5, §5.2.6.2).
    pub(super) fn writes_may_be_cached(&self, features: u64) -> bool {
        if features & bit(VIRTIO_BLK_F_CONFIG_WCE) != 0 {
            self.writeback.load(Ordering::Acquire)
        } else {
            features & bit(VIRTIO_BLK_F_FLUSH) != 0
        }
    }

    pub(super) fn read(&self, config: &VirtioBlkConfig, offset: u64, data: &mut [u8]) {
        let bytes = self.bytes(config);
        let from = usize::try_from(offset)
            .unwrap_or(CONFIG_LEN)
            .min(CONFIG_LEN);
        let len = data.len().min(CONFIG_LEN - from);
        data.fill(0);
        data[..len].copy_from_slice(&bytes[from..from + len]);
    }

    pub(super) fn write(&self, offset: u64, data: &[u8], features: u64) {
        if let (WRITEBACK_OFFSET, [value @ 0..=1]) = (offset, data)
            && features & bit(VIRTIO_BLK_F_CONFIG_WCE) != 0
        {
            self.writeback.store(*value == 1, Ordering::Release);
        }
    }

    /// `struct virtio_blk_config` (virtio 1.2 §5.2.4).
    fn bytes(&self, config: &VirtioBlkConfig) -> [u8; CONFIG_LEN] {
        let logical = config.logical_block_size;
        let physical = config.physical_block_size;
        let limits = config.backend.root().limits();
        let unmap_unit = limits.zero_alignment.max(logical);
        let optimal_io = limits.cluster_size.unwrap_or(0) / logical;

        let mut bytes = [0; CONFIG_LEN];
        let mut put = |offset: usize, field: &[u8]| {
            bytes[offset..offset + field.len()].copy_from_slice(field);
        };
        put(0, &(self.capacity() / SECTOR).to_le_bytes());
        put(12, &seg_max(config.queue_size).to_le_bytes());
        put(20, &logical.to_le_bytes());
        // Topology: exponent, alignment offset, minimal and optimal unit.
        put(24, &[(physical / logical).trailing_zeros() as u8, 0]);
        put(26, &((physical / logical) as u16).to_le_bytes());
        put(28, &optimal_io.to_le_bytes());
        put(32, &[u8::from(self.writeback.load(Ordering::Acquire)), 0]);
        put(34, &config.num_queues.to_le_bytes());
        if !config.read_only && config.discard {
            put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
            put(40, &MAX_RANGES.to_le_bytes());
            put(44, &(unmap_unit / SECTOR as u32).to_le_bytes());
            put(48, &MAX_WRITE_ZEROES_SECTORS.to_le_bytes());
            put(52, &MAX_RANGES.to_le_bytes());
            put(56, &[1]);
        }
        bytes
    }
}

/// Data segments that fit a chain beside header and status.
fn seg_max(queue_size: u16) -> u32 {
    u32::from(queue_size) - 2
}

pub(super) const fn bit(feature: u32) -> u64 {
    1 << feature
}
